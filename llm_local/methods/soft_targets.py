"""Distillation beside a method's own losses: the next exit's predictions are soft targets (model/distillation.py)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from llm_local.flags import LocalArguments
from llm_local.methods.schedule import SOFT_TARGETS, Schedule

if TYPE_CHECKING:
    from deepspeed.runtime.pipe.schedule import PipeInstruction

MOST_ZERO = 2


class DistillationSchedule(Schedule):
    """One step in which every block but the last waits with its backward pass for the next block's soft targets.

    Those for the stage before leave as soon as the first block has run forward.
    """

    name = "distillation"
    back = SOFT_TARGETS

    def steps(self) -> Iterator[list[PipeInstruction]]:
        for micro_batch in range(self.micro_batches):
            buffer = micro_batch % self.num_pipe_buffers()
            commands = [self.enter(buffer)]
            for block in range(self.num_blocks):
                meaning = {"learns": not self.is_last(block), "teaches": not self.is_first(block)}
                commands += self.forward(buffer, block, **meaning)
                commands += [self.backward(buffer, block - 1, learns=True)] if block else self.send_back(buffer)
            if self.is_last_stage:
                commands.append(self.backward(buffer, self.num_blocks - 1))
            yield [*commands, *self.catch_up(micro_batch, learns=True), *self.end(micro_batch)]

    @classmethod
    def last_wait(cls, own: Sequence[float], behind: Sequence[float], there_and_back: float) -> float:
        return max(0.0, behind[0] + there_and_back - own[0])


def distillation_problems(local: LocalArguments) -> list[str]:
    if not local.distillation_weight > 0:
        return ["distillation_sampling=True needs distillation_weight above 0"] if local.distillation_sampling else []
    if local.head_token_fraction == 1:
        return []
    given = f"distillation_weight={local.distillation_weight}"
    return [f"{given} needs every position of both heads; leave out head_token_fraction"]
