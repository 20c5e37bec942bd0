"""Which part of every parameter, and of its optimizer state, this rank owns, whatever DeepSpeed made of it.

ZeRO flattens and shards: a parameter is one tensor without it, a stretch of a flat buffer of a group under ZeRO 1 and
2, and a stretch of itself under ZeRO 3. A checkpoint names parameters as the model does and holds each flat, in
stretches, so that a run of any layout takes from it what it needs.

    model.layers.3.mlp.up_proj.weight                  float32, the optimizer's own copy where there is one
    model.layers.3.mlp.up_proj.weight/state/exp_avg    what the optimizer keeps for each weight
    model.layers.3.mlp.up_proj.weight/scalar/step      and for the parameter as a whole
    exits.4.model.norm.weight                          of the head that reads layer 3, unless it is the model's own
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.runtime.fp16.fused_optimizer import FP16_Optimizer
from deepspeed.runtime.fp16.unfused_optimizer import FP16_UnfusedOptimizer
from torch import nn

from llm_local.backprop import PipeSlice
from llm_local.model.stage import Block

STATE, SCALAR, EXITS = "/state/", "/scalar/", "exits."


class MisplacedWeights(RuntimeError):
    """DeepSpeed keeps a weight elsewhere than it says: what would be saved is not the model."""


@dataclass(frozen=True)
class Stretch:
    """Elements from `start` on of a tensor of `numel` elements; values: a flat view of them."""

    numel: int
    start: int
    values: torch.Tensor


@dataclass(frozen=True)
class Shard:
    """This rank's part of one parameter or saved buffer.

    master: what the optimizer updates, or of what it does not, the tensor itself; None where that lies on other ranks.
    holder: the tensor that the optimizer's state belongs to, in which the master lies from `offset` on; None if there
    is no optimizer for it. is_replicated: every replica has the same. weights: what the model computes with, where
    that is not the master. momentum: Muon's under ZeRO 1 and 2 has the whole of each parameter that the rank owns a
    part of, one after the other: where this one begins, and how many there are.
    """

    name: str
    master: Stretch | None
    holder: torch.Tensor | None
    offset: int
    is_replicated: bool
    weights: tuple[Stretch, ...] = ()
    momentum: tuple[int, int] | None = None

    def kept(self, state: torch.Tensor) -> Stretch:
        """What a state has of the parameter."""
        assert self.master is not None
        if self.momentum is None:
            values = state.view(-1).narrow(0, self.offset, len(self.master.values))
            return Stretch(self.master.numel, self.master.start, values)
        return Stretch(self.master.numel, 0, state.view(-1).narrow(0, self.momentum[0], self.master.numel))

    def part(self, state: torch.Tensor) -> torch.Tensor:
        """The master's stretch of a state."""
        assert self.master is not None
        kept = self.kept(state)
        return kept.values.narrow(0, self.master.start - kept.start, len(self.master.values))

    def fits(self, state: torch.Tensor) -> bool:
        """Whether a state has a number for each weight, and is none for the parameter as a whole."""
        numel = 0 if self.holder is None else self.holder.numel()
        return state.dim() > 0 and state.numel() == (self.momentum[1] if self.momentum else numel)

    def new_state(self) -> torch.Tensor:
        assert self.holder is not None
        numel = self.momentum[1] if self.momentum else self.holder.numel()
        return self.holder.new_zeros(numel).view(-1 if self.momentum else self.holder.shape)


def head_prefix(module: Block) -> str:
    """What the names of a block's head begin with: nothing, if it is the model's own."""
    return "" if module.body.is_last else f"{EXITS}{module.body.span.stop}."


def named_tensors(module: nn.Module) -> dict[str, torch.Tensor]:
    """Parameters and saved buffers of a block, or of a slice in the stock pipeline, by their names in a checkpoint.

    A parameter that two places share has the name of the first.
    """
    if isinstance(module, Block):
        prefix = head_prefix(module)
        places = [("", module.body_model), (prefix, module.head_model)]
        own = {f"{prefix}{name}": p for name, p in module.named_parameters(recurse=False)}
        if module.temperature is not None:
            own[f"{prefix}temperature"] = module.temperature.scale
    else:
        places = [("", part.model) for part in module.modules() if isinstance(part, PipeSlice)] or [("", module)]
        own = {}
    found: dict[str, torch.Tensor] = {}
    seen: set[int] = set()
    for prefix, model in places:
        for name, tensor in model.state_dict(keep_vars=True).items():
            if id(tensor) not in seen:
                seen.add(id(tensor))
                found[f"{prefix}{name}"] = tensor
    return found | own


def tied_names(module: nn.Module) -> dict[str, str]:
    """Names of a block's head that stand for a parameter of its body, and that one's name: tied embeddings."""
    if not isinstance(module, Block):
        return {}
    body = {id(tensor): name for name, tensor in module.body_model.state_dict(keep_vars=True).items()}
    head = module.head_model.state_dict(keep_vars=True).items()
    return {f"{head_prefix(module)}{name}": body[id(tensor)] for name, tensor in head if id(tensor) in body}


def states_of(engine: DeepSpeedEngine) -> Any:
    """The state of the optimizer that DeepSpeed wraps, by holder."""
    return base_optimizer(engine).state


def base_optimizer(engine: DeepSpeedEngine) -> Any:
    optimizer: Any = engine.optimizer
    return getattr(optimizer, "optimizer", optimizer)


def shards(engine: DeepSpeedEngine, replica: int) -> Iterator[Shard]:
    """This rank's part of every tensor of the engine's block."""
    module: Any = engine.module
    for name, tensor in named_tensors(module).items():
        if hasattr(tensor, "ds_id"):
            yield _of_zero3(engine.optimizer, name, tensor, replica)
        elif not tensor.requires_grad:
            yield Shard(name, whole(tensor), None, 0, True)
        elif hasattr(tensor, "_hp_mapping"):
            yield _of_flat_partition(engine.optimizer, name, tensor)
        else:
            holder, offset = _whole_holder(engine.optimizer, tensor)
            values = holder.detach().view(-1).narrow(0, offset, tensor.numel())
            weights = () if holder is tensor else (whole(tensor),)
            yield Shard(name, Stretch(tensor.numel(), 0, values), holder, offset, True, weights)


def check_masters(engines: Sequence[DeepSpeedEngine], replica: int) -> None:
    """Raises MisplacedWeights naming a parameter whose master on this rank is not, rounded, what the model computes
    with."""
    for shard in (shard for engine in engines for shard in shards(engine, replica) if shard.master is not None):
        assert shard.master is not None
        start, stop = shard.master.start, shard.master.start + len(shard.master.values)
        for weights in shard.weights:
            first, last = max(start, weights.start), min(stop, weights.start + len(weights.values))
            ours = shard.master.values[first - start : last - start].to(weights.values)
            theirs = weights.values[first - weights.start : last - weights.start]
            if not torch.allclose(ours, theirs, rtol=0.0, atol=0.0, equal_nan=True):
                raise MisplacedWeights(
                    f"the optimizer's copy of {shard.name} is not the model's weight, so that a checkpoint or export "
                    "would hold another model; leave out what rearranges weights in the zero_optimization section of "
                    "--deepspeed"
                )


def whole(tensor: torch.Tensor) -> Stretch:
    return Stretch(tensor.numel(), 0, tensor.detach().view(-1))


def _of_zero3(optimizer: Any, name: str, parameter: Any, replica: int) -> Shard:
    """The parameter's own partition; the last one's is padded."""
    length, numel = parameter.ds_tensor.ds_numel, parameter.ds_numel
    start = replica * length
    count = max(0, min(length, numel - start))
    weights = [Stretch(numel, start, parameter.ds_tensor.detach().view(-1).narrow(0, 0, count))] if count else []
    if parameter.numel() == numel:  # small ones stay gathered
        weights.append(whole(parameter))
    if not parameter.requires_grad:
        return Shard(name, weights[0] if count else None, None, 0, False, tuple(weights[1:] if count else weights))
    group, offset, _ = optimizer.grad_position[optimizer.get_param_id(parameter)]
    holder = optimizer.fp32_partitioned_groups_flat[group]
    master = Stretch(numel, start, holder.detach().narrow(0, offset, count)) if count else None
    return Shard(name, master, holder, offset, False, tuple(weights))


def _of_flat_partition(optimizer: Any, name: str, parameter: Any) -> Shard:
    """ZeRO 1 and 2, and DeepSpeed's BF16_Optimizer; the model's weights are whole on every rank."""
    mapping, weights = parameter._hp_mapping, (whole(parameter),)
    if mapping is None:
        return Shard(name, None, None, 0, False, weights)
    groups = getattr(optimizer, "single_partition_of_fp32_groups", None) or optimizer.fp32_groups_flat_partition
    holder, there = groups[mapping.param_group_index], mapping.hp_fragment_address
    values = holder.detach().view(-1).narrow(0, there.start, there.numel)
    master = Stretch(parameter.numel(), mapping.lp_fragment_address.start, values)
    return Shard(name, master, holder, there.start, False, weights, _momentum(optimizer, mapping, parameter))


def _momentum(optimizer: Any, mapping: Any, parameter: Any) -> tuple[int, int] | None:
    if not getattr(parameter, "use_muon", False) or getattr(optimizer, "cpu_offload", True):
        return None
    ours, offset = optimizer.params_in_partition[mapping.param_group_index], 0
    for each in ours:
        if each is parameter:
            return offset, sum(one.numel() for one in ours)
        offset += each.numel()
    raise AssertionError("a parameter with a master is in the partition")


def _whole_holder(optimizer: Any, parameter: torch.Tensor) -> tuple[torch.Tensor, int]:
    """Without ZeRO: the parameter itself, or its float32 copy, which may lie in a flat one of its group."""
    if isinstance(optimizer, (FP16_UnfusedOptimizer, FP16_Optimizer)):
        for number, group in enumerate(optimizer.fp16_groups):
            offset = 0
            for index, candidate in enumerate(group):
                if candidate is parameter:
                    if isinstance(optimizer, FP16_UnfusedOptimizer):
                        return optimizer.fp32_groups[number][index], 0
                    return optimizer.fp32_groups_flat[number], offset
                offset += candidate.numel()
    return parameter, 0
