"""DeepSpeed's JSON for one block's engine: "auto" values filled from the flags as transformers' Trainer fills them."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch.optim import lr_scheduler
from transformers.integrations.deepspeed import HfTrainerDeepSpeedConfig

from llm_local.config import ConfigError, RunConfig, from_here

Json = dict[str, Any]
# DeepSpeed's monitors, and which of their settings tells the stages apart
MONITORS = {"tensorboard": "job_name", "csv_monitor": "job_name", "wandb": "", "comet": ""}


def load_json(config: RunConfig) -> Json:
    """The file of --deepspeed, {} without one. Raises ConfigError naming the file and the line."""
    if config.train.deepspeed is None:
        return {}
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
    return loaded


def zero_stage(settings: Json) -> int:
    return int(settings.get("zero_optimization", {}).get("stage", 0))


def deepspeed_problems(config: RunConfig, num_replicas: int) -> list[str]:
    """What is wrong with the JSON itself and with its combination with the flags."""
    try:
        settings = resolve(config, num_replicas, model_config=SimpleNamespace(hidden_size=64), cpu=True)
    except ConfigError as error:
        return error.problems
    problems = []
    stage = zero_stage(settings)
    if stage not in (0, 1, 2, 3):
        problems.append(f"zero_optimization.stage={stage} in {config.train.deepspeed}; DeepSpeed has 0, 1, 2 and 3")
    if config.is_pipelined and stage >= 2:
        problems.append(f"ZeRO stage {stage} does not work with method=backprop (DeepSpeed's pipeline); use 0 or 1")
    if config.local.method == "overlapping" and (stage == 3 or "offload_optimizer" in settings["zero_optimization"]):
        what = "ZeRO stage 3" if stage == 3 else "offload_optimizer"
        problems.append(
            f"{what} does not work with method=overlapping, whose shared layers have two backward passes through one "
            "graph; use ZeRO stage 0, 1 or 2 without offload"
        )
    if config.local.distillation_weight and stage == 3:
        problems.append(
            "ZeRO stage 3 does not work with distillation_weight, which reads a head outside its forward pass; "
            "use 0, 1 or 2"
        )
    theirs = [name for name in ("optimizer", "scheduler") if name in settings]
    if config.local.head_warmup_steps > 0 and theirs:
        problems.append(
            f"head_warmup_steps={config.local.head_warmup_steps} sets learning rates of its own; "
            f"remove {' and '.join(theirs)} from {config.train.deepspeed}"
        )
    if "pipeline" in settings and not config.is_pipelined:
        problems.append(f"the pipeline section of {config.train.deepspeed} is for method=backprop; remove it")
    return problems or _deepspeeds_own_problems(config, settings)


def _deepspeeds_own_problems(config: RunConfig, settings: Json) -> list[str]:
    """What DeepSpeed itself would refuse when it makes an engine, for it would do so on every rank."""
    from deepspeed.runtime import lr_schedules
    from deepspeed.runtime.config import DEEPSPEED_OPTIMIZERS, DeepSpeedConfig

    for section in ("optimizer", "scheduler"):
        if section in settings and not isinstance(settings[section].get("type"), str):
            return [
                f"{config.train.deepspeed}: {section} has no type; name one, or remove {section}: the flags have one"
            ]
    name = settings.get("optimizer", {}).get("type")
    schedule = settings.get("scheduler", {}).get("type", lr_schedules.WARMUP_LR)
    if schedule == "ReduceLROnPlateau" or not (hasattr(lr_schedules, schedule) or hasattr(lr_scheduler, schedule)):
        why = "waits for a measure that no run gives it" if schedule == "ReduceLROnPlateau" else "is unknown"
        known = ", ".join(lr_schedules.VALID_LR_SCHEDULES)
        return [
            f"{config.train.deepspeed}: scheduler.type={schedule!r} {why}; use {known}, or one of torch by its name"
        ]
    if name is not None and name.lower() not in DEEPSPEED_OPTIMIZERS and not hasattr(torch.optim, name):
        return [f"{config.train.deepspeed}: optimizer.type={name!r} is unknown; DeepSpeed has {DEEPSPEED_OPTIMIZERS}"]
    try:
        # the batch of all replicas was compared with the flags; here DeepSpeed sees a world of one
        DeepSpeedConfig(copy.deepcopy({k: v for k, v in settings.items() if k != "train_batch_size"}))
    except Exception as error:  # pydantic's, asserts and errors of its own
        return [f"{config.train.deepspeed}: DeepSpeed refuses it: {' '.join(str(error).split())}"]
    return []


def resolve(config: RunConfig, num_replicas: int, model_config: Any, cpu: bool, monitor: str | None = None) -> Json:
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
    arguments = SimpleNamespace(
        **config.flat(),
        world_size=num_replicas,
        save_on_each_node=False,
        fp16_full_eval=False,
        bf16_full_eval=False,
        get_warmup_steps=lambda _total: train.warmup_steps,
    )
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
    return _own_settings(config, settings, cpu, monitor)


def _repair(line: str) -> str:
    flags = [f"--{name}" for name in ("bf16", "fp16") if f"ds {name}.enabled=True" in line]
    return "write 'auto' there" + "".join(f", or give the flag ({flag})" for flag in flags)


def _own_settings(config: RunConfig, settings: Json, cpu: bool, monitor: str | None) -> Json:
    settings.setdefault("steps_per_print", 10**9)
    zero = settings.setdefault("zero_optimization", {"stage": 0})
    if not config.is_pipelined:
        # one step() after any number of backward passes; DeepSpeed overlaps its reductions with that in ZeRO-2 only
        settings["managed_gradient_accumulation"] = False
        if zero_stage(settings) != 2:
            zero["overlap_comm"] = False
    # torch's own AdamW: offloading would else compile DeepSpeed's, which also does not resume bit for bit
    settings.setdefault("zero_force_ds_cpu_optimizer", False)
    optimizer = settings.get("optimizer", {})
    if cpu and optimizer.get("type", "").lower() in ("adam", "adamw"):
        optimizer.setdefault("params", {}).setdefault("torch_adam", True)
    chosen = {"tensorboard": "tensorboard", "csv": "csv_monitor"}.get(config.train.report_to)
    if chosen:
        settings.setdefault(chosen, {"enabled": True, "output_path": str(config.output_dir / config.train.report_to)})
    for name in MONITORS:
        if monitor is None:
            settings.pop(name, None)
        elif name in settings and "job_name" in MONITORS[name]:
            settings[name]["job_name"] = settings[name].get("job_name", "") + monitor
    return settings


def _autos(value: Any, name: str) -> Iterator[str]:
    if value == "auto":
        yield name
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from _autos(item, f"{name}.{key}" if name else key)
