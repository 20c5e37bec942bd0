"""The run's tokenizer: the one named, the model's, or the built-in one trained on the built-in corpus.

The built-in one is a sentencepiece BPE of 4096 pieces, kept as a Hugging Face tokenizer: decode(encode(text)) is the
text for every text, and the ids are sentencepiece's own for every text without U+2581, its mark for a space.
"""

from __future__ import annotations

import io
import json
import os
import platform
import tempfile
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import sentencepiece
from datasets.fingerprint import Hasher
from tokenizers import Regex, Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from llm_local import corpus
from llm_local.config import ConfigError, RunConfig, from_here
from llm_local.gguf_cache import weights_path

VOCAB_SIZE = 4096
SPACE_MARK = "\u2581"
UNK, BOS, EOS = "<|unk|>", "<|bos|>", "<|eos|>"  # unlike <s> and </s>, these don't occur in library sources
REVISION = 1  # counts changes of this file that change the result but not SETTINGS

SETTINGS: dict[str, Any] = {
    "model_type": "bpe",
    "vocab_size": VOCAB_SIZE,
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
SAMPLE_STRIDE = 8  # every eighth document: about 4 MB, half a second of training
SAMPLE_CHUNKS = 20_000
CHUNK_CHARACTERS = 1000

# What sentencepiece takes for a word: a run of spaces and what follows. Newlines and tabs are ordinary characters.
WORD = Regex(" *[^ ]+| +")


def load_tokenizer(config: RunConfig) -> PreTrainedTokenizerBase:
    """tokenizer_name, else that of model_name_or_path or of its GGUF (which must be converted by now), else the
    built-in one. Raises ConfigError if there is none."""
    model = config.model
    field = "tokenizer_name" if model.tokenizer_name else "model_name_or_path"
    name = model.tokenizer_name or model.model_name_or_path
    if model.gguf_file is not None and not model.tokenizer_name:
        name = weights_path(config)
    if name is None:
        return AutoTokenizer.from_pretrained(builtin_tokenizer_dir(config.cache_dir))
    try:
        return AutoTokenizer.from_pretrained(name, trust_remote_code=model.trust_remote_code)
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        repair = "give a directory with tokenizer.json and tokenizer_config.json, or a hub name"
        named = f"{field}={name!r}" + ("" if Path(name).exists() else from_here(name))
        raise ConfigError([f"{named} has no tokenizer that can be loaded; {repair} ({reason})"]) from error


def builtin_tokenizer_dir(cache_dir: Path, folder: Path | None = None, vocab_size: int = VOCAB_SIZE) -> Path:
    """The directory of the built-in tokenizer, trained the first time that this Python and these settings meet.

    The directory appears whole or not at all, and processes that train at the same time end up with the same one.
    """
    folder = folder or corpus.stdlib_folder()
    settings = SETTINGS | {"vocab_size": vocab_size}
    key = Hasher.hash([REVISION, json.dumps(settings), SAMPLE_STRIDE, SAMPLE_CHUNKS, corpus.corpus_key(folder)])
    target = cache_dir / "tokenizer" / f"python-{platform.python_version()}-{key}"
    if target.is_dir():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".unfinished-") as unfinished:
        _save(_train(folder, settings), Path(unfinished, "tokenizer"))
        try:
            os.rename(Path(unfinished, "tokenizer"), target)
        except OSError:
            if not target.is_dir():  # else another process was faster, with the same result
                raise
    return target


def sample(folder: Path) -> Iterator[str]:
    """Whole lines of the corpus, about CHUNK_CHARACTERS together: sentencepiece skips what is longer than its limit."""
    for text in islice(corpus.documents(folder), 0, None, SAMPLE_STRIDE):
        chunk = ""
        for line in text.splitlines(keepends=True):
            if chunk and len(chunk) + len(line) > CHUNK_CHARACTERS:
                yield chunk
                chunk = ""
            chunk += line
        yield chunk


def _train(folder: Path, settings: dict[str, Any]) -> bytes:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(  # pyright: ignore[reportAttributeAccessIssue] -- no type stubs
        sentence_iterator=islice(sample(folder), SAMPLE_CHUNKS),
        model_writer=model,
        num_threads=2,
        minloglevel=2,
        **settings,
    )
    return model.getvalue()


def _save(model: bytes, target: Path) -> None:
    """Writes a tokenizer directory for AutoTokenizer, with the sentencepiece model beside it."""
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=fast_tokenizer(sentencepiece.SentencePieceProcessor(model_proto=model)),
        unk_token=UNK,
        bos_token=BOS,
        eos_token=EOS,
        clean_up_tokenization_spaces=False,
    )
    tokenizer.save_pretrained(target)
    (target / "tokenizer.model").write_bytes(model)


def fast_tokenizer(model: Any) -> Tokenizer:
    """The BPE of a sentencepiece model (with byte_fallback and SETTINGS) as a `tokenizers` BPE with the same ids.

    Written out instead of transformers' converters, which keep U+2581 for spaces (a text that holds that character
    comes back with a space), and strip or prepend a space for some model types.
    """
    pieces = [model.id_to_piece(index).replace(SPACE_MARK, " ") for index in range(model.get_piece_size())]
    ids = {piece: index for index, piece in enumerate(pieces)}
    assert len(ids) == len(pieces)
    merges = [
        (piece[:cut], piece[cut:])
        for index, piece in enumerate(pieces)  # sentencepiece's order of merging is the order of its pieces
        if not (model.is_byte(index) or model.is_control(index) or model.is_unknown(index))
        for cut in range(1, len(piece))
        if piece[:cut] in ids and piece[cut:] in ids
    ]
    tokenizer = Tokenizer(BPE(vocab=ids, merges=merges, unk_token=UNK, fuse_unk=True, byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(WORD, "isolated")  # pyright: ignore[reportAttributeAccessIssue]
    tokenizer.decoder = decoders.Sequence(  # pyright: ignore[reportAttributeAccessIssue]
        [decoders.ByteFallback(), decoders.Fuse()]
    )
    return tokenizer
