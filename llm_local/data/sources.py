"""From a source to two sets of documents, training and validation: the built-in corpus, files, a folder written by
save_to_disk or prepare_data.py, or a data set from the hub.

What a document is: a file of the built-in corpus, a row of the others. A single .txt file is one running text: its
rows are its lines with their newlines, as in transformers' run_clm, and what joins them is the text itself, so nothing
is put between them and their order is kept. Of several .txt files each is a document. Text made of many documents
belongs into .jsonl, one a line.
"""

from __future__ import annotations

import glob
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow
from datasets import Dataset, Features, IterableDataset, load_dataset, load_from_disk
from datasets.exceptions import DatasetGenerationError, DatasetsError

from llm_local.config import Config, ConfigError
from llm_local.data.corpus import builtin_corpus
from llm_local.data.mixture import BUILTIN, TOKENS, Source, local_path
from llm_local.data.parts import read
from llm_local.data.source_problems import column_problem, files_of, missing_split, table_features, wanted_splits
from llm_local.data.text_files import TEXT_FORMATS, UnreadableText, format_of, missing_column, read_texts
from llm_local.data.text_parts import TextFiles, convert, features_of
from llm_local.data.token_folder import REPAIR, TRAIN, VALIDATION
from llm_local.files import Unwritten

# Not the run's seed: runs that differ in their seed are compared on the same validation documents.
SPLIT_SEED = 0
STREAM_PROBE = 10_000  # documents of a stream of which the first few percent are held out
BLOCK_LINES = 200  # of a .txt file that are tokenised in one go
REPAIR_OF_HUB = "check the name, its config, split and revision, or give a folder from save_to_disk"
REPAIRS = {  # by what `datasets` says
    "zstd not supported": "its files are .zst: pip install zstandard",
    "contain any data files": "put files of one kind there; `datasets` takes brackets in its path for a pattern",
    "scripts are no longer supported": "set the revision refs/convert/parquet, or give a folder from save_to_disk",
}
# What `datasets` raises for a name, a script that it no longer runs, a package that is missing, or a damaged file
UNREADABLE = (DatasetsError, pyarrow.ArrowException, ValueError, OSError, EOFError, RuntimeError, ImportError)


@dataclass(frozen=True)
class Documents:
    """Rows with a column of text, or of token numbers (encoding.IDS). `source` is how a message names them;
    `running_text`: rows are lines of one text.

    tokens: the folder of the rows where they are tokens already (prepared.py), and no text.
    """

    rows: Dataset | IterableDataset
    column: str
    source: str
    running_text: bool = False
    tokens: Path | None = None


def load_training(config: Config, source: Source, divide: bool) -> tuple[Documents, Documents | None]:
    """Training and validation documents of a source, disjoint; the latter None unless `divide`. Raises ConfigError
    if they can't be read or divided.

    Validation is the split of the data set for that, else held out: validation_split_percentage of the documents,
    drawn by a fixed seed (of a running text its last lines). Of a stream it is the first few: that percentage of the
    first STREAM_PROBE documents. A stream's validation documents are read at once, STREAM_PROBE at most.
    """
    if source.kind == TOKENS:
        train, validation = (_read_tokens(source, name) for name in (TRAIN, VALIDATION))
        return train, validation if divide else None
    train, validation = _read(config, source, divide)
    if not divide:
        return in_blocks(train), None
    if validation is None:
        split = hold_out_stream if isinstance(train.rows, IterableDataset) else hold_out
        train, validation = or_refused(source, lambda: split(train, config.data.validation_split_percentage))
    return in_blocks(train), in_blocks(validation)


def load_validation(config: Config, source: Source) -> Documents:
    """The documents of validation_file, validation_files or eval_dataset, all of them. Raises ConfigError."""
    if source.kind == "object":
        return Documents(source.rows, source.text_column, source.named)
    return in_blocks(_read_files(config, replace(source, streaming=False)))


def in_blocks(documents: Documents) -> Documents:
    """Rows of BLOCK_LINES lines for a running text: a tokenizer sees the text across line ends, blank lines too."""
    if not documents.running_text:
        return documents
    return replace(documents, rows=documents.rows.batch(BLOCK_LINES))


def _read(config: Config, source: Source, divide: bool) -> tuple[Documents, Documents | None]:
    if source.kind == "files":
        return _read_files(config, source), None
    if source.kind == "object":
        return Documents(source.rows, source.text_column, source.named), None
    if source.kind == BUILTIN:
        rows = builtin_corpus(config.cache_dir)
        return Documents(rows.to_iterable_dataset() if source.streaming else rows, "text", "the built-in corpus"), None
    splits = read_saved(source) if source.kind == "saved" else read_hub(config, source)
    return from_splits(splits, source, divide)


def or_refused(source: Source, read: Callable[[], Any]) -> Any:
    """What `read` returns. Raises ConfigError naming the source where a document cannot be read."""
    try:
        return read()
    except DatasetGenerationError as error:
        cause = error.__cause__ or error
        line = str(cause) if isinstance(cause, UnreadableText) else f"cannot be read ({_reason(cause)})"
    except UnreadableText as error:
        cause, line = error, str(error)
    except UNREADABLE as error:
        if isinstance(error, (ConfigError, Unwritten)):
            raise
        cause, line = error, f"cannot be read ({_reason(error)})"
    rest = line.removeprefix(source.source)
    raise ConfigError([f"{source.named}{rest if rest != line else f': {line}'}"]) from cause


def _reason(error: BaseException) -> str:
    return " ".join(str(error.__cause__ or error).split())


def _read_files(config: Config, source: Source) -> Documents:
    files, column = files_of(source.source), source.text_column
    kind = format_of(files[0])
    whole = kind == "text" and len(files) > 1
    assert kind is not None
    if kind not in TEXT_FORMATS:
        return Documents(_read_tables(config, source, kind, files), column, source.named)
    texts = TextFiles(files, kind, column, whole)

    def load() -> Dataset | IterableDataset:
        if source.streaming:
            options = {"pieces": texts.pieces(), "kind": kind, "column": column, "whole": whole}
            return IterableDataset.from_generator(read_texts, features=features_of(column), gen_kwargs=options)
        title = None if datasets.are_progress_bars_disabled() else f"reading {source.named}"
        return convert(texts, config.cache_dir, config.data.preprocessing_num_workers, title)

    rows = or_refused(source, load)
    return Documents(rows, column, source.named, running_text=kind == "text" and not whole)


def _read_tables(config: Config, source: Source, kind: str, files: list[Path]) -> Dataset | IterableDataset:
    column = source.text_column
    features = or_refused(source, lambda: table_features(files, column))
    options: dict[str, Any] = {"columns": [column]} if kind == "parquet" else {}
    options |= {"features": Features({column: features[column]}) if options else features}
    options |= {"streaming": source.streaming, "cache_dir": str(config.cache_dir / "datasets")}
    data_files = {"train": [glob.escape(str(file.resolve())) for file in files]}  # brackets would make a pattern
    rows = or_refused(source, lambda: load_dataset(kind, data_files=data_files, split="train", **options))
    _check_column(source.named, rows, source.text_column)
    return _only(rows, source.text_column)


def _read_tokens(source: Source, name: str) -> Documents:
    folder = Path(source.source, name)
    return Documents(read(folder, REPAIR), "tokens", source.named, tokens=folder)


def read_saved(source: Source) -> dict[str, Any]:
    saved = load_from_disk(source.source)
    splits: dict[str, Any] = {"train": saved} if isinstance(saved, Dataset) else {str(k): saved[k] for k in saved}
    wanted = source.split or "train"
    return splits | ({wanted: splits[wanted].to_iterable_dataset()} if source.streaming and wanted in splits else {})


def read_hub(config: Config, source: Source) -> dict[str, Any]:
    options: dict[str, Any] = {"revision": source.revision, "streaming": source.streaming}
    options["cache_dir"] = str(config.cache_dir / "datasets")
    clone = local_path(source.source)
    name = source.source if clone is None else str(clone.resolve())  # "json" alone would be a reader of datasets
    try:
        if source.split is None and source.validation_split is None:
            saved: Any = load_dataset(name, source.config, **options)
            return dict(saved)
        splits = [split for split in (source.split or "train", source.validation_split) if split]
        return {split: load_dataset(name, source.config, split=split, **options) for split in splits}
    except UNREADABLE as error:
        reason = _reason(error)
        repair = next((repair for cause, repair in REPAIRS.items() if cause in reason), REPAIR_OF_HUB)
        raise ConfigError([f"{source.named} cannot be loaded ({reason}); {repair}"]) from error


def from_splits(splits: dict[str, Any], source: Source, divide: bool = True) -> tuple[Documents, Documents | None]:
    """The splits to train and, with `divide`, to validate on; any other is left alone. Raises ConfigError."""
    train, validation = wanted_splits(source, list(splits))
    found = []
    for name in [train] if validation is None or not divide else [train, validation]:
        if name not in splits:
            raise ConfigError([missing_split(source.named, name, list(splits))])
        _check_column(f"{source.named}, split {name!r}", splits[name], source.text_column)
        rows = _only(splits[name], source.text_column)
        found.append(Documents(rows, source.text_column, source.named, source.running_text))
    if len(found) > 1 and isinstance(found[1].rows, IterableDataset):
        texts = or_refused(source, lambda: _first_texts(found[1], STREAM_PROBE))
        found[1] = replace(found[1], rows=Dataset.from_dict({source.text_column: texts}))
    return found[0], found[1] if len(found) > 1 else None


def _check_column(named: str, rows: Any, column: str) -> None:
    problem = column_problem(rows.features, column) if rows.features else ""
    if problem:
        raise ConfigError([f"{named}: {problem}"])


def _only(rows: Any, column: str) -> Dataset | IterableDataset:
    """Without the other columns, unless the stream does not know its columns before it is read."""
    rows = rows.select_columns([column]) if rows.features else rows
    if isinstance(rows, IterableDataset) and rows.features and rows.features[column].dtype == "string_view":
        return rows.map(dict, batched=True, features=features_of(column))  # `datasets` cannot shuffle views
    return rows


def hold_out(train: Documents, percentage: int) -> tuple[Documents, Documents]:
    """Divides the documents: drawn by SPLIT_SEED, in file order; of a running text the last lines. One at least."""
    rows = train.rows
    assert isinstance(rows, Dataset)
    _require_two(train, rows.num_rows)
    kept, held = divide(rows.num_rows, percentage, in_order=train.running_text)
    return replace(train, rows=rows.select(kept)), replace(train, rows=rows.select(held))


def divide(count: int, percentage: int, in_order: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """Numbers of the rows to train on and of those held out, drawn by SPLIT_SEED or the last ones; each sorted."""
    numbers = np.arange(count) if in_order else np.random.default_rng(SPLIT_SEED).permutation(count)
    kept = count - _held_out(count, percentage)
    return np.sort(numbers[:kept]), np.sort(numbers[kept:])


def hold_out_stream(train: Documents, percentage: int) -> tuple[Documents, Documents]:
    """Divides a stream: the first documents, read now, are the validation; training begins behind them."""
    assert isinstance(train.rows, IterableDataset)
    probed = sum(1 for _ in islice(train.rows, STREAM_PROBE))
    _require_two(train, probed)
    held = _held_out(probed, percentage)
    validation = Dataset.from_dict({train.column: _first_texts(train, held)})
    return replace(train, rows=train.rows.skip(held)), replace(train, rows=validation)


def _held_out(count: int, percentage: int) -> int:
    return min(count - 1, max(1, round(count * percentage / 100)))


def _require_two(train: Documents, documents: int) -> None:
    if documents < 2:
        kind = "line" if train.running_text else "document"
        raise ConfigError([f"{train.source} holds {documents} {kind}, which cannot be divided; add validation text"])


def _first_texts(documents: Documents, count: int) -> list[str]:
    texts = []
    for row in islice(documents.rows, count):
        if documents.column not in row:
            raise ConfigError([f"{documents.source}: {missing_column(documents.column, list(row))}"])
        texts.append(row[documents.column])
    return texts
