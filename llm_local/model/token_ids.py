"""The ids of EOS, BOS and padding that a model's config has, and whether they are in its vocabulary."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from huggingface_hub.errors import StrictDataclassFieldValidationError
from transformers import PretrainedConfig

from llm_local.model.observation import text_config

EOS, BOS, PAD = TOKEN_IDS = ("eos_token_id", "bos_token_id", "pad_token_id")


def token_id(config: PretrainedConfig, name: str) -> int | list[int] | None:
    """An id of the config, of its text's part where the whole has none."""
    own = getattr(config, name, None)
    return getattr(text_config(config), name, None) if own is None else own


def set_token_ids(config: PretrainedConfig, ids: Mapping[str, Any]) -> PretrainedConfig:
    """The same config with these ids, in its text's part, too. A class that must have one keeps it where it is None."""
    text = text_config(config)
    for part in (config, text):
        for name, value in ids.items():
            if part is text or hasattr(part, name):
                try:
                    setattr(part, name, value)
                except StrictDataclassFieldValidationError:
                    assert value is None, f"{name}={value}"
    return config


def check_token_ids(config: PretrainedConfig, chosen: Collection[str], is_new: bool) -> None:
    """Takes ids out of a new model's config that are outside its vocabulary, as its type's or another model's may be.

    chosen: names of those that a person set. Raises ValueError naming one of these, and a padding id that nobody could
    make an embedding for.
    """
    size = getattr(text_config(config), "vocab_size", None)
    if not isinstance(size, int):
        return
    outside = [name for name in TOKEN_IDS if _is_outside(token_id(config, name), size)]
    if is_new:
        set_token_ids(config, {name: None for name in outside if name not in chosen})
    for name in outside:
        value = token_id(config, name)
        if _is_outside(value, size) and (name in chosen or name == PAD):
            raise ValueError(
                f"{name}={value} is outside the vocabulary of {size}; set {name} to an id below, or to null, in "
                "config_overrides"
            )


def _is_outside(value: object, size: int) -> bool:
    ids = value if isinstance(value, list) else [value]
    return any(isinstance(each, int) and each >= size for each in ids)
