"""From a run's data flags to its token sequences: load, tokenise once, pack.

    train, validation = prepare(config, tokenizer)
    train.batch(index=7, rows=32)    # (32, seq_length), the same whoever asks

Each document is followed by EOS, and documents are packed into rows as config.data.packing says. Empty documents and
NUL characters are left out. Tokens are kept below config.cache_dir, under a key of the documents and the tokenizer, so
that a second start only maps a file.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import datasets
import numpy as np
from datasets import Dataset, IterableDataset
from datasets.fingerprint import Hasher
from transformers import PreTrainedTokenizerBase

from llm_local.config import ConfigError, RunConfig
from llm_local.encoding import REVISION, encode, tokenizer_key
from llm_local.mixture import training_sources, validation_sources
from llm_local.packing import CONCAT, Packed, mark_of
from llm_local.prepared import Job, Prepared, packed_rows, prepare_tokens
from llm_local.sequences import FittedTokens, MixedSequences, PackedTokens, Sequences, StoredSequences, shares
from llm_local.source_problems import data_problems
from llm_local.sources import Documents, load_training, load_validation
from llm_local.streams import StreamedSequences

__all__ = [
    "Data",
    "Sequences",
    "SourceData",
    "ValidationSet",
    "data_problems",
    "prepare",
    "prepare_all",
    "tokenizer_key",
]

VALIDATION_SEED = 0  # mixed, so that a short evaluation sees many documents; the same in every run


@dataclass(frozen=True)
class ValidationSet:
    """Sequences to evaluate on. bytes_per_token: UTF-8 bytes of its text by its tokens, EOS included."""

    name: str
    sequences: Sequences
    bytes_per_token: float


@dataclass(frozen=True)
class SourceData:
    """What a source gives to train on; tokens and how they are packed are not known of a stream."""

    name: str
    weight: float
    sequences: Sequences
    tokens: Prepared | None = None
    packed: Packed | None = None

    def describe(self) -> str:
        """In a line for a person."""
        how = self.packed.describe() if self.packed else "a stream, packed as it is read"
        return f"{self.name}: {how}"


@dataclass(frozen=True)
class Data:
    """What a run trains and evaluates on. The first validation set is the one that a single number speaks of."""

    train: Sequences
    validation: tuple[ValidationSet, ...]
    sources: tuple[SourceData, ...] = ()


def prepare(
    config: RunConfig, tokenizer: PreTrainedTokenizerBase, progress: bool = False
) -> tuple[Sequences, Sequences]:
    """(train, validation) as prepare_all makes them, of the first validation set alone."""
    data = prepare_all(config, tokenizer, progress)
    return data.train, data.validation[0].sequences


def prepare_all(config: RunConfig, tokenizer: PreTrainedTokenizerBase, progress: bool = False) -> Data:
    """The run's sequences; training ones are shuffled by config.train.seed, validation always alike.

    Raises ConfigError for what data_problems finds, a tokenizer without EOS, and a source with too little text for
    one sequence (for validation only if the run evaluates). `progress` shows the progress bars of `datasets`.
    """
    if tokenizer.eos_token_id is None:
        name = tokenizer.name_or_path or type(tokenizer).__name__
        raise ConfigError([f"the tokenizer {name} has no EOS token to end a document; set eos_token in its config"])
    problems = data_problems(config)
    if problems:
        raise ConfigError(problems)
    with _progress_bars(progress):
        given = {
            name: _validate_on(load_validation(config, source), tokenizer, config)
            for name, source in validation_sources(config).items()
        }
        parts: list[SourceData] = []
        held_out = []
        for source in training_sources(config):
            train, validation = load_training(config, source, divide=not given)
            if validation is not None:
                held_out.append(_validate_on(validation, tokenizer, config))
            parts.append(_train_on(train, source.weight, tokenizer, config))
    weights, rows = [part.weight for part in parts], [part.sequences for part in parts]
    if not given:
        given = {"validation": _mixed(held_out, weights)}
    sets = tuple(ValidationSet(name, *found) for name, found in given.items())
    return Data(rows[0] if len(rows) == 1 else MixedSequences(rows, weights, config.train.seed), sets, tuple(parts))


def _mixed(held_out: list[tuple[Sequences, float]], weights: list[float]) -> tuple[Sequences, float]:
    """What was held out of each source as one set with the weights of the training data."""
    if len(held_out) == 1:
        return held_out[0]
    counts = shares(weights)
    bytes_per_token = sum(n * each for n, (_, each) in zip(counts, held_out, strict=True)) / sum(counts)
    return MixedSequences([found for found, _ in held_out], weights, VALIDATION_SEED), bytes_per_token


@contextmanager
def _progress_bars(shown: bool) -> Iterator[None]:
    were_shown = not datasets.are_progress_bars_disabled()
    (datasets.enable_progress_bars if shown else datasets.disable_progress_bars)()
    try:
        yield
    finally:
        (datasets.enable_progress_bars if were_shown else datasets.disable_progress_bars)()


def _validate_on(
    documents: Documents, tokenizer: PreTrainedTokenizerBase, config: RunConfig
) -> tuple[StoredSequences, float]:
    found = _store(documents, tokenizer, config, seed=VALIDATION_SEED)
    if config.train.eval_batches:
        _require_a_sequence(found.sequences, f"{documents.source} (validation)", config)
    return found.sequences, found.tokens.text_bytes / max(1, found.sequences.num_tokens)


def _train_on(documents: Documents, weight: float, tokenizer: PreTrainedTokenizerBase, config: RunConfig) -> SourceData:
    if isinstance(documents.rows, IterableDataset):
        return SourceData(documents.source, weight, _stream(documents, tokenizer, config))
    found = _store(documents, tokenizer, config, seed=config.train.seed)
    _require_a_sequence(found.sequences, documents.source, config)
    return SourceData(documents.source, weight, found.sequences, found.tokens, found.packed)


def _require_a_sequence(sequences: StoredSequences, source: str, config: RunConfig) -> None:
    if not sequences.num_sequences:
        found = f"{source} holds {sequences.num_tokens} tokens"
        needed = f"one sequence needs {config.data.seq_length}"
        raise ConfigError([f"{found}, {needed}; give more text or lower seq_length"])


def _packing(documents: Documents, config: RunConfig) -> str:
    """A running text is one document, and all that can be done with it is to cut it."""
    return CONCAT if documents.running_text else config.data.packing


@dataclass(frozen=True)
class _Stored:
    sequences: StoredSequences
    tokens: Prepared
    packed: Packed


def _store(documents: Documents, tokenizer: PreTrainedTokenizerBase, config: RunConfig, seed: int) -> _Stored:
    """The documents' sequences on disk, made the first time."""
    rows, eos = documents.rows, _eos(tokenizer)
    assert isinstance(rows, Dataset)
    end = None if documents.running_text else eos
    key = Hasher.hash([REVISION, rows._fingerprint, tokenizer_key(tokenizer), documents.column, end])
    job = Job.of(rows, documents.column, tokenizer, end, config.cache_dir / "tokens" / key)
    shown = not datasets.are_progress_bars_disabled()
    title = f"tokenising {documents.source}" if shown else None
    prepared = prepare_tokens(job, key, config.data.preprocessing_num_workers, title)
    last = [np.array([eos], dtype=np.int32)] if documents.running_text else []
    tokens = PackedTokens([*prepared.pieces, *last], config.data.seq_length)
    pieces, packed = packed_rows(prepared, config.data.seq_length, _packing(documents, config))
    fitted = tokens if pieces is None else FittedTokens(tokens, pieces, mark_of(eos))
    if documents.running_text:  # its parts are no documents
        packed = replace(packed, documents=1, cut=int(packed.rows > 1))
    return _Stored(StoredSequences(fitted, seed), prepared, packed)


def _eos(tokenizer: PreTrainedTokenizerBase) -> int:
    eos: Any = tokenizer.eos_token_id
    return eos


def _stream(documents: Documents, tokenizer: PreTrainedTokenizerBase, config: RunConfig) -> StreamedSequences:
    assert isinstance(documents.rows, IterableDataset)
    eos, running = _eos(tokenizer), documents.running_text
    return StreamedSequences(
        documents.rows,
        lambda texts: encode(texts, tokenizer, None if running else eos)[0],
        config.data.seq_length,
        seed=None if running else config.train.seed,
        source=documents.source,
        column=documents.column,
        last=[eos] if running else [],
        packing=_packing(documents, config),
        padding=mark_of(eos),
    )
