"""What a stage does with the micro-batches of a step, as DeepSpeed's own pipeline instructions.

Two stages, four micro-batches, two optimizer steps (F forward, B backward, O optimizer step; drawn by simulate.py).
Local learning, LocalSchedule:

    stage 0 | FBFBFBFBOFBFBFBFBO
    stage 1 |  FBFBFBFBOFBFBFBFBO

Backpropagation, DeepSpeed's TrainSchedule (1F1B):

    stage 0 | FF BFBFB BOFF BFBFB BO
    stage 1 |  FBFBFBFBO  FBFBFBFBO

A local stage never waits for a later one, so it starts the next step at once and the pipe stays full.
"""

from __future__ import annotations

from typing import Any

from deepspeed.runtime.pipe.schedule import (
    BackwardPass,
    ForwardPass,
    LoadMicroBatch,
    OptimizerStep,
    PipeInstruction,
    PipeSchedule,
    RecvActivation,
    ReduceGrads,
    SendActivation,
)


class LocalSchedule(PipeSchedule):
    """One step of local training on a stage: no instruction receives or sends a gradient.

    Each block of the stage runs forward and backward before the next one, so that the activations of one block are
    alive at a time; the stage's output leaves before the last block's backward pass.
    """

    def __init__(self, micro_batches: int, stages: int, stage_id: int, num_blocks: int = 1):
        super().__init__(micro_batches, stages, stage_id)
        self.num_blocks = num_blocks

    def steps(self) -> Any:
        """Yields the instructions of one micro-batch at a time; the last list ends with the optimizer step."""
        for micro_batch in range(self.micro_batches):
            commands = self._forward(train=True)
            if micro_batch == self.micro_batches - 1:
                commands += [ReduceGrads(), OptimizerStep()]
            yield commands

    def _forward(self, train: bool) -> list[PipeInstruction]:
        commands: list[PipeInstruction] = [LoadMicroBatch(0) if self.is_first_stage else RecvActivation(0)]
        for block in range(self.num_blocks):
            commands.append(ForwardPass(0, block=block))
            if block == self.num_blocks - 1 and not self.is_last_stage:
                commands.append(SendActivation(0))
            if train:
                commands.append(BackwardPass(0, block=block))
        return commands

    def num_pipe_buffers(self) -> int:
        """One micro-batch is alive at a time, whatever the number of stages."""
        return 1


class LocalEvalSchedule(LocalSchedule):
    """The forward half of LocalSchedule, for evaluation."""

    def steps(self) -> Any:
        for _ in range(self.micro_batches):
            yield self._forward(train=False)
