"""How many devices may divide a model's layers, or its rows, by what a run would have against it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from llm_local.checks.sequence_trial import undividable
from llm_local.config import ConfigError
from llm_local.export.stages import trim_config
from llm_local.memory.division import WHOLE, Division
from llm_local.memory.sizes import MOST_LAYERS
from llm_local.model.levels import num_layers_of
from llm_local.model.model_config import load_model_config
from llm_local.plan.layouts import Planner
from llm_local.registry import TASKS
from llm_local.sequence_problems import sequence_problems
from llm_local.tensor_problems import tensor_problems

FLAGS = tuple(WHOLE.flags)


def asked_for(layers: Sequence[int] | None, rows: Sequence[int] | None) -> list[Division]:
    """The divisions of two flags' numbers; None: not given. Of both one number is 1."""
    found = [Division(a, b) for a in layers or [1] for b in rows or [1]]
    return [division for division in dict.fromkeys(found) if 1 in (division.layers, division.rows)]


def divisions(planner: Planner, layers: Sequence[int] | None, rows: Sequence[int] | None) -> tuple[Division, ...]:
    """Those that the flags ask for; of a flag that is not given, all that the model and the devices allow. Raises
    ConfigError for what they do not."""
    found = asked_for(layers, rows)
    for division in found:
        if problems := _problems(planner, division):
            raise ConfigError(problems)
    sizes = [size for size in range(2, planner.machine.devices + 1) if planner.machine.devices % size == 0]
    others = [Division(layers=size) for size in sizes] if layers is None and WHOLE in found else []
    found += _allowed(planner, others)
    others = [Division(rows=size) for size in sizes] if rows is None and WHOLE in found else []
    return (*found, *_allowed(planner, others))


def _allowed(planner: Planner, others: Sequence[Division]) -> Iterator[Division]:
    """A type that cannot be divided by the least number cannot by any, and is not tried again."""
    for division in others:
        is_least = division == others[0]
        problems = _problems(planner, division, is_least)
        if not problems:
            yield division
        elif is_least:
            return


def _problems(planner: Planner, division: Division, is_tried: bool = True) -> list[str]:
    if division == WHOLE:
        return []
    config = division.in_flags(planner.config)
    zero = {"zero_optimization": {"stage": 1}}  # other stages, and heads, are left out one by one
    static = replace(config, local=replace(config.local, method="chunked", head="linear"), deepspeed_json=zero)
    found = tensor_problems(static) + sequence_problems(static)
    if found:
        return found
    task, model_config = TASKS[config.model.task], load_model_config(config.model)
    layers = min(MOST_LAYERS, num_layers_of(task.part_of(model_config)))
    small = trim_config(model_config, layers, task), replace(planner.anatomy, num_layers=layers)
    return undividable(config, *small, is_tried)
