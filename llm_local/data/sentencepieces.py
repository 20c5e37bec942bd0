"""Sentencepiece models, unigram or BPE: trained so that text comes back exactly, and kept as Hugging Face tokenizers.

With EXACT settings decode(encode(text)) is the text for every text, and the ids are sentencepiece's own for every text
without U+2581, its mark for a space. A model that was trained elsewhere is taken as it is, with what it does to text
before it cuts it; one that would get other ids here than from sentencepiece is refused.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import sentencepiece
from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import BPE, Unigram
from transformers import PreTrainedTokenizerFast

from llm_local.config import ConfigError, from_here

UNK, BOS, EOS = "<|unk|>", "<|bos|>", "<|eos|>"  # unlike <s> and </s>, these don't occur in library sources
SPACE_MARK = "\u2581"
EXACT: dict[str, Any] = {
    "byte_fallback": True,
    "normalization_rule_name": "identity",
    "add_dummy_prefix": False,
    "remove_extra_whitespaces": False,
    "allow_whitespace_only_pieces": True,  # an indentation is one piece
    "split_digits": True,
    "character_coverage": 0.9995,  # of the sample's characters; the rest is spelled in bytes
    "max_sentence_length": 8192,
    "unk_piece": UNK,
    "bos_piece": BOS,
    "eos_piece": EOS,
}
CHUNK_CHARACTERS = 1000
# Of a longer line so much, up to white space if there is some
SHORT = re.compile(rf".{{1,{CHUNK_CHARACTERS}}}(?=\s|\Z)|.{{1,{CHUNK_CHARACTERS}}}", re.DOTALL)

# What sentencepiece takes for a word: a run of spaces and what follows. Newlines and tabs are ordinary characters.
WORD = Regex(" *[^ ]+| +")
# Text that spells a byte piece must not become that byte: sentencepiece does not look for these among its pieces
SPELLED_BYTE = "<(?=0x[0-9A-F]{2}>)"
KINDS = {1: "unigram", 2: "bpe", 3: "word", 4: "char"}
UNKNOWN, CONTROL, USER_DEFINED = 2, 3, 4  # types of a piece
PROBED_SYMBOLS = 20
PROBES = (
    "The quick brown fox, 12.5 times; (over) [lazy] dogs!",
    "  two  spaces\tand a tab\nand\n\n    an indented line  ",
    "def f(x):\n    return {'a': x ** 2, \"b\": [1, 2]}\n",
    "Grüße, Ελλάδα, Москва, 漢字かな, العربية, ไทย, ﬁn, e\u0301, ½, Ａ",
    "emoji 👩‍👩‍👧 😀 and \x01 control",
)


def chunks(text: str) -> Iterator[str]:
    """Whole lines, about CHUNK_CHARACTERS together, and longer ones cut: sentencepiece skips what exceeds its limit."""
    chunk = ""
    for part in (part for line in text.splitlines(keepends=True) for part in SHORT.findall(line)):
        if chunk and len(chunk) + len(part) > CHUNK_CHARACTERS:
            yield chunk
            chunk = ""
        chunk += part
    yield chunk


def train(texts: Iterable[str], settings: dict[str, Any]) -> bytes:
    """A model of the texts. Raises RuntimeError with the trainer's reason, as where vocab_size does not suit them."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(  # pyright: ignore[reportAttributeAccessIssue] -- no type stubs
        sentence_iterator=iter(texts), model_writer=model, num_threads=2, minloglevel=2, **settings
    )
    return model.getvalue()


def read_model(path: Path, named: str) -> PreTrainedTokenizerFast:
    """The tokenizer of a .model file; `named` is how a message names it. Raises ConfigError."""
    try:
        model = path.read_bytes()
        tokenizer = from_model(model)
    except OSError as error:
        raise ConfigError([f"{named} cannot be read ({error.strerror}){from_here(path)}; check the path"]) from error
    except RuntimeError as error:
        repair = "give one that was trained as unigram or bpe, or a directory with tokenizer.json"
        raise ConfigError([f"{named} is not a sentencepiece model; {repair}"]) from error
    except ValueError as error:
        raise ConfigError([f"{named}: {error}; give a directory with tokenizer.json made from it"]) from error
    tokenizer.name_or_path = str(path)
    return tokenizer


def from_model(model: bytes) -> PreTrainedTokenizerFast:
    """The model as a tokenizer that AutoTokenizer loads once it is saved.

    Raises RuntimeError for what is no model, ValueError for one that cannot be kept as such.
    """
    theirs = sentencepiece.SentencePieceProcessor(model_proto=model)
    ours = fast_tokenizer(theirs)
    symbols = [theirs.id_to_piece(n) for n, piece in enumerate(_spec(theirs).pieces) if piece.type == USER_DEFINED]
    for text in [*PROBES, *(f"a {symbol} b" for symbol in symbols[:PROBED_SYMBOLS])]:
        if ours.encode(text, add_special_tokens=False).ids != theirs.encode(text):  # pyright: ignore[reportAttributeAccessIssue]
            raise ValueError(f"it cuts {text[:20]!r}... in a way that a fast tokenizer does not reproduce")
    ids = {"unk_token": theirs.unk_id(), "bos_token": theirs.bos_id(), "eos_token": theirs.eos_id()}
    ids["pad_token"] = theirs.pad_id()
    special = {name: theirs.id_to_piece(number) for name, number in ids.items() if number >= 0}
    return PreTrainedTokenizerFast(tokenizer_object=ours, clean_up_tokenization_spaces=False, **special)


def _spec(model: Any) -> Any:
    from sentencepiece import sentencepiece_model_pb2

    proto: Any = sentencepiece_model_pb2
    return proto.ModelProto.FromString(model.serialized_model_proto())


def fast_tokenizer(model: Any) -> Tokenizer:
    """A sentencepiece model as a `tokenizers` one with the same ids.

    Written out instead of transformers' converters, which keep U+2581 for spaces (a text that holds that character
    comes back with a space), and strip or prepend a space for some model types. Raises ValueError for a model of whole
    words or characters.
    """
    spec = _spec(model)
    trained, normal = spec.trainer_spec, spec.normalizer_spec
    kind = KINDS.get(trained.model_type, "unknown")
    if kind not in ("unigram", "bpe"):
        raise ValueError(f"it is a sentencepiece model of type {kind!r}, neither unigram nor bpe")
    if not normal.escape_whitespaces or trained.treat_whitespace_as_suffix:
        raise ValueError("it keeps its spaces in another way than in front of words")
    pieces = [model.id_to_piece(index).replace(SPACE_MARK, " ") for index in range(model.get_piece_size())]
    if len(set(pieces)) < len(pieces):
        raise ValueError("two of its pieces differ by U+2581 and a space alone")
    tokenizer = Tokenizer(_unigram(model, pieces) if kind == "unigram" else _bpe(model, pieces))
    if steps := _normalizers(normal):
        tokenizer.normalizer = normalizers.Sequence(steps)  # pyright: ignore[reportAttributeAccessIssue]
    words = [pre_tokenizers.Split(WORD, "isolated")] if trained.split_by_whitespace else []
    if kind == "unigram":
        words = [pre_tokenizers.Split(_spelled(spec, pieces), "merged_with_previous"), *words]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(words)  # pyright: ignore[reportAttributeAccessIssue]
    first = [decoders.Strip(" ", 1, 0)] if normal.add_dummy_prefix else []
    bytes_first = [decoders.ByteFallback()] if trained.byte_fallback else []
    tokenizer.decoder = decoders.Sequence(  # pyright: ignore[reportAttributeAccessIssue]
        [*bytes_first, decoders.Fuse(), *first]
    )
    own = {USER_DEFINED: False, CONTROL: True}  # a user's symbols are cut out of the text, control pieces are special
    added = [(own[piece.type], pieces[n]) for n, piece in enumerate(spec.pieces) if piece.type in own]
    tokenizer.add_tokens([AddedToken(text, normalized=False, special=special) for special, text in added])
    return tokenizer


def _spelled(spec: Any, pieces: list[str]) -> Regex:
    """The first character of text that spells what only a model's own steps may make: a byte, or a special piece."""
    special = [pieces[n] for n, piece in enumerate(spec.pieces) if piece.type in (UNKNOWN, CONTROL)]
    found = [f"{re.escape(piece[0])}(?={re.escape(piece[1:])})" for piece in special if len(piece) > 1]
    return Regex("|".join([*found, SPELLED_BYTE] if spec.trainer_spec.byte_fallback else found))


def _normalizers(spec: Any) -> list[Any]:
    """What sentencepiece does to a text before it cuts it."""
    steps: list[Any] = []
    if spec.precompiled_charsmap:
        steps.append(normalizers.Precompiled(spec.precompiled_charsmap))
    if spec.remove_extra_whitespaces:
        steps += [normalizers.Strip(), normalizers.Replace(Regex(" {2,}"), " ")]
    if spec.add_dummy_prefix:
        steps.append(normalizers.Prepend(" "))
    return steps


def _unigram(model: Any, pieces: list[str]) -> Unigram:
    scored = [(piece, model.get_score(index)) for index, piece in enumerate(pieces)]
    has_bytes = any(model.is_byte(index) for index in range(len(pieces)))
    return Unigram(scored, model.unk_id(), has_bytes)


def _bpe(model: Any, pieces: list[str]) -> BPE:
    ids = {piece: index for index, piece in enumerate(pieces)}
    plain = [n for n in range(len(pieces)) if not (model.is_byte(n) or model.is_control(n) or model.is_unknown(n))]
    merges = [
        (pieces[index][:cut], pieces[index][cut:])
        for index in sorted(plain, key=lambda n: (-model.get_score(n), n))  # sentencepiece merges the best piece first
        for cut in range(1, len(pieces[index]))
        if pieces[index][:cut] in ids and pieces[index][cut:] in ids
    ]
    has_bytes = any(model.is_byte(index) for index in range(len(pieces)))
    unk = pieces[model.unk_id()]
    return BPE(vocab=ids, merges=merges, unk_token=unk, fuse_unk=True, byte_fallback=has_bytes)


def reason_of(error: RuntimeError) -> str:
    """What sentencepiece says, less the place in its own source."""
    return re.sub(r"^.*\] ?", "", str(error), flags=re.DOTALL).strip() or str(error)
