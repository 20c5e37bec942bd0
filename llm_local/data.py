"""From a run's data flags to its token sequences: load, tokenise once, pack.

    train, validation = prepare(config, tokenizer)
    train.batch(index=7, rows=32)    # (32, seq_length), the same whoever asks

Each document is followed by EOS; documents are packed end to end. Tokens are kept below config.cache_dir, under a
key of the documents and the tokenizer, so that a second start only maps a file.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import datasets
import numpy as np
from datasets import Dataset, Features, IterableDataset, Value
from datasets.fingerprint import Hasher
from transformers import PreTrainedTokenizerBase

from llm_local.config import ConfigError, RunConfig
from llm_local.sequences import PackedTokens, Sequences, StoredSequences, StreamedSequences
from llm_local.source_problems import data_problems
from llm_local.sources import Documents, load_documents

__all__ = ["Sequences", "data_problems", "prepare"]

REVISION = 1  # counts changes of this file that change the tokens of the same text
VALIDATION_SEED = 0  # mixed, so that a short evaluation sees many documents; the same in every run
MAP_BATCH = 200  # documents tokenised together: bounds memory with documents of a megabyte


def prepare(
    config: RunConfig, tokenizer: PreTrainedTokenizerBase, progress: bool = False
) -> tuple[Sequences, Sequences]:
    """(train, validation) of the run; train is shuffled by config.train.seed, validation always alike.

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
        train, validation = load_documents(config)
        validation_sequences = _store(validation, tokenizer, config, seed=VALIDATION_SEED)
        if config.train.eval_batches:
            _require_a_sequence(validation_sequences, f"{validation.source} (validation)", config)
        if isinstance(train.rows, IterableDataset):
            return _stream(train, tokenizer, config), validation_sequences
        train_sequences = _store(train, tokenizer, config, seed=config.train.seed)
        _require_a_sequence(train_sequences, train.source, config)
    return train_sequences, validation_sequences


@contextmanager
def _progress_bars(shown: bool) -> Iterator[None]:
    were_shown = not datasets.are_progress_bars_disabled()
    (datasets.enable_progress_bars if shown else datasets.disable_progress_bars)()
    try:
        yield
    finally:
        (datasets.enable_progress_bars if were_shown else datasets.disable_progress_bars)()


def _require_a_sequence(sequences: StoredSequences, source: str, config: RunConfig) -> None:
    needed = config.data.seq_length
    if sequences.num_tokens < needed:
        found = f"{source} holds {sequences.num_tokens} tokens"
        raise ConfigError([f"{found}, one sequence needs {needed}; give more text or lower seq_length"])


def _encode(
    batch: dict[str, list[Any]], tokenizer: PreTrainedTokenizerBase, column: str, eos: int | None
) -> dict[str, list[list[int]]]:
    """Token lists of a batch of texts, each ended by `eos` unless that is None; a missing or empty text has none.

    A text may be a list of lines: a block of a running text.
    """
    texts = ["".join(text) for text in batch[column] if text]
    if not texts:
        return {"tokens": []}
    encoded = tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]
    end = [] if eos is None else [eos]
    return {"tokens": [[*tokens, *end] for tokens in encoded]}  # pyright: ignore[reportGeneralTypeIssues]


def _encode_options(documents: Documents, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    eos = None if documents.running_text else tokenizer.eos_token_id
    return {"tokenizer": tokenizer, "column": documents.column, "eos": eos}


def _store(documents: Documents, tokenizer: PreTrainedTokenizerBase, config: RunConfig, seed: int) -> StoredSequences:
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
        features=Features({"tokens": datasets.Sequence(Value("int32"))}),
        fn_kwargs=options,
        num_proc=min(workers, rows.num_rows) if workers > 1 else None,
        # Beside the data, where `datasets` would put it, may be a folder of someone else's
        cache_file_name=str(folder / f"{key}.arrow"),
        new_fingerprint=key,
        load_from_cache_file=True,
        desc=f"tokenising {documents.source}",
    )
    last = [tokenizer.eos_token_id] if documents.running_text else []
    return StoredSequences(PackedTokens(_pieces(tokenised, last), config.data.seq_length), seed)


def _pieces(tokenised: Dataset, last: list[Any]) -> list[np.ndarray]:
    """The token column as consecutive arrays over the mapped file, without a copy, and `last` behind them."""
    chunks = tokenised.data.column("tokens").chunks
    return [chunk.flatten().to_numpy(zero_copy_only=True) for chunk in chunks] + [np.array(last, dtype=np.int32)]


def _stream(documents: Documents, tokenizer: PreTrainedTokenizerBase, config: RunConfig) -> StreamedSequences:
    assert isinstance(documents.rows, IterableDataset)
    options = _encode_options(documents, tokenizer)
    return StreamedSequences(
        documents.rows,
        lambda batch: _encode(batch, **options)["tokens"],
        config.data.seq_length,
        seed=None if documents.running_text else config.train.seed,
        source=documents.source,
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
