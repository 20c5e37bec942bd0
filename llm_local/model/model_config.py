"""The config of the model to train, with overrides: of a folder, a file, a name on the hub or a model type."""

from __future__ import annotations

import json
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from transformers import CONFIG_MAPPING, AutoConfig, PretrainedConfig
from transformers.utils.peft_utils import ADAPTER_CONFIG_NAME, find_adapter_config_file

from llm_local.config import ConfigError, from_here
from llm_local.flags import ModelArguments
from llm_local.model.gguf_cache import gguf_path, read_gguf_config
from llm_local.model.overrides import overridden, parse_overrides
from llm_local.model.remote_code import OF_CODE, UNTRUSTED, check_code, is_untrusted
from llm_local.model.token_ids import check_token_ids


def load_model_config(model: ModelArguments) -> PretrainedConfig:
    """The config of the model to train. Raises ConfigError naming the file, the value or the override that is wrong."""
    source = model.model_name_or_path or model.config_name or model.model_type
    assert source is not None, "checked in problems.py"
    path, named = Path(source), f"{'model_name_or_path' if model.model_name_or_path else 'config_name'}={source}"
    if source == model.model_type:
        return _changed(_default_config(source), {}, model)
    where = "" if path.exists() else from_here(path)
    if not path.exists() and source.endswith(".json"):
        raise ConfigError([f"{named}: no such file{where}"])
    if path.suffix == ".gguf" and path.is_file():
        raise ConfigError([f"{named} is a file; use model_name_or_path={path.parent} and gguf_file={path.name}"])
    if path.is_dir() and not (path / "config.json").exists() and (path / "export" / "config.json").exists():
        raise ConfigError([f"{named} is the folder of a run, not a model; did you mean {path / 'export'}?"])
    if model.gguf_file is not None:
        config = read_gguf_config(gguf_path(model))
        return _changed(config, config.to_diff_dict(), model)
    if path.name == "config.json":
        source = str(path.parent)  # where its code is
    try:
        config = AutoConfig.from_pretrained(source, trust_remote_code=model.trust_remote_code)
    except StrictDataclassError as error:  # says in its second line what is wrong
        raise ConfigError([f"no model config in {source}: {' '.join(str(error).split())}"]) from error
    except (OSError, ValueError, KeyError, TypeError, ArithmeticError, *OF_CODE) as error:
        if is_untrusted(error):
            raise ConfigError([f"{named} {UNTRUSTED}"]) from error
        if adapter := adapter_problem(named, str(path.parent) if path.name == ADAPTER_CONFIG_NAME else source):
            raise ConfigError([adapter]) from error
        raise ConfigError([f"no model config in {source}{where}: {str(error).splitlines()[0]}"]) from error
    config = _changed(config, PretrainedConfig.get_config_dict(source)[0], model)
    return check_code(config, model.trust_remote_code, named)


def adapter_problem(named: str, source: str) -> str | None:
    """Of what PEFT saved beside a model, or instead of one: transformers would load both. Of a name on the hub it is
    looked up there."""
    try:
        found = find_adapter_config_file(source)
        base = json.loads(Path(found).read_text()).get("base_model_name_or_path") if found else None
    except (OSError, ValueError, AttributeError):
        return None
    merged = f"AutoPeftModelForCausalLM.from_pretrained({source!r}).merge_and_unload().save_pretrained(FOLDER)"
    said = f"{named} is a PEFT adapter of {base}, not a whole model; merge them ({merged}) and name FOLDER"
    return said if found else None


def _default_config(model_type: str) -> PretrainedConfig:
    if model_type not in CONFIG_MAPPING:
        near = ", ".join(get_close_matches(model_type, list(CONFIG_MAPPING), cutoff=0.5)) or "llama, gpt2, qwen3"
        raise ConfigError([f"model_type={model_type!r} is unknown to transformers; did you mean one of {near}?"])
    return CONFIG_MAPPING[model_type]()


def _changed(config: PretrainedConfig, values: dict[str, Any], model: ModelArguments) -> PretrainedConfig:
    """The config with the overrides in it, and with no id that its vocabulary has not."""
    named, overrides = "", model.config_overrides
    try:
        if overrides:
            named = f"config_overrides={overrides!r}: "
            config = overridden(config, values, overrides)
        check_token_ids(config, parse_overrides(overrides), is_new=model.model_name_or_path is None)
        return config
    except (ValueError, TypeError, AttributeError, ArithmeticError, StrictDataclassError) as error:
        raise ConfigError([f"{named}{' '.join(str(error).split())}"]) from error
