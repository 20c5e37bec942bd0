"""The float32 weights behind a training in bf16 or fp16: what the optimizer updates, and the model has rounded."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.utils import safe_get_full_fp32_param

from llm_local.checkpoint.shards import check_masters, saved_module, shards

Masters = Callable[[torch.Tensor], "torch.Tensor | None"]


def masters_of(engines: Sequence[DeepSpeedEngine], replica: int) -> Masters:
    """From a parameter to the whole of what its optimizer updates, in float32; None for what none does.

    What is returned gathers under ZeRO: every replica of the stage must call it for the same tensors in the same order.
    Raises MisplacedWeights.
    """
    check_masters(engines, replica)
    copies: dict[int, torch.Tensor] = {}
    for engine in engines:
        tensors = saved_module(engine).saved_tensors()
        for shard in shards(engine, replica):
            tensor = tensors[shard.name]
            if shard.is_replicated and shard.master is not None and shard.holder is not None:
                copies[id(tensor)] = shard.master.values.view(tensor.shape)

    def master(tensor: torch.Tensor) -> torch.Tensor | None:
        if not tensor.requires_grad:
            return None
        copy = copies.get(id(tensor))
        return safe_get_full_fp32_param(tensor) if copy is None else copy

    return master
