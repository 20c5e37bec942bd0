"""A model's config with changes given as text: 'hidden_size=64,rope_scaling={"rope_type":"linear","factor":2}'.

Lists and dictionaries are JSON. The config is made again from its JSON, so that what it derives follows the changes.
"""

from __future__ import annotations

import copy
import json
from typing import Any

from transformers import PretrainedConfig

from llm_local.adapters.hf_internals import rope_kinds

_ROPE_DICTIONARIES, _ROPE_NUMBERS = ("rope_parameters", "rope_scaling"), ("rope_theta", "partial_rotary_factor")
_ROPE = (*_ROPE_DICTIONARIES, *_ROPE_NUMBERS)


def parse_overrides(text: str | None) -> dict[str, Any]:
    """Values by name: what begins with a bracket or a quote as JSON reads it, all else as it stands.

    Raises ValueError naming the part that is no name=value, or no JSON.
    """
    found: dict[str, Any] = {}
    rest = text or ""
    while rest:
        name, equals, rest = rest.partition("=")
        if not equals:
            raise ValueError(f"{name!r} is not name=value")
        if rest[:1] not in ("[", "{", '"'):
            found[name], _, rest = rest.partition(",")
            continue
        try:
            found[name], end = json.JSONDecoder().raw_decode(rest)
        except json.JSONDecodeError as error:
            reason = f"{error.msg} at {rest[error.pos :][:20]!r}"
            raise ValueError(f"the value of {name} is not JSON ({reason}); quote the whole for the shell") from error
        if rest[end:] and rest[end] != ",":
            raise ValueError(f"after the value of {name} stands {rest[end:][:20]!r}, not a comma")
        rest = rest[end + 1 :]
    return found


def overridden(config: PretrainedConfig, values: dict[str, Any], overrides: str) -> PretrainedConfig:
    """The config made again from its JSON's values with the overrides in it.

    Raises ValueError, as update_from_string does, and for a name whose value the config works out from others.
    """
    given = {name: _typed(config, name, value) for name, value in parse_overrides(overrides).items()}
    made = type(config).from_dict(
        _values(config, values, given) | {"model_type": config.model_type}, name_or_path=config.name_or_path
    )
    for name, value in given.items():
        if name not in _ROPE and not isinstance(value, (dict, list)) and getattr(made, name) != value:
            raise ValueError(f"{name} is {getattr(made, name)} whatever is set: it follows from other values")
    return made


def is_per_layer(name: str, value: object, num_layers: int) -> bool:
    """Whether a config's value is a list with an entry for each layer."""
    is_list = isinstance(value, (list, tuple)) and len(value) == num_layers
    return is_list and name != "architectures" and not name.endswith("_token_id")


def _typed(config: PretrainedConfig, name: str, value: Any) -> Any:
    """The value as the config has it: text becomes what the one that is there now is."""
    now = getattr(config, name, None)
    if not isinstance(value, str) or isinstance(now, str):
        return value
    if value in ("null", "None"):
        return None
    if isinstance(now, (int, float)):  # bool is one of them
        trial = copy.deepcopy(config)
        trial.update_from_string(f"{name}={value}")
        return getattr(trial, name)
    if isinstance(now, (dict, PretrainedConfig)):
        raise ValueError(f"{name} is a dictionary; give it as JSON, as {name}={{...}}")
    try:
        return json.loads(value)
    except json.JSONDecodeError:
        if isinstance(now, (list, tuple)):
            raise ValueError(f"{name} is a list; give it as JSON, as {name}=[...]") from None
        return value


def _values(config: PretrainedConfig, stated: dict[str, Any], given: dict[str, Any]) -> dict[str, Any]:
    """What the JSON of a config, or of a part of one, states, with the given values instead."""
    alias = type(config).attribute_map  # GPT-2's JSON may say n_embd or hidden_size
    has_rope = hasattr(config, "rope_parameters")
    changed = {}
    for name, value in given.items():
        if not hasattr(config, name) and not (has_rope and name in _ROPE):
            raise ValueError(f"key {name} isn't in the original config dict")
        part = getattr(config, name, None)
        if isinstance(part, PretrainedConfig) and isinstance(value, dict):
            value = {"model_type": part.model_type} | _values(part, stated.get(name) or {}, value)
        changed[alias.get(name, name)] = value
    kept = {name: value for name, value in stated.items() if alias.get(name, name) not in changed}
    if has_rope and not changed.keys().isdisjoint(_ROPE):
        kept = {name: value for name, value in kept.items() if name not in _ROPE}
        changed = _with_rope(config, changed)
    layers = alias.get("num_hidden_layers", "num_hidden_layers")
    if layers in changed:
        kept = _resized(config, kept, layers, changed[layers])
    return kept | changed


def _with_rope(config: PretrainedConfig, changed: dict[str, Any]) -> dict[str, Any]:
    """Rotary values under the names that older configs have, as transformers now keeps them: all in rope_parameters."""
    now: dict[str, Any] = config.rope_parameters or {}
    changed, made = dict(changed), dict(now)
    kinds = rope_kinds(config, now)
    for name in _ROPE_DICTIONARIES:
        if name in changed:
            value = changed.pop(name) or {"rope_type": "default"}
            if not isinstance(value, dict):
                raise ValueError(f"{name} is a dictionary; give it as JSON, as {name}={{...}}")
            made = {number: now[number] for number in _ROPE_NUMBERS if number in now} | value
    numbers = {name: changed.pop(name) for name in _ROPE_NUMBERS if name in changed}
    if kinds and (numbers or rope_kinds(config, made) != kinds):
        example = ",".join(f'"{kind}":{{...}}' for kind in kinds)
        raise ValueError(f"layers differ in their rotary values; give all of them, as rope_parameters={{{example}}}")
    attributes = {name: value for name, value in numbers.items() if name in vars(config)}
    return changed | attributes | {"rope_parameters": made | numbers}


def _resized(config: PretrainedConfig, stated: dict[str, Any], layers: str, after: int) -> dict[str, Any]:
    """What is stated, for another number of layers, whose name is `layers`. A list with an entry a layer is left to the
    class where it makes the same; else it is cut, or goes on where its entries are equal. Raises ValueError else."""
    before = getattr(config, layers)
    lists = {name: value for name, value in stated.items() if is_per_layer(name, value, before)}
    others = {name: value for name, value in stated.items() if name not in lists}
    if isinstance(single := others.get("per_layer_config"), dict):  # of single layers, by number
        others["per_layer_config"] = {number: value for number, value in single.items() if int(number) < after}
    if not lists:
        return others
    try:
        own, longer = (vars(type(config).from_dict(copy.deepcopy(others) | {layers: n})) for n in (before, after))
    except (ValueError, TypeError):  # the class makes nothing without them
        own = longer = {}
    for name, value in lists.items():
        if list(own.get(name) or ()) == list(value) and is_per_layer(name, longer[name], after):
            continue
        if after > before and any(entry != value[0] for entry in value):
            raise ValueError(f"{name} has {before} entries and {layers} is {after}; give {name}=[...], too")
        others[name] = (list(value) + [value[0]] * after)[:after] if after > before else list(value[:after])
    return others
