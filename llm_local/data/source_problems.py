"""What is wrong with the data a run names, seen before training: one plain line each, with value, place and repair."""

from __future__ import annotations

import glob
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.ipc
import pyarrow.parquet
from datasets import Dataset, Features, Value, load_from_disk

from llm_local.config import Config, ConfigError, from_here
from llm_local.data import corpus
from llm_local.data.mixture import BUILTIN, DIGITS, SAVED, TOKENS, Source, training_sources, validation_sources
from llm_local.data.text_files import (
    FORMATS,
    PACKED,
    TEXT_FORMATS,
    UnreadableText,
    format_of,
    lines_before,
    lines_of,
    missing_column,
    pieces_of,
)
from llm_local.data.token_folder import folder_problems, is_token_folder, read_card
from llm_local.flags import DataArguments

CHECKED_BYTES = 64 << 20  # of a source before training: a second; a line further on is named when it is read
PROBLEMS_A_FILE = 3
STRINGS = ("string", "large_string")
TEXT_TYPES = (*STRINGS, "string_view", "null")  # null: each text is missing, and so each document empty, as in JSON
TABLES_CHECKED = 200  # files of a source whose footer is read before training


def data_problems(config: Config) -> list[str]:
    """Everything wrong with the run's data sources that shows before training. A hub name is not looked up."""
    try:
        sources = [*training_sources(config), *validation_sources(config).values()]
    except ConfigError as error:
        return error.problems
    problems = [problem for source in sources for problem in source_problems(source)]
    return problems or [
        line for source in sources if source.kind == TOKENS for line in _division_problems(config, source)
    ]


def source_problems(source: Source) -> list[str]:
    """What is wrong with one source, as far as it is looked at before training."""
    if source.kind == "object":
        given = "give it again (llm_local.prepare), or name another data set"
        return [] if source.rows is not None else [f"{source.named} was an object of a Python program; {given}"]
    if source.kind == DIGITS:
        return [f"{source.named} are images; set task=image-classification, or name another data set"]
    if source.kind == BUILTIN:
        return builtin_problems(corpus.stdlib_folder())
    if source.kind == TOKENS:
        return _tokens_problems(source)
    if source.kind == "saved":
        return _saved_problems(source)
    return _files_problems(source) if source.kind == "files" else []


def uses_builtin(config: Config) -> bool:
    data = config.data
    return not data.data_mixture and not data.train_file and data.dataset_name in (None, BUILTIN)


def builtin_problems(folder: Path) -> list[str]:
    if corpus.source_files(folder):
        return []
    return [f"the built-in corpus needs .py files in {folder}, which has none; give train_file or dataset_name"]


def files_of(source: str) -> list[Path]:
    """The files that a name means: itself, a directory's text files at any depth, or what matches a glob; sorted.

    Of several, empty files and those that a dot hides are left out.
    """
    path = Path(source)
    if path.is_file():
        return [path]
    found = path.rglob("*") if path.is_dir() else map(Path, glob.glob(source, recursive=True))
    visible = (file for file in found if file.is_file() and not any(part.startswith(".") for part in file.parts[-1:]))
    return sorted(file for file in visible if file.stat().st_size and (not path.is_dir() or format_of(file)))


def file_problems(source: Source, checked_bytes: int = CHECKED_BYTES) -> list[str]:
    """Problems of a source's files, from their first checked_bytes and at most PROBLEMS_A_FILE lines of a file."""
    problems, tables = [], 0
    for path in files_of(source.source):
        if format_of(path) in TEXT_FORMATS:
            if checked_bytes > 0:
                problems += list(islice(_line_problems(source, path, checked_bytes), PROBLEMS_A_FILE))
            checked_bytes -= path.stat().st_size
        elif tables < TABLES_CHECKED:
            tables += 1
            problems += _table_file_problems(source, path)
        if len(problems) >= PROBLEMS_A_FILE:
            break
    return problems


def _files_problems(source: Source) -> list[str]:
    named, path = source.named, Path(source.source)
    if not path.exists() and not glob.has_magic(source.source):
        return [f"{named} does not exist; check the path (relative to {Path.cwd()})"]
    if path.is_dir() and any((path / name).exists() for name in SAVED):
        return [f"{named} is a folder from save_to_disk, which goes into dataset_name"]
    if is_token_folder(path):
        return [f"{named} is a folder of tokens, which goes into dataset_name"]
    if path.is_file() and path.stat().st_size == 0:
        return [f"{named} is empty; give a file with text"]
    files, known = files_of(source.source), ", ".join(FORMATS)
    if not files and path.is_dir():
        return [f"{named} is a directory without a file of text; put files there that end in one of {known}"]
    if not files:
        return [f"{named} matches no file that holds anything; check the pattern{from_here(path)}"]
    for file in files:
        if format_of(file) is None:
            suffixes = "".join(file.suffixes[-2:] if file.suffix in PACKED else file.suffixes[-1:])
            return [f"{_place(source, file)} has the unknown suffix {suffixes!r}; use one of {known}"]
    first, other = files[0], next((file for file in files if format_of(file) != format_of(files[0])), None)
    if other is not None:
        return [f"{named} holds {first.name} and {other.name}, which are read differently; give files of one kind"]
    return file_problems(source)


def _place(source: Source, path: Path) -> str:
    return source.named if Path(source.source) == path else f"{source.named}: {path}"


def _line_problems(source: Source, path: Path, checked_bytes: int) -> Iterator[str]:
    kind, checked = format_of(path), 0
    assert kind is not None
    try:
        for piece in pieces_of(path, whole=False):
            for line in lines_of(piece, kind, source.text_column):
                if line.problem:
                    yield f"{_place(source, path)}, line {lines_before(piece) + line.number}: {line.problem}"
                checked += len(line.text)
                if checked > checked_bytes:
                    return
    except UnreadableText as error:
        yield f"{_place(source, path)}{str(error).removeprefix(str(path))}"


def column_problem(features: Features, column: str) -> str:
    """What keeps `column` from being the text, '' if nothing does."""
    if column not in features:
        return missing_column(column, list(features))
    feature: Any = features[column]
    if isinstance(feature, Value) and feature.dtype in TEXT_TYPES:
        return ""
    kind = feature.dtype if isinstance(feature, Value) else type(feature).__name__
    return f"column {column!r} holds {kind}, not text; set text_column_name to one of strings"


def _table_file_problems(source: Source, path: Path) -> list[str]:
    named, kind = _place(source, path), format_of(path)
    try:
        rows, schema = _rows_and_schema(path)
        features = Features.from_arrow_schema(schema)
    except (pyarrow.ArrowException, OSError) as error:
        reason = " ".join(str(error).split())
        return [f"{named} is not a file of {kind} ({reason}); write it again, or check the suffix"]
    return _table_problems(named, rows, features, source.text_column)


def table_features(files: list[Path], column: str) -> Features:
    """The columns of files of one kind, each as the first file has it in which it is not all missing."""
    found: dict[str, Any] = {}
    for path in files:
        for name, feature in Features.from_arrow_schema(_rows_and_schema(path)[1]).items():
            if name not in found or _is_missing(found[name]):
                found[name] = feature
        if not any(map(_is_missing, found.values())):
            break
    if column in found and found[column].dtype not in STRINGS:
        found[column] = Value("large_string")
    return Features(found)


def _is_missing(feature: Any) -> bool:
    return isinstance(feature, Value) and feature.dtype == "null"


def _rows_and_schema(path: Path) -> tuple[int, pyarrow.Schema]:
    """Of a table on disk, from its footer; of an arrow stream, which has none, only whether there are rows."""
    if format_of(path) == "parquet":
        file = pyarrow.parquet.ParquetFile(path)
        return file.metadata.num_rows, file.schema_arrow
    with pyarrow.memory_map(str(path)) as memory:
        try:
            stream = pyarrow.ipc.open_stream(memory)
            return next((batch.num_rows for batch in stream if batch.num_rows), 0), stream.schema
        except pyarrow.ArrowInvalid:
            table = pyarrow.ipc.open_file(memory)
            return sum(table.get_batch(n).num_rows for n in range(table.num_record_batches)), table.schema


def _table_problems(named: str, num_rows: int, features: Features, column: str) -> list[str]:
    problem = column_problem(features, column)
    problems = [f"{named}: {problem}"] if problem else []
    return problems if num_rows else [*problems, f"{named} has no rows; give a data set with text"]


def _saved_problems(source: Source) -> list[str]:
    path, named = Path(source.source), source.named
    if path.is_file():
        return [f"{named} is a file; give it as train_file"]
    if not path.exists():
        return [f"{named} does not exist; check the path (relative to {Path.cwd()})"]
    try:
        saved = load_from_disk(str(path))
    except FileNotFoundError:
        return [f"{named} is no clone of the hub's and not from save_to_disk; give a folder of files as train_file"]
    except (OSError, ValueError) as error:
        return [f"{named} cannot be read ({' '.join(str(error).split())}); write it again with save_to_disk"]
    if isinstance(saved, Dataset):
        if source.split not in (None, "train"):
            return [f"{named} has no splits, and {source.split!r} was asked for; leave the split out"]
        return _table_problems(named, saved.num_rows, saved.features, source.text_column)
    train, validation = wanted_splits(source, [str(split) for split in saved])
    missing = [split for split in (train, validation) if split is not None and split not in saved]
    if missing:
        return [missing_split(named, missing[0], [str(split) for split in saved])]
    return [
        line
        for split in (train, validation)
        if split is not None
        for line in _table_problems(
            f"{named}, split {split!r}", saved[split].num_rows, saved[split].features, source.text_column
        )
    ]


def _tokens_problems(source: Source) -> list[str]:
    named = source.named
    if source.streaming:
        return [f"{named} is a folder of tokens, which is read in any order and not as a stream; leave streaming out"]
    if source.split or source.validation_split or source.config or source.revision:
        return [f"{named} is a folder of tokens, with one set to train and one to validate on; name no split or config"]
    return folder_problems(named, Path(source.source))


def _division_problems(config: Config, source: Source) -> list[str]:
    """A percentage that is asked for, and is not the one by which the folder was made."""
    asked, made = config.data.validation_split_percentage, read_card(Path(source.source)).validation_split_percentage
    if asked in (made, DataArguments.validation_split_percentage):
        return []
    how = f"was divided with validation_split_percentage={made}"
    return [f"{source.named} {how}; leave validation_split_percentage={asked} out, or prepare the text again with it"]


def wanted_splits(source: Source, found: list[str]) -> tuple[str, str | None]:
    """The split to train on and that to validate on, None for one that is to be held out."""
    default = "validation" if "validation" in found else None
    return source.split or "train", source.validation_split or default


def missing_split(named: str, split: str, found: list[str]) -> str:
    instead = "name one of them (dataset_split)" if len(found) > 1 else "rename it, or set dataset_split"
    return f"{named} has no split {split!r}, only {', '.join(map(repr, found))}; {instead}"
