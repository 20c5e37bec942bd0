"""What is wrong with the data a run names, seen before training: one plain line each, with value, place and repair."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
from datasets import Dataset, DatasetDict, Features, Value, load_from_disk

from llm_local import corpus
from llm_local.config import RunConfig

FORMATS = {".txt": "text", ".jsonl": "json", ".json": "json", ".parquet": "parquet"}  # suffix: loader in `datasets`
CHECKED_BYTES = 64 << 20  # of a file before training: a third of a second; a line further on is named when it is read
PROBLEMS_A_FILE = 3


def data_problems(config: RunConfig) -> list[str]:
    """Everything wrong with the run's data source that shows before training. A hub name is not looked up."""
    data = config.data
    if data.train_file:
        named = {"train_file": data.train_file, "validation_file": data.validation_file}
        files = {field: Path(value) for field, value in named.items() if value}
        return [line for field, path in files.items() for line in file_problems(field, path, data.text_column_name)]
    if uses_builtin(config):
        return builtin_problems(corpus.stdlib_folder())
    assert data.dataset_name
    return _dataset_problems(data.dataset_name, data.text_column_name)


def uses_builtin(config: RunConfig) -> bool:
    return not config.data.train_file and config.data.dataset_name in (None, "builtin")


def builtin_problems(folder: Path) -> list[str]:
    if corpus.source_files(folder):
        return []
    return [f"the built-in corpus needs .py files in {folder}, which has none; give train_file or dataset_name"]


def file_problems(field: str, path: Path, column: str, checked_bytes: int = CHECKED_BYTES) -> list[str]:
    """Problems of a training or validation file, from its first checked_bytes and at most PROBLEMS_A_FILE lines."""
    named = f"{field}={path}"
    if not path.exists():
        return [f"{named} does not exist; check the path (relative to {Path.cwd()})"]
    if path.is_dir():
        return [f"{named} is a directory, not a file; a folder from save_to_disk goes into dataset_name"]
    if path.suffix.lower() not in FORMATS:
        return [f"{named} has the unknown suffix {path.suffix!r}; use one of {', '.join(FORMATS)}"]
    if path.stat().st_size == 0:
        return [f"{named} is empty; give a file with text"]
    if path.suffix.lower() == ".parquet":
        return _parquet_problems(named, path, column)
    problems = []
    for line in _line_problems(path, column, checked_bytes):
        problems.append(f"{named}, {line}")
        if len(problems) == PROBLEMS_A_FILE:
            break
    return problems


def _line_problems(path: Path, column: str, checked_bytes: int) -> Iterator[str]:
    is_json = FORMATS[path.suffix.lower()] == "json"
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                yield f"line {number}: byte {line[error.start]:#04x} is not UTF-8; save the file as UTF-8"
                continue
            problem = _json_problem(text, column) if is_json and text.strip() else ""
            if problem:
                yield f"line {number}: {problem}"
            if file.tell() > checked_bytes:
                return


def _json_problem(text: str, column: str) -> str:
    try:
        row = json.loads(text)
    except ValueError as error:
        return f"not JSON ({error}); write one JSON object a line"
    if not isinstance(row, dict):
        return f"a JSON {type(row).__name__}, not an object; write one JSON object a line"
    if column not in row:
        return missing_column(column, list(row))
    if not isinstance(row[column], (str, type(None))):  # an empty text, as in parquet
        return f"{column!r} holds {json.dumps(row[column])[:40]}, not text; write a string there"
    return ""


def missing_column(column: str, columns: list[str]) -> str:
    return f"no column {column!r}, only {', '.join(map(repr, columns)) or 'none'}; set text_column_name"


def column_problem(features: Features, column: str) -> str:
    """What keeps `column` from being the text, '' if nothing does."""
    if column not in features:
        return missing_column(column, list(features))
    feature: Any = features[column]
    if isinstance(feature, Value) and feature.dtype in ("string", "large_string"):
        return ""
    kind = feature.dtype if isinstance(feature, Value) else type(feature).__name__
    return f"column {column!r} holds {kind}, not text; set text_column_name to one of strings"


def _parquet_problems(named: str, path: Path, column: str) -> list[str]:
    try:
        file = pyarrow.parquet.ParquetFile(path)
        rows, features = file.metadata.num_rows, Features.from_arrow_schema(file.schema_arrow)
    except (pyarrow.ArrowException, OSError) as error:
        return [f"{named} is not a parquet file ({error}); write it again, or check the suffix"]
    return _table_problems(named, rows, features, column)


def _table_problems(named: str, num_rows: int, features: Features, column: str) -> list[str]:
    problem = column_problem(features, column)
    problems = [f"{named}: {problem}"] if problem else []
    return problems if num_rows else [*problems, f"{named} has no rows; give a data set with text"]


def local_path(dataset_name: str) -> Path | None:
    """The path that a dataset_name means, None if it is a name on the hub ("name" or "owner/name")."""
    path = Path(dataset_name)
    looks_local = path.is_absolute() or dataset_name.startswith((".", "~")) or len(path.parts) > 2
    return path if looks_local or path.exists() else None


def _dataset_problems(name: str, column: str) -> list[str]:
    path, named = local_path(name), f"dataset_name={name}"
    if path is None:
        return []
    if path.is_file():
        return [f"{named} is a file; give it as train_file"]
    if not path.exists():
        return [f"{named} does not exist; check the path (relative to {Path.cwd()})"]
    try:
        saved = load_from_disk(str(path))
    except FileNotFoundError:
        return [f"{named} is a folder that save_to_disk did not write; write it so, or give its files as train_file"]
    except (OSError, ValueError) as error:
        return [f"{named} cannot be read ({' '.join(str(error).split())}); write it again with save_to_disk"]
    if isinstance(saved, Dataset):
        return _table_problems(named, saved.num_rows, saved.features, column)
    if "train" not in saved:
        return [f"{named} has no split 'train', only {', '.join(map(repr, saved))}; rename one of them"]
    return _split_problems(named, saved, column)


def _split_problems(named: str, saved: DatasetDict, column: str) -> list[str]:
    splits = {split: saved[split] for split in ("train", "validation") if split in saved}
    return [
        line
        for split, rows in splits.items()
        for line in _table_problems(f"{named}, split {split!r}", rows.num_rows, rows.features, column)
    ]
