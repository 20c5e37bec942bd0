"""From a source to rows with an image and a class each: a folder, tables, a data set of the hub, saved or given as an
object, or scikit-learn's digits."""

from __future__ import annotations

import glob
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
from datasets import ClassLabel, Dataset, Image, Value, load_dataset
from datasets.packaged_modules.imagefolder.imagefolder import ImageFolder

from llm_local.config import Config, ConfigError, some_of
from llm_local.data.digits import digits
from llm_local.data.mixture import BUILTIN, DIGITS, TOKENS, Source
from llm_local.data.source_problems import files_of, missing_split, wanted_splits
from llm_local.data.sources import or_refused, read_hub, read_saved
from llm_local.data.text_files import TEXT_FORMATS, format_of, missing_column

SPLITS = ("train", "validation", "val", "valid", "test")
REPAIR = "give train_dir (a folder for each class), train_file (.parquet) or dataset_name ('digits' is built in)"
_NAMED = {"train_dir": "train", "validation_dir": "validation"}


@dataclass(frozen=True)
class Labelled:
    """Rows of a data set with their classes. images: a column of undecoded images; labels: (rows,) numbers of names;
    named: how a message names the data set."""

    named: str
    images: Dataset
    column: str
    labels: np.ndarray
    names: tuple[str, ...]


def read_labelled(config: Config, source: Source) -> tuple[Labelled, Labelled | None]:
    """What is to train on, and the data set's own validation or test split if it has one. Raises ConfigError."""
    splits = _splits(config, source)
    if len(splits) == 1 and not (source.split or source.validation_split):
        return _labelled(source, source.named, *splits.values()), None
    train, validation = wanted_splits(source, list(splits))
    validation = validation or ("test" if "test" in splits and train != "test" else None)
    found = []
    for name in [train] if validation is None else [train, validation]:
        if name not in splits:
            raise ConfigError([missing_split(source.named, name, list(splits))])
        found.append(_labelled(source, f"{source.named}, split {name!r}", splits[name]))
    return found[0], found[1] if len(found) > 1 else None


def _splits(config: Config, source: Source) -> dict[str, Any]:
    if source.streaming:
        raise ConfigError([f"{source.named}: images are read by number, and not as a stream; leave streaming out"])
    if source.kind in (BUILTIN, TOKENS):
        raise ConfigError([f"{source.named} is text, and task={config.task.name} reads images; {REPAIR}"])
    if source.kind == "object":
        if source.rows is None:
            given = "give it again (llm_local.prepare), or name another data set"
            raise ConfigError([f"{source.named} was an object of a Python program; {given}"])
        return {"train": source.rows}
    if source.kind == DIGITS:
        return {"train": digits()}
    if source.kind == "saved":
        return or_refused(source, lambda: read_saved(source))
    return _read_files(config, source) if source.kind == "files" else read_hub(config, source)


def _read_files(config: Config, source: Source) -> dict[str, Any]:
    path, cache = Path(source.source), str(config.cache_dir / "datasets")
    if not path.is_dir() or not _holds_images(path):
        tables = [file for file in files_of(source.source) if format_of(file)]
        kind = format_of(tables[0]) if tables else None
        if kind is None or kind in TEXT_FORMATS or any(format_of(file) != kind for file in tables):
            raise ConfigError([_no_images(source, path)])
        data_files = {"train": [glob.escape(str(file.resolve())) for file in tables]}
        options: dict[str, Any] = {"data_files": data_files, "cache_dir": cache}
        return {"train": or_refused(source, lambda: load_dataset(kind, split="train", **options))}
    folders = {each.name for each in path.iterdir() if each.is_dir()}
    if "train" in folders and len(folders & {*SPLITS}) > 1 and folders <= {*SPLITS}:
        of = " and ".join(f"{flag}={path / name}" for flag, name in _NAMED.items() if name in folders)
        raise ConfigError([f"{source.named} holds splits ({', '.join(sorted(folders))}), not classes; give {of}"])
    pattern = f"{glob.escape(str(path.resolve()))}/**"  # and no folder's name is that of a split
    options = {"data_files": {"train": pattern}, "cache_dir": cache, "drop_labels": False}
    rows = or_refused(source, lambda: load_dataset("imagefolder", split="train", **options))
    if {*rows.features} == {"image", "label"} and (problem := _class_problem(source, path.resolve(), rows)):
        raise ConfigError([problem])
    return {"train": rows}


def _holds_images(path: Path) -> bool:
    return any(file.suffix.lower() in ImageFolder.EXTENSIONS for file in path.rglob("*"))


def _no_images(source: Source, path: Path) -> str:
    if not path.exists():
        return f"{source.named} does not exist; check the path (relative to {Path.cwd()})"
    if path.is_dir():
        return f"{source.named} holds no images and no tables of one kind; put images there, in a folder for each class"
    return f"{source.named} holds no images; {REPAIR}"


def _class_problem(source: Source, path: Path, rows: Any) -> str:
    """Why the names of the images' own folders are no classes; '' if they are."""
    images = rows.cast_column("image", Image(decode=False)).with_format("arrow")[:]["image"].combine_chunks()
    found = sorted({Path(image).parent for image in images.field("path").unique().to_pylist()})
    if found == [path]:
        return f"{source.named} has images and no folders of classes; put them into a folder for each class"
    one, other = (pick(found, key=lambda folder: len(folder.parts)) for pick in (min, max))
    if len(one.parts) != len(other.parts):
        return f"{source.named} has images in {one} and in {other}; put all into a folder for each class, side by side"
    return ""


def _labelled(source: Source, named: str, rows: Any) -> Labelled:
    image, label = source.image_column, source.label_column
    for flag, column in (("image_column_name", image), ("label_column_name", label)):
        if column not in rows.features:
            raise ConfigError([f"{named}: {missing_column(column, list(rows.features), flag)}"])
    if not rows.num_rows:
        raise ConfigError([f"{named} has no rows; give a data set with images"])
    labels, names = read_labels(named, rows, label)
    return Labelled(named, _undecoded(named, rows, image), image, labels, names)


def _undecoded(named: str, rows: Dataset, column: str) -> Dataset:
    feature: Any = rows.features[column]
    try:
        return rows.select_columns([column]).cast_column(column, Image(decode=False))
    except (pyarrow.ArrowException, TypeError, ValueError) as error:
        kind = feature.dtype if isinstance(feature, Value) else type(feature).__name__
        raise ConfigError([f"{named}: column {column!r} holds {kind}, not images; set image_column_name"]) from error


def read_labels(named: str, rows: Dataset, column: str) -> tuple[np.ndarray, tuple[str, ...]]:
    """(rows,) numbers of the classes, and their names. Raises ConfigError for a row without a class."""
    feature: Any = rows.features[column]
    is_class = isinstance(feature, ClassLabel)
    kind = feature.dtype if isinstance(feature, Value) else type(feature).__name__
    if not is_class and not kind.startswith(("int", "uint", "bool", "string", "large_string")):
        raise ConfigError([f"{named}: column {column!r} holds {kind}, not a class a row; set label_column_name"])
    found = rows.select_columns([column]).with_format("arrow")[:][column].to_pylist()
    names = list(feature.names) if is_class else sorted({each for each in found if each not in (None, "")})
    wrong = next((n for n, each in enumerate(found) if not _is_class(each, is_class, len(names))), None)
    if wrong is not None:
        say = f"row {wrong} has {found[wrong]!r} in {column!r}, which is none of its {len(names)} classes"
        raise ConfigError([f"{named}: {say}; mend or leave out such rows, or name another split"])
    numbers = found if is_class else list(map({name: n for n, name in enumerate(names)}.__getitem__, found))
    return np.array(numbers, dtype=np.int64), tuple(map(str, names))


def _is_class(value: Any, is_number: bool, count: int) -> bool:
    return value not in (None, "") and (not is_number or 0 <= value < count)


def classes_of(found: Sequence[Labelled]) -> tuple[str, ...]:
    """The classes of all that is trained on, in their order. Raises ConfigError for one alone."""
    names = tuple(dict.fromkeys(name for each in found for name in each.names))
    if len(names) < 2:
        raise ConfigError([f"{found[0].named} has one class, {some_of(names)!r}; give images of two or more"])
    return names
