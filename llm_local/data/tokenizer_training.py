"""A new tokenizer, trained on any source of documents; decode(encode(text)) is the text for every text.

    folder = train_tokenizer(texts, "bpe", vocab_size=32_000, target=Path("my_tokenizer"))

unigram and bpe are sentencepiece's, with bytes for what has no piece; byte_bpe is GPT-2's BPE of bytes.
"""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer
from transformers import PreTrainedTokenizerFast

from llm_local.config import Config, ConfigError
from llm_local.data.encoding import joined_text
from llm_local.data.mixture import TOKENS, training_sources
from llm_local.data.sentencepieces import BOS, EOS, EXACT, SPACE_MARK, chunks, from_model, reason_of, train
from llm_local.data.sequences import shares
from llm_local.data.sources import Documents, load_training
from llm_local.files import writing

KINDS = ("unigram", "bpe", "byte_bpe")
SEED = 0
LONG_RUN = re.compile(r"(?:\S{64}|\s{64})(?=.)", re.DOTALL)
LEAST = 256 + 3  # bytes, and what stands for an unknown text, its begin and its end


def sample_texts(config: Config, characters: int) -> Iterator[str]:
    """Texts of the run's training data of so many characters together: of each source its weight's share, drawn at
    random; the first ones of a stream. Raises ConfigError where a source cannot be read."""
    sources = training_sources(config)
    for source in sources:
        if source.kind == TOKENS:
            raise ConfigError([f"{source.named} is a folder of tokens; a tokenizer is trained on text"])
    counts = shares([source.weight for source in sources])
    for source, count in zip(sources, counts, strict=True):
        left = characters * count // sum(counts)
        for text in _texts(load_training(config, source, divide=False)[0]):
            yield text[:left]
            left -= len(text)
            if left <= 0:
                break


def _texts(documents: Documents) -> Iterator[str]:
    rows = documents.rows
    drawn: Any = rows
    if isinstance(rows, Dataset):
        drawn = (rows[int(number)] for number in np.random.default_rng(SEED).permutation(rows.num_rows))
    for row in drawn:
        text = row[documents.column]
        if text:
            yield joined_text(text)


def train_tokenizer(
    texts: Iterable[str],
    kind: str,
    vocab_size: int,
    target: Path,
    progress: bool = False,
    special_tokens: Mapping[str, str] | None = None,
) -> Path:
    """Trains a tokenizer and writes the directory `target` for AutoTokenizer, whole or not at all; of sentencepiece's
    kinds with tokenizer.model beside it. progress: shown on a terminal. special_tokens: have ids behind the pieces.

    The time is linear in the text, of any text, but unigram's: of text without white space 30k characters take 0.2 s of
    a core, 300k 4 s and 3M 87 s, where sentencepiece's bpe takes 0.1, 0.5 and 3 s. To cut runs does not change it.

    Raises ConfigError for a kind that is none, a vocabulary that does not suit the texts, and a target that exists,
    Unwritten where there is no room for it.
    """
    if kind not in KINDS:
        raise ConfigError([f"kind={kind!r} is unknown; choose one of {', '.join(KINDS)}"])
    if vocab_size < LEAST:
        raise ConfigError(
            [f"vocab_size={vocab_size} has no room for the {LEAST} pieces of bytes and text ends; raise it"]
        )
    if target.exists():
        raise ConfigError([f"output={target} exists; remove it, or choose another"])
    model = None
    if kind == "byte_bpe":
        tokenizer = _byte_bpe(texts, vocab_size, progress)
    else:
        model = _sentencepiece(texts, kind, vocab_size)
        tokenizer = from_model(model)
    if len(tokenizer) < vocab_size:
        raise ConfigError(
            [f"vocab_size={vocab_size}: the text gives {len(tokenizer)} pieces; lower it, or give more text"]
        )
    tokenizer.add_special_tokens(dict(special_tokens or {}))
    with writing(target):
        target.parent.mkdir(parents=True, exist_ok=True)
    with writing(target), tempfile.TemporaryDirectory(dir=target.parent, prefix=".unfinished-") as unfinished:
        made = Path(unfinished, "tokenizer")
        tokenizer.save_pretrained(made)
        if model is not None:
            (made / "tokenizer.model").write_bytes(model)
        os.rename(made, target)
    return target


def _sentencepiece(texts: Iterable[str], kind: str, vocab_size: int) -> bytes:
    settings = {**EXACT, "model_type": kind, "vocab_size": vocab_size, "required_chars": SPACE_MARK}
    sample = (chunk for text in texts for chunk in chunks(text))
    try:
        return train(sample, settings)
    except RuntimeError as error:
        repair = "lower it, or give more text" if "too high" in str(error) else "raise it, or give other text"
        raise ConfigError([f"vocab_size={vocab_size}: {reason_of(error)}; {repair}"]) from error


def cut_runs(text: str) -> Iterator[str]:
    """The text, cut within long runs without white space: what is learned of a word takes the square of its length."""
    start = 0
    for found in LONG_RUN.finditer(text):
        yield text[start : found.end()]
        start = found.end()
    yield text[start:]


def _byte_bpe(texts: Iterable[str], vocab_size: int, progress: bool) -> PreTrainedTokenizerFast:
    tokenizer: Any = Tokenizer(BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = BpeTrainer(
        vocab_size=vocab_size, special_tokens=[BOS, EOS], initial_alphabet=alphabet, show_progress=progress
    )
    tokenizer.train_from_iterator((part for text in texts for part in cut_runs(text)), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=BOS, eos_token=EOS, clean_up_tokenization_spaces=False
    )
