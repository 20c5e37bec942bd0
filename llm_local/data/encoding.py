"""Texts to tokens: what is left out, where long texts are cut, and what makes two tokenizers the same.

A text that is long or comes in blocks is tokenised in parts, and has the tokens of the whole: it is cut only where that
does not show (find_cut), and what is behind a cut is tokenised with the text before it as context, whose tokens are
dropped. Nothing is assumed of a tokenizer but that text further away than CONTEXT does not matter. (Where a unigram
model knows no words, rounding over the whole text may yet decide between segmentations that are equally good.)
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Collection, Iterable, Sequence
from itertools import chain, islice, pairwise
from typing import Any

import numpy as np
from datasets.fingerprint import Hasher
from transformers import PreTrainedTokenizerBase

REVISION = 5  # counts changes of the tokens of the same text, and of what is kept beside them
CUT_CHARACTERS = 1 << 20  # a longer text is tokenised in parts, for a tokenizer takes many times its memory
CONTEXT = 512  # characters on each side of a cut that decide whether it shows
CONTEXTS = 4  # of them, each shorter by one: so that pairs and threes of a letter fall in every way
CUT_SEARCHED, CUT_TRIES = 10_000, 32  # characters and places that are looked at for a cut
LONG_RUN = re.compile(r"(.{1,4}?)\1{127}|\d{256}", re.DOTALL)  # may be divided by where it began, further away
WORD_END = re.compile(r"\S(?=\s)")

IDS = "input_ids"  # the column of token numbers

Tokens = list[list[int]]


def encode(texts: Sequence[Any], tokenizer: PreTrainedTokenizerBase, end: int | None) -> tuple[Tokens, list[int]]:
    """Token lists of documents, and the texts' sizes in UTF-8. Each is ended by `end`, and begun with BOS where the
    tokenizer does so (first_token), unless `end` is None.

    A missing or empty text has none, and NUL is left out. What spells a special token is text. Documents that are token
    numbers already (IDS) are ended alone; their size is that of the text that the tokenizer makes of them.
    """
    if any(_is_ids(text) for text in texts):
        return _encode_ids(texts, tokenizer, end)
    joined = [text for text in map(joined_text, texts) if text]
    bos = None if end is None else first_token(tokenizer)
    first, last = ([] if token is None else [token] for token in (bos, end))
    found = [[*first, *tokens, *last] for tokens in _encode_behind([(text, 0) for text in joined], tokenizer)]
    return found, [len(text.encode()) for text in joined]


def encode_running(
    texts: Sequence[Any] | None, kept: Sequence[str], tokenizer: PreTrainedTokenizerBase
) -> tuple[Tokens, list[int], list[str]]:
    """As `encode` the tokens of one text that comes in blocks, and what to keep for the next call: the end of what was
    tokenised, and what waits for the text behind it. None: the text has ended."""
    before, waiting = kept
    text = before + waiting + "".join(map(joined_text, texts or []))
    stop: int | None = len(text)
    if texts is not None:
        at = len(text) - 2 * CONTEXT
        stop = find_cut(text, at, tokenizer) if at > len(before) else None
    if stop is None or stop == len(before):
        return [], [], [before, text[len(before) :]]
    size = len(text[len(before) : stop].encode())
    return _encode_behind([(text[:stop], len(before))], tokenizer), [size], [text[:stop][-CONTEXT:], text[stop:]]


def _is_ids(text: Any) -> bool:
    return not isinstance(text, str) and text is not None and len(text) > 0 and not isinstance(text[0], str)


def _encode_ids(texts: Sequence[Any], tokenizer: PreTrainedTokenizerBase, end: int | None) -> tuple[Tokens, list[int]]:
    found = [[int(number) for number in ids] for ids in texts if ids]
    sizes = [len(text.encode()) for text in tokenizer.batch_decode(found, skip_special_tokens=True)]
    return [ids if end is None or ids[-1] == end else [*ids, end] for ids in found], sizes


def joined_text(text: Any) -> str:
    """A text, or the lines of a block of a running one; without NUL."""
    return "".join(text or "").replace("\0", "")


def _encode_behind(texts: Sequence[tuple[str, int]], tokenizer: PreTrainedTokenizerBase) -> Tokens:
    """The tokens of each text from a place on, which is its beginning or one of find_cut."""
    cuts = [_cuts(text, start, tokenizer) for text, start in texts]
    parts: list[str] = []
    for (text, _), places in zip(texts, cuts, strict=True):
        for start, stop in pairwise([*places, len(text)]):
            context = text[max(0, start - CONTEXT) : start]
            parts += [context, context + text[start:stop]] if start else [text[:stop]]
    ids = iter(_ids(parts, tokenizer))
    return [[token for start in places for token in _without(next(ids) if start else [], next(ids))] for places in cuts]


def _without(context: list[int], tokens: list[int]) -> list[int]:
    return tokens[len(context) :]


def _cuts(text: str, start: int, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The first places of the parts in which the text is tokenised from `start` on."""
    found, at = [start], start + CUT_CHARACTERS
    while at < len(text):
        cut = find_cut(text, at, tokenizer)
        found += [] if cut is None else [cut]
        at = CUT_CHARACTERS + (cut or at)
    return found


def find_cut(text: str, at: int, tokenizer: PreTrainedTokenizerBase) -> int | None:
    """A place from `at` on where a cut does not show, None if none is near: what ends there, and what begins there
    with the text before it as context, have the tokens that they have in the whole text."""
    stop = min(at + CUT_SEARCHED, len(text) - CONTEXT)
    words = (found.end() for found in WORD_END.finditer(text, max(0, at - 1), max(0, stop)))
    places = chain(islice(words, CUT_TRIES), islice(range(at, stop), CUT_TRIES))
    return next((place for place in places if _is_unseen(text, place, tokenizer)), None)


def _is_unseen(text: str, place: int, tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether contexts of several lengths are tokenised alike with and without what follows, and that always alike."""
    first, found = max(0, place - CONTEXT), []
    if LONG_RUN.search(text, first, place + CONTEXT):
        return False
    for start in range(first, first + CONTEXTS):
        left, whole = _ids([text[start:place], text[start : place + CONTEXT]], tokenizer)
        found.append(_without(left, whole))
        if not left or left + found[-1] != whole or found[-1] != found[0]:
            return False
    return True


def _ids(texts: list[str], tokenizer: PreTrainedTokenizerBase) -> Tokens:
    plain: Any = {"add_special_tokens": False, "split_special_tokens": True, "return_attention_mask": False}
    encoded: Any = tokenizer(texts, **plain, verbose=False)["input_ids"] if texts else []
    return encoded


def first_token(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """BOS where the tokenizer by itself begins a text with it, else None."""
    ids: Any = tokenizer("a", verbose=False)["input_ids"]
    begins = ids[:1] == [tokenizer.bos_token_id] and len(ids) > len(_ids(["a"], tokenizer)[0])
    return ids[0] if begins else None


def prompt_ids(prompt: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The prompt begun like a document, once; special tokens that it spells are tokens."""
    ids: Any = tokenizer(prompt, add_special_tokens=False, verbose=False)["input_ids"]
    bos = first_token(tokenizer)
    return ids if bos is None or ids[:1] == [bos] else [bos, *ids]


def never_text(tokenizer: PreTrainedTokenizerBase) -> dict[str, int]:
    """Special tokens, with their ids, that the tokenizer makes of text that spells them whatever it is asked, because
    its vocabulary has them as words. Its unknown token is none of them: other text becomes that, too."""
    special = special_ids(tokenizer)
    if not special:
        return {}
    alone, within = (_ids([pattern.format(token) for token in special], tokenizer) for pattern in ("{}", "a {} b"))
    found = zip(special.items(), alone, within, strict=True)
    return {token: number for (token, number), *ids in found if any(number in some for some in ids)}


def special_ids(tokenizer: PreTrainedTokenizerBase) -> dict[str, int]:
    """All special tokens but the unknown one, with their ids."""
    special = {token.content: number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    special |= dict(zip(tokenizer.all_special_tokens, tokenizer.all_special_ids, strict=True))
    return {token: number for token, number in special.items() if number != tokenizer.unk_token_id}


def count_spelled(pieces: Iterable[np.ndarray], special: Collection[int], documents: int, around: Sequence[Any]) -> int:
    """How many of the tokens are special ones made of text: those that begin and end each document, `around`, are not.
    The pieces together hold so many documents."""
    if not special:
        return 0
    found = sum(int(np.isin(piece, list(special)).sum()) for piece in pieces)
    return found - documents * sum(token in special for token in around)


def tokenizer_key(tokenizer: PreTrainedTokenizerBase) -> str:
    """A key of what the tokenizer does to text, the same in each process and, of a fast tokenizer, on each machine.

    A fast one is hashed by its JSON less truncation and padding, which a call changes; any other is pickled, with where
    its files are.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return Hasher.hash(tokenizer)
    rules = json.loads(backend.to_str())
    does = [rules | {"truncation": None, "padding": None}, tokenizer.eos_token_id]
    return hashlib.sha256(json.dumps(does, sort_keys=True).encode()).hexdigest()[:16]
