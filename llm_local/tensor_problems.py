"""What is wrong with the flags of layers that are divided between ranks: seen without the model."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

from llm_local.config import Config, ConfigError
from llm_local.ds_config import TENSOR_PARALLEL, load_json, zero_stage
from llm_local.model.heads.head import head_of

_ELEMENTWISE = ("adam", "adamw", "sgd")  # an optimizer that sees a whole matrix would need all of its parts
_MOST_ZERO = 2


def tensor_problems(config: Config) -> list[str]:
    """What does not go with tensor_parallel_size, and what others say of it."""
    try:
        settings = load_json(config)
    except ConfigError:  # which ds_problems.py has
        settings = {}
    size = config.local.tensor_parallel_size
    problems = [*_other_sizes(config, settings, size)]
    if size > 1:
        problems += [f"tensor_parallel_size={size}: {why}" for why in _unfit(config, settings)]
    return problems


def _other_sizes(config: Config, settings: dict[str, Any], size: int) -> Iterator[str]:
    """DeepSpeed's JSON and accelerate's config file may name the same number, and no other."""
    section = settings.get(TENSOR_PARALLEL)
    if section is not None:
        where = f"{config.train.deepspeed}: {TENSOR_PARALLEL}"
        section = section if isinstance(section, dict) else {}
        found = section.get("autotp_size")
        if found not in (size, "auto"):
            repair = f"give --tensor_parallel_size {found}" if isinstance(found, int) else "name it"
            yield f"{where}.autotp_size={found}, the run has tensor_parallel_size={size}; {repair}, or remove it there"
        if others := sorted(section.keys() - {"autotp_size"}):
            yield f"{where}.{others[0]} does nothing in a run: the model's own plan divides its layers; remove it"
    if os.environ.get("ACCELERATE_USE_PARALLELISM_CONFIG") == "true":
        for name, flag in _ACCELERATE.items():
            asked = os.environ.get(f"PARALLELISM_CONFIG_{name.upper()}", "1")
            wanted = str(getattr(config.local, flag)) if flag else "1"
            if asked != wanted:
                repair = f"give --{flag} {asked}, or change" if flag else "remove"
                yield (
                    f"accelerate's config file asks for parallelism_config_{name}={asked}, the run has {wanted}: "
                    f"{repair} it there"
                )


# of accelerate's parallelism_config, and the flags that say the same
_ACCELERATE = {"tp_size": "tensor_parallel_size", "cp_size": "", "sp_size": "sequence_parallel_size"}


def _unfit(config: Config, settings: dict[str, Any]) -> Iterator[str]:
    """What the ranks of a replica cannot do together."""
    local, train, zero = config.local, config.train, settings.get("zero_optimization", {})
    if config.is_pipelined:
        yield f"DeepSpeed's pipeline (method={local.method} on several stages) divides no layers; use num_stages=1"
    if local.stage is not None:
        yield f"jobs do not divide layers yet; leave out stage={local.stage}, for one launch of all stages"
    if local.replica_sync_steps:
        yield f"replicas that train apart (replica_sync_steps={local.replica_sync_steps}) are of one rank; leave it out"
    if head_of(config).shares_matrix:
        yield f"the matrix of head={local.head} travels whole; use head=linear or decoder"
    yield from _unplanned(config)
    if (stage := zero_stage(settings)) > _MOST_ZERO:
        yield f"ZeRO stage {stage} gathers parameters over all ranks of a stage; use 0, 1 or 2"
    if config.precision == "bf16" and stage == 0:
        yield "DeepSpeed's bf16 without ZeRO clips by a norm that misses parts of matrices; use ZeRO stage 1 or 2"
    if train.fp16:
        yield "fp16 has not been tried with it; use bf16"
    if any(name in zero for name in ("offload_optimizer", "offload_param")):
        yield "offload has not been tried with it; remove it from zero_optimization"
    name = settings.get("optimizer", {}).get("type")
    if isinstance(name, str) and name.lower() not in _ELEMENTWISE:
        yield f"optimizer.type={name} may look at whole matrices, of which a rank has a part; use AdamW or SGD"
    if train.torch_compile:
        yield "compiled layers have not been tried with it; leave out torch_compile"
    if train.trace:
        yield "a trace has one file for a replica, of which each rank would write one; leave out trace"


def _unplanned(config: Config) -> Iterator[str]:
    """What changes layers or their engines in a way that no plan knows of."""
    local = config.local
    if local.head_rank is not None:
        yield f"the matrices of head_rank={local.head_rank} have no plan; leave it out"
    if local.lora_rank is not None:
        yield f"the matrices of lora_rank={local.lora_rank} have no plan; leave it out"
    if local.freeze_stages is not None:
        yield f"stages that are not trained (freeze_stages={local.freeze_stages}) have not been tried; leave it out"
