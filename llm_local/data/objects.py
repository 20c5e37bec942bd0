"""Models, tokenizers and data sets that are given as Python objects, in place of flags.

A model's config and a tokenizer are written into the cache, where later starts, exports and other ranks find them; data
sets stay what they are, and are read as those of flags are. Each rank gives its own.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch.utils.data
from datasets import Dataset, DatasetDict, IterableDataset
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from llm_local.config import Config, ConfigError
from llm_local.data.encoding import IDS
from llm_local.data.mixture import OBJECT, TRAIN, VALIDATION
from llm_local.data.tokenizer import highest_id
from llm_local.files import writing

Model = PretrainedConfig | Path | str
Rows = Any  # a Dataset or IterableDataset of datasets or torch, or a list


def with_objects(
    config: Config,
    model: Model | None = None,
    tokenizer: PreTrainedTokenizerBase | Path | str | None = None,
    train_dataset: Rows | None = None,
    eval_dataset: Rows | Mapping[str, Rows] | None = None,
) -> Config:
    """The configuration of a run with these. Raises ConfigError where an object is of no known kind, or a flag says the
    same."""
    _only_once(config, model=model, tokenizer=tokenizer, train_dataset=train_dataset, eval_dataset=eval_dataset)
    given, folder = config.model, config.cache_dir / "objects"
    if isinstance(model, PretrainedConfig):
        given = replace(given, config_name=str(_kept(model, folder, "model") / "config.json"))
    elif isinstance(model, (str, Path)):
        given = replace(given, model_name_or_path=str(model))
    elif model is not None:
        kind = type(model).__name__
        raise ConfigError([f"model={kind}: give its .config for a new model, or the folder of its save_pretrained"])
    if isinstance(tokenizer, PreTrainedTokenizerBase):
        given = replace(given, tokenizer_name=str(_kept(tokenizer, folder, "tokenizer")))
    elif tokenizer is not None:
        given = replace(given, tokenizer_name=str(tokenizer))
    rows = {} if train_dataset is None else {TRAIN: train_dataset}
    if isinstance(eval_dataset, Mapping) and not isinstance(eval_dataset, DatasetDict):
        rows |= dict(eval_dataset)
    elif eval_dataset is not None:
        rows[VALIDATION] = eval_dataset
    found = {name: _rows(name, each, config, tokenizer) for name, each in rows.items()}
    data = config.data
    if TRAIN in found:
        data = replace(data, dataset_name=OBJECT, streaming=isinstance(found[TRAIN][1], IterableDataset))
    return replace(config, model=given, data=data, rows=found)


def _only_once(config: Config, **objects: Any) -> None:
    flags, values = (
        {
            "model": ("model_name_or_path", "config_name", "model_type"),
            "tokenizer": ("tokenizer_name",),
            "train_dataset": ("dataset_name", "train_file", "train_dir", "data_mixture", "streaming"),
            "eval_dataset": ("validation_file", "validation_dir", "validation_files"),
        },
        config.flat(),
    )
    problems = [
        f"{name}= is given, and the flag {flag}={values[flag]}; keep one"
        for name, value in objects.items()
        for flag in flags[name]
        if value is not None and values[flag] and not (name == "train_dataset" and values["dataset_name"] == OBJECT)
    ]
    if problems:
        raise ConfigError(problems)


def _kept(thing: PretrainedConfig | PreTrainedTokenizerBase, folder: Path, kind: str) -> Path:
    """A folder with it, whose name is a key of what is in it."""
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder, prefix=".unfinished-") as unfinished:
            draft = Path(unfinished, kind)
            thing.save_pretrained(str(draft))
            files = sorted(path for path in draft.rglob("*") if path.is_file())
            key = hashlib.sha256(b"\0".join(path.name.encode() + path.read_bytes() for path in files)).hexdigest()
            target = folder / f"{kind}-{key[:16]}"
            if not target.is_dir():
                try:
                    os.rename(draft, target)
                except OSError:
                    if not target.is_dir():  # else another process was faster, with the same result
                        raise
            return target


def _rows(name: str, given: Rows, config: Config, tokenizer: Any) -> tuple[str, Dataset | IterableDataset]:
    """A column of text, of token numbers or of images, and the rows; with that alone, of text. Raises ConfigError for
    anything else."""
    field = "train_dataset" if name == TRAIN else "eval_dataset"
    named = field if name in (TRAIN, VALIDATION) else f"{field} {name!r}"
    if config.task.reads_images:
        return config.data.image_column_name, _images(named, given, config)
    rows = _as_datasets(given, config)
    if rows is None:
        kinds = "a Dataset or IterableDataset of datasets or torch, or a list of texts"
        raise ConfigError([f"{named} is a {type(given).__name__}; give {kinds}"])
    if name != TRAIN and isinstance(rows, IterableDataset):
        raise ConfigError([f"{named} is a stream; give a Dataset, which all evaluations find alike"])
    first = next(iter(rows), None)
    if first is None:
        raise ConfigError([f"{named} has no rows; give a data set with text"])
    text, columns = config.data.text_column_name, ", ".join(map(repr, first))
    if isinstance(first.get(text), str) or (text in first and first[text] is None):
        return text, rows.select_columns([text])
    if IDS not in first:
        raise ConfigError([f"{named} has no text in {text!r} and no {IDS!r}, only {columns}; set text_column_name"])
    if tokenizer is None:
        raise ConfigError([f"{named} has {IDS}; give the tokenizer that has made them"])
    most = max(first[IDS], default=0)
    if isinstance(tokenizer, PreTrainedTokenizerBase) and most > (highest := highest_id(tokenizer)):
        raise ConfigError([f"{named} has the token {most}, the tokenizer none above {highest}; give its own"])
    return IDS, rows.select_columns([IDS])


def _images(named: str, given: Rows, config: Config) -> Dataset:
    """Rows with images and labels, which image_sources.py looks at. Raises ConfigError for no such rows."""
    if isinstance(given, Dataset):
        return given
    if not _is_list(given):
        kinds = "a Dataset of datasets or torch, or a list of (image, label), which are read by number"
        raise ConfigError([f"{named} is a {type(given).__name__}; give {kinds}"])
    options: Any = {"rows": given, "columns": (config.data.image_column_name, config.data.label_column_name)}
    made = Dataset.from_generator(_labelled, gen_kwargs=options, cache_dir=str(config.cache_dir / "datasets"))
    assert isinstance(made, Dataset)
    return made


def _labelled(rows: Any, columns: tuple[str, str]) -> Iterator[dict[str, Any]]:
    """Rows by column: those of a torch data set may be pairs."""
    for number in range(len(rows)):
        row = rows[number]
        yield {**row} if isinstance(row, Mapping) else dict(zip(columns, row, strict=True))


def _is_list(given: Rows) -> bool:
    return hasattr(given, "__getitem__") and hasattr(given, "__len__") and not isinstance(given, (str, bytes, Mapping))


def _as_datasets(given: Rows, config: Config) -> Dataset | IterableDataset | None:
    """As one of `datasets`, by its own means; None for what is none."""
    if isinstance(given, (Dataset, IterableDataset)):
        return given
    if isinstance(given, torch.utils.data.IterableDataset):
        return IterableDataset.from_generator(_items, gen_kwargs={"rows": given, "text": config.data.text_column_name})
    if _is_list(given):
        options: Any = {"rows": given, "text": config.data.text_column_name}
        cache = str(config.cache_dir / "datasets")
        return Dataset.from_generator(_items, gen_kwargs=options, cache_dir=cache)
    return None


def _items(rows: Any, text: str) -> Iterator[dict[str, Any]]:
    """Rows by column: those of a torch data set may be a text, numbers, or a dictionary of such."""
    several = (rows[number] for number in range(len(rows))) if hasattr(rows, "__len__") else iter(rows)
    for row in several:
        if not isinstance(row, Mapping):
            row = {text if isinstance(row, str) else IDS: row}
        kept = {name: row[name] for name in (text, IDS) if name in row} or row
        yield {name: value if isinstance(value, str) else [*map(int, value)] for name, value in kept.items()}
