"""What a stage does with the micro-batches of a step, as DeepSpeed's own pipeline instructions.

Two stages, four micro-batches, two optimizer steps (F forward, B backward from the local loss, G backward from what
the next block sent back, O optimizer step; drawn by simulate.py). Local learning, LocalSchedule:

    stage 0 | FBFBFBFBOFBFBFBFBO
    stage 1 |  FBFBFBFBOFBFBFBFBO

Backpropagation, DeepSpeed's TrainSchedule (1F1B):

    stage 0 | FF BFBFB BOFF BFBFB BO
    stage 1 |  FBFBFBFBO  FBFBFBFBO

Overlapping blocks, OverlapSchedule: one gradient comes back over each boundary, from the next block and no further.

    stage 0 | FBFBGFBGFBGGOFBFBGFBGFBGGO
    stage 1 |  FBFB FB FBO  FBFB FB FBO

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
    RecvGrad,
    ReduceGrads,
    SendActivation,
    SendGrad,
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
            commands = [self._entry(0)]
            for block in range(self.num_blocks):
                commands += [*self._forward(0, block), BackwardPass(0, block=block)]
            yield commands + self._end(micro_batch)

    def _entry(self, buffer: int) -> PipeInstruction:
        return LoadMicroBatch(buffer) if self.is_first_stage else RecvActivation(buffer)

    def _forward(self, buffer: int, block: int) -> list[PipeInstruction]:
        leaves = block == self.num_blocks - 1 and not self.is_last_stage
        return [ForwardPass(buffer, block=block), *([SendActivation(buffer)] if leaves else [])]

    def _end(self, micro_batch: int) -> list[PipeInstruction]:
        return [ReduceGrads(), OptimizerStep()] if micro_batch == self.micro_batches - 1 else []

    def num_pipe_buffers(self) -> int:
        """One micro-batch is alive at a time, whatever the number of stages."""
        return 1


class LocalEvalSchedule(LocalSchedule):
    """The forward half of LocalSchedule, for evaluation."""

    def steps(self) -> Any:
        for _ in range(self.micro_batches):
            yield [self._entry(0), *(c for block in range(self.num_blocks) for c in self._forward(0, block))]


class OverlapSchedule(LocalSchedule):
    """One step in which every block's loss also trains the top of the block below.

    The gradient for the stage before leaves as soon as the first block has it. That of the stage behind comes back one
    micro-batch later, so that nobody waits for it but at the end of a step; it goes no further than the last block.
    """

    def steps(self) -> Any:
        for micro_batch in range(self.micro_batches):
            buffer = micro_batch % self.num_pipe_buffers()
            commands = [self._entry(buffer)]
            for block in range(self.num_blocks):
                commands += [*self._forward(buffer, block), BackwardPass(buffer, block=block)]
                if block > 0:
                    commands.append(BackwardPass(buffer, block=block - 1, from_above=True))
                elif not self.is_first_stage:
                    commands.append(SendGrad(buffer))
            if micro_batch > 0:
                commands += self._from_behind((micro_batch - 1) % self.num_pipe_buffers())
            if micro_batch == self.micro_batches - 1:
                commands += self._from_behind(buffer)
            yield commands + self._end(micro_batch)

    def _from_behind(self, buffer: int) -> list[PipeInstruction]:
        if self.is_last_stage:
            return []
        return [RecvGrad(buffer), BackwardPass(buffer, block=self.num_blocks - 1, from_above=True)]

    def num_pipe_buffers(self) -> int:
        """The micro-batch at work, and the one whose gradient is on its way."""
        return min(2, self.micro_batches)


class DistillationSchedule(OverlapSchedule):
    """One step in which every block but the last waits with its backward pass for the next block's soft targets.

    They take the way of OverlapSchedule's gradients, but leave before the backward pass.
    """

    def steps(self) -> Any:
        for micro_batch in range(self.micro_batches):
            buffer = micro_batch % self.num_pipe_buffers()
            commands = [self._entry(buffer)]
            for block in range(self.num_blocks):
                commands += self._forward(buffer, block)
                if block > 0:
                    commands.append(BackwardPass(buffer, block=block - 1))
                elif not self.is_first_stage:
                    commands.append(SendGrad(buffer))
            if self.is_last_stage:
                commands.append(BackwardPass(buffer, block=self.num_blocks - 1))
            if micro_batch > 0:
                commands += self._from_behind((micro_batch - 1) % self.num_pipe_buffers())
            if micro_batch == self.micro_batches - 1:
                commands += self._from_behind(buffer)
            yield commands + self._end(micro_batch)

    def _from_behind(self, buffer: int) -> list[PipeInstruction]:
        if self.is_last_stage:
            return []
        return [RecvGrad(buffer), BackwardPass(buffer, block=self.num_blocks - 1)]


class GlobalSchedule(LocalSchedule):
    """One step of backpropagation through the same blocks, one forward and one backward pass in turn (1F1B).

    The last block's loss alone trains the bodies; every other block's own loss trains its head in the same pass. So
    each exit stays a model of today's weights.
    """

    def steps(self) -> Any:
        ahead = min(self.stages - self.stage_id - 1, self.micro_batches)
        for micro_batch in range(ahead):
            yield self._all_forward(micro_batch)
        for micro_batch in range(self.micro_batches):
            commands = []
            if micro_batch + ahead < self.micro_batches:
                commands = self._all_forward(micro_batch + ahead)
            yield commands + self._all_backward(micro_batch) + self._end(micro_batch)

    def _all_forward(self, micro_batch: int) -> list[PipeInstruction]:
        buffer = micro_batch % self.num_pipe_buffers()
        return [self._entry(buffer), *(c for block in range(self.num_blocks) for c in self._forward(buffer, block))]

    def _all_backward(self, micro_batch: int) -> list[PipeInstruction]:
        buffer = micro_batch % self.num_pipe_buffers()
        commands: list[PipeInstruction] = [] if self.is_last_stage else [RecvGrad(buffer)]
        for block in reversed(range(self.num_blocks)):
            is_last = self.is_last_stage and block == self.num_blocks - 1
            commands.append(BackwardPass(buffer, block=block, from_above=not is_last))
        return commands if self.is_first_stage else [*commands, SendGrad(buffer)]

    def num_pipe_buffers(self) -> int:
        """Micro-batches alive at a time: one more than there are stages behind."""
        return max(1, min(self.stages - self.stage_id, self.micro_batches))
