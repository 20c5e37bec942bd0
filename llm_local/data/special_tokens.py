"""Whose EOS, BOS and padding a run's model has, in its config and in what its generate() does by default.

A new model has those of the tokenizer that its text is made with, whatever its type has by default or the JSON of
another model says; config_overrides win. A pretrained model keeps its own, and also stops at the tokenizer's EOS.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from transformers import GenerationConfig, PretrainedConfig, PreTrainedTokenizerBase
from transformers.utils import GENERATION_CONFIG_NAME

from llm_local.adapters.hf_internals import generation_settings
from llm_local.config import Config, ConfigError
from llm_local.model.gguf_cache import weights_path
from llm_local.model.model_config import load_model_config
from llm_local.model.overrides import parse_overrides
from llm_local.model.pretrained import COPY_AGAIN, find
from llm_local.model.token_ids import EOS, PAD, TOKEN_IDS, set_token_ids, token_id


def run_model_config(config: Config, tokenizer: PreTrainedTokenizerBase) -> PretrainedConfig:
    """The config of the run's model. Raises ConfigError where there is none."""
    return set_token_ids(load_model_config(config.model), special_tokens(config, tokenizer))


def special_tokens(config: Config, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """The ids that a new model's config gets from the tokenizer, None where that has none; {} for a pretrained model.

    A padding token that also ends or begins texts is none to the model, which does not train its embedding.
    """
    if config.model.model_name_or_path is not None:
        return {}
    found: dict[str, Any] = {name: getattr(tokenizer, name) for name in TOKEN_IDS}
    end, begin, pad = found.values()
    if pad in (end, begin):
        found[PAD] = None
    stated = token_id(load_model_config(config.model), EOS)
    if isinstance(stated, list) and end in stated:
        found[EOS] = stated
    return {name: value for name, value in found.items() if name not in parse_overrides(config.model.config_overrides)}


def token_warnings(
    config: Config, model_config: PretrainedConfig, tokenizer: PreTrainedTokenizerBase
) -> tuple[str, ...]:
    """Where a new model has other ids than its JSON says, or does not end its texts as its data does.

    model_config: of the run (run_model_config).
    """
    if config.model.model_name_or_path is not None:
        return ()
    said, chosen = [], parse_overrides(config.model.config_overrides)
    if config.model.config_name is not None:
        values = PretrainedConfig.get_config_dict(config.model.config_name)[0]
        stated = (values.get("text_config") or {}) | values
        has = {name: token_id(model_config, name) for name in TOKEN_IDS if name not in chosen}
        other = [f"{n} {stated[n]} → {id}" for n, id in has.items() if stated.get(n) is not None and stated[n] != id]
        if other:
            named = f"config_name={config.model.config_name}"
            said.append(f"the tokenizer's ids replace those of {named}: {', '.join(other)}; config_overrides would win")
    end, ends = tokenizer.eos_token_id, token_id(model_config, EOS)
    if config.task.generates and end not in (ends if isinstance(ends, list) else [ends]):
        said.append(f"{EOS}={ends} in config_overrides, but the data's documents end with {end}: generate() runs on")
    return tuple(said)


def generation_values(
    config: Config, model_config: PretrainedConfig, tokenizer: PreTrainedTokenizerBase
) -> dict[str, Any]:
    """What generation_config.json holds: a pretrained model's own, with the tokenizer's EOS, or a new config's."""
    if config.model.model_name_or_path is None:
        values = GenerationConfig.from_model_config(model_config).to_diff_dict()
        pad = tokenizer.pad_token_id
        return values if pad is None or PAD in values else values | {PAD: pad}
    values = pretrained_generation(config)
    values |= {n: token_id(model_config, n) for n in TOKEN_IDS if n in parse_overrides(config.model.config_overrides)}
    end, ends = tokenizer.eos_token_id, values.get(EOS)
    ends = ends if isinstance(ends, list) else [] if ends is None else [ends]
    return values if end is None or end in ends else values | {EOS: [end, *ends] if ends else end}


def pretrained_generation(config: Config) -> dict[str, Any]:
    """What the pretrained model's own generate() does by default; {} for a new model.

    Raises ConfigError naming a file that cannot be read.
    """
    if config.model.model_name_or_path is None:
        return {}
    path = weights_path(config)
    file = find(path, GENERATION_CONFIG_NAME)
    if file is None:  # older models have it in their config
        return generation_settings(path)
    try:
        return dict(json.loads(Path(file).read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise ConfigError([f"{file} cannot be read ({error}); {COPY_AGAIN}, or remove it"]) from error
