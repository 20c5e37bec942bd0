"""Layers → blocks → stages, as pure functions of numbers.

A block is a run of layers with a loss on top; a stage is a run of blocks on one group of ranks. Which blocks are
trained does not depend on where they run: `make_partition` first fixes the blocks, then deals them out.

Overlapping windows of k layers, one every s layers, are blocks as well: a block holds the layers of its window that
no earlier window has, and its loss also trains the last k - s layers of the block below.

    k = 2, s = 1      loss    0 1 2      the window of loss 1 is layers 1 and 2; block 1 holds layer 2,
                      layer 0 1 2 3      blocks are 0-1, 2, 3; the overlap is 1 layer
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import TypeVar

Number = TypeVar("Number", int, float)


@dataclass(frozen=True)
class Span:
    """Layers start, ..., stop - 1 of the model."""

    start: int
    stop: int

    def __len__(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True)
class Partition:
    """`blocks[b]` are the layers of block b; `stages[k]` the blocks of stage k. Both cover the model in order.

    overlap: layers of the block below that a block's loss trains, too.
    """

    blocks: tuple[Span, ...]
    stages: tuple[Span, ...]
    overlap: int = 0

    @property
    def num_layers(self) -> int:
        return self.blocks[-1].stop

    @property
    def num_stages(self) -> int:
        return len(self.stages)

    def blocks_of(self, stage: int) -> tuple[Span, ...]:
        """The layer spans of the stage's blocks."""
        return self.blocks[self.stages[stage].start : self.stages[stage].stop]

    def stage_of(self, block: int) -> int:
        return next(stage for stage, blocks in enumerate(self.stages) if blocks.start <= block < blocks.stop)

    def private_layers(self, block: int, schedule: Sequence[int]) -> Span:
        """The layers of the block's head, named as those behind the block; fewer where the model ends."""
        stop = self.blocks[block].stop
        return Span(stop, min(stop + held(schedule, block), self.num_layers))

    def layers_of(self, stage: int) -> Span:
        blocks = self.blocks_of(stage)
        return Span(blocks[0].start, blocks[-1].stop)

    def describe(self) -> str:
        """'stage 0: layers 0-3 | stage 1: layers 4-5, 6-7', one range a block."""
        ranges = [
            ", ".join(str(b.start) if len(b) == 1 else f"{b.start}-{b.stop - 1}" for b in self.blocks_of(k))
            for k in range(self.num_stages)
        ]
        return " | ".join(f"stage {k}: layers {text}" for k, text in enumerate(ranges))


@dataclass(frozen=True)
class Costs:
    """What each part costs in training, forward and backward, FLOPs or seconds; only their ratios matter.

    layer: the mean of them, or of each if `layers` is (), else it has each layer's own. head: the model's. first: what
    runs before the layers. stage_speeds: of each stage, where they differ; a stage of twice the speed pays half of what
    its layers cost.
    """

    layer: float
    head: float
    layers: tuple[float, ...] = ()
    first: float = 0.0
    stage_speeds: tuple[float, ...] = ()

    def of(self, span: Span) -> float:
        """Of the span's layers."""
        return sum(self.layers[span.start : span.stop]) if self.layers else self.layer * len(span)


@dataclass(frozen=True)
class Heads:
    """What a cut pays for heads. are_local: every block has one, with private layers as the schedule `layers` says,
    fewer where the model ends; otherwise the last stage alone pays for one (backprop). share_matrix: all but the last
    read a matrix without training it, which saves a third of what it costs. token_fraction: share of the positions that
    all but the last see."""

    are_local: bool = True
    layers: Sequence[int] = (0,)
    share_matrix: bool = False
    token_fraction: float = 1.0


def estimate_costs(
    layer_parameters: int, head_parameters: int, hidden_size: int, seq_length: int, first_parameters: int = 0
) -> Costs:
    """6 FLOPs a parameter and token, and 12·T·H for the attention of a layer (PaLM, Chowdhery et al. 2022, app. B).

    Parameters that take part in a matrix product count: of a sparse layer, those active for one token.
    """
    layer = 6.0 * layer_parameters + 12.0 * seq_length * hidden_size
    return Costs(layer, 6.0 * head_parameters, first=6.0 * first_parameters)


def held(schedule: Sequence[Number], block: int) -> Number:
    """The block's entry of a list that may be shorter than the blocks: its last number holds for the rest."""
    return schedule[min(block, len(schedule) - 1)]


def make_partition(
    num_layers: int,
    num_stages: int,
    costs: Costs,
    layers_per_block: int | None = None,
    block_stride: int | None = None,
    heads: Heads | None = None,
) -> Partition:
    """Cuts the model so that the costliest stage is as cheap as can be.

    layers_per_block: layers of each block (the last may be shorter); None makes each stage one block.
    block_stride: layers_per_block is the length of overlapping windows that start so many layers apart.
    Raises ValueError where a stage would have no block, or there is one window only.
    """
    blocks = _blocks(num_layers, num_stages, layers_per_block, block_stride)
    heads = heads or Heads()

    def head(block: int, stop: int) -> float:
        """What the head of a block that ends before layer `stop` costs, or without local heads that of the model."""
        if not heads.are_local:
            return costs.head * (stop == num_layers)
        matrix = costs.head * (2 / 3 if heads.share_matrix and stop < num_layers else 1.0)
        whole = matrix + costs.of(Span(stop, min(stop + held(heads.layers, block), num_layers)))
        return heads.token_fraction * whole if stop < num_layers else whole

    def after_first(items: list[float]) -> list[float]:
        return [costs.first + items[0], *items[1:]]

    speeds = costs.stage_speeds or [1.0] * num_stages
    assert len(speeds) == num_stages
    if layers_per_block is not None:
        stages = _balance(after_first([costs.of(b) + head(i, b.stop) for i, b in enumerate(blocks)]), speeds)
    else:
        stages = _balance(after_first([costs.of(Span(i, i + 1)) for i in range(num_layers)]), speeds, head)
    return _dealt(blocks, stages, layers_per_block, block_stride)


def cut_by_hand(
    num_layers: int,
    num_stages: int,
    stage_layers: Sequence[int],
    layers_per_block: int | None = None,
    block_stride: int | None = None,
) -> Partition:
    """As make_partition, with so many layers in each stage. Raises ValueError also where these are not the model's, or
    cut a block."""
    if len(stage_layers) != num_stages:
        raise ValueError(f"stage_layers names {len(stage_layers)} stages, num_stages is {num_stages}")
    blocks = _blocks(num_layers, num_stages, layers_per_block, block_stride)
    return _dealt(blocks, _stages_by_hand(blocks, num_layers, stage_layers), layers_per_block, block_stride)


def _dealt(
    blocks: tuple[Span, ...], stages: tuple[Span, ...], layers_per_block: int | None, block_stride: int | None
) -> Partition:
    """The stages with the blocks that they have, of which each has one unless layers_per_block says otherwise."""
    if layers_per_block is None:
        blocks = tuple(Span(blocks[s.start].start, blocks[s.stop - 1].stop) for s in stages)
        stages = tuple(Span(k, k + 1) for k in range(len(stages)))
    return Partition(blocks, stages, 0 if block_stride is None else (layers_per_block or 1) - block_stride)


def _blocks(num_layers: int, num_stages: int, layers_per_block: int | None, stride: int | None) -> tuple[Span, ...]:
    """Blocks of so many layers, by default of one, or those that windows of them leave to each other."""
    unit = layers_per_block or 1
    ends = [*range(unit, num_layers, stride or unit), num_layers]
    if stride is not None and len(ends) == 1:
        raise ValueError(
            f"layers_per_block={unit} with block_stride={stride} makes one window of the model's {num_layers} "
            "layers, nothing overlaps; use smaller ones, or method=backprop"
        )
    if len(ends) < num_stages:
        what = f"{num_layers} layers" if unit == 1 else f"{len(ends)} blocks of {unit} layers"
        raise ValueError(
            f"num_stages={num_stages} is more than the model's {what}: a stage would have no layer; "
            f"use at most {len(ends)} stages"
        )
    return tuple(Span(a, b) for a, b in pairwise([0, *ends]))


def _stages_by_hand(blocks: Sequence[Span], num_layers: int, stage_layers: Sequence[int]) -> tuple[Span, ...]:
    given = ",".join(map(str, stage_layers))
    if min(stage_layers) < 1:
        raise ValueError(f"stage_layers={given} leaves a stage without a layer")
    if sum(stage_layers) != num_layers:
        raise ValueError(f"stage_layers={given} adds up to {sum(stage_layers)} layers, the model has {num_layers}")
    first_block = {block.start: index for index, block in enumerate(blocks)} | {num_layers: len(blocks)}
    cuts = [0, *accumulate(stage_layers)]
    for cut in cuts:
        if cut not in first_block:
            raise ValueError(f"stage_layers={given} cuts before layer {cut}, inside a block; cut where a block ends")
    return tuple(Span(first_block[a], first_block[b]) for a, b in pairwise(cuts))


def _balance(
    costs: Sequence[float], speeds: Sequence[float], end: Callable[[int, int], float] = lambda _stage, _stop: 0.0
) -> tuple[Span, ...]:
    """Contiguous groups, one for each speed, with the least maximum of cost / speed; group k that ends before item
    `stop` also pays end(k, stop).

    Dynamic programming over (groups, items). Of equal maxima the more even one wins, then the one whose last group
    is smaller.
    """
    prefix = [0.0, *accumulate(costs)]
    low, high = 0.0, 2 * (prefix[-1] + end(len(speeds) - 1, len(costs))) / min(speeds)
    for _ in range(24):
        most = (low + high) / 2
        low, high = (low, most) if _fits(prefix, speeds, end, most) else (most, high)
    while (found := _balance_below(prefix, speeds, end, high)) is None:
        high *= 1.1
    return found


def _fits(prefix: Sequence[float], speeds: Sequence[float], end: Callable[[int, int], float], most: float) -> bool:
    """Whether groups that take all they can reach the last item; no more than a hint, as a group's cost may fall."""
    n, start = len(prefix) - 1, 0
    for stage, speed in enumerate(speeds):
        stop, room = start, most * speed
        while stop <= n - len(speeds) + stage and prefix[stop + 1] - prefix[start] + end(stage, stop + 1) <= room:
            stop += 1
        if stop == start:
            return False
        start = stop
    return start == n


def _balance_below(
    prefix: Sequence[float], speeds: Sequence[float], end: Callable[[int, int], float], most: float
) -> tuple[Span, ...] | None:
    """The best groups if none of them costs more than `most`; None if there are none. Groups that lead to more are not
    looked at: of a thousand layers, most."""
    n = len(prefix) - 1
    best = {0: (0.0, 0.0)}
    starts: list[dict[int, int]] = []  # of each group by where it ends
    behind = [0.0, *accumulate(reversed(speeds))]
    for stage, speed in enumerate(speeds):
        left, room = behind[len(speeds) - stage - 1] * most, most * speed
        step: dict[int, tuple[float, float]] = {}
        starts.append({})
        for start, (worst, squares) in best.items():
            for stop in range(start + 1, n - len(speeds) + stage + 2):
                layers = prefix[stop] - prefix[start]
                if layers > room:
                    break
                if prefix[n] - prefix[stop] > left:
                    continue  # too much for the groups behind
                whole = layers + end(stage, stop)
                if whole > room:
                    continue
                cost = whole / speed
                found = (max(worst, cost), squares + cost * cost)
                if stop not in step or found <= step[stop]:
                    step[stop] = found
                    starts[stage][stop] = start
        best = step
    if n not in best:
        return None
    groups, stop = [], n
    for places in reversed(starts):
        groups.append(Span(places[stop], stop))
        stop = places[stop]
    return tuple(reversed(groups))
