"""Images as rows: what is read of them, what training alters, and a line for each that cannot be used."""

from __future__ import annotations

import io
import json
import re
import sys
import tarfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, DatasetDict, Features
from datasets import Image as ImageFeature
from PIL import Image
from transformers import ViTConfig, ViTImageProcessorPil

from llm_local.config import Config, ConfigError, from_flat
from llm_local.data import image_sources
from llm_local.data.digits import digits
from llm_local.data.feed import BatchSize, Feed, RowUse
from llm_local.data.image_files import UnreadableImage, header_problem, read_image
from llm_local.data.image_processor import Pixels, crop_box, load_processor, new_processor, pixel_shape
from llm_local.data.objects import with_objects
from llm_local.data.sets import class_names, data_problems, load_processing_class, prepare_all
from llm_local.flags import DataArguments
from llm_local.links.packet import EVAL, TRAIN
from llm_local.place import Place
from llm_local.problems import data_flag_problems, text_flag_problems

Settings = Callable[..., Config]
MODEL = ViTConfig(image_size=16, num_channels=3)


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    def make(**flags: Any) -> Config:
        return from_flat({"task": "image-classification", "cache_dir": str(tmp_path / "cache"), **flags})

    return make


def picture(number: int = 0, mode: str = "RGB", size: tuple[int, int] = (12, 10)) -> Image.Image:
    values = np.random.default_rng(number).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(values).convert(mode)


def encoded(image: Image.Image, kind: str = "PNG", **options: Any) -> dict[str, Any]:
    written = io.BytesIO()
    image.save(written, kind, **options)
    return {"bytes": written.getvalue(), "path": None}


def folder(path: Path, classes: str = "cat dog", images: int = 6) -> Path:
    for n, name in enumerate(classes.split()):
        (path / name).mkdir(parents=True, exist_ok=True)
        for number in range(images):
            picture(100 * n + number).save(path / name / f"{number}.png")
    return path


def table(images: int = 10, **columns: Any) -> Dataset:
    labels = ClassLabel(names=["cat", "dog"])
    rows = {"image": [encoded(picture(n)) for n in range(images)], "label": [n % 2 for n in range(images)]} | columns
    features = Features({"image": ImageFeature(), "label": labels})
    return Dataset.from_dict(rows, features=features if not columns else None).cast_column("image", ImageFeature())


def asked(config: Config, number: int = 0, rows: int = 8) -> tuple[torch.Tensor, torch.Tensor]:
    """A batch of training images as a model sees them, and their labels."""
    data = prepare_all(config, None)
    ask = data.asker(config, load_processing_class(config, MODEL))
    assert ask is not None
    parts = ask({"input_ids": data.train.batch(number, rows)}, list(range(rows)))
    return parts["pixel_values"], parts["labels"]


# --- sources


def test_a_folder_of_classes(settings: Settings, tmp_path: Path):
    config = settings(train_dir=str(folder(tmp_path / "train")), random_crop_scale=1.0, horizontal_flip=False)
    assert data_problems(config) == []
    assert class_names(config) == ("cat", "dog")
    data = prepare_all(config, None)
    assert [source.describe() for source in data.sources] == [
        f"train_dir={tmp_path / 'train'}: 11 images of 2 classes"
    ], "one in twenty is held out"
    assert data.counts()["validation (validation)"] == (1, 2)
    pixels, labels = asked(config, rows=11)
    assert pixels.shape == (11, 3, 16, 16)
    assert labels.shape == (11, 1)
    processor = new_processor(MODEL)
    for n, name in enumerate(("cat", "dog")):
        files = [Image.open(tmp_path / "train" / name / f"{number}.png") for number in range(6)]
        theirs = Pixels(processor, 1.0, False).as_they_are([file.convert("RGB") for file in files])
        found = [any(torch.equal(mine, each) for each in theirs) for mine in pixels]
        assert found == [int(label) == n for label in labels]


def test_a_start_opens_its_folders_once(settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    opened, really = [], image_sources.load_dataset
    monkeypatch.setattr(image_sources, "load_dataset", lambda *a, **b: opened.append(a) or really(*a, **b))
    config = settings(train_dir=str(folder(tmp_path / "train")))
    for seen in (("cat", "dog"), ("cat", "dog", "owl")):
        assert data_problems(config) == []
        assert class_names(config) == seen
        assert prepare_all(replace(config, train=replace(config.train, max_steps=7)), None).counts()
        folder(tmp_path / "train", "cat dog owl")
    assert len(opened) == 2


def test_validation_is_the_folder_that_is_given_or_the_data_sets_own(settings: Settings, tmp_path: Path):
    train, held = folder(tmp_path / "train"), folder(tmp_path / "held [1]", "dog")
    data = prepare_all(settings(train_dir=str(train), validation_dir=str(held)), None)
    assert data.counts() == {f"train_dir={train}": (12, 2), "validation (validation)": (6, 2)}
    assert data.images is not None
    assert set(data.images.validation["validation"][0].labels) == {1}, "by name, not by place"
    for own in ("validation", "test"):
        DatasetDict({"train": table(8), own: table(4), "more": table(2)}).save_to_disk(tmp_path / own)
        counts = prepare_all(settings(dataset_name=str(tmp_path / own)), None).counts()
        assert [count for count, _ in counts.values()] == [8, 4]


@pytest.mark.parametrize("kind", ["parquet", "saved", "object", "pairs", "mixture"])
def test_tables_and_objects(settings: Settings, tmp_path: Path, kind: str):
    rows, flags, given = table(20), {"random_crop_scale": 1.0, "horizontal_flip": False}, {}
    if kind == "parquet":
        rows.to_parquet(tmp_path / "a.parquet")
        flags["train_file"] = str(tmp_path / "a.parquet")
    elif kind == "saved":
        rows.save_to_disk(tmp_path / "saved")
        flags["dataset_name"] = str(tmp_path / "saved")
    elif kind == "mixture":
        rows.save_to_disk(tmp_path / "saved")
        source = {"source": str(tmp_path / "saved"), "weight": 3}
        other = {"source": str(folder(tmp_path / "other", "dog owl"))}
        (tmp_path / "mixture.yaml").write_text(json.dumps([source, other]))
        flags["data_mixture"] = str(tmp_path / "mixture.yaml")
    else:
        pairs = [(row["image"], row["label"]) for row in rows]
        given = {"train_dataset": rows if kind == "object" else pairs}
    config = with_objects(settings(**flags), **given)
    assert data_problems(config) == []
    names = {"pairs": ("0", "1"), "mixture": ("cat", "dog", "owl")}
    assert class_names(config) == names.get(kind, ("cat", "dog"))
    pixels, labels = asked(config)
    assert pixels.shape == (8, 3, 16, 16)
    assert labels.max() < 3


def repository(path: Path, kind: str) -> dict[str, Any]:
    """A data set as git clones it from the hub, with 12 images to train on and 4 to test; flags for its columns."""
    path.mkdir()
    if kind == "folders":
        folder(path / "train")
        folder(path / "test", images=2)
        (path / ".gitattributes").touch()
        return {}
    parts = {"train": table(12), "test": table(4)}
    if kind == "parquet":
        files = [{"split": name, "path": f"data/{name}-*"} for name in parts]
        card = {"configs": [{"config_name": "plain", "data_files": files}]}
        (path / "data").mkdir()
        for name, rows in parts.items():
            rows.rename_column("image", "img").to_parquet(path / f"data/{name}-00000-of-00001.parquet")
        (path / "README.md").write_text(f"---\n{json.dumps(card)}\n---\n# Cats and dogs\n")
        return {"image_column_name": "img"}
    (path / "README.md").touch()
    for name, rows in parts.items():
        with tarfile.open(path / f"{name}-0000.tar", "w") as shard:
            for n, row in enumerate(rows.cast_column("image", ImageFeature(decode=False))):
                for suffix, content in (("png", row["image"]["bytes"]), ("cls", str(row["label"]).encode())):
                    member = tarfile.TarInfo(f"{n:04d}.{suffix}")
                    member.size = len(content)
                    shard.addfile(member, io.BytesIO(content))
    return {"image_column_name": "png", "label_column_name": "cls"}


@pytest.mark.parametrize(("kind", "place"), [("parquet", "json"), ("folders", "./dogs"), ("webdataset", "pets")])
def test_a_clone_of_a_data_set_of_the_hub(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, place: str
):
    """Read as it would be from there; also where it is called as a reader of `datasets` is, json."""
    monkeypatch.chdir(tmp_path)
    config = settings(dataset_name=place, **repository(Path(place), kind))
    assert data_problems(config) == []
    assert class_names(config) == (("0", "1") if kind == "webdataset" else ("cat", "dog"))
    data = prepare_all(config, None)
    assert [count for count, _ in data.counts().values()] == [12, 4], "its own test split"
    assert [source.title for source in data.sources] == [Path(place).name]
    pixels, labels = asked(config)
    assert pixels.shape == (8, 3, 16, 16)
    assert {*labels.flatten().tolist()} == {0, 1}


def test_a_clone_without_a_part_of_its_rows(settings: Settings, tmp_path: Path):
    repository(tmp_path / "clone", "parquet")
    splits = [{"name": name, "num_bytes": 1, "num_examples": 99} for name in ("train", "test")]
    (tmp_path / "clone/README.md").write_text(f"---\n{json.dumps({'dataset_info': {'splits': splits}})}\n---\n")
    said = one_problem(settings(dataset_name=str(tmp_path / "clone")))
    assert f"dataset_name={tmp_path / 'clone'} cannot be loaded (" in said
    assert "num_examples=99" in said
    (tmp_path / "clone").rename(tmp_path / "clone [1]")
    said = one_problem(settings(dataset_name=str(tmp_path / "clone [1]")))
    assert said.endswith("put files of one kind there; `datasets` takes brackets in its path for a pattern")


def test_labels_may_be_names_or_numbers(settings: Settings, tmp_path: Path):
    for n, labels in enumerate((["b", "a"], [7, 3], [True, False])):
        table(2, kind=labels * 1).remove_columns("label").to_parquet(tmp_path / f"{n}.parquet")
        config = settings(train_file=str(tmp_path / f"{n}.parquet"), label_column_name="kind")
        assert class_names(config) == tuple(map(str, sorted(labels)))


def test_the_digits(settings: Settings, monkeypatch: pytest.MonkeyPatch):
    config = settings(dataset_name="digits", validation_split_percentage=20)
    assert prepare_all(config, None).counts() == {
        "dataset_name=digits": (1438, 10),
        "validation (validation)": (359, 10),
    }
    assert data_problems(settings(dataset_name="digits", task="causal-lm")) == [
        "dataset_name=digits are images; set task=image-classification, or name another data set"
    ]
    plain = Pixels.of(new_processor(ViTConfig(image_size=8, num_channels=1)), config.data)
    image = digits()[0]["image"]
    assert torch.equal(plain.altered([image], [1]), plain.as_they_are([image])), "a digit is neither mirrored nor cut"
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    assert data_problems(config) == ["dataset_name=digits needs scikit-learn; pip install 'llm_local[digits]'"]


# --- what a model is asked


def test_what_an_image_becomes_does_not_depend_on_the_layout(settings: Settings, tmp_path: Path):
    config = settings(train_dir=str(folder(tmp_path / "train")), validation_dir=str(folder(tmp_path / "held")))
    data = prepare_all(config, None)
    ask = data.asker(config, load_processing_class(config, MODEL))
    whole: dict[tuple[int, int, int], torch.Tensor] = {}
    for kind in (TRAIN, EVAL):
        for step in (1, 2, 3):
            for replicas, size in ((1, 12), (1, 4), (2, 3), (3, 2)):
                count = 12 // replicas // size
                for replica in range(replicas):
                    validation, place = [data.validation[0].sequences], Place(replica, (replicas,))
                    use = RowUse(config.task.name, ask, row_tokens=5)
                    feed = Feed(data.train, validation, place, BatchSize(size, count, count), use=use)
                    for index in range(count):
                        packet = feed(kind, step, index)
                        assert packet.weight == 1
                        assert packet.num_tokens == 5 * size
                        assert packet.pixel_values is not None
                        assert packet.labels is not None
                        for n in range(size):
                            key = (kind, step, (index * size + n) * replicas + replica)
                            row = torch.cat([packet.pixel_values[n].flatten(), packet.labels[n].float()])
                            assert torch.equal(whole.setdefault(key, row), row)
    same = [torch.equal(whole[EVAL, 1, n], whole[EVAL, 3, n]) for n in range(12)]
    assert all(same), "an evaluation sees the same each time"
    epochs = [{tuple(whole[TRAIN, step, n].tolist()) for n in range(12)} for step in (1, 2)]
    assert not epochs[0] & epochs[1], "each pass cuts out other parts"
    row = Feed(data.train, [], Place(0, (1,)), BatchSize(4, 1, 0), use=RowUse(config.task.name, ask))(2, 1, 0)
    assert row.pixel_values is not None
    assert len(row.pixel_values) == 1, "a row to check an export with"


def test_several_threads_read_the_same(settings: Settings, tmp_path: Path):
    train = str(folder(tmp_path / "train"))
    one, several = (asked(settings(train_dir=train, preprocessing_num_workers=n)) for n in (1, 3))
    assert torch.equal(one[0], several[0])
    assert torch.equal(one[1], several[1])


def test_training_cuts_and_mirrors():
    processor = new_processor(MODEL)
    image, seeds = picture(1, size=(16, 16)), list(range(40))
    as_it_is = Pixels(processor, 1.0, False).as_they_are([image])[0]
    mirrored = Pixels(processor, 1.0, True).altered([image] * 40, seeds)
    flipped = [torch.equal(each, as_it_is.flip(2)) for each in mirrored]
    assert 10 < sum(flipped) < 30
    assert all(
        torch.equal(each, as_it_is) for each, is_flipped in zip(mirrored, flipped, strict=True) if not is_flipped
    )
    cut = Pixels.of(processor, DataArguments()).altered([image] * 40, seeds)
    assert cut.shape == (40, 3, 16, 16)
    assert len({tuple(each.flatten().tolist()) for each in cut}) == 40
    random = np.random.default_rng(0)
    for width, height in ((30, 20), (200, 3), (3, 200)):
        for _ in range(50):
            left, top, right, bottom = crop_box(width, height, 0.2, random)
            assert 0 <= left < right <= width + 1e-6
            assert 0 <= top < bottom <= height + 1e-6
            assert 0.7 < (right - left) / (bottom - top) < 1.4
            assert width > 100 or height > 100 or (right - left) * (bottom - top) >= 0.2 * width * height - 1e-6


def test_a_processor_is_the_models_own_or_made_of_its_config(settings: Settings, tmp_path: Path):
    assert pixel_shape(new_processor(ViTConfig(image_size=(8, 24), num_channels=1))) == (1, 8, 24)
    ViTImageProcessorPil(size={"height": 20, "width": 20}).save_pretrained(tmp_path / "own")
    ViTConfig(image_size=20).save_pretrained(tmp_path / "own")
    ViTConfig().save_pretrained(tmp_path / "none")
    for flag in ("config_name", "model_name_or_path", "image_processor_name"):
        assert pixel_shape(load_processor(settings(**{flag: str(tmp_path / "own")}), MODEL)) == (3, 20, 20)
    assert pixel_shape(load_processor(settings(config_name=str(tmp_path / "none")), MODEL)) == (3, 16, 16)
    for flag in ("model_name_or_path", "image_processor_name"):
        with pytest.raises(ConfigError, match=rf"{flag}=.*none has no preprocessor_config.json; set image_process"):
            load_processor(settings(**{flag: str(tmp_path / "none")}), MODEL)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("{", "the image processor of config_name=.* cannot be loaded .*; set image_processor_name to a folder that"),
        (
            json.dumps({"image_processor_type": "ConvNextImageProcessor", "do_resize": False}),
            r"its image processor makes images of several sizes \(48x64 and 64x48\); give size a height and a width",
        ),
        (
            json.dumps({"image_processor_type": "ViTImageProcessor", "image_mean": [0.5] * 4, "image_std": [0.5] * 4}),
            "takes neither colour nor grey images; use one with 3 or 1 means",
        ),
        (json.dumps({"auto_map": {"AutoImageProcessor": "x.Y"}}), "holds code of its own; read it, and let it run"),
    ],
)
def test_a_processor_that_is_of_no_use(settings: Settings, tmp_path: Path, content: str, reason: str):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "preprocessor_config.json").write_text(content)
    with pytest.raises(ConfigError, match=reason):
        load_processor(settings(config_name=str(tmp_path / "model")), MODEL)


# --- images that are none


def test_modes_are_converted_where_nothing_is_lost():
    image = picture(3)
    for mode in ("1", "L", "P", "CMYK", "YCbCr", "HSV"):
        kept = encoded(image.convert(mode), "TIFF") if mode != "HSV" else encoded(image)
        assert read_image(kept, 3).mode == "RGB"
    opaque = image.convert("RGBA")
    assert read_image(encoded(opaque), 3).tobytes() == image.tobytes()
    grey = image.convert("L")
    for kept in (encoded(grey), encoded(grey.convert("RGB")), encoded(grey.convert("LA"))):
        assert read_image(kept, 1).tobytes() == grey.tobytes()
    turned = Image.Exif()
    turned[0x0112] = 6
    assert read_image(encoded(picture(size=(12, 10)), "JPEG", exif=turned), 3).size == (10, 12)


def transparent(mode: str) -> dict[str, Any]:
    image = picture().convert("RGBA")
    image.putpixel((0, 0), (0, 0, 0, 0))
    return encoded(image.convert(mode))


@pytest.mark.parametrize(
    ("value", "problem"),
    [
        ({"bytes": None, "path": None}, "is missing; take the row out"),
        ({"bytes": None, "path": "/nowhere/a.png"}, "does not exist; put it back, or take it out"),
        ({"bytes": b"", "path": None}, "is empty (0 bytes); fetch the file again, or take it out"),
        ({"bytes": b"<html>", "path": None}, "is no image that Pillow reads; fetch the file again, or take it out"),
        ({"bytes": encoded(picture())["bytes"][:20], "path": None}, "is "),
        (
            encoded(Image.fromarray(np.ones((4, 4), np.uint16) * 999)),
            "has 16 or 32 bit values (mode I;16), a model takes",
        ),
        (
            encoded(Image.new("F", (3, 3)), "TIFF"),
            "has floating-point values (mode F), a model takes 8 bit",
        ),
        (transparent("RGBA"), "has transparent parts (mode RGBA); put it on a background and save it without"),
        (transparent("LA"), "has transparent parts (mode LA)"),
        (encoded(Image.new("P", (3, 3)), transparency=0), "has transparent parts (mode P)"),
    ],
)
def test_images_that_cannot_be_used(value: dict[str, Any], problem: str):
    assert header_problem(value).startswith(problem)
    with pytest.raises(UnreadableImage, match=f"^{re.escape(problem)}"):
        read_image(value, 3)


def test_an_image_without_pixels(tmp_path: Path):
    content = b"P6 0 4 255\n"
    assert header_problem({"bytes": content, "path": None}) in (
        "has 0 pixels (0 x 4); take it out",
        "is no image that Pillow reads; fetch the file again, or take it out",
    )


def test_colours_are_not_thrown_away():
    with pytest.raises(UnreadableImage, match=r"is in colour, and the model takes grey \(num_channels=1\); set num_"):
        read_image(encoded(picture()), 1)


def test_headers_are_looked_at_before_training_and_what_they_hide_is_named_later(settings: Settings, tmp_path: Path):
    train = folder(tmp_path / "train", images=8)
    broken = [train / "dog" / f"{n}.png" for n in range(5)]
    for path in broken:
        path.write_bytes(b"<html>")
    config = settings(train_dir=str(train), validation_dir=str(folder(tmp_path / "held")))
    assert data_problems(config) == [], "nothing is read yet"
    with pytest.raises(ConfigError) as said:
        prepare_all(config, None)
    named = f"train_dir={train}"
    repair = "fetch the file again, or take it out"
    lines = [f"{named}: {path} is no image that Pillow reads; {repair}" for path in broken[:3]]
    assert said.value.problems == [*lines, f"{named}: 2 more images cannot be read"]
    for number, path in enumerate(broken):
        picture(number, size=(64, 64)).save(path)
    whole = broken[2].read_bytes()
    broken[2].write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UnreadableImage, match=rf"^{named}: {broken[2]} is broken \(.*\); fetch the file again"):
        asked(config, rows=16)


def test_a_row_is_named_where_there_is_no_file(settings: Settings, tmp_path: Path):
    images = [encoded(picture(n)) for n in range(6)]
    images[4] = {"bytes": b"<html>", "path": "x.jpg"}
    table(6, image=images, label=list("ababab")).save_to_disk(tmp_path / "saved")
    with pytest.raises(ConfigError, match=r"saved, row 4 \(x.jpg\) is no image that Pillow reads"):
        prepare_all(settings(dataset_name=str(tmp_path / "saved")), None)


# --- data that are none


def one_problem(config: Config) -> str:
    problems = data_problems(config)
    assert len(problems) == 1
    return problems[0]


@pytest.mark.parametrize(
    ("columns", "problem"),
    [
        ({"label": [None, "a", "b", "a"]}, "row 0 has None in 'label', which is none of its 2 classes; mend or leave"),
        ({"label": [0.5] * 4}, "column 'label' holds float64, not a class a row; set label_column_name"),
        ({"label": [["a", "b"]] * 4}, "column 'label' holds List, not a class a row; set label_column_name"),
        ({"label": ["a"] * 4}, "has one class, 'a'; give images of two or more"),
        ({"image": [1, 2, 3, 4]}, "column 'image' holds int64, not images; set image_column_name"),
        ({"other": list("abab")}, "no column 'label', only 'image', 'other'; set label_column_name"),
    ],
)
def test_columns_that_are_none(settings: Settings, tmp_path: Path, columns: dict[str, Any], problem: str):
    rows = {"image": [encoded(picture(n)) for n in range(4)]} | ({} if "other" in columns else {"label": list("abab")})
    made = Dataset.from_dict(rows | columns)
    made.save_to_disk(tmp_path / "saved")
    assert f"dataset_name={tmp_path / 'saved'}" in one_problem(settings(dataset_name=str(tmp_path / "saved")))
    assert problem in one_problem(settings(dataset_name=str(tmp_path / "saved")))


def test_labels_that_are_no_class(settings: Settings, tmp_path: Path):
    hidden = table(4).map(lambda row: {"label": -1}, features=table(2).features)
    DatasetDict({"train": table(4), "test": hidden}).save_to_disk(tmp_path / "saved")
    assert one_problem(settings(dataset_name=str(tmp_path / "saved"))).endswith(
        "split 'test': row 0 has -1 in 'label', which is none of its 2 classes; mend or leave out such rows, or name "
        "another split"
    )
    train, held = folder(tmp_path / "train"), folder(tmp_path / "held", "cat owl")
    assert one_problem(settings(train_dir=str(train), validation_dir=str(held))) == (
        f"validation_dir={held} has the class 'owl', which is none of the 2 classes to train on (cat and 1 more); "
        "rename it, or take it out"
    )


def test_folders_that_are_none(settings: Settings, tmp_path: Path):
    flat, deep, splits, one, empty = (tmp_path / name for name in ("flat", "deep", "splits", "one", "empty"))
    flat.mkdir()
    picture().save(flat / "0.png")
    folder(deep, "cat dog/small")
    folder(splits, "train/cat train/dog test/cat")
    folder(one, "cat")
    (empty / "cat").mkdir(parents=True)
    (tmp_path / "a.txt").write_text("text")
    for path, problem in {
        flat: "has images and no folders of classes; put them into a folder for each class",
        deep: f"has images in {deep / 'cat'} and in {deep / 'dog/small'}; put all into a folder for",
        splits: f"holds splits (test, train), not classes; give train_dir={splits / 'train'}",
        one: "has one class, 'cat'; give images of two or more",
        empty: "holds no images and no tables of one kind; put images there, in a folder for each class",
        tmp_path / "a.txt": "holds no images; give train_dir (a folder for each class), train_file (.parquet) or",
        tmp_path / "none": "does not exist; check the path",
    }.items():
        assert one_problem(settings(train_dir=str(path))).startswith(f"train_dir={path} {problem}")


def test_other_data_that_are_none(settings: Settings, tmp_path: Path):
    assert one_problem(settings()).startswith("dataset_name=builtin is text, and task=image-classification reads ima")
    assert "images are read by number, and not as a stream" in one_problem(
        settings(dataset_name="digits", streaming=True)
    )
    table(1).save_to_disk(tmp_path / "one")
    assert "holds one image, which cannot be divided; add validation images" in one_problem(
        settings(dataset_name=str(tmp_path / "one"))
    )
    empty = with_objects(settings(), train_dataset=table(4).select([]))
    assert one_problem(empty) == "train_dataset has no rows; give a data set with images"
    DatasetDict({"some": table(4), "more": table(4)}).save_to_disk(tmp_path / "splits")
    assert "has no split 'train', only 'some', 'more'" in one_problem(settings(dataset_name=str(tmp_path / "splits")))
    config = settings(dataset_name="<train_dataset>")
    assert "was an object of a Python program; give it again" in one_problem(config)
    kinds = "give a Dataset of datasets or torch, or a list of (image, label), which are read by number"
    with pytest.raises(ConfigError) as said:
        with_objects(settings(), train_dataset=iter([]))
    assert said.value.problems == [f"train_dataset is a list_iterator; {kinds}"]


def test_flags_of_text_and_of_images(settings: Settings):
    assert data_flag_problems(settings(task="causal-lm", train_dir="a")) == [
        "train_dir=a is for images; leave it out, or choose another task"
    ]
    assert text_flag_problems(settings(dataset_name="digits")) == [
        "task=image-classification reads images, and this is for text; a run reads them as they are"
    ]
    assert data_flag_problems(settings(dataset_name="digits", mlm_probability=0.3)) == [
        "mlm_probability=0.3 is for text; leave it out, or choose another task"
    ]
    assert data_flag_problems(settings(dataset_name="digits", packing="none", tokenizer_name="x")) == [
        "tokenizer_name=x is for text; leave it out, or choose another task",
        "packing=none is for text; leave it out, or choose another task",
    ]
    assert data_flag_problems(settings(train_dir="a", dataset_name="digits")) == [
        "both dataset_name and train_dir are given; keep one"
    ]
    assert data_flag_problems(settings(dataset_name="digits", validation_dir="a")) == [
        "validation_dir needs train_dir, and no validation_file beside it"
    ]


def test_an_epoch_is_counted_in_images(settings: Settings):
    from llm_local.checks.epochs import with_epochs

    config = settings(dataset_name="digits", num_train_epochs=2, per_device_train_batch_size=10)
    counted = with_epochs(config, world_size=1)
    assert counted.epoch == (1707, 10)
    assert counted.train.max_steps == 342
