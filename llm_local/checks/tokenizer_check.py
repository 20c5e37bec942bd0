"""Whether others get the run's tokens: from the export, and from tokenizer.json without transformers' classes."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from llm_local.adapters.hf_internals import file_of
from llm_local.config import Config
from llm_local.data.sentencepieces import PROBES
from llm_local.data.tokenizer import read_tokenizer
from llm_local.files import writing


def tokenizer_warnings(
    config: Config, model_config: PretrainedConfig, tokenizer: PreTrainedTokenizerBase
) -> tuple[str, ...]:
    """Where the same files give other tokens. Raises ConfigError where what the export will hold cannot be read."""
    return (*_class_warnings(tokenizer), *_export_warnings(tokenizer, config, model_config))


def _class_warnings(tokenizer: PreTrainedTokenizerBase) -> tuple[str, ...]:
    """A class of transformers may build the tokenizer anew, and take only the vocabulary from tokenizer.json."""
    if Path(name := tokenizer.name_or_path).is_file():
        return ()
    file = file_of(name, "tokenizer.json", local_files_only=True)
    if file is None:
        return ()
    plain = Tokenizer.from_file(file)
    said = [plain.encode(text, add_special_tokens=False).ids for text in PROBES]
    ours: Any = tokenizer([*PROBES], add_special_tokens=False)["input_ids"]
    differ = [text for text, *ids in zip(PROBES, said, ours, strict=True) if ids[0] != ids[1]]
    if not differ:
        return ()
    return (
        f"{type(tokenizer).__name__} gets other tokens of {differ[0]!r} than {file} says, which it is read from; set "
        "tokenizer_class to PreTrainedTokenizerFast in tokenizer_config.json there, unless the class is right",
    )


def _export_warnings(
    tokenizer: PreTrainedTokenizerBase, config: Config, model_config: PretrainedConfig
) -> tuple[str, ...]:
    """Whether AutoTokenizer, beside the model's config, reads what the export will hold: some types force a class."""
    with tempfile.TemporaryDirectory() as unnamed:
        folder = Path(unnamed, "tokenizer")  # transformers keeps code under the folder's name
        with writing(folder):
            tokenizer.save_pretrained(folder)
            model_config.save_pretrained(folder)
        again = read_tokenizer(folder, "the tokenizer beside the model's config", config.model.trust_remote_code)
    if again([*PROBES])["input_ids"] == tokenizer([*PROBES])["input_ids"]:
        return ()
    kind = model_config.model_type
    return (
        f"beside a {kind!r} model AutoTokenizer reads this tokenizer as {type(again).__name__} and gets other tokens; "
        "load it from the export with PreTrainedTokenizerFast, or train with the model's own (--tokenizer_name)",
    )
