"""The run's tokenizer: the one named, the model's, or the built-in one trained on the built-in corpus.

The built-in one is a sentencepiece BPE of 4096 pieces, kept as a Hugging Face tokenizer (sentencepieces.py).
"""

from __future__ import annotations

import json
import os
import platform
import tempfile
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from datasets.fingerprint import Hasher
from tokenizers import Tokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from llm_local.config import Config, ConfigError, from_here
from llm_local.data import corpus
from llm_local.data.encoding import first_token
from llm_local.data.sentencepieces import EXACT, chunks, from_model, read_model, train
from llm_local.files import writing
from llm_local.model.gguf_cache import weights_path
from llm_local.model.remote_code import UNTRUSTED, is_untrusted
from llm_local.program import program

VOCAB_SIZE = 4096
REVISION = 1  # counts changes of this file that change the result but not SETTINGS

SETTINGS = {"model_type": "bpe", "vocab_size": VOCAB_SIZE, **EXACT}
SAMPLE_STRIDE = 8  # every eighth document: about 4 MB, half a second of training
SAMPLE_CHUNKS = 20_000
REPAIR = "give a directory with tokenizer.json and tokenizer_config.json, a sentencepiece .model, or a hub name"


def load_tokenizer(config: Config) -> PreTrainedTokenizerBase:
    """tokenizer_name, else that of model_name_or_path or of its GGUF (which must be converted by now), else the
    built-in one; it begins a text with BOS as add_bos says. Raises ConfigError if there is none, or it cannot do that.
    """
    tokenizer, wanted = _load(config), config.data.add_bos
    for token, instead in config.task.delimiters.items():
        if getattr(tokenizer, token) is None and getattr(tokenizer, instead) is not None:
            setattr(tokenizer, token, getattr(tokenizer, instead))
    if wanted is not None and wanted != (first_token(tokenizer) is not None):
        ends: Any = tokenizer("a")["input_ids"]
        told: Any = tokenizer  # what ends a text is kept: these write the whole template
        told.add_eos_token = ends[-1] == tokenizer.eos_token_id
        told.add_bos_token = wanted
        if wanted != (first_token(tokenizer) is not None):
            why = "without BOS" if tokenizer.bos_token_id is None else "which cannot be told to"
            made = f"the tokenizer is a {type(tokenizer).__name__} {why}"
            raise ConfigError([f"add_bos={wanted}: {made}; leave add_bos out, or choose another tokenizer"])
    if config.data.document_mask and first_token(tokenizer) is not None and tokenizer.bos_token == tokenizer.eos_token:
        why = "the tokenizer's BOS, which begins documents, is also its EOS, which ends them"
        raise ConfigError([f"document_mask=True: {why}; set add_bos=false"])
    return tokenizer


def _load(config: Config) -> PreTrainedTokenizerBase:
    model = config.model
    field = "tokenizer_name" if model.tokenizer_name else "model_name_or_path"
    name = model.tokenizer_name or model.model_name_or_path
    if model.gguf_file is not None and not model.tokenizer_name:
        name = weights_path(config)
    if name is None:
        folder = builtin_tokenizer_dir(config.cache_dir)
        made = read_tokenizer(folder, f"the built-in tokenizer, {folder},")
        made.add_special_tokens(dict(config.task.new_tokens))
        return made
    if field == "tokenizer_name" and name.endswith(".model") and not Path(name).is_dir():
        found = read_model(Path(name), f"{field}={name!r}")
    else:
        found = read_tokenizer(name, f"{field}={name!r}", model.trust_remote_code)
    task, needed = config.task.name, config.task.needed_token
    if needed and getattr(found, needed) is None:
        train = f"{program('train_tokenizer.py')} --task {task}"
        lacks = f"task={task}: the tokenizer of {field}={name!r} has no {needed}"
        raise ConfigError([f"{lacks}; choose one that has, or train one with {train}"])
    return found


def read_tokenizer(name: str | Path, named: str, trusted: bool = False) -> PreTrainedTokenizerBase:
    """What AutoTokenizer makes of a directory or a name on the hub; `named` is how a message names it.

    Raises ConfigError with the reason, and the file where one is broken.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=trusted)
        tokenizer("Some text.")  # some files are found to be broken at their first use
    except Exception as error:  # of whatever library reads a file
        if is_untrusted(error):
            raise ConfigError([f"the tokenizer of {named} {UNTRUSTED}"]) from error
        raise ConfigError([f"{named}{_why_not(Path(name), error)}"]) from error
    if set(tokenizer.get_vocab()) <= set(tokenizer.all_special_tokens):
        raise ConfigError([f"{named} has a tokenizer without a vocabulary; {REPAIR}"])
    if not trusted:
        tokenizer.init_kwargs.pop("auto_map", None)  # else the export would name code that it has not
    return tokenizer


def _why_not(folder: Path, error: Exception) -> str:
    for path in sorted([*folder.glob("*.json"), *folder.glob("*.model")]):
        if reason := _broken(path):
            return f" has a broken file: {path} {reason}; copy the tokenizer again, or give another"
    reason, settings = f"{type(error).__name__}: {' '.join(str(error).split())}", folder / "tokenizer_config.json"
    if isinstance(error, ImportError):
        return f" has a tokenizer that needs a package which is not here; install it, or give another ({reason})"
    if settings.is_file():
        return f" has a tokenizer that cannot be loaded as {settings} says; {REPAIR} ({reason})"
    return f"{'' if folder.exists() else from_here(folder)} has no tokenizer that can be loaded; {REPAIR} ({reason})"


def _broken(path: Path) -> str:
    """What is wrong with a file of a tokenizer's folder, '' if nothing that shows by itself."""
    try:
        if path.suffix == ".model":
            from_model(path.read_bytes())
            return ""
        content = json.loads(path.read_bytes())
        if not isinstance(content, dict):
            return f"holds a JSON {type(content).__name__}, not an object"
        if path.name == "tokenizer.json":
            Tokenizer.from_file(str(path))
    except Exception as error:  # that of `tokenizers` has no class of its own
        return f"cannot be read ({' '.join(str(error).split())})"
    return ""


def highest_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """Of all tokens, added ones too; with holes in its ids a tokenizer's highest one is beyond its length."""
    return max([*tokenizer.get_vocab().values(), *tokenizer.added_tokens_decoder], default=-1)


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
    with writing(target.parent, reads=True):
        target.parent.mkdir(parents=True, exist_ok=True)
        _make_builtin(target, folder, settings)
    return target


def _make_builtin(target: Path, folder: Path, settings: dict[str, Any]) -> None:
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".unfinished-") as unfinished:
        model = train(islice(sample(folder), SAMPLE_CHUNKS), settings)
        made = Path(unfinished, "tokenizer")
        from_model(model).save_pretrained(made)
        (made / "tokenizer.model").write_bytes(model)
        try:
            os.rename(Path(unfinished, "tokenizer"), target)
        except OSError:
            if not target.is_dir():  # else another process was faster, with the same result
                raise


def sample(folder: Path) -> Iterator[str]:
    """Some of the corpus, in chunks for the trainer."""
    for text in islice(corpus.documents(folder), 0, None, SAMPLE_STRIDE):
        yield from chunks(text)
