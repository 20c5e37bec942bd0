"""Blocks that share layers: each one's loss also trains the top of the block below, and one gradient comes back."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from llm_local.flags import LocalArguments
from llm_local.methods.method import Method, register_method
from llm_local.methods.schedule import GRADIENT, LocalSchedule, Schedule

if TYPE_CHECKING:
    from deepspeed.runtime.pipe.schedule import PipeInstruction


class OverlapSchedule(Schedule):
    """One step in which every block's loss also trains the top of the block below.

    The gradient for the stage before leaves as soon as the first block has it; that of the stage behind goes no further
    than the last block.
    """

    name = "overlapping"
    back = GRADIENT
    passes_again = True

    def steps(self) -> Iterator[list[PipeInstruction]]:
        for micro_batch in range(self.micro_batches):
            buffer = micro_batch % self.num_pipe_buffers()
            commands = [self.enter(buffer)]
            for block in range(self.num_blocks):
                commands += self.forward(buffer, block, keep_graph=True)
                commands.append(self.backward(buffer, block, again=not self.is_last(block), passes_down=True))
                commands += [self.backward(buffer, block - 1, from_above=True)] if block else self.send_back(buffer)
            yield [*commands, *self.catch_up(micro_batch, from_above=True), *self.end(micro_batch)]

    @classmethod
    def last_wait(cls, own: Sequence[float], behind: Sequence[float], there_and_back: float) -> float:
        return max(0.0, sum(behind) + there_and_back - sum(own))


class Overlapping(Method):
    """Windows of layers; a block holds the layers of its window that no earlier window has."""

    own_schedule = OverlapSchedule

    def block_layers(self, local: LocalArguments) -> int | None:
        return local.layers_per_block or 2

    def window_stride(self, local: LocalArguments) -> int | None:
        """By default half a window, rounded up: the paper's case of 2 and 1 layers."""
        return local.block_stride or ((self.block_layers(local) or 2) + 1) // 2

    def block_flags(self, layers: int) -> dict[str, int]:
        return {"layers_per_block": layers + (layers + 1) // 2, "block_stride": layers}

    def schedule(self, local: LocalArguments, heads_alone: bool = False) -> type[Schedule]:
        return LocalSchedule if heads_alone else self.own_schedule  # heads that train alone send no gradient down

    def problems(self, local: LocalArguments) -> list[str]:
        problems = super().problems(local)
        problems += _window_problems(self.block_layers(local) or 0, self.window_stride(local) or 0)
        if local.distillation_weight > 0:
            given = f"distillation_weight={local.distillation_weight}"
            problems.append(f"{given} does not work with method=overlapping, which sends gradients back; use chunked")
        return problems

    def zero_problems(self, local: LocalArguments, stage: int, offloads: bool = False) -> list[str]:
        if stage < 3 and not offloads:
            return []
        what = "ZeRO stage 3" if stage == 3 else "offload_optimizer"
        return [
            f"{what} does not work with method=overlapping, whose shared layers have two backward passes through one "
            "graph; use ZeRO stage 0, 1 or 2 without offload"
        ]

    def router_problems(self, local: LocalArguments) -> list[str]:
        if not local.final_backprop_steps:
            return []
        return [" does not go with final_backprop_steps and method=overlapping; use method=chunked"]

    def describe(self, num_blocks: int) -> str:
        return f"{super().describe(num_blocks)}, but between windows that overlap"


def _window_problems(layers: int, stride: int) -> list[str]:
    given = f"layers_per_block={layers} with block_stride={stride}"
    if layers < 1 or stride < 1:
        return []  # their range is checked with that of all flags
    if layers == 1:
        return [f"{given}: windows of one layer cannot overlap; use layers_per_block=2 or more, or method=greedy"]
    if stride > layers:
        return [f"{given} leaves layers between the windows; use a stride from {(layers + 1) // 2} to {layers - 1}"]
    if stride == layers:
        return [f"{given}: windows do not overlap; use a smaller stride, or method=chunked"]
    if layers > 2 * stride:
        return [
            f"{given} puts layers into more than two windows, whose gradients would go further than one block; "
            f"use a stride of {(layers + 1) // 2} or more"
        ]
    return []


register_method("overlapping", Overlapping())
