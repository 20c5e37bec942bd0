"""Data sets of images: a row travels as its number, and becomes what a model is asked where it is read.

    data = prepare_images(config)
    ask = data.images.asker(processor, config.data)
    ask({"input_ids": data.train.batch(index=7, rows=32)}, seeds)    # pixel_values (32, C, H, W), labels (32, 1)

Numbers go through all sets of a run, training first, so that a number says which image it is, and whether it is cut and
mirrored. What is done to it depends on its row's seed alone, and so on no layout.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from datasets.fingerprint import Hasher
from datasets.utils.tqdm import tqdm
from PIL import Image
from transformers import BaseImageProcessor

from llm_local.adapters.hf_internals import fingerprint_of
from llm_local.config import Config, ConfigError, some_of
from llm_local.data.image_files import UnreadableImage, header_problem, read_image
from llm_local.data.image_processor import Pixels
from llm_local.data.image_sources import Labelled, classes_of, read_labelled
from llm_local.data.mixture import training_sources, validation_sources
from llm_local.data.sources import divide
from llm_local.files import write_json, writing
from llm_local.flags import DataArguments
from llm_local.tasks.task import Ask, Parts

PROBLEMS_A_SET = 3
HEADERS_AT_A_TIME = 1000
_opened: dict[tuple[Any, ...], Images] = {}  # the sets that were asked for last


@dataclass(frozen=True)
class ImageSet:
    """Some rows of a data set: their numbers in it, and their classes by those of the run."""

    rows: Labelled
    numbers: np.ndarray
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.numbers)

    def undecoded(self, indices: Sequence[int] | np.ndarray) -> Iterator[tuple[str, dict[str, Any]]]:
        """Images with the places that a message names them by: file or row."""
        numbers = self.numbers[indices].tolist()
        for number, value in zip(numbers, self.rows.images[numbers][self.rows.column], strict=True):
            place, value = f"{self.rows.named}, row {number}", value or {}
            if path := value.get("path"):
                place = f"{self.rows.named}: {path}" if value.get("bytes") is None else f"{place} ({path})"
            yield place, value

    @property
    def key(self) -> str:
        """Changes with what the set holds."""
        return Hasher.hash([fingerprint_of(self.rows.images), self.labels.tobytes(), self.numbers.tobytes()])


class ImageRows:
    """The rows of a set as `Rows` of sequences.py: each the number of an image."""

    seq_length = 1

    def __init__(self, first: int, count: int):
        self._first = first
        self.num_tokens = self.num_rows = count

    def row(self, index: int) -> np.ndarray:
        """(1,) int64."""
        return np.array([self._first + index], dtype=np.int64)


@dataclass(frozen=True)
class Images:
    """All sets of a run. classes: their names, in the order of the labels."""

    train: tuple[ImageSet, ...]
    validation: dict[str, tuple[ImageSet, ...]]
    classes: tuple[str, ...]

    @property
    def sets(self) -> tuple[ImageSet, ...]:
        """Those to train on first."""
        return (*self.train, *(each for several in self.validation.values() for each in several))

    @property
    def firsts(self) -> list[int]:
        """The number of each set's first image."""
        return [0, *np.cumsum([len(each) for each in self.sets]).tolist()[:-1]]

    def extent(self, images: ImageSet) -> str:
        """How much there is of a set, for a person."""
        return f"{len(images):,} images of {len(np.unique(images.labels)):,} classes"

    def counts(self) -> dict[str, tuple[int, int]]:
        """Images of each set, and classes of the run, by the set's name."""
        several = {each.rows.named: each for each in self.train}
        held_out = {f"{name} (validation)": each for name, found in self.validation.items() for each in found}
        return {name: (len(each), len(self.classes)) for name, each in (several | held_out).items()}

    def asker(self, processor: BaseImageProcessor, data: DataArguments) -> Ask:
        """Makes of numbers (B, 1) as input_ids what a model is asked. Raises UnreadableImage."""
        sets, firsts, pixels = self.sets, self.firsts, Pixels.of(processor, data)
        channels, workers = pixels.shape[0], data.preprocessing_num_workers
        pool = ThreadPoolExecutor(workers) if workers > 1 else None  # Pillow decodes without the interpreter's lock

        def ask(parts: Parts, seeds: Sequence[int]) -> Parts:
            numbers = parts["input_ids"][:, 0].numpy()
            owners = np.searchsorted(firsts, numbers, side="right") - 1
            values, labels = torch.empty(len(numbers), *pixels.shape), torch.empty(len(numbers), 1, dtype=torch.int64)
            for owner in np.unique(owners).tolist():
                at = np.flatnonzero(owners == owner)
                mine, found = sets[owner], numbers[at] - firsts[owner]
                each: Callable[..., Any] = map if pool is None else pool.map
                images = list(each(partial(_read, channels=channels), mine.undecoded(found)))
                if owner < len(self.train):
                    made = pixels.altered(images, [seeds[n] for n in at.tolist()])
                else:
                    made = pixels.as_they_are(images)
                values[at], labels[at, 0] = made, torch.from_numpy(mine.labels[found])
            return {"pixel_values": values, "labels": labels}

        return ask


def _read(named: tuple[str, dict[str, Any]], channels: int) -> Image.Image:
    place, value = named
    try:
        return read_image(value, channels)
    except UnreadableImage as error:
        raise UnreadableImage(f"{place} {error}") from error


def read_images(config: Config, again: bool = False) -> Images:
    """The run's sets, opened; no image is looked at. A start asks several times, and they are opened when it begins
    (again). Raises ConfigError."""
    sources = (tuple(training_sources(config)), tuple(validation_sources(config).items()))
    key = (*sources, config.data.validation_split_percentage, config.cache_dir)
    if again or key not in _opened:
        _opened.clear()
        _opened[key] = _open(config)
    return _opened[key]


def _open(config: Config) -> Images:
    given = {name: read_labelled(config, source)[0] for name, source in validation_sources(config).items()}
    train, own = zip(*(read_labelled(config, source) for source in training_sources(config)), strict=True)
    classes, percentage = classes_of(train), config.data.validation_split_percentage
    kept, held_out = [], []
    for rows, validation in zip(train, own, strict=True):
        numbers = np.arange(len(rows.labels))
        if not given and validation is None:
            if len(numbers) < 2:
                raise ConfigError([f"{rows.named} holds one image, which cannot be divided; add validation images"])
            numbers, held = divide(len(numbers), percentage)
            held_out.append(_some(rows, held, classes))
        elif not given:
            held_out.append(_some(validation, np.arange(len(validation.labels)), classes))
        kept.append(_some(rows, numbers, classes))
    validation = {n: (_some(rows, np.arange(len(rows.labels)), classes),) for n, rows in given.items()}
    return Images(tuple(kept), validation or {"validation": tuple(held_out)}, classes)


def _some(rows: Labelled, numbers: np.ndarray, classes: tuple[str, ...]) -> ImageSet:
    known = {name: n for n, name in enumerate(classes)}
    present = [rows.names[n] for n in np.unique(rows.labels[numbers])]
    if strange := [name for name in present if name not in known]:
        among = f"which is none of the {len(classes)} classes to train on ({some_of(classes)})"
        raise ConfigError([f"{rows.named} has the class {strange[0]!r}, {among}; rename it, or take it out"])
    lookup = np.array([known.get(name, -1) for name in rows.names], dtype=np.int64)
    return ImageSet(rows, numbers, lookup[rows.labels[numbers]])


def class_names(config: Config) -> tuple[str, ...]:
    """The classes of the run's images, in the order of the labels; none where it reads no images. Raises ConfigError
    for all that is wrong with the data but for the images themselves."""
    return read_images(config).classes if config.task.reads_images else ()


def check_images(images: Images, config: Config) -> None:
    """Looks at the header of each image, the first time that a data set is met. Raises ConfigError with the first of
    those that cannot be read, and how many there are."""
    for each in images.sets:
        done = config.cache_dir / "images" / f"{each.key}.json"
        if done.is_file():
            continue
        problems = _header_problems(each, config.data.preprocessing_num_workers)
        if problems:
            more = [f"{each.rows.named}: {len(problems) - PROBLEMS_A_SET:,} more images cannot be read"]
            raise ConfigError(problems[:PROBLEMS_A_SET] + (more if len(problems) > PROBLEMS_A_SET else []))
        with writing(done):
            done.parent.mkdir(parents=True, exist_ok=True)
        write_json(done, {"images": len(each)})


def _header_problems(images: ImageSet, workers: int) -> list[str]:
    def look(named: tuple[str, dict[str, Any]]) -> str:
        problem = header_problem(named[1])
        return f"{named[0]} {problem}" if problem else ""

    found: list[str] = []
    with ThreadPoolExecutor(workers) as pool:
        for first in tqdm(range(0, len(images), HEADERS_AT_A_TIME), desc=f"looking at {images.rows.named}", delay=2):
            these = np.arange(first, min(first + HEADERS_AT_A_TIME, len(images)))
            found += filter(None, pool.map(look, images.undecoded(these)))
    return found
