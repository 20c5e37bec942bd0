"""From the flags of scripts/plan.py to a plan: what is wrong with them, and the search through the layouts."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from llm_local.config import Config, ConfigError
from llm_local.plan.layouts import Planner, fastest
from llm_local.plan.report import Plan
from llm_local.plan.stages import PEER_METHODS, Candidate
from llm_local.problems import static_problems
from llm_local.registry import HEADS

POSITIVE = (
    "devices",
    "devices_per_host",
    "memory_gb",
    "memory_tb_per_second",
    "device_tflops",
    "link_gbps",
    "local_link_gbps",
    "top",
)
# of a run, that a plan sets itself or that say nothing here
_SET = ("method", "head", "num_stages", "stage_layers", "final_backprop_steps", "deepspeed")


def check_plan(given: Mapping[str, Any], config: Config) -> None:
    """Raises ConfigError with every problem of the flags that shows without the model."""
    problems = [_positive(name, given[name]) for name in POSITIVE]
    problems += [_positive(n, given[n]) for n in ("mtbf_hours", "restart_seconds") if given[n] is not None]
    latency = given["link_latency_us"]
    if not 0 <= latency < math.inf:
        problems.append(f"--link-latency-us {latency:g} must be 0 or more")
    devices, per_host = given["devices"], given["devices_per_host"]
    if min(devices, per_host) > 0 and devices > per_host and devices % per_host:
        problems.append(f"--devices {devices} are no multiple of --devices-per-host {per_host}; use full hosts")
    for count in given["num_stages"] or []:
        if count < 1:
            problems.append(f"--num_stages {count} must be 1 or more")
        elif devices > 0 and devices % count:
            near = ", ".join(str(n) for n in _divisors(devices) if n <= 2 * count)
            problems.append(f"--num_stages {count} does not divide the {devices} devices; use one of {near}")
    problems += [
        f"--{name} {given[name]}: there is no folder {given[name].parent}; make it"
        for name in ("json", "trace")
        if given[name] and not given[name].parent.is_dir()
    ]
    defaults = Config().flat()
    problems += [
        f"--{name} is set by the plan; leave it out"
        for name, value in config.flat().items()
        if name in _SET and value != defaults[name]
    ]
    for method in given["method"]:
        for head in given["head"] or default_heads(config):
            problems += static_problems(Candidate(method, 1, 1, 0, head).flags(config), 1, True, True)
    if problems := [problem for problem in dict.fromkeys(problems) if problem]:
        raise ConfigError(problems)


def default_heads(config: Config) -> tuple[str, ...]:
    """Those that the flags leave: some have private layers."""
    private = config.local.head_layers or config.local.head_layers_schedule
    return tuple(name for name, head in HEADS.items() if private or not head.needs_private_layers)


def _positive(name: str, value: float) -> str:
    return "" if 0 < value < math.inf else f"--{name.replace('_', '-')} {value:g} must be more than 0"


def search(
    planner: Planner,
    methods: Sequence[str],
    heads: Sequence[str] | None,
    stages: Sequence[int] | None,
    zero: Sequence[int],
    top: int,
) -> Plan:
    """The fastest local layouts, the fastest of each backpropagation, and what does not fit.

    Raises ConfigError for stages, or positions, that the model has not.
    """
    layers = planner.sizes.num_layers
    for count in stages or []:
        if count > layers:
            raise ConfigError([f"--num_stages {count} is more than the model's {layers} layers; use {layers} or fewer"])
    length, most = planner.config.data.seq_length, planner.sizes.max_positions
    if most is not None and length > most:
        raise ConfigError([f"--seq_length {length} is longer than the model's {most} positions; shorten it"])
    heads = heads or default_heads(planner.config)
    counts = stages or _divisors(planner.machine.devices)
    shards = sorted(set(zero))
    local = [planner.evaluate(layout) for layout in planner.layouts(methods, heads, counts, shards)]
    best = fastest(local, top)
    refused = [outcome for outcome in local if outcome.problem]
    peers = []
    for method in PEER_METHODS:
        found = [planner.evaluate(layout) for layout in planner.layouts([method], heads, counts, shards)]
        refused += [outcome for outcome in found if outcome.problem]
        peers += fastest(found, 1)
    return Plan(tuple(best), tuple(peers), tuple(refused))


def _divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]
