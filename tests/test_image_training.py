"""Image classifiers: their exports, a checkpoint of other classes, what is refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TINY, TINY_VIT, Trainer, records, weights
from launching import by_hand
from PIL import Image
from transformers import AutoConfig, AutoModelForImageClassification, ViTImageProcessorPil, pipeline

from llm_local.checks.preflight import preflight
from llm_local.config import Config, ConfigError, parse
from llm_local.data.image_files import read_image
from llm_local.data.images import read_images
from llm_local.data.sets import prepare_all
from llm_local.model.anatomy import probe
from llm_local.model.classes import new_parameters, set_classes
from llm_local.model.stage import Blueprint, build_block
from llm_local.offline_export import export_checkpoint
from llm_local.partition import Costs, make_partition

TASK = "image-classification"
DIGITS: dict[str, Any] = {
    **{"num_stages": 2, "per_device_train_batch_size": 8, "eval_batches": 4, "max_steps": 8, "learning_rate": 1e-2},
}
of_digits = pytest.mark.parametrize("trainer", [TASK], indirect=True)


def answers(export: Path, config: Config, count: int) -> float:
    """The share of the first rows of the validation set that transformers' pipeline names rightly."""
    images, classify = read_images(config), pipeline(TASK, model=str(export))
    rows = prepare_all(config, None).validation[0].sequences.batch(0, count)[:, 0] - images.firsts[-1]
    (held_out,) = images.validation["validation"]
    shown = [read_image(value, 3) for _, value in held_out.undecoded(rows.numpy())]
    found: Any = classify(shown, top_k=1)
    wanted = [images.classes[n] for n in held_out.labels[rows.numpy()]]
    return sum(each[0]["label"] == name for each, name in zip(found, wanted, strict=True)) / count


@pytest.mark.processes
@of_digits
def test_what_its_exports_are(trainer: Trainer):
    """In the answers of transformers' pipeline the accuracy of the last evaluation; made again from a checkpoint."""
    settings = DIGITS | {"method": "overlapping", "layers_per_block": 2, "head": "decoder", "head_layers": 1}
    output = trainer.run("run", 2, save_steps=8, **settings)
    export_checkpoint(output / "checkpoints/step-00000008", trainer.folder / "offline", None, "auto")
    offline, whole = weights(trainer.folder / "offline"), weights(output / "export")
    assert offline.keys() == whole.keys()
    assert all(torch.equal(offline[name], whole[name]) for name in whole)
    assert (trainer.folder / "offline/preprocessor_config.json").exists()
    config = parse(trainer.flags("run", **settings))
    for stage, export in enumerate((output / "export/exits/stage-00", output / "export")):
        found = records(output, stage, "eval")[-1]
        assert answers(export, config, 32) == pytest.approx(found["accuracy"])
        assert found["accuracy"] <= found["top_5_accuracy"] <= 1
        assert found["perplexity"] is None
        card = (export / "README.md").read_text()
        assert "pipeline_tag: image-classification" in card
        assert "| exit | loss | accuracy | top 5 accuracy |" in card


@pytest.mark.processes
@of_digits
def test_an_image_that_breaks_off_ends_all_stages(trainer: Trainer):
    """Its header is whole, so that stage 0 meets it in a step; its line is all that any stage says."""
    folder = trainer.folder / "images"
    for name in ("cat", "dog"):
        (folder / name).mkdir(parents=True)
        for number in range(8):
            Image.effect_noise((8, 8), 100).save(folder / name / f"{number}.png")
    broken = folder / "dog" / "5.png"
    broken.write_bytes(broken.read_bytes()[:60])
    flags = trainer.flags("run", num_stages=2, dataset_name=None, train_dir=folder, max_steps=99)
    with by_hand(2, flags, trainer.folder) as ranks:
        assert [rank.wait(120) for rank in ranks] == [1, 1]
    said = f"train_dir={folder}: {broken} is broken ("
    assert all(said in rank.text for rank in ranks), [rank.text for rank in ranks]
    assert not any("Traceback" in rank.text for rank in ranks)


def test_a_checkpoint_of_other_classes_gets_a_new_classifier(tmp_path: Path):
    config = AutoConfig.for_model(**TINY_VIT, num_labels=3)
    theirs = AutoModelForImageClassification.from_config(config)
    theirs.save_pretrained(tmp_path)
    ViTImageProcessorPil(size={"height": 8, "width": 8}).save_pretrained(tmp_path)
    run = parse(["--task", TASK, "--model_name_or_path", str(tmp_path), "--num_stages", "1"])
    model_config = AutoConfig.from_pretrained(tmp_path)
    assert new_parameters(run, model_config) == ((), "")
    set_classes(model_config, [f"digit {n}" for n in range(10)])
    fresh, said = new_parameters(run, model_config)
    assert fresh == ("classifier.weight", "classifier.bias")
    assert said == (
        f"{tmp_path} has a classifier of 3 classes (LABEL_0 and 2 more), and the data has 10 (digit 0 and 9 more): "
        "a new one is made"
    )
    anatomy = replace(probe(model_config, run.model), fresh=fresh)
    partition = make_partition(4, 1, Costs(1.0, 1.0), 4)
    one, other = (build_block(Blueprint(run, model_config, anatomy, partition), 0) for _ in range(2))
    classifier = one.head.model.get_parameter("classifier.weight")
    assert classifier.shape == (10, 32)
    assert not classifier.isnan().any()
    assert torch.equal(classifier, other.head.model.get_parameter("classifier.weight"))
    loaded = one.body.model.state_dict()
    assert all(torch.equal(tensor, theirs.state_dict()[name]) for name, tensor in loaded.items())


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        ("--head shared", "a classifier is small, and each block has its own; use head=linear or decoder"),
        ("--head_token_fraction 0.5", "a head pools all of an image; leave it out"),
        ("--distillation_weight 1", "soft targets are of what comes next; leave it out"),
        ("--gguf_file a.gguf", "GGUF holds causal models; use safetensors"),
    ],
)
def test_flags_that_mean_nothing_to_it_are_refused(flags: str, reason: str):
    config = parse(["--task", TASK, *flags.split()])
    name, value = flags.removeprefix("--").split()
    said = config.task.problems(config.model, config.data, config.local, config.train)
    assert said == [f"{name}={value} with task={TASK}: {reason}"]


@of_digits
def test_what_does_not_fit_the_model_is_said_before_the_start(trainer: Trainer):
    flags = trainer.flags("run", **DIGITS | {"seq_length": 100})
    with pytest.raises(ConfigError, match="seq_length=100: the model makes 17 tokens of an image; leave it out"):
        preflight(parse(flags), 2)
    flags = trainer.flags("run", **DIGITS | {"config_name": trainer.model(TINY), "sample_prompt": "x"})
    with pytest.raises(ConfigError, match="sample_prompt=x is for text; leave it out") as raised:
        preflight(parse(flags), 2)
    said = "task=image-classification: transformers has no image classifier of model type 'llama'"
    assert said in str(raised.value)
