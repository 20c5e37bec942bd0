"""From the flags of scripts/plan.py to a plan: what is wrong with them, and the search through the layouts."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from llm_local.config import Config, ConfigError
from llm_local.memory.division import WHOLE, Division
from llm_local.memory.sizes import ModelSizes, read_shares
from llm_local.plan.divisions import FLAGS, asked_for, divisions
from llm_local.plan.layouts import Planner, Replicas, fastest
from llm_local.plan.machine import hosts_of, of_each
from llm_local.plan.report import Plan
from llm_local.plan.splits import splits
from llm_local.plan.stages import PEER_METHODS, Candidate
from llm_local.problems import static_problems
from llm_local.registry import HEADS
from llm_local.replicas import parse_replicas

POSITIVE = ("devices", "link_gbps", "local_link_gbps", "top")
EACH = ("memory_gb", "memory_tb_per_second", "device_tflops")  # one number, or of each host or device
ANY = "any"
# of a run, that a plan sets itself or that say nothing here
_SET = ("method", "head", "num_stages", "stage_replicas", "stage_layers", "final_backprop_steps", "deepspeed")
_TUNING = ("freeze_stages", "lora_rank")


def check_plan(given: Mapping[str, Any], config: Config) -> None:
    """Raises ConfigError with every problem of the flags that shows without the model."""
    problems = [_positive(name, given[name]) for name in POSITIVE]
    problems += [_positive(name, value) for name in ("devices_per_host", *EACH) for value in given[name]]
    problems += [_positive(n, given[n]) for n in ("mtbf_hours", "restart_seconds") if given[n] is not None]
    latency = given["link_latency_us"]
    if not 0 <= latency < math.inf:
        problems.append(f"--link-latency-us {latency:g} must be 0 or more")
    if not any(problems):
        problems += [*_device_problems(given), *_stage_problems(given)]
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
    tuned = [name for name in _TUNING if getattr(config.local, name) is not None]
    problems += [f"--{name}: a plan is of models that are trained whole; leave it out" for name in tuned]
    for method in given["method"] if not tuned else ():
        for head in given["head"] or default_heads(config):
            problems += static_problems(Candidate(method, 1, 1, 0, head).flags(config), 1, True, True)
    if problems := [problem for problem in dict.fromkeys(problems) if problem]:
        raise ConfigError(problems)


def _device_problems(given: Mapping[str, Any]) -> list[str]:
    """Of numbers that are more than 0."""
    devices, per_host = given["devices"], given["devices_per_host"]
    if len(per_host) > 1 and sum(per_host) != devices:
        return [f"--devices-per-host {_list(per_host)} are {sum(per_host)} devices, --devices is {devices}"]
    if len(per_host) == 1 and devices > per_host[0] and devices % per_host[0]:
        return [f"--devices {devices} are no multiple of --devices-per-host {per_host[0]}; use full hosts"]
    problems = []
    for name in EACH:
        try:
            of_each(given[name], hosts_of(devices, per_host))
        except ValueError as error:
            problems.append(f"--{name.replace('_', '-')} {_list(given[name])} are {error}")
    return problems


def _stage_problems(given: Mapping[str, Any]) -> list[str]:
    devices, counts, asked = given["devices"], given["num_stages"] or [], given["stage_replicas"] or []
    problems = [f"--num_stages {count} must be 1 or more" for count in counts if count < 1]
    ranks = [division.ranks for division in asked_for(*(given[name] for name in FLAGS))]  # of a replica
    if not ranks:
        problems.append(f"--{FLAGS[0]} and --{FLAGS[1]}: devices divide layers or rows; leave one out, or give 1, too")
    for name in FLAGS:
        for size in given[name] or []:
            if size < 1 or devices % size:
                near = ", ".join(map(str, _divisors(devices)))
                problems.append(f"--{name} {size} does not divide the {devices} devices; use one of {near}")
    if problems:
        return problems
    if not asked and all(len(set(given[name])) == 1 for name in EACH):  # stages are equal, then
        for count in (count for count in counts if all(devices % (count * size) for size in ranks)):
            replicas = devices // min(ranks)
            near = ", ".join(str(n) for n in _divisors(replicas) if n <= 2 * count)
            what = f"{replicas} groups of {min(ranks)}" if min(ranks) > 1 else f"{devices}"
            problems.append(f"--num_stages {count} does not divide the {what} devices; use one of {near}")
    for text in asked:
        found, name = parse_replicas(text), f"--stage_replicas {text}"
        if text == ANY:
            continue
        if found is None or 0 in found:
            problems.append(f"{name} is neither a list of 1 or more for each stage, such as 4,2,1, nor {ANY}")
        elif sum(found) * ranks[0] != devices and not any(sum(found) * count == devices for count in ranks):
            of = f" x {ranks[0]}" if ranks[0] > 1 else ""
            problems.append(f"{name}{of} are {sum(found) * ranks[0]} devices, --devices is {devices}")
        elif counts and len(found) not in counts:
            problems.append(f"{name} names {len(found)} stages, --num_stages is {_list(counts)}")
    return problems


def _list(values: Sequence[float]) -> str:
    return " ".join(f"{value:g}" for value in values)


def default_heads(config: Config) -> tuple[str, ...]:
    """Those that the flags leave: some have private layers, and some a matrix that only causal models share."""
    private = config.local.head_layers or config.local.head_layers_schedule
    fitting = {name: head for name, head in HEADS.items() if config.task.generates or not head.shares_matrix}
    return tuple(name for name, head in fitting.items() if private or not head.needs_private_layers)


def _positive(name: str, value: float) -> str:
    return "" if 0 < value < math.inf else f"--{name.replace('_', '-')} {value:g} must be more than 0"


@dataclass(frozen=True)
class Choices:
    """What layouts are made of. heads, stages: None: all that fit. replicas: of each stage, as --stage_replicas; None:
    any where devices differ, else as many of each stage. layers, rows: numbers of devices that divide each; None: all
    that the model allows."""

    methods: Sequence[str]
    heads: Sequence[str] | None
    stages: Sequence[int] | None
    zero: Sequence[int]
    replicas: Sequence[str] | None = None
    layers: Sequence[int] | None = None
    rows: Sequence[int] | None = None


def search(planner: Planner, choices: Choices, top: int) -> Plan:
    """The `top` fastest local layouts, the fastest of each backpropagation, and what does not fit.

    Raises ConfigError for stages, or positions, that the model has not.
    """
    stages, layers = choices.stages, planner.sizes.num_layers
    for count in stages or []:
        if count > layers:
            raise ConfigError([f"--num_stages {count} is more than the model's {layers} layers; use {layers} or fewer"])
    length, most = planner.config.data.seq_length, planner.sizes.max_positions
    if most is not None and length > most:
        raise ConfigError([f"--seq_length {length} is longer than the model's {most} positions; shorten it"])
    heads, shards = choices.heads or default_heads(planner.config), sorted(set(choices.zero))
    ranks = divisions(planner, choices.layers, choices.rows)
    planner = replace(planner, shares=_shares(planner, ranks))
    local, peers, refused = [], [], []
    for division in ranks:
        cuts = _cuts(planner, choices, division)
        layouts = planner.layouts(choices.methods, heads, cuts, shards, division)
        local += [planner.evaluate(layout) for layout in layouts]
    best = fastest(local, top)
    refused += [outcome for outcome in local if outcome.problem]
    for method in PEER_METHODS:
        found = []
        for division in [WHOLE] if method in PEER_METHODS[1:] else ranks:
            equal = _equal(planner, choices, division)
            found += [planner.evaluate(each) for each in planner.layouts([method], heads, equal, shards, division)]
        refused += [outcome for outcome in found if outcome.problem]
        peers += fastest(found, 1)
    return Plan(tuple(best), tuple(peers), tuple(refused))


def _shares(planner: Planner, ranks: Sequence[Division]) -> dict[Division, ModelSizes]:
    """What each device has of the model, in each of the divisions."""
    config, divided = planner.config, tuple(division for division in ranks if division != WHOLE)
    if not divided:
        return {}
    found = read_shares(config.model, config.data.seq_length, config.precision, divided)[1]
    return dict(zip(divided, found, strict=True))


def _equal(planner: Planner, choices: Choices, division: Division) -> list[int]:
    """Numbers of stages with equally many replicas."""
    counts = _divisors(planner.machine.devices // division.ranks)
    return [count for count in choices.stages or counts if count in counts]


def _cuts(planner: Planner, choices: Choices, division: Division) -> list[int | Replicas]:
    """Numbers of stages, or the replicas of each, to look at."""
    stages, replicas, size = choices.stages, choices.replicas, division.ranks
    alike = planner.machine.alike()
    unequal = [found for text in replicas or [] if (found := parse_replicas(text))]
    whole = all(run.start % size == run.stop % size == 0 for run in alike)  # a replica is of devices of one kind
    if ANY in (replicas or [ANY] * (len(alike) > 1)) and whole:
        runs = [range(run.start // size, run.stop // size) for run in alike]
        most = max(stages or [planner.sizes.num_layers])
        unequal += [each for each in splits(runs, planner.rows, most) if not stages or len(each) in stages]
    return [*unequal] if replicas and ANY not in replicas else [*_equal(planner, choices, division), *unequal]


def _divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]
