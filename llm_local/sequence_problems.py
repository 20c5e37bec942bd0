"""What is wrong with the flags of rows that are divided between ranks: seen without the model."""

from __future__ import annotations

from collections.abc import Iterator

from llm_local.config import Config, ConfigError
from llm_local.ds_config import SEQUENCE_PARALLEL, load_json

# what has not been shown to train as it does on whole rows
_UNTRIED = ("distillation_weight", "lora_rank", "replica_sync_steps", "fp16", "torch_compile")


def sequence_problems(config: Config) -> list[str]:
    """What does not go with sequence_parallel_size, and what DeepSpeed's JSON says of it."""
    try:
        settings = load_json(config)
    except ConfigError:  # which ds_problems.py has
        settings = {}
    size, found = config.local.sequence_parallel_size, settings.get(SEQUENCE_PARALLEL, "auto")
    problems = []
    if found not in (size, "auto"):
        repair = f"give --{SEQUENCE_PARALLEL} {found}" if isinstance(found, int) else "name it"
        problems = [
            f"{config.train.deepspeed}: {SEQUENCE_PARALLEL}={found}, the run has {size}; {repair}, or remove it there"
        ]
    if size > 1:
        problems += [f"sequence_parallel_size={size}: {why}" for why in _unfit(config, size)]
    return problems


def _unfit(config: Config, size: int) -> Iterator[str]:
    """What the ranks of a replica cannot do together."""
    local, length, values = config.local, config.data.seq_length, config.flat()
    if length % size:
        yield f"seq_length={length} is no multiple of it; use {-(-length // size) * size}, or another number of ranks"
    if local.tensor_parallel_size > 1:
        yield f"ranks divide rows or layers; leave out one of it and tensor_parallel_size={local.tensor_parallel_size}"
    if config.is_pipelined:
        yield f"DeepSpeed's pipeline (method={local.method} on several stages) divides no rows; use num_stages=1"
    if config.task.name != "causal-lm":
        yield f"task={config.task.name} is of rows that cannot be divided yet; use causal-lm"
    if local.stage is not None:
        yield f"jobs do not divide rows yet; leave out stage={local.stage}, for one launch of all stages"
    if local.head_token_fraction < 1:
        yield f"the windows of head_token_fraction={local.head_token_fraction:g} are of whole rows; leave it out"
    if config.data.document_mask:
        yield "no rank sees where the documents of whole rows begin; leave out document_mask"
    if config.train.trace:
        yield "a trace has one file for a replica, of which each rank would write one; leave out trace"
    for name in _UNTRIED:
        if values[name]:
            yield f"{name}={values[name]} has not been tried with it; leave it out"
