"""Texts to tokens: what is left out, how long texts are cut, and what makes two tokenizers the same."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from typing import Any

from datasets.fingerprint import Hasher
from transformers import PreTrainedTokenizerBase

REVISION = 4  # counts changes of the tokens of the same text, and of what is kept beside them
CUT_CHARACTERS = 1 << 20  # a longer text is tokenised in parts, for a tokenizer takes many times its memory
CUT_SEARCHED = 10_000  # characters before the cut that are searched for a better place
WORD_END = re.compile(r"\S(?=\s)")


def encode(
    texts: Sequence[Any], tokenizer: PreTrainedTokenizerBase, end: int | None
) -> tuple[list[list[int]], list[int]]:
    """Token lists of texts, and the texts' sizes in UTF-8. Each is ended by `end`, and begun with BOS where the
    tokenizer does so (first_token), unless `end` is None: what is no document has neither.

    A missing or empty text has none, and NUL is left out. A text may be a list of lines: a block of a running text.
    What spells a special token is text.
    """
    joined = ["".join(text).replace("\0", "") for text in texts if text]
    joined = [text for text in joined if text]
    if not joined:
        return [], []
    cut = [_parts(text) for text in joined]
    flat = [part for parts in cut for part in parts]
    bos = None if end is None else first_token(tokenizer)
    first, last = ([] if token is None else [token] for token in (bos, end))
    tokens = iter(_ids(flat, tokenizer))
    found = [[*first, *(token for _ in parts for token in next(tokens)), *last] for parts in cut]
    return found, [len(text.encode()) for text in joined]


def _ids(texts: list[str], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    plain: Any = {"add_special_tokens": False, "split_special_tokens": True, "return_attention_mask": False}
    encoded: Any = tokenizer(texts, **plain, verbose=False)["input_ids"]
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
    special = {token.content: number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    special |= dict(zip(tokenizer.all_special_tokens, tokenizer.all_special_ids, strict=True))
    special = {token: number for token, number in special.items() if number != tokenizer.unk_token_id}
    if not special:
        return {}
    alone, within = (_ids([pattern.format(token) for token in special], tokenizer) for pattern in ("{}", "a {} b"))
    found = zip(special.items(), alone, within, strict=True)
    return {token: number for (token, number), *ids in found if any(number in some for some in ids)}


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
