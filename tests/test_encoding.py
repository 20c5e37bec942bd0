"""The tokens of a text do not show where it was cut, whatever a tokenizer does at the beginning of what it is given."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_tokenizer_training import model_file
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import ByT5Tokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from llm_local.config import from_flat
from llm_local.data import corpus, encoding, prepared
from llm_local.data.encoding import encode, encode_running, find_cut
from llm_local.data.sets import prepare_all
from llm_local.data.tokenizer import load_tokenizer

SOURCES = list(corpus.documents(corpus.stdlib_folder() / "json"))
DRAW = random.Random(0)
LETTERS = "".join(chr(DRAW.randrange(0x4E00, 0x4E80)) for _ in range(9_000))
TEXTS = {
    "sources": "".join(SOURCES)[:30_000],
    "no white space": LETTERS,
    "digits": "".join(DRAW.choices("0123456789", k=9_000)),
    "many spaces": "".join(DRAW.choice(["word", " ", "  ", " " * 700, "\n\n", "\t"]) for _ in range(150)),
    "one letter": "a" * 9_000,
}


def trained(model: Any, trainer: Any, before: Any = None, normalizer: Any = None) -> PreTrainedTokenizerBase:
    tokenizer: Any = Tokenizer(model)
    if before is not None:
        tokenizer.pre_tokenizer = before
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    lines = [line for text in [*SOURCES, LETTERS[:2000]] for line in text.splitlines(keepends=True)]
    tokenizer.train_from_iterator(lines, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>")


def bpe(before: Any = None, normalizer: Any = None) -> PreTrainedTokenizerBase:
    alphabet = pre_tokenizers.ByteLevel.alphabet() if before is not None else []
    trainer = trainers.BpeTrainer(
        vocab_size=700, special_tokens=["<unk>", "<eos>"], initial_alphabet=alphabet, show_progress=False
    )
    return trained(models.BPE(unk_token="<unk>", fuse_unk=True), trainer, before, normalizer)


def unigram(before: Any) -> PreTrainedTokenizerBase:
    trainer = trainers.UnigramTrainer(
        vocab_size=700, special_tokens=["<unk>", "<eos>"], unk_token="<unk>", show_progress=False
    )
    return trained(models.Unigram(), trainer, before)


def sentencepiece(folder: Path, **settings: Any) -> PreTrainedTokenizerBase:
    return load_tokenizer(from_flat({"tokenizer_name": str(model_file(folder, SOURCES, **settings))}))


LLAMA = {"model_type": "bpe", "byte_fallback": True, "normalization_rule_name": "identity"}
LLAMA |= {"remove_extra_whitespaces": False}


def in_threes() -> Any:
    digits = pre_tokenizers.Split(Regex(r"\p{N}{1,3}"), "isolated")
    return pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])  # pyright: ignore[reportArgumentType]


def spaces_marked() -> Any:
    return normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])  # pyright: ignore[reportArgumentType]


TOKENIZERS: dict[str, Callable[[Path], PreTrainedTokenizerBase]] = {
    "sentencepiece unigram": lambda folder: sentencepiece(folder),
    "sentencepiece bpe, as Llama": lambda folder: sentencepiece(folder, **LLAMA),
    "sentencepiece across spaces": lambda folder: sentencepiece(folder, split_by_whitespace=False),
    "byte level": lambda _: bpe(pre_tokenizers.ByteLevel(add_prefix_space=False)),
    "byte level, prefix": lambda _: bpe(pre_tokenizers.ByteLevel(add_prefix_space=True)),
    "byte level, no words": lambda _: bpe(pre_tokenizers.ByteLevel(add_prefix_space=True, use_regex=False)),
    "digits in threes": lambda _: bpe(in_threes()),
    "Metaspace": lambda _: unigram(pre_tokenizers.Metaspace()),
    "Metaspace, first": lambda _: unigram(pre_tokenizers.Metaspace(prepend_scheme="first")),
    "Prepend, as Llama 2": lambda _: bpe(None, spaces_marked()),
    "no fast one": lambda _: ByT5Tokenizer(),
}


@pytest.fixture(scope="module", params=TOKENIZERS)
def tokenizer(request, tmp_path_factory) -> PreTrainedTokenizerBase:
    return TOKENIZERS[request.param](tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture
def short_parts(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(encoding, "CUT_CHARACTERS", 3000)
    monkeypatch.setattr(prepared, "PART_BYTES", 9000)


def whole(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    ids: Any = tokenizer(text, add_special_tokens=False, split_special_tokens=True, verbose=False)["input_ids"]
    return ids


@pytest.mark.usefixtures("short_parts")
@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)
def test_a_document_in_parts_has_the_tokens_of_the_whole(tokenizer: PreTrainedTokenizerBase, text: str):
    (found,), (size,) = encode([text], tokenizer, None)
    assert found == whole(tokenizer, text)
    assert size == len(text.encode())


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)
def test_a_text_in_blocks_has_the_tokens_of_the_whole(tokenizer: PreTrainedTokenizerBase, text: str):
    kept, found, size = ["", ""], [], 0
    for start in [*range(0, len(text), 1711), None]:
        block = None if start is None else [text[start : start + 1711]]
        tokens, sizes, kept = encode_running(block, kept, tokenizer)
        found += [token for each in tokens for token in each]
        size += sum(sizes)
    assert found == whole(tokenizer, text)
    assert size == len(text.encode())


def test_a_text_is_cut_where_that_is_possible(tokenizer: PreTrainedTokenizerBase):
    """So that the tests above compare something, and memory is bounded."""
    assert find_cut(TEXTS["sources"], 5000, tokenizer) is not None
    assert find_cut(LETTERS, 5000, tokenizer) is not None


@pytest.mark.usefixtures("short_parts")
@pytest.mark.parametrize("workers", [1, 2])
def test_a_text_file_has_the_tokens_of_the_whole(settings, tmp_path, workers: int):
    tokenizer = sentencepiece(tmp_path, **LLAMA)
    (tmp_path / "a.txt").write_text(text := TEXTS["sources"])
    expected = whole(tokenizer, text)
    flags = {"train_file": str(tmp_path / "a.txt"), "validation_file": str(tmp_path / "a.txt")}
    stored = prepare_all(settings(**flags, preprocessing_num_workers=workers), tokenizer).sources[0].tokens
    assert stored is not None
    assert len(list(stored.folder.glob("data-*"))) > 3
    assert np.concatenate(stored.pieces).tolist() == expected
    assert stored.text_bytes == len(text.encode())
    stream = prepare_all(settings(**flags, streaming=True, seq_length=8), tokenizer).train
    eos: Any = tokenizer.eos_token_id
    expected.append(eos)
    assert stream.batch(0, len(expected) // 8).flatten().tolist() == expected[: len(expected) // 8 * 8]
