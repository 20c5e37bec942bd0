"""DeepSpeed's JSON for one block's engine: "auto" values filled from the flags as transformers' Trainer fills them."""

from __future__ import annotations

import copy
import inspect
import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from transformers.integrations.deepspeed import HfTrainerDeepSpeedConfig

from llm_local.config import Config, ConfigError, from_here
from llm_local.files import Json

BUCKET = 500_000_000  # DeepSpeed's reduce_bucket_size, in elements
# DeepSpeed's monitors, and which of their settings tells the stages apart
MONITORS = {"tensorboard": "job_name", "csv_monitor": "job_name", "wandb": "", "comet": ""}

# a section and a setting that say what flags say
TENSOR_PARALLEL, SEQUENCE_PARALLEL = "tensor_parallel", "sequence_parallel_size"
REPORTERS = {"tensorboard": "tensorboard", "csv": "csv_monitor"}  # of these, by what --report_to calls them


def load_json(config: Config) -> Json:
    """What the file of --deepspeed holds, {} without one; read, unless the config has it. Raises ConfigError naming the
    file and the line."""
    if config.deepspeed_json is not None:
        return copy.deepcopy(config.deepspeed_json)
    if config.train.deepspeed is None:
        return _with_loss_scale(config, {})
    path = Path(config.train.deepspeed)
    try:
        loaded = json.loads(path.read_text())
    except OSError as error:
        raise ConfigError([f"deepspeed={path}{from_here(path)}: {error.strerror}"]) from error
    except json.JSONDecodeError as error:
        raise ConfigError([f"deepspeed={path} is not JSON: line {error.lineno}: {error.msg}"]) from error
    if not isinstance(loaded, dict):
        raise ConfigError([f"deepspeed={path} holds {type(loaded).__name__}, not settings"])
    for name in ("zero_optimization", "optimizer", "scheduler", "bf16", "fp16", *MONITORS):
        if not isinstance(loaded.get(name, {}), dict):
            raise ConfigError([f"deepspeed={path}: {name} is {loaded[name]!r}, not a section {{...}}"])
    if "bfloat16" in loaded:  # DeepSpeed's older name
        loaded.setdefault("bf16", loaded.pop("bfloat16"))
    return _with_loss_scale(config, loaded)


def _with_loss_scale(config: Config, settings: Json) -> Json:
    """With fp16 ZeRO-1 where no stage is named: DeepSpeed divides gradients by the loss scale at any stage, and
    multiplies the loss under ZeRO alone. runtime/engine.py, DeepSpeedEngine.backward"""
    if config.train.fp16:
        settings.setdefault("zero_optimization", {}).setdefault("stage", 1)
    return settings


def zero_stage(settings: Json) -> int:
    return int(settings.get("zero_optimization", {}).get("stage", 0))


def resolve(config: Config, num_replicas: int, model_config: Any, monitor: str | None = None) -> Json:
    """The settings of one engine in a data-parallel world of num_replicas.

    monitor: job name under which DeepSpeed's monitors write; None turns them off (one engine of a stage writes).
    Raises ConfigError for values that contradict the flags and for "auto" in a place that has no flag.
    """
    train = config.train
    settings = load_json(config)
    defaults = ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping")
    settings = {**dict.fromkeys(defaults, "auto"), **settings}
    for precision in ("bf16", "fp16"):
        if getattr(train, precision) and precision not in settings:
            settings[precision] = {"enabled": True}
    _leave_to_the_flags(config, settings)
    arguments = SimpleNamespace(
        **config.flat(),
        world_size=num_replicas,
        save_on_each_node=False,
        fp16_full_eval=False,
        bf16_full_eval=False,
        get_warmup_steps=lambda _total: config.warmup_steps,
    )
    for name in (TENSOR_PARALLEL, SEQUENCE_PARALLEL):
        settings.pop(name, None)
    filled = HfTrainerDeepSpeedConfig(settings)
    try:
        filled.trainer_config_process(arguments)
        filled.trainer_config_finalize(arguments, SimpleNamespace(config=model_config), train.max_steps)
    except ValueError as error:
        lines = [line.strip("- ") for line in str(error).splitlines() if line.startswith("- ")]
        raise ConfigError([f"{train.deepspeed}: {line}; {_repair(line)}" for line in lines or [str(error)]]) from error
    settings = filled.config
    left = list(_autos(settings, ""))
    if left:
        raise ConfigError([f"{train.deepspeed}: {name} is 'auto', but no flag has its value" for name in left])
    settings = _own_settings(config, settings, monitor)
    if num_replicas * max(1, config.local.sequence_parallel_size) == 1 and _can_do_without_zero(config, settings):
        settings["zero_optimization"] = {"stage": 0}
    return settings


def _can_do_without_zero(config: Config, settings: Json) -> bool:
    """Whether one rank trains the same in float32 without ZeRO 1 or 2, which would shard nothing: they copy weights and
    gradients into buffers of their own."""
    zero = settings["zero_optimization"]
    is_plain = config.precision == "fp32" and "optimizer" not in settings and "offload_optimizer" not in zero
    return is_plain and not config.is_pipelined and zero.get("stage") in (1, 2)


def _leave_to_the_flags(config: Config, settings: Json) -> None:
    """What a named optimizer or scheduler leaves out is as if it had written "auto"."""
    from deepspeed.runtime import lr_schedules

    name, schedule = (settings.get(section, {}).get("type") for section in ("optimizer", "scheduler"))
    names: dict[str, list[str]] = {"optimizer": [], "scheduler": []}
    if isinstance(name, str):
        adam = "adam" in name.lower() or name.lower() in ("lamb", "muon")  # others have other moments than Adam's
        names["optimizer"] = ["lr", "weight_decay", *(["betas", "eps"] if adam else [])]
        if hasattr(torch.optim, name):
            taken = inspect.signature(getattr(torch.optim, name)).parameters
            names["optimizer"] = [each for each in names["optimizer"] if each in taken]
    if isinstance(schedule, str) and hasattr(lr_schedules, schedule):
        taken = inspect.signature(getattr(lr_schedules, schedule)).parameters
        some = ["warmup_max_lr", "total_num_steps", *(["warmup_num_steps"] if config.warmup_steps else [])]
        names["scheduler"] = [each for each in some if each in taken]
    for section, left in names.items():
        if left:
            settings[section]["params"] = dict.fromkeys(left, "auto") | (settings[section].get("params") or {})


def _repair(line: str) -> str:
    flags = [f"--{name}" for name in ("bf16", "fp16") if f"ds {name}.enabled=True" in line]
    return "write 'auto' there" + "".join(f", or give the flag ({flag})" for flag in flags)


def _own_settings(config: Config, settings: Json, monitor: str | None) -> Json:
    settings.setdefault("steps_per_print", 10**9)
    zero = settings.setdefault("zero_optimization", {"stage": 0})
    if not config.is_pipelined:
        # one step() after any number of backward passes; DeepSpeed overlaps its reductions with that in ZeRO-2 only
        settings["managed_gradient_accumulation"] = False
        if zero_stage(settings) != 2:
            zero["overlap_comm"] = False
    # torch's own AdamW: DeepSpeed's compile for minutes, and do not resume bit for bit
    settings.setdefault("zero_force_ds_cpu_optimizer", False)
    optimizer = settings.get("optimizer", {})
    if optimizer.get("type", "").lower() in ("adam", "adamw", "muon"):
        optimizer.setdefault("params", {}).setdefault("torch_adam", True)
    for name, section in REPORTERS.items():
        if name in config.reporters:
            settings.setdefault(section, {"enabled": True, "output_path": str(config.output_dir / name)})
    for name in MONITORS:
        if monitor is None:
            settings.pop(name, None)
        elif name in settings and "job_name" in MONITORS[name]:
            settings[name]["job_name"] = settings[name].get("job_name", "") + monitor
    return settings


def monitor_folder(settings: Json) -> Path | None:
    """Where a monitor of DeepSpeed's writes files, if one does."""
    found = (settings[name] for name, key in MONITORS.items() if key and settings.get(name, {}).get("enabled"))
    return next((Path(each.get("output_path", ""), each["job_name"]) for each in found), None)


def fit_bucket(settings: Json, trained: int) -> Json:
    """With a bucket for gradients, which DeepSpeed makes as large as it may be, no larger than all that there are."""
    zero = settings["zero_optimization"]
    size = min(int(zero.get("reduce_bucket_size", BUCKET)), trained)
    return {**settings, "zero_optimization": {**zero, "reduce_bucket_size": size}} if zero["stage"] else settings


def _autos(value: Any, name: str) -> Iterator[str]:
    if value == "auto":
        yield name
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from _autos(item, f"{name}.{key}" if name else key)
