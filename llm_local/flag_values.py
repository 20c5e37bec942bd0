"""A flag's name and value, as a YAML file or the command line gives them."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any, get_args

from llm_local.program import program
from llm_local.trainer_flags import NOT_TAKEN


def unknown_name(kind: str, name: object) -> str:
    """What is said of one that there is not, and what to do instead."""
    plain = str(name).lstrip("-").partition("=")[0]
    instead = NOT_TAKEN[plain].instead if plain in NOT_TAKEN else f"see {program('pretrain.py')} --help"
    return f"unknown {kind} {name!r}; {instead}"


def options(name: str) -> tuple[str, ...]:
    return tuple(dict.fromkeys((f"--{name}", f"--{name.replace('_', '-')}")))


def number(value: Any) -> float:
    """A whole number as such; argparse's messages bear this name. Raises ValueError and TypeError."""
    found = float(value)
    return int(found) if found.is_integer() else found


def truth(text: str) -> bool:
    known = {"true": True, "t": True, "yes": True, "y": True, "1": True}
    known |= {"false": False, "f": False, "no": False, "n": False, "0": False}
    if text.lower() not in known:
        raise argparse.ArgumentTypeError(f"true or false expected, got {text}")
    return known[text.lower()]


def without_values(unknown: Sequence[str]) -> list[str]:
    """The unknown arguments less the values that follow unknown flags: a flag and its value are one problem."""
    flags = [text.startswith("--") for text in unknown]
    before = [False, *(flag and "=" not in text for flag, text in zip(flags, unknown, strict=True))]
    return [text for text, flag, after in zip(unknown, flags, before, strict=False) if flag or not after]


def typed_value(value: Any, hint: Any) -> tuple[Any, str]:
    """A YAML value as the field's type, and what it should have been if it is not ('' when it is)."""
    kinds = get_args(hint) or (hint,)
    if value is None:
        return None, "" if type(None) in kinds else "a value"
    if str in kinds:
        return _text(value)
    if bool in kinds:
        return value, "" if isinstance(value, bool) else "true or false"
    wanted = number if {int, float} <= {*kinds} else int if int in kinds else float
    try:  # YAML reads 5e-4 as text
        found = None if isinstance(value, bool) else wanted(value)
    except (TypeError, ValueError, OverflowError):  # int(inf) overflows
        found = None
    is_it = found is not None and float(found) == float(value)
    return found, "" if is_it else "a whole number" if wanted is int else "a number"


def _text(value: Any) -> tuple[Any, str]:
    """YAML's natural forms of a text flag: stage_layers: 4 or [4, 4], resume_from_checkpoint: true."""
    if isinstance(value, dict):
        return None, "a single value"
    if isinstance(value, bool):
        return str(value).lower(), ""
    return ",".join(map(str, value)) if isinstance(value, list) else str(value), ""
