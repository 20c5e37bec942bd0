"""Layers → blocks → stages, as pure functions of numbers.

A block is a run of layers trained by one loss; a stage is a run of blocks on one group of ranks. Which blocks are
trained does not depend on where they run: `make_partition` first fixes the blocks, then deals them out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise


@dataclass(frozen=True)
class Span:
    """Layers start, ..., stop - 1 of the model."""

    start: int
    stop: int

    def __len__(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True)
class Partition:
    """`blocks[b]` are the layers of block b; `stages[k]` the blocks of stage k. Both cover the model in order."""

    blocks: tuple[Span, ...]
    stages: tuple[Span, ...]

    @property
    def num_layers(self) -> int:
        return self.blocks[-1].stop

    @property
    def num_stages(self) -> int:
        return len(self.stages)

    def blocks_of(self, stage: int) -> tuple[Span, ...]:
        """The layer spans of the stage's blocks."""
        return self.blocks[self.stages[stage].start : self.stages[stage].stop]

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
    """Training FLOPs of each part for one token, forward and backward; only their ratios matter."""

    layer: float
    head: float


def estimate_costs(layer_parameters: int, head_parameters: int, hidden_size: int, seq_length: int) -> Costs:
    """6 FLOPs a parameter and token, and 12·T·H for the attention of a layer (PaLM, Chowdhery et al. 2022, app. B).

    Parameters that take part in a matrix product count: of a sparse layer, those active for one token.
    """
    return Costs(6.0 * layer_parameters + 12.0 * seq_length * hidden_size, 6.0 * head_parameters)


def make_partition(
    num_layers: int,
    num_stages: int,
    costs: Costs,
    layers_per_block: int | None = None,
    stage_layers: Sequence[int] | None = None,
    local_heads: bool = True,
    head_layers: int = 0,
) -> Partition:
    """Cuts the model so that the costliest stage is as cheap as can be.

    layers_per_block: layers of each block (the last may be shorter); None makes each stage one block.
    stage_layers: layers of each stage, chosen by hand. local_heads: every block has a head with head_layers private
    layers, fewer where the model ends; otherwise the last stage alone pays for one (backprop).
    Raises ValueError where a stage would have no block, or stage_layers cut a block.
    """
    unit = layers_per_block or 1
    blocks = tuple(Span(a, min(a + unit, num_layers)) for a in range(0, num_layers, unit))
    if stage_layers is not None and len(stage_layers) != num_stages:
        raise ValueError(f"stage_layers names {len(stage_layers)} stages, num_stages is {num_stages}")
    if len(blocks) < num_stages:
        what = f"{num_layers} layers" if unit == 1 else f"{len(blocks)} blocks of {unit} layers"
        raise ValueError(
            f"num_stages={num_stages} is more than the model's {what}: a stage would have no layer; "
            f"use at most {len(blocks)} stages"
        )
    if stage_layers is not None:
        stages = _stages_by_hand(blocks, num_layers, stage_layers)
    else:
        # with local heads every block, or every stage, pays for the same output matrix: that moves no cut
        private = [costs.layer * min(head_layers, num_layers - block.stop) for block in blocks]
        stage_costs = [len(block) * costs.layer for block in blocks]
        ends = [0.0] * (len(blocks) - 1) + [0.0 if local_heads else costs.head]
        if layers_per_block is None:
            ends = [a + b for a, b in zip(private, ends, strict=True)]
        else:
            stage_costs = [a + b for a, b in zip(private, stage_costs, strict=True)]
        stages = _balance(stage_costs, ends, num_stages)
    if layers_per_block is None:
        blocks = tuple(Span(blocks[s.start].start, blocks[s.stop - 1].stop) for s in stages)
        stages = tuple(Span(k, k + 1) for k in range(num_stages))
    return Partition(blocks, stages)


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


def _balance(costs: Sequence[float], ends: Sequence[float], num_stages: int) -> tuple[Span, ...]:
    """Contiguous groups with the least maximum cost; a group that ends with block b also pays ends[b].

    Dynamic programming over (groups, blocks). Of equal maxima the more even one wins, then the one whose last group
    is smaller.
    """
    prefix = [0.0, *accumulate(costs)]
    n = len(costs)
    best: dict[int, tuple[float, float, tuple[Span, ...]]] = {0: (0.0, 0.0, ())}
    for stage in range(num_stages):
        remaining = num_stages - stage - 1
        step: dict[int, tuple[float, float, tuple[Span, ...]]] = {}
        for start, (worst, squares, groups) in best.items():
            for stop in range(start + 1, n - remaining + 1):
                cost = prefix[stop] - prefix[start] + ends[stop - 1]
                found = (max(worst, cost), squares + cost * cost)
                if stop not in step or found <= step[stop][:2]:
                    step[stop] = (*found, (*groups, Span(start, stop)))
        best = step
    return best[n][2]
