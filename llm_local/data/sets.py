"""From a run's data flags to its token sequences: load, tokenise once, pack.

    train, validation = prepare(config, tokenizer)
    train.batch(index=7, rows=32)    # (32, seq_length), the same whoever asks

Each document is followed by EOS, and begins with BOS where the tokenizer begins a text so; documents are packed into
rows as config.data.packing says. Empty documents and NUL characters are left out. Tokens are kept below
config.cache_dir, under a key of the documents and the tokenizer, so that a second start only maps a file.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from datasets import Dataset, IterableDataset
from datasets.fingerprint import Hasher
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from llm_local.adapters.hf_internals import fingerprint_of
from llm_local.config import Config, ConfigError
from llm_local.data.encoding import (
    REVISION,
    count_spelled,
    encode,
    encode_running,
    first_token,
    never_text,
    special_ids,
    tokenizer_key,
)
from llm_local.data.image_processor import load_processor
from llm_local.data.image_sets import prepare_images
from llm_local.data.images import class_names, read_images
from llm_local.data.mixture import TOKENS, Source, training_sources, validation_sources
from llm_local.data.packing import CONCAT, Packed, Pieces, count_openings, mark_of
from llm_local.data.prepared import Job, Prepared, open_tokens, packed_rows, prepare_tokens
from llm_local.data.run_data import (
    OTHER_TEXT,
    VALIDATION_SEED,
    Data,
    ProcessingClass,
    SourceData,
    ValidationSet,
    taken,
    title_of,
)
from llm_local.data.sequences import FittedTokens, MixedSequences, PackedTokens, Sequences, StoredSequences, shares
from llm_local.data.source_problems import data_problems as text_problems
from llm_local.data.source_problems import files_of
from llm_local.data.sources import Documents, load_training, load_validation
from llm_local.data.streams import RowPacking, StreamedSequences, TokensOf
from llm_local.data.token_folder import REPAIR, require_tokenizer
from llm_local.data.tokenizer import load_tokenizer

__all__ = [
    "Data",
    "ProcessingClass",
    "Sequences",
    "SourceData",
    "ValidationSet",
    "class_names",
    "data_problems",
    "key_of",
    "load_processing_class",
    "prepare",
    "prepare_all",
    "tokenizer_key",
    "tokenizer_of",
]


def data_problems(config: Config) -> list[str]:
    """Everything wrong with the run's data sources that shows before training, images themselves left out."""
    if not config.task.reads_images:
        return text_problems(config)
    try:
        read_images(config, again=True)
    except ConfigError as error:
        return error.problems
    return []


def load_processing_class(config: Config, model_config: PretrainedConfig) -> ProcessingClass:
    """The tokenizer, or the image processor of a task that reads images. Raises ConfigError."""
    return load_processor(config, model_config) if config.task.reads_images else load_tokenizer(config)


def tokenizer_of(config: Config) -> PreTrainedTokenizerBase | None:
    """The tokenizer; None of a task that reads images. Raises ConfigError."""
    return None if config.task.reads_images else load_tokenizer(config)


def key_of(processing_class: ProcessingClass) -> str:
    """Changes with what it makes of text or images."""
    if isinstance(processing_class, PreTrainedTokenizerBase):
        return tokenizer_key(processing_class)
    return Hasher.hash(processing_class.to_json_string())


def prepare(
    config: Config, processing_class: ProcessingClass | None, progress: bool = False
) -> tuple[Sequences, Sequences]:
    """(train, validation) as prepare_all makes them, of the first validation set alone."""
    data = prepare_all(config, processing_class, progress)
    return data.train, data.validation[0].sequences


def prepare_all(config: Config, processing_class: ProcessingClass | None, progress: bool = False) -> Data:
    """The run's sequences; training ones are shuffled by config.train.seed, validation always alike.

    processing_class: of text the tokenizer; images need none yet.

    Raises ConfigError for what data_problems finds, a tokenizer without EOS, and a source with too little text for
    one sequence (for validation only if the run evaluates), or images that are none. `progress` shows the progress bars
    of `datasets`.
    """
    if config.task.reads_images:
        with _progress_bars(progress):
            return prepare_images(config)
    assert isinstance(processing_class, PreTrainedTokenizerBase), "text is tokenised"
    tokenizer = processing_class
    if tokenizer.eos_token_id is None:
        name = tokenizer.name_or_path or type(tokenizer).__name__
        raise ConfigError([f"the tokenizer {name} has no EOS token to end a document; set eos_token in its config"])
    problems = data_problems(config)
    if problems:
        raise ConfigError(problems)
    for source in training_sources(config):
        if source.kind == TOKENS:
            require_tokenizer(source.named, Path(source.source), tokenizer)
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
            part = _train_on(train, source.weight, tokenizer, config)
            parts.append(replace(part, title=title_of(source), extent=_extent(source, part)))
    weights, rows = [part.weight for part in parts], [part.sequences for part in parts]
    names = [*given] if given else [part.name for part in parts]
    named = [(part.name, part.tokens) for part in parts]
    for name, each in zip(names, given.values() if given else held_out, strict=True):
        named.append((f"{name} (validation)", each.tokens))
    warnings = _spelled(named, tokenizer)
    if not given:
        given = {"validation": _mixed(held_out, weights)}
    sets = tuple(ValidationSet(name, f.sequences, f.bytes_per_token, f.tokens) for name, f in given.items())
    train = rows[0] if len(rows) == 1 else MixedSequences(rows, weights, config.train.seed)
    return Data(train, sets, tuple(parts), warnings)


def _spelled(found: list[tuple[str, Prepared | None]], tokenizer: PreTrainedTokenizerBase) -> tuple[str, ...]:
    """Where text that spells a special token became one; the tokens of a stream, None, are counted as they are read."""
    lines, could = [], never_text(tokenizer)
    for name, tokens in found:
        if tokens is None:
            lines += [f"{name}: {taken(tokenizer)}, which is counted as the stream is read"] if could else []
        elif tokens.spelled:
            lines.append(f"{name}: {taken(tokenizer)}, {tokens.spelled:,} times; {OTHER_TEXT}")
        elif tokens.spelled is None and (count := _count_old(tokens, tokenizer)):
            then = "was prepared when text that spelled a special token became one"
            lines.append(f"{name} {then}, {count:,} times; prepare it again")
    return tuple(lines)


def _count_old(tokens: Prepared, tokenizer: PreTrainedTokenizerBase) -> int:
    """Special tokens that were made of text, in a folder that does not say so."""
    around = [] if tokens.end is None else [first_token(tokenizer), tokens.end]
    return count_spelled(tokens.pieces, special_ids(tokenizer).values(), tokens.documents, around)


def _extent(source: Source, part: SourceData) -> str:
    if part.tokens is not None and part.packed is not None:
        return f"{part.packed.documents:,} documents of {part.tokens.tokens:,} tokens"
    sizes = [file.stat().st_size for file in files_of(source.source)] if source.kind == "files" else []
    return f"{sum(sizes):,} bytes" if sizes else ""


@dataclass(frozen=True)
class _HeldOut:
    """A set to evaluate on. density: tokens that are predicted by places of its rows."""

    sequences: Sequences
    bytes_per_token: float
    density: float
    tokens: Prepared | None = None


def _mixed(held_out: list[_HeldOut], weights: list[float]) -> _HeldOut:
    """What was held out of each source as one set with the weights of the training data."""
    if len(held_out) == 1:
        return held_out[0]
    counts = [rows * each.density for rows, each in zip(shares(weights), held_out, strict=True)]
    text_bytes = sum(count * each.bytes_per_token for count, each in zip(counts, held_out, strict=True))
    mixed = MixedSequences([each.sequences for each in held_out], weights, VALIDATION_SEED)
    return _HeldOut(mixed, text_bytes / (sum(counts) or 1.0), sum(counts) / sum(shares(weights)))


@contextmanager
def _progress_bars(shown: bool) -> Iterator[None]:
    were_shown = not datasets.are_progress_bars_disabled()
    (datasets.enable_progress_bars if shown else datasets.disable_progress_bars)()
    try:
        yield
    finally:
        (datasets.enable_progress_bars if were_shown else datasets.disable_progress_bars)()


def _validate_on(documents: Documents, tokenizer: PreTrainedTokenizerBase, config: Config) -> _HeldOut:
    found = _store(documents, tokenizer, config, seed=VALIDATION_SEED)
    if config.train.eval_batches:
        _require_a_sequence(found.sequences, f"{documents.source} (validation)", config)
    predicted, tokens = _predicted(found, config), found.sequences.num_tokens
    places = tokens if found.pieces is None else found.packed.rows * found.packed.room
    # of a text of which only a share is predicted there are no bits a byte
    whole = config.task.scored_share(config.data) == 1
    bytes_per_token = found.tokens.text_bytes / max(1, predicted) if whole else 0.0
    return _HeldOut(found.sequences, bytes_per_token, predicted / max(1, places), found.tokens)


def _predicted(found: _Stored, config: Config) -> int:
    """Tokens of a set's text that a model is asked for; of the others it has bytes and no nats.

    Nothing foretells a document's first token where documents are kept apart, or where it begins a padded row. A token
    that begins a row because the one before was full is asked for in principle, and counts as the others on average.
    """
    if config.data.document_mask:
        return found.sequences.num_tokens - found.packed.documents
    openings = 0 if found.pieces is None else count_openings(found.pieces, found.tokens.lengths())
    return found.sequences.num_tokens - openings


def _train_on(documents: Documents, weight: float, tokenizer: PreTrainedTokenizerBase, config: Config) -> SourceData:
    if isinstance(documents.rows, IterableDataset):
        return SourceData(documents.source, weight, _stream(documents, tokenizer, config))
    found = _store(documents, tokenizer, config, seed=config.train.seed, most=config.data.max_train_samples)
    _require_a_sequence(found.sequences, documents.source, config)
    return SourceData(documents.source, weight, found.sequences, found.tokens, found.packed)


def _require_a_sequence(sequences: StoredSequences, source: str, config: Config) -> None:
    if not sequences.num_sequences:
        found = f"{source} holds {sequences.num_tokens} tokens"
        needed = f"one sequence needs {config.data.seq_length}"
        raise ConfigError([f"{found}, {needed}; give more text or lower seq_length"])


def _packing(running_text: bool, config: Config) -> str:
    """A running text is one document, and all that can be done with it is to cut it."""
    return CONCAT if running_text else config.data.packing


@dataclass(frozen=True)
class _Stored:
    """pieces: where the tokens of padded rows are; None: end to end."""

    sequences: StoredSequences
    tokens: Prepared
    packed: Packed
    pieces: Pieces | None


def _store(
    documents: Documents, tokenizer: PreTrainedTokenizerBase, config: Config, seed: int, most: int | None = None
) -> _Stored:
    """The documents' sequences on disk, made the first time; of `most` the first so many."""
    prepared, eos = _tokens(documents, tokenizer, config), _eos(tokenizer)
    running = prepared.end is None
    first, last = (np.array(some, dtype=np.int32) for some in _around(running, tokenizer))
    tokens = PackedTokens([first, *prepared.pieces, last], config.data.seq_length)
    kept = config.cache_dir / "tokens" / prepared.fingerprint
    pieces, packed = packed_rows(prepared, config.data.seq_length, _packing(running, config), kept)
    fitted = tokens if pieces is None else FittedTokens(tokens, pieces, mark_of(eos))
    if running:  # its parts are no documents
        packed = replace(packed, documents=1, cut=int(packed.rows > 1))
    return _Stored(StoredSequences(fitted, seed, most), prepared, packed, pieces)


def _tokens(documents: Documents, tokenizer: PreTrainedTokenizerBase, config: Config) -> Prepared:
    if documents.tokens is not None:
        return open_tokens(documents.tokens, REPAIR)
    rows = documents.rows
    assert isinstance(rows, Dataset)
    end = None if documents.running_text else _eos(tokenizer)
    made_by = [tokenizer_key(tokenizer), first_token(tokenizer)]
    key = Hasher.hash([REVISION, fingerprint_of(rows), *made_by, documents.column, end])
    job = Job(rows, documents.column, tokenizer, end, config.cache_dir / "tokens" / key)
    title = None if datasets.are_progress_bars_disabled() else f"tokenising {documents.source}"
    return prepare_tokens(job, key, config.data.preprocessing_num_workers, title)


def _around(running: bool, tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """What begins and ends a running text; documents have these already."""
    bos = first_token(tokenizer)
    return ([] if bos is None else [bos], [_eos(tokenizer)]) if running else ([], [])


def _eos(tokenizer: PreTrainedTokenizerBase) -> int:
    eos: Any = tokenizer.eos_token_id
    return eos


def _stream(documents: Documents, tokenizer: PreTrainedTokenizerBase, config: Config) -> StreamedSequences:
    assert isinstance(documents.rows, IterableDataset)
    eos, running = _eos(tokenizer), documents.running_text
    first, last = _around(running, tokenizer)
    special, around = never_text(tokenizer).values(), [] if running else [first_token(tokenizer), eos]

    def count(documents: list[list[int]]) -> int:
        flat = np.fromiter(chain.from_iterable(documents), dtype=np.int64)
        return count_spelled([flat], special, len(documents), around)

    def encode_blocks(texts: list[Any] | None, kept: list[str]) -> tuple[list[list[int]], list[str]]:
        tokens, _, kept = encode_running(texts, kept, tokenizer)
        return tokens, kept

    tokens = TokensOf(
        encode=lambda texts: encode(texts, tokenizer, eos)[0],
        running=encode_blocks if running else None,
        first=first,
        last=last,
        count=count,
    )
    packing = RowPacking(config.data.seq_length, _packing(running, config), mark_of(eos))
    seed = None if running else config.train.seed
    return StreamedSequences(documents.rows, tokens, packing, seed, documents.source, documents.column)
