"""Which part of every parameter, and of its optimizer state, this rank owns, whatever DeepSpeed made of it.

ZeRO flattens and shards: a parameter is one tensor without it, a stretch of a flat buffer of a group under ZeRO 1 and
2, and a stretch of itself under ZeRO 3. A checkpoint names parameters as the model does and holds each flat, in
stretches, so that a run of any layout takes from it what it needs.

    model.layers.3.mlp.up_proj.weight                  float32, the optimizer's own copy where there is one
    model.layers.3.mlp.up_proj.weight/state/exp_avg    what the optimizer keeps for each weight
    model.layers.3.mlp.up_proj.weight/scalar/step      and for the parameter as a whole
    model.layers.3.mlp.up_proj.weight/outer/anchor     where replicas train apart: where they met (outer_optimizer.py)
    model.layers.3.mlp.up_proj.weight/delayed/1        what the next step computes with (delayed_engine.py)
    model.layers.3.mlp.up_proj.weight/part/0           what a rank of a replica has of it, where layers are divided
    exits.4.model.norm.weight                          of the head that reads layer 3, unless it is the model's own
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from deepspeed.runtime.engine import DeepSpeedEngine

from llm_local.adapters.deepspeed_internals import (
    base_optimizer,
    is_linked,
    is_partitioned,
    master_in_flat_partition,
    master_of_partition,
    master_without_zero,
    momentum_in_partition,
    partition_of,
    whole_numel,
)
from llm_local.model.tensor_cut import TensorCut
from llm_local.model.tensor_parallel import part_of
from llm_local.partition import Span

STATE, SCALAR, OUTER, DELAYED, PART = "/state/", "/scalar/", "/outer/", "/delayed/", "/part/"


class MisplacedWeights(RuntimeError):
    """DeepSpeed keeps a weight elsewhere than it says: what would be saved is not the model."""


@dataclass(frozen=True)
class Stretch:
    """Elements from `start` on of a tensor of `numel` elements; values: a flat view of them. cut: that of the tensor,
    if it is a part of another."""

    numel: int
    start: int
    values: torch.Tensor
    cut: TensorCut | None = None

    @property
    def whole_numel(self) -> int:
        """Of the tensor that the model has."""
        return self.numel if self.cut is None else self.cut.numel


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

    def of_part(self, cut: TensorCut) -> Shard:
        """The same of a tensor that is a part of another."""
        master = None if self.master is None else replace(self.master, cut=cut)
        return replace(self, master=master, weights=tuple(replace(each, cut=cut) for each in self.weights))

    def kept(self, state: torch.Tensor) -> Stretch:
        """What a state has of the parameter."""
        assert self.master is not None
        if self.momentum is None:
            values = state.view(-1).narrow(0, self.offset, len(self.master.values))
            return replace(self.master, values=values)
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


class SavedModule(Protocol):
    """What a checkpoint needs of a module that an engine trains. span: of a block; None where it has no loss of its
    own."""

    @property
    def span(self) -> Span | None: ...

    def saved_tensors(self) -> dict[str, torch.Tensor]: ...

    def tied_names(self) -> dict[str, str]: ...


def saved_module(engine: DeepSpeedEngine) -> SavedModule:
    module: Any = engine.module
    return module


def cuts_of(engine: DeepSpeedEngine) -> dict[str, TensorCut]:
    """Of the tensors of the engine's block that are parts of others, by name."""
    found = {name: part_of(tensor) for name, tensor in saved_module(engine).saved_tensors().items()}
    return {name: part.cut for name, part in found.items() if part is not None}


def states_of(engine: DeepSpeedEngine) -> Any:
    """The state of the optimizer that DeepSpeed wraps, by holder."""
    return base_optimizer(engine.optimizer).state


def shards(engine: DeepSpeedEngine, replica: int) -> Iterator[Shard]:
    """This rank's part of every tensor of the engine's block."""
    for name, tensor in saved_module(engine).saved_tensors().items():
        shard, part = _of_tensor(engine.optimizer, name, tensor, replica), part_of(tensor)
        yield shard if part is None else shard.of_part(part.cut)


def _of_tensor(optimizer: Any, name: str, tensor: torch.Tensor, replica: int) -> Shard:
    if is_partitioned(tensor):
        return _of_zero3(optimizer, name, tensor, replica)
    if not tensor.requires_grad:
        return Shard(name, whole(tensor), None, 0, True)
    if is_linked(tensor):
        return _of_flat_partition(optimizer, name, tensor)
    holder, offset = master_without_zero(optimizer, tensor)
    values = holder.detach().view(-1).narrow(0, offset, tensor.numel())
    weights = () if holder is tensor else (whole(tensor),)
    return Shard(name, Stretch(tensor.numel(), 0, values), holder, offset, True, weights)


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
    partition, numel = partition_of(parameter), whole_numel(parameter)
    length = len(partition)
    start = replica * length
    count = max(0, min(length, numel - start))
    weights = [Stretch(numel, start, partition.narrow(0, 0, count))] if count else []
    if parameter.numel() == numel:  # small ones stay gathered
        weights.append(whole(parameter))
    if not parameter.requires_grad:
        return Shard(name, weights[0] if count else None, None, 0, False, tuple(weights[1:] if count else weights))
    holder, offset = master_of_partition(optimizer, parameter)
    master = Stretch(numel, start, holder.detach().narrow(0, offset, count)) if count else None
    return Shard(name, master, holder, offset, False, tuple(weights))


def _of_flat_partition(optimizer: Any, name: str, parameter: Any) -> Shard:
    """ZeRO 1 and 2, and DeepSpeed's BF16_Optimizer; the model's weights are whole on every rank."""
    found, weights = master_in_flat_partition(optimizer, parameter), (whole(parameter),)
    if found is None:
        return Shard(name, None, None, 0, False, weights)
    values = found.holder.detach().view(-1).narrow(0, found.offset, found.numel)
    master = Stretch(parameter.numel(), found.start, values)
    momentum = momentum_in_partition(optimizer, parameter)
    return Shard(name, master, found.holder, found.offset, False, weights, momentum)
