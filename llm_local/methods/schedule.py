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

A local stage never waits for a later one, so it starts the next step at once and the pipe stays full. Blocks that are
frozen have no backward passes.

An instruction says all that it means; the engine asks nothing of the schedule that it is from. Beside buffer and block
a ForwardPass has what a Forward is made of, and a BackwardPass that of a Backward.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

if TYPE_CHECKING:
    from deepspeed.runtime.pipe.schedule import PipeInstruction

GRADIENT, SOFT_TARGETS = "gradient", "soft targets"


@dataclass(frozen=True)
class Forward:
    """What a forward pass of a block means beside its loss and its output.

    keep_graph: a gradient of the output is still to come: input and output are kept with their graph. learns: soft
    targets are still to come, teaches: they are made for the block before; for both, what the output matrix read is
    kept. detach_head: the loss trains the head alone. body_waits: and not even a router loss trains the body. no_graph:
    nothing of the block is trained.
    """

    keep_graph: bool = False
    learns: bool = False
    teaches: bool = False
    detach_head: bool = False
    body_waits: bool = False
    no_graph: bool = False

    @property
    def keeps_normed(self) -> bool:
        return self.learns or self.teaches


@dataclass(frozen=True)
class Backward:
    """What a backward pass is, which is from the block's own loss unless it is

    from_above: from the gradient of the block's output that the next one has had. beside_loss: from both, in one pass.
    learns: the own loss has the divergence from the soft targets of the next block. again: another pass over the same
    graph follows. passes_down: through the whole block, and the gradient of what came in is for the block before.
    """

    from_above: bool = False
    beside_loss: bool = False
    learns: bool = False
    again: bool = False
    passes_down: bool = False


class Schedule(ABC):
    """One step of a stage, or one evaluation.

    name: what the planner calls it. back: what comes back over each boundary, of each micro-batch: nothing, GRADIENT or
    SOFT_TARGETS. passes_again: all blocks but the model's last one have a second backward pass, for the gradient.
    heads_alone: all heads but the model's last one train, and the layers below them do not. frozen: blocks of the stage
    that are not trained.
    """

    name: ClassVar[str] = ""
    back: ClassVar[str | None] = None
    passes_again: ClassVar[bool] = False

    def __init__(
        self,
        micro_batches: int,
        stages: int,
        stage_id: int,
        num_blocks: int = 1,
        *,
        heads_alone: bool = False,
        frozen: Collection[int] = (),
    ):
        self.micro_batches = micro_batches
        self.stages = stages
        self.stage_id = stage_id
        self.num_blocks = num_blocks
        self.heads_alone = heads_alone
        self.frozen = frozen

    @abstractmethod
    def steps(self) -> Iterator[list[PipeInstruction]]:
        """The instructions, in lists of which each does what belongs together."""

    def num_pipe_buffers(self) -> int:
        """Micro-batches alive at a time: the one at work, and that whose gradient or targets are on their way."""
        return min(2, self.micro_batches) if self.back else 1

    def __iter__(self) -> Iterator[list[PipeInstruction]]:
        return iter(self.steps())

    @property
    def is_first_stage(self) -> bool:
        return self.stage_id == 0

    @property
    def is_last_stage(self) -> bool:
        return self.stage_id == self.stages - 1

    def is_last(self, block: int) -> bool:
        """Whether no block stands behind this one of the stage."""
        return self.is_last_stage and block == self.num_blocks - 1

    def is_first(self, block: int) -> bool:
        """Whether the model begins with this block of the stage."""
        return self.is_first_stage and block == 0

    def enter(self, buffer: int) -> PipeInstruction:
        """The next micro-batch, from the data or from the stage before."""
        from deepspeed.runtime.pipe.schedule import LoadMicroBatch, RecvActivation

        return LoadMicroBatch(buffer) if self.is_first_stage else RecvActivation(buffer)

    def forward(self, buffer: int, block: int, **meaning: bool) -> list[PipeInstruction]:
        """A block's forward pass; what leaves the stage is sent at once."""
        from deepspeed.runtime.pipe.schedule import ForwardPass, SendActivation

        if self.heads_alone and not self.is_last(block):
            meaning |= {"detach_head": True, "body_waits": True}
        meaning |= {"no_graph": block in self.frozen}
        leaves = block == self.num_blocks - 1 and not self.is_last_stage
        said = {name: True for name, holds in meaning.items() if holds}
        return [ForwardPass(buffer, block=block, **said), *([SendActivation(buffer)] if leaves else [])]

    def backward(self, buffer: int, block: int, **meaning: bool) -> PipeInstruction:
        """A block's backward pass."""
        from deepspeed.runtime.pipe.schedule import BackwardPass

        return BackwardPass(buffer, block=block, **{name: True for name, holds in meaning.items() if holds})

    def send_back(self, buffer: int) -> list[PipeInstruction]:
        """To the stage before, what the first block has for it."""
        from deepspeed.runtime.pipe.schedule import SendGrad

        return [] if self.is_first_stage else [SendGrad(buffer)]

    def receive_back(self, buffer: int) -> list[PipeInstruction]:
        """From the stage behind, what it has for the last block."""
        from deepspeed.runtime.pipe.schedule import RecvGrad

        return [] if self.is_last_stage else [RecvGrad(buffer)]

    def catch_up(self, micro_batch: int, **meaning: bool) -> list[PipeInstruction]:
        """The last block's passes for what comes back, one micro-batch late and so that nobody waits but at a step's
        end."""
        if self.is_last_stage:
            return []
        due = range(max(0, micro_batch - 1), micro_batch + (micro_batch == self.micro_batches - 1))
        commands = []
        for buffer in (each % self.num_pipe_buffers() for each in due):
            commands += [*self.receive_back(buffer), self.backward(buffer, self.num_blocks - 1, **meaning)]
        return commands

    def end(self, micro_batch: int) -> list[PipeInstruction]:
        """The optimizer step, behind the last micro-batch."""
        from deepspeed.runtime.pipe.schedule import OptimizerStep, ReduceGrads

        return [ReduceGrads(), OptimizerStep()] if micro_batch == self.micro_batches - 1 else []

    @classmethod
    def alive_passes(cls, behind: int, micro_batches: int, num_blocks: int) -> int:
        """Most passes through a block that a stage has the activations of; behind: stages behind it."""
        # the block before waits for this one; the last block waits, beside the next micro-batch, for the next stage
        waits = min(2, num_blocks) + (behind > 0 and micro_batches > 1)
        return waits if cls.back else 1

    @classmethod
    def last_wait(cls, own: Sequence[float], behind: Sequence[float], there_and_back: float) -> float:
        """Seconds at a step's end for what the next stage sends back of the last micro-batch.

        own: of the last block's backward pass, and of that from above. behind: of the next stage's first block, forward
        and backward.
        """
        return 0.0


class LocalSchedule(Schedule):
    """One step of local training on a stage: no instruction receives or sends a gradient.

    Each block of the stage runs forward and backward before the next one, so that the activations of one block are
    alive at a time; the stage's output leaves before the last block's backward pass.
    """

    name = "local"

    def steps(self) -> Iterator[list[PipeInstruction]]:
        """Yields the instructions of one micro-batch at a time; the last list ends with the optimizer step."""
        for micro_batch in range(self.micro_batches):
            commands = [self.enter(0)]
            for block in range(self.num_blocks):
                commands += self.forward(0, block)
                commands += [] if block in self.frozen else [self.backward(0, block)]
            yield commands + self.end(micro_batch)


class EvalSchedule(Schedule):
    """Forward passes alone, for evaluation."""

    def steps(self) -> Iterator[list[PipeInstruction]]:
        for _ in range(self.micro_batches):
            yield [self.enter(0), *(c for block in range(self.num_blocks) for c in self.forward(0, block))]
