"""What is wrong with DeepSpeed's JSON: by itself, beside the flags, and where it asks for what no run would do."""

from __future__ import annotations

import copy
import os
from collections.abc import Iterable, Iterator, KeysView
from difflib import get_close_matches
from types import SimpleNamespace
from typing import Any

import torch
from torch.optim import lr_scheduler

from llm_local.config import Config, ConfigError
from llm_local.ds_config import SEQUENCE_PARALLEL, load_json, resolve, zero_stage
from llm_local.files import Json

# what acts through parts of DeepSpeed that no run uses, or moves weights to where no checkpoint finds them
UNUSED = {
    "activation_checkpointing": "give --gradient_checkpointing true",
    "autotuning": "scripts/plan.py ranks layouts",
    "checkpoint": "--save_steps writes checkpoints",
    "compile": "give --torch_compile true",
    "data_efficiency": "the data flags say which rows come",
    "dataloader_drop_last": "the data flags say which rows come",
    "expert_parallel": "--num_stages divides a model",
    "hybrid_engine": "it is for reinforcement learning",
    "torch_autocast": "give --bf16 true or --fp16 true",
    "weight_quantization": "it is for inference",
    "zero_optimization.offload_optimizer.super_offload": "use device cpu alone",
    "zero_optimization.zenflow": "use offload_optimizer with device cpu",
}


def deepspeed_problems(config: Config, num_replicas: int) -> list[str]:
    """What is wrong with the JSON itself and with its combination with the flags."""
    try:
        settings = resolve(config, num_replicas, model_config=SimpleNamespace(hidden_size=64))
    except ConfigError as error:
        return error.problems
    problems = []
    stage = zero_stage(load_json(config))
    if stage not in (0, 1, 2, 3):
        problems.append(f"zero_optimization.stage={stage} in {config.train.deepspeed}; DeepSpeed has 0, 1, 2 and 3")
    if config.train.fp16 and stage == 0:
        problems.append(
            f"zero_optimization.stage=0 in {config.train.deepspeed} with fp16 would train nothing, as DeepSpeed scales "
            "the loss under ZeRO alone; use stage 1"
        )
    offloads = "offload_optimizer" in settings["zero_optimization"]
    problems += config.method.zero_problems(config.local, stage, offloads)
    theirs = [name for name in ("optimizer", "scheduler") if name in settings]
    if config.local.head_warmup_steps > 0 and theirs:
        problems.append(
            f"head_warmup_steps={config.local.head_warmup_steps} sets learning rates of its own; "
            f"remove {' and '.join(theirs)} from {config.train.deepspeed}"
        )
    muon = settings.get("optimizer", {}).get("type", "") in ("Muon", "muon")
    if muon and stage > 0 and settings["gradient_clipping"]:
        problems.append(
            f"{config.train.deepspeed}: max_grad_norm={config.train.max_grad_norm} with Muon under ZeRO would clip the "
            "orthogonal update instead of the gradient; give --max_grad_norm 0, or use ZeRO stage 0"
        )
    if "pipeline" in settings and not config.is_pipelined:
        problems.append(f"the pipeline section of {config.train.deepspeed} is for method=backprop; remove it")
    problems += list(_accelerate_problems(config, settings, stage))
    return problems or _deepspeeds_own_problems(config, settings)


def _accelerate_problems(config: Config, settings: Json, stage: int) -> Iterator[str]:
    """What accelerate's own config file asks for, and the flags do not: its launcher tells it by variables."""
    asked = {n.removeprefix("ACCELERATE_"): v for n, v in os.environ.items() if n.startswith("ACCELERATE_")}
    train, zero = config.train, settings["zero_optimization"]
    compiles = asked.get("DYNAMO_BACKEND") if train.torch_compile else None
    wanted = [
        ("MIXED_PRECISION", config.precision, "--{0} true"),
        ("USE_FSDP", None, "--deepspeed configs/ds/zero3.json"),
        ("USE_MEGATRON_LM", None, "--num_stages"),
        ("DYNAMO_BACKEND", compiles, "--torch_compile true"),
    ]
    if config.local.stage_replicas is None:  # else it is another number on each stage
        steps = ("GRADIENT_ACCUMULATION_STEPS", train.gradient_accumulation_steps, "--gradient_accumulation_steps {0}")
        wanted.append(steps)
    if asked.get("USE_DEEPSPEED") == "true":
        path = asked.get("DEEPSPEED_CONFIG_FILE", "none")
        if path != "none":
            wanted = [("DEEPSPEED_CONFIG_FILE", train.deepspeed, "--deepspeed {0}")]
        else:
            asked.setdefault("DEEPSPEED_ZERO_STAGE", "2")
            wanted += [
                ("DEEPSPEED_ZERO_STAGE", stage, "--deepspeed configs/ds/zero{0}.json"),
                ("GRADIENT_CLIPPING", train.max_grad_norm, "--max_grad_norm {0}"),
            ]
            for name in ("optimizer", "param"):
                here = (zero.get(f"offload_{name}") or {}).get("device")
                repair = "--deepspeed configs/ds/zero3_offload.json"
                wanted.append((f"DEEPSPEED_OFFLOAD_{name.upper()}_DEVICE", here, repair))
    for name, here, repair in wanted:
        value = asked.get(name, "no")
        number = value.replace(".", "", 1).isdigit()
        if value.lower() not in ("no", "none", "false", "auto") and (float(value) if number else value) != here:
            yield (
                f"accelerate's config file asks for {name.lower()}={value}, the run has {here}: "
                f"give {repair.format(value)}, or remove it there"
            )


class _Asked(dict[str, Any]):
    """Settings that know which of their keys DeepSpeed has looked for."""

    def __init__(self, settings: Json):
        super().__init__(settings)
        self.asked: set[str] = set()

    def __contains__(self, key: object) -> bool:
        self.asked.add(str(key))
        return super().__contains__(key)

    def get(self, key: str, default: Any = None) -> Any:
        self.asked.add(key)
        return super().get(key, default)

    def keys(self) -> Any:
        return KeysView(self)


def _unknown_keys(settings: Json, known: dict[str, Iterable[str]]) -> Iterator[str]:
    """Names of settings, by section, that DeepSpeed would pass over in silence, each with the one that was meant."""
    for section, names in known.items():
        for key in settings.get(section, {}) if section else settings:
            if key not in set(names):
                near = get_close_matches(key, list(names), 1)
                name = f"{section}.{key}" if section else key
                yield f"{name} is no setting of DeepSpeed's" + (f"; did you mean {near[0]}?" if near else "; remove it")


def _asks(value: Any) -> bool:
    """Whether a setting or section asks for anything."""
    if isinstance(value, dict):
        return bool(value["enabled"]) if "enabled" in value else any(map(_asks, value.values()))
    return value not in (0, 1) if type(value) in (int, float) else bool(value)


def _unused_settings(settings: Json) -> Iterator[str]:
    for name, instead in UNUSED.items():
        value: Any = settings
        for part in name.split("."):
            value = value.get(part) if isinstance(value, dict) else None
        if _asks(value):
            yield f"{name} does nothing in a run: {instead}, and remove it"
    for name in ("offload_optimizer", "offload_param"):
        if (settings.get("zero_optimization", {}).get(name) or {}).get("device") == "nvme":
            yield f"zero_optimization.{name}.device=nvme is where no checkpoint finds the weights; use cpu"


def _deepspeeds_own_problems(config: Config, settings: Json) -> list[str]:
    """What DeepSpeed itself would refuse when it makes an engine, for it would do so on every rank."""
    from deepspeed.runtime import lr_schedules
    from deepspeed.runtime.config import DEEPSPEED_OPTIMIZERS, DeepSpeedConfig
    from deepspeed.runtime.precision_config import DeepSpeedBF16Config, DeepSpeedFP16Config
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    for section in ("optimizer", "scheduler"):
        if section in settings and not isinstance(settings[section].get("type"), str):
            return [
                f"{config.train.deepspeed}: {section} has no type; name one, or remove {section}: the flags have one"
            ]
    name = settings.get("optimizer", {}).get("type")
    schedule = settings.get("scheduler", {}).get("type", lr_schedules.WARMUP_LR)
    if schedule == "ReduceLROnPlateau" or not (hasattr(lr_schedules, schedule) or hasattr(lr_scheduler, schedule)):
        why = "waits for a measure that no run gives it" if schedule == "ReduceLROnPlateau" else "is unknown"
        theirs = ", ".join(lr_schedules.VALID_LR_SCHEDULES)
        return [
            f"{config.train.deepspeed}: scheduler.type={schedule!r} {why}; use {theirs}, or one of torch by its name"
        ]
    if name is not None and name.lower() not in DEEPSPEED_OPTIMIZERS and not hasattr(torch.optim, name):
        return [f"{config.train.deepspeed}: optimizer.type={name!r} is unknown; use AdamW, Muon or one of torch.optim"]
    given = load_json(config)
    known: dict[str, Iterable[str]] = {
        "optimizer": ("type", "params", "legacy_fusion"),
        "scheduler": ("type", "params"),
    }
    models = {"zero_optimization": DeepSpeedZeroConfig, "bf16": DeepSpeedBF16Config, "fp16": DeepSpeedFP16Config}
    for section, model in models.items():
        known[section] = [n for name, field in model.model_fields.items() for n in (name, field.alias) if n]
    problems = [*_unused_settings(given), *_unknown_keys(given, known)]
    # the batch of all replicas was compared with the flags; here DeepSpeed sees a world of one
    seen = _Asked(copy.deepcopy({k: v for k, v in settings.items() if k != "train_batch_size"}))
    if not problems:
        try:
            DeepSpeedConfig(seen)
            problems = list(_unknown_keys(given, {"": seen.asked | {SEQUENCE_PARALLEL}}))  # of a world alone it asks
        except Exception as error:  # pydantic's, asserts and errors of its own
            problems = [f"DeepSpeed refuses it: {' '.join(str(error).split())}"]
    return [f"{config.train.deepspeed}: {problem}" for problem in problems]
