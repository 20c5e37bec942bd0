"""From a run's data flags to its token sequences: load, tokenise once, pack.

    train, validation = prepare(config, tokenizer)
    train.batch(index=7, rows=32)    # (32, seq_length), the same whoever asks

Each document is followed by EOS; documents are packed end to end. Empty documents and NUL characters are left out.
Tokens are kept below config.cache_dir, under a key of the documents and the tokenizer, so that a second start only maps
a file.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import datasets
import numpy as np
from datasets import Dataset, Features, IterableDataset, Value
from datasets.fingerprint import Hasher
from transformers import PreTrainedTokenizerBase

from llm_local.config import ConfigError, RunConfig
from llm_local.mixture import training_sources, validation_sources
from llm_local.sequences import MixedSequences, PackedTokens, Sequences, StoredSequences, shares
from llm_local.source_problems import data_problems
from llm_local.sources import Documents, load_training, load_validation
from llm_local.streams import StreamedSequences

__all__ = ["Data", "Sequences", "ValidationSet", "data_problems", "prepare", "prepare_all"]

REVISION = 2  # counts changes of this file that change the tokens of the same text
VALIDATION_SEED = 0  # mixed, so that a short evaluation sees many documents; the same in every run
MAP_BATCH = 200  # documents tokenised together: bounds memory with documents of a megabyte
CUT_CHARACTERS = 1 << 20  # a longer text is tokenised in parts, for a tokenizer takes many times its memory
CUT_SEARCHED = 10_000  # characters before the cut that are searched for a better place
WORD_END = re.compile(r"\S(?=\s)")


@dataclass(frozen=True)
class ValidationSet:
    """Sequences to evaluate on. bytes_per_token: UTF-8 bytes of its text by its tokens, EOS included."""

    name: str
    sequences: Sequences
    bytes_per_token: float


@dataclass(frozen=True)
class Data:
    """What a run trains and evaluates on. The first validation set is the one that a single number speaks of."""

    train: Sequences
    validation: tuple[ValidationSet, ...]


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
        sources = training_sources(config)
        parts: list[Sequences] = []
        held_out = []
        for source in sources:
            train, validation = load_training(config, source, divide=not given)
            if validation is not None:
                held_out.append(_validate_on(validation, tokenizer, config))
            parts.append(_train_on(train, tokenizer, config))
    weights = [source.weight for source in sources]
    if not given:
        given = {"validation": _mixed(held_out, weights)}
    sets = tuple(ValidationSet(name, *found) for name, found in given.items())
    return Data(parts[0] if len(parts) == 1 else MixedSequences(parts, weights, config.train.seed), sets)


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
    sequences, text_bytes = _store(documents, tokenizer, config, seed=VALIDATION_SEED)
    if config.train.eval_batches:
        _require_a_sequence(sequences, f"{documents.source} (validation)", config)
    return sequences, text_bytes / max(1, sequences.num_tokens)


def _train_on(documents: Documents, tokenizer: PreTrainedTokenizerBase, config: RunConfig) -> Sequences:
    if isinstance(documents.rows, IterableDataset):
        return _stream(documents, tokenizer, config)
    sequences, _ = _store(documents, tokenizer, config, seed=config.train.seed)
    _require_a_sequence(sequences, documents.source, config)
    return sequences


def _require_a_sequence(sequences: StoredSequences, source: str, config: RunConfig) -> None:
    needed = config.data.seq_length
    if sequences.num_tokens < needed:
        found = f"{source} holds {sequences.num_tokens} tokens"
        raise ConfigError([f"{found}, one sequence needs {needed}; give more text or lower seq_length"])


def _encode(
    batch: dict[str, list[Any]], tokenizer: PreTrainedTokenizerBase, column: str, eos: int | None
) -> dict[str, list[Any]]:
    """Token lists of a batch of texts, each ended by `eos` unless that is None, and the texts' sizes in UTF-8; a
    missing or empty text has none.

    A text may be a list of lines: a block of a running text.
    """
    texts = ["".join(text).replace("\0", "") for text in batch[column] if text]
    texts = [text for text in texts if text]
    if not texts:
        return {"tokens": [], "bytes": []}
    cut = [_parts(text) for text in texts]
    flat = [part for parts in cut for part in parts]
    encoded: Any = tokenizer(flat, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]
    end, tokens = [] if eos is None else [eos], iter(encoded)
    joined = [[token for _ in parts for token in next(tokens)] + end for parts in cut]
    return {"tokens": joined, "bytes": [len(text.encode()) for text in texts]}


def _parts(text: str) -> list[str]:
    """The text in parts of CUT_CHARACTERS at most, each but the first beginning with white space where some is near."""
    parts, start = [], 0
    while len(text) - start > CUT_CHARACTERS:
        end = start + CUT_CHARACTERS
        words_end = [found.start() for found in WORD_END.finditer(text, max(start, end - CUT_SEARCHED), end)]
        end = words_end[-1] + 1 if words_end else end
        parts.append(text[start:end])
        start = end
    return [*parts, text[start:]]


def _encode_options(documents: Documents, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    eos = None if documents.running_text else tokenizer.eos_token_id
    return {"tokenizer": tokenizer, "column": documents.column, "eos": eos}


def _store(
    documents: Documents, tokenizer: PreTrainedTokenizerBase, config: RunConfig, seed: int
) -> tuple[StoredSequences, int]:
    """The sequences of the documents, and how many bytes of UTF-8 all of their text has."""
    rows = documents.rows
    assert isinstance(rows, Dataset)
    options, workers = _encode_options(documents, tokenizer), config.data.preprocessing_num_workers
    key = Hasher.hash([REVISION, rows._fingerprint, tokenizer_key(tokenizer), options["column"], options["eos"]])
    folder = config.cache_dir / "tokens"
    folder.mkdir(parents=True, exist_ok=True)
    tokenised = rows.map(
        _encode,
        batched=True,
        batch_size=MAP_BATCH,
        remove_columns=rows.column_names,
        features=Features({"tokens": datasets.Sequence(Value("int32")), "bytes": Value("int64")}),
        fn_kwargs=options,
        num_proc=min(workers, rows.num_rows) if workers > 1 else None,
        # Beside the data, where `datasets` would put it, may be a folder of someone else's
        cache_file_name=str(folder / f"{key}.arrow"),
        new_fingerprint=key,
        load_from_cache_file=True,
        desc=f"tokenising {documents.source}",
    )
    last = [tokenizer.eos_token_id] if documents.running_text else []
    text_bytes = sum(int(chunk.to_numpy().sum()) for chunk in tokenised.data.column("bytes").chunks)
    return StoredSequences(PackedTokens(_pieces(tokenised, last), config.data.seq_length), seed), text_bytes


def _pieces(tokenised: Dataset, last: list[Any]) -> list[np.ndarray]:
    """The token column as consecutive arrays over the mapped file, without a copy, and `last` behind them."""
    chunks = tokenised.data.column("tokens").chunks
    return [chunk.flatten().to_numpy(zero_copy_only=True) for chunk in chunks] + [np.array(last, dtype=np.int32)]


def _stream(documents: Documents, tokenizer: PreTrainedTokenizerBase, config: RunConfig) -> StreamedSequences:
    assert isinstance(documents.rows, IterableDataset)
    options = _encode_options(documents, tokenizer)
    return StreamedSequences(
        documents.rows,
        lambda texts: _encode({documents.column: texts}, **options)["tokens"],
        config.data.seq_length,
        seed=None if documents.running_text else config.train.seed,
        source=documents.source,
        column=documents.column,
        last=[tokenizer.eos_token_id] if documents.running_text else [],  # pyright: ignore[reportArgumentType]
    )


def tokenizer_key(tokenizer: PreTrainedTokenizerBase) -> str:
    """A key of what the tokenizer does to text, the same in each process.

    A fast tokenizer is hashed by its JSON less truncation and padding, which a call changes; any other is pickled.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return Hasher.hash(tokenizer)
    rules = json.loads(backend.to_str())
    return Hasher.hash([rules | {"truncation": None, "padding": None}, tokenizer.eos_token_id])
