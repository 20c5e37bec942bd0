"""A study's file: settings to compare, each with several seeds, on the same data and the same number of tokens.

    base:                          # flags of pretrain.py that all runs share
      config_name: configs/studies/cpu.json
      max_steps: 400
    seeds: [1, 2, 3]
    grid:                          # points backprop, greedy-linear, chunked-2-linear, overlapping-4-shared, ...
      method: [backprop, greedy, chunked, overlapping]
      head: [linear, decoder, shared]
      blocks: [2, 4]
      head_layers: 1               # private layers of the heads decoder and shared
    points:                        # by hand; `like` takes another point's flags
      - {name: chunked-4-shared-refresh-1, like: chunked-4-shared, head_refresh_steps: 1}
    builtin_vocab_size: 512        # the built-in tokenizer with so many pieces, where no tokenizer is named

In the grid n blocks of a model of L layers are layers_per_block=L/n (chunked), or windows of L/n + L/2n layers, one
every L/n (overlapping; half a layer counts as one). Every layer is a block of greedy, and backprop has no local heads.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from llm_local.config import Config, ConfigError, parse
from llm_local.costs import Setting, Shape
from llm_local.cut import plan_partition, run_setting, run_shape
from llm_local.device import supports
from llm_local.flags import AMOUNT, LAYOUT, START, DataArguments, ModelArguments, deciding
from llm_local.head_problems import cut_problems
from llm_local.model.anatomy import Anatomy, SliceError, probe
from llm_local.model.model_config import load_model_config
from llm_local.problems import static_problems
from llm_local.registry import HEADS, METHODS

KEYS = ("base", "seeds", "grid", "points", "builtin_vocab_size")
GRID_KEYS = ("method", "head", "blocks", "head_layers")
# what the study sets itself, and what all points share so that their losses can be compared
OWN = (*deciding(START, LAYOUT), "seed")
SHARED = (*(f.name for f in fields(DataArguments)), *deciding(AMOUNT), "tokenizer_name", "eval_steps", "eval_batches")

Flags = dict[str, Any]


@dataclass(frozen=True)
class Point:
    """One setting of a study. config is that of its runs, but for seed and folder."""

    name: str
    config: Config
    shape: Shape
    setting: Setting


@dataclass(frozen=True)
class Study:
    """Points times seeds. base is the undivided model under backpropagation, whether or not a point trains it."""

    base: Point
    points: tuple[Point, ...]
    seeds: tuple[int, ...]
    builtin_vocab_size: int | None


def read_study(path: Path) -> Study:
    """The study that the file describes. Raises ConfigError with every problem of every point."""
    try:
        content = yaml.safe_load(path.read_text())
    except OSError as error:
        raise ConfigError([f"cannot read the study {path}: {error.strerror}"]) from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError([f"{path} is not YAML: {' '.join(str(error).split())}"]) from error
    problems = _file_problems(content)
    if problems:
        raise ConfigError([f"{path}: {problem}" for problem in problems])
    base, problems = _make_point("base", {**content["base"], "method": "backprop"})
    if base is None:
        raise ConfigError(problems)
    named, more = expand(content, base.setting.blocks[-1].stop)
    problems += more + _vocabulary_problems(content.get("builtin_vocab_size"), base.config)
    points = []
    for name, flags in named:
        point, more = _make_point(name, content["base"] | flags)
        problems += more
        points += [point] if point else []
    if problems:
        raise ConfigError(problems)
    return Study(base, tuple(points), tuple(content["seeds"]), content.get("builtin_vocab_size"))


def _file_problems(content: Any) -> list[str]:
    """What is wrong with the file before any point is looked at."""
    if not isinstance(content, dict):
        return ["there are no 'name: value' lines"]
    problems = [f"unknown key {key!r}; there are {', '.join(KEYS)}" for key in content if key not in KEYS]
    base, seeds = content.get("base"), content.get("seeds")
    if not isinstance(base, dict):
        problems.append("base: give the flags that all runs share, as 'name: value' lines")
    else:
        problems += [f"base: {name} is set by the study; leave it out" for name in base if name in OWN]
    if not isinstance(seeds, list) or not seeds or not all(_is_count(seed) or seed == 0 for seed in seeds):
        problems.append(f"seeds={seeds!r} is not a list of whole numbers such as [1, 2, 3]")
    elif len(set(seeds)) < len(seeds):
        problems.append(f"seeds={seeds!r} has a seed twice")
    if not content.get("grid") and not content.get("points"):
        problems.append("nothing to train; give a grid, or points")
    vocabulary = content.get("builtin_vocab_size")
    if vocabulary is not None and not _is_count(vocabulary):
        problems.append(f"builtin_vocab_size={vocabulary!r} is not a number of pieces")
    return problems


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def expand(content: Mapping[str, Any], num_layers: int) -> tuple[list[tuple[str, Flags]], list[str]]:
    """The points of a study of a model of so many layers, by name with their own flags, and what is wrong with them."""
    named, problems = expand_grid(content.get("grid") or {}, num_layers)
    more, wrong = _expand_points(content.get("points") or [], dict(named))
    named, problems = named + more, problems + wrong
    names = [name for name, _ in named]
    problems += [f"two points are named {name!r}; rename one" for name in dict.fromkeys(names) if names.count(name) > 1]
    return named, problems


def expand_grid(grid: Any, num_layers: int) -> tuple[list[tuple[str, Flags]], list[str]]:
    """The grid's points by name, and what is wrong with it."""
    if not grid:
        return [], []
    problems = _grid_problems(grid, num_layers)
    if problems:
        return [], problems
    named: list[tuple[str, Flags]] = []
    for method in grid["method"]:
        if not METHODS[method].has_local_losses:
            named.append((method, {"method": method}))
            continue
        for blocks in grid["blocks"] if METHODS[method].is_cut_by_hand else [None]:
            for head in grid["head"]:
                layers = grid.get("head_layers", 1) if HEADS[head].takes_private_layers else 0
                flags = {"method": method, "head": head, "head_layers": layers}
                flags |= METHODS[method].block_flags(num_layers // blocks) if blocks else {}
                named.append(("-".join(str(part) for part in (method, blocks, head) if part is not None), flags))
    return named, []


def _grid_problems(grid: Any, num_layers: int) -> list[str]:
    if not isinstance(grid, dict):
        return ["grid: give lists of method, head and blocks"]
    problems = [f"grid: unknown key {key!r}; there are {', '.join(GRID_KEYS)}" for key in grid if key not in GRID_KEYS]
    known = {"method": METHODS, "head": HEADS}
    methods = grid.get("method")
    methods = methods if isinstance(methods, list) else []
    needed = ["method"]
    known_methods = [METHODS[method] for method in methods if method in METHODS]
    needed += ["head"] if any(method.has_local_losses for method in known_methods) else []
    needed += ["blocks"] if any(method.is_cut_by_hand for method in known_methods) else []
    for key in needed:
        values = grid.get(key)
        if not isinstance(values, list) or not values:
            problems.append(f"grid: {key}={values!r} is not a list")
            continue
        for value in values:
            if key == "blocks" and not (_is_count(value) and value > 1 and num_layers % value == 0):
                parts = [str(n) for n in range(2, num_layers + 1) if num_layers % n == 0]
                problems.append(
                    f"grid: blocks={value!r} does not divide the model's {num_layers} layers into equal blocks; "
                    f"use {', '.join(parts)}, or write the point by hand"
                )
            elif key != "blocks" and value not in known[key]:
                problems.append(f"grid: {key}={value!r} is unknown; choose from {', '.join(known[key])}")
    if not _is_count(grid.get("head_layers", 1)):
        problems.append(f"grid: head_layers={grid['head_layers']!r} must be 1 or more; head linear has none by itself")
    return problems


def _expand_points(points: Any, known: dict[str, Flags]) -> tuple[list[tuple[str, Flags]], list[str]]:
    """The points written by hand; `known` are those that `like` may name, and each point joins them."""
    if not isinstance(points, list):
        return [], ["points: give a list, one '- {name: ..., flag: value}' a point"]
    named: list[tuple[str, Flags]] = []
    problems: list[str] = []
    for number, point in enumerate(points, start=1):
        name = point.get("name") if isinstance(point, dict) else None
        if not isinstance(name, str) or not re.fullmatch(r"\w[\w.-]*", name):
            problems.append(f"points: number {number} has no name of letters, digits, '-', '_' and '.'")
            continue
        flags = {key: value for key, value in point.items() if key not in ("name", "like")}
        like = point.get("like")
        if like is not None and like not in known:
            problems.append(f"{name}: like={like!r} names no earlier point")
        problems += [f"{name}: {flag} is set by the study; leave it out" for flag in flags if flag in OWN]
        problems += [
            f"{name}: {flag} would give it other data or tokens than the others; set it in base"
            for flag in flags
            if flag in SHARED
        ]
        flags = known.get(str(like), {}) | flags
        known = known | {name: flags}
        named.append((name, flags))
    return named, problems


def _make_point(name: str, flags: Flags) -> tuple[Point | None, list[str]]:
    """The point that the flags make, or what is wrong with them."""
    try:
        config = parse(_arguments(flags))
        problems = static_problems(config, 1, supports("fp16"), supports("bf16"))
        if not problems:
            return Point(name, *_measures(config)), []
    except ConfigError as error:
        problems = error.problems
    except ValueError as error:
        problems = [str(error)]
    return None, [f"{name}: {problem}" for problem in problems]


def _arguments(flags: Flags) -> list[str]:
    """The flags as pretrain.py's arguments, which are typed and checked as those of any run."""
    texts = {
        name: ",".join(map(str, value)) if isinstance(value, list) else str(value) for name, value in flags.items()
    }
    return [part for name, text in texts.items() if flags[name] is not None for part in (f"--{name}", text)]


@cache
def _anatomy(model: ModelArguments) -> Anatomy:
    try:
        return probe(load_model_config(model), model)
    except SliceError as error:
        raise ConfigError([str(error)]) from error


def _measures(config: Config) -> tuple[Config, Shape, Setting]:
    """The config with the tokens of an image, and what the costs of a run depend on. Raises ValueError where the model
    cannot be had, or cut as wanted."""
    anatomy = _anatomy(config.model)
    if anatomy.num_tokens:
        config = replace(config, data=replace(config.data, seq_length=anatomy.num_tokens))
    partition = plan_partition(config, anatomy)
    if problems := cut_problems(config, partition):
        raise ConfigError(problems)
    return config, run_shape(config, anatomy), run_setting(config, partition, anatomy.layer_matrices)


def _vocabulary_problems(pieces: int | None, config: Config) -> list[str]:
    if pieces is None:
        return []
    if config.model.tokenizer_name or config.model.model_name_or_path:
        return ["builtin_vocab_size is for studies that name no tokenizer and no pretrained model; leave it out"]
    size = load_model_config(config.model).get_text_config(decoder=True).vocab_size
    if size >= pieces:
        return []
    return [f"the model's vocabulary of {size} is smaller than builtin_vocab_size={pieces}; lower it"]
