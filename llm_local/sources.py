"""From a run's data flags to two sets of documents, training and validation: the built-in corpus, files, a folder
written by save_to_disk, or a data set from the hub, all through `datasets`.

What a document is: a file of the built-in corpus, a row of the others. A .txt file is one running text: its rows
are its lines with their newlines, as in transformers' run_clm, and what joins them is the text itself, so nothing
is put between them and their order is kept. Text made of many documents belongs into .jsonl, one a line.
"""

from __future__ import annotations

import glob
import sys
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset, Features, IterableDataset, Value, load_dataset, load_from_disk
from datasets.exceptions import DatasetGenerationError

from llm_local.config import ConfigError, RunConfig
from llm_local.corpus import builtin_corpus
from llm_local.source_problems import FORMATS, column_problem, file_problems, local_path, missing_column, uses_builtin

# Not the run's seed: runs that differ in their seed are compared on the same validation documents.
SPLIT_SEED = 0
STREAM_PROBE = 10_000  # documents of a stream of which the first few percent are held out
BLOCK_LINES = 200  # of a .txt file that are tokenised in one go


@dataclass(frozen=True)
class Documents:
    """Rows with a text column. `source` is how a message names them; `running_text`: rows are lines of one text."""

    rows: Dataset | IterableDataset
    column: str
    source: str
    running_text: bool = False


def load_documents(config: RunConfig) -> tuple[Documents, Documents]:
    """Training and validation documents, disjoint. Raises ConfigError if they can't be read or divided.

    Validation is validation_file, else the split named 'validation', else held out: validation_split_percentage of
    the documents, drawn by a fixed seed (of a .txt file its last lines). Of a stream it is the first few: that
    percentage of the first STREAM_PROBE documents. A stream's validation documents are read at once, STREAM_PROBE
    at most.
    """
    train, validation = _read(config)
    if validation is None:
        split = hold_out_stream if isinstance(train.rows, IterableDataset) else hold_out
        train, validation = split(train, config.data.validation_split_percentage)
    return _in_blocks(train), _in_blocks(validation)


def _in_blocks(documents: Documents) -> Documents:
    """Rows of BLOCK_LINES lines for a running text: a tokenizer sees the text across line ends, blank lines too."""
    if not documents.running_text:
        return documents
    return replace(documents, rows=documents.rows.batch(BLOCK_LINES))


def _read(config: RunConfig) -> tuple[Documents, Documents | None]:
    data = config.data
    if data.train_file:
        train = _read_file(config, "train_file", Path(data.train_file), data.streaming)
        file = data.validation_file
        return train, _read_file(config, "validation_file", Path(file), streaming=False) if file else None
    if uses_builtin(config):
        rows = builtin_corpus(config.cache_dir)
        return Documents(rows.to_iterable_dataset() if data.streaming else rows, "text", "the built-in corpus"), None
    name = data.dataset_name
    assert name
    splits = _read_folder(name, data.streaming) if local_path(name) else _read_hub(config, name)
    return from_splits(splits, data.text_column_name, f"dataset_name={name}")


def _read_file(config: RunConfig, field: str, path: Path, streaming: bool) -> Documents:
    column, kind = config.data.text_column_name, FORMATS[path.suffix.lower()]
    options: dict[str, Any] = {
        "text": {"keep_linebreaks": True, "features": Features({column: Value("string")})},
        "json": {},
        "parquet": {"columns": [column]},
    }[kind]
    files = {"train": glob.escape(str(path.resolve()))}  # `datasets` takes a bracket in a name for a pattern
    cache = str(config.cache_dir / "datasets")
    try:
        rows: Any = load_dataset(kind, data_files=files, split="train", streaming=streaming, cache_dir=cache, **options)
    except (DatasetGenerationError, ValueError, OSError) as error:
        raise _unreadable(field, path, column, f"cannot be read ({_reason(error)})") from error
    problem = column_problem(rows.features, column) if rows.features else ""
    if problem:
        raise _unreadable(field, path, column, problem)
    return Documents(_only(rows, column), column, f"{field}={path}", running_text=kind == "text")


def _unreadable(field: str, path: Path, column: str, reason: str) -> ConfigError:
    """What data_problems did not see lies beyond what it checks: look through the whole file for the line to name."""
    return ConfigError(file_problems(field, path, column, checked_bytes=sys.maxsize) or [f"{field}={path}: {reason}"])


def _reason(error: Exception) -> str:
    return " ".join(str(error.__cause__ or error).split())


def _read_folder(name: str, streaming: bool) -> dict[str, Any]:
    saved = load_from_disk(name)
    splits: dict[str, Any] = {"train": saved} if isinstance(saved, Dataset) else {str(k): saved[k] for k in saved}
    return splits | ({"train": splits["train"].to_iterable_dataset()} if streaming else {})


def _read_hub(config: RunConfig, name: str) -> dict[str, Any]:
    data, cache = config.data, str(config.cache_dir / "datasets")
    try:
        saved: Any = load_dataset(name, data.dataset_config_name, streaming=data.streaming, cache_dir=cache)
    except (DatasetGenerationError, ValueError, OSError) as error:
        repair = "check the name and dataset_config_name, or give a folder from save_to_disk"
        raise ConfigError([f"dataset_name={name} cannot be loaded ({_reason(error)}); {repair}"]) from error
    return dict(saved)


def from_splits(splits: dict[str, Any], column: str, source: str) -> tuple[Documents, Documents | None]:
    """The splits 'train' and, if there is one, 'validation'; any other is left alone. Raises ConfigError."""
    if "train" not in splits:
        raise ConfigError([f"{source} has no split 'train', only {', '.join(map(repr, splits))}; rename one of them"])
    found = {name: splits[name] for name in ("train", "validation") if name in splits}
    for name, rows in found.items():
        problem = column_problem(rows.features, column) if rows.features else ""
        if problem:
            raise ConfigError([f"{source}, split {name!r}: {problem}"])
    train, *validation = [Documents(_only(rows, column), column, source) for rows in found.values()]
    if validation and isinstance(validation[0].rows, IterableDataset):
        texts = _first_texts(validation[0], STREAM_PROBE)
        validation = [replace(train, rows=Dataset.from_dict({column: texts}))]
    return train, validation[0] if validation else None


def _only(rows: Any, column: str) -> Dataset | IterableDataset:
    """Without the other columns, unless the stream does not know its columns before it is read."""
    return rows.select_columns([column]) if rows.features else rows


def hold_out(train: Documents, percentage: int) -> tuple[Documents, Documents]:
    """Divides the documents: drawn by SPLIT_SEED, in file order; of a running text the last lines. One at least."""
    rows = train.rows
    assert isinstance(rows, Dataset)
    held, kept = _numbers_held_out(train, rows.num_rows, percentage)
    if train.running_text:
        numbers = np.arange(rows.num_rows)
    else:
        numbers = np.random.default_rng(SPLIT_SEED).permutation(rows.num_rows)
    validation = rows.select(np.sort(numbers[kept:]))
    assert validation.num_rows == held
    return replace(train, rows=rows.select(np.sort(numbers[:kept]))), replace(train, rows=validation)


def hold_out_stream(train: Documents, percentage: int) -> tuple[Documents, Documents]:
    """Divides a stream: the first documents, read now, are the validation; training begins behind them."""
    assert isinstance(train.rows, IterableDataset)
    probed = sum(1 for _ in islice(train.rows, STREAM_PROBE))
    held, _ = _numbers_held_out(train, probed, percentage)
    validation = Dataset.from_dict({train.column: _first_texts(train, held)})
    return replace(train, rows=train.rows.skip(held)), replace(train, rows=validation)


def _numbers_held_out(train: Documents, documents: int, percentage: int) -> tuple[int, int]:
    if documents < 2:
        kind = "line" if train.running_text else "document"
        raise ConfigError([f"{train.source} holds {documents} {kind}, which cannot be divided; add validation text"])
    held = min(documents - 1, max(1, round(documents * percentage / 100)))
    return held, documents - held


def _first_texts(documents: Documents, count: int) -> list[str]:
    texts = []
    for row in islice(documents.rows, count):
        if documents.column not in row:
            raise ConfigError([f"{documents.source}: {missing_column(documents.column, list(row))}"])
        texts.append(row[documents.column])
    return texts
