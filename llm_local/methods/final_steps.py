"""The last steps of a run by backpropagation through the same blocks, beside any method with local losses."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from llm_local.methods.schedule import GRADIENT, Schedule

if TYPE_CHECKING:
    from deepspeed.runtime.pipe.schedule import PipeInstruction


class GlobalSchedule(Schedule):
    """One step of backpropagation through the same blocks, one forward and one backward pass in turn (1F1B).

    The last block's loss alone trains the bodies; every other block's own loss trains its head in the same pass, for
    ZeRO wants each parameter's gradient in the first pass of a step. So each exit stays a model of today's weights.
    """

    back = GRADIENT

    def steps(self) -> Iterator[list[PipeInstruction]]:
        ahead = min(self.stages - self.stage_id - 1, self.micro_batches)
        for micro_batch in range(ahead):
            yield self._all_forward(micro_batch)
        for micro_batch in range(self.micro_batches):
            commands = []
            if micro_batch + ahead < self.micro_batches:
                commands = self._all_forward(micro_batch + ahead)
            yield commands + self._all_backward(micro_batch) + self.end(micro_batch)

    def _all_forward(self, micro_batch: int) -> list[PipeInstruction]:
        buffer = micro_batch % self.num_pipe_buffers()
        commands = [self.enter(buffer)]
        for block in range(self.num_blocks):
            commands += self.forward(buffer, block, keep_graph=True, detach_head=not self.is_last(block))
        return commands

    def _all_backward(self, micro_batch: int) -> list[PipeInstruction]:
        buffer = micro_batch % self.num_pipe_buffers()
        commands = self.receive_back(buffer)
        for block in reversed(range(self.num_blocks)):
            above = not self.is_last(block)
            commands.append(self.backward(buffer, block, from_above=above, beside_loss=above, passes_down=True))
        return commands + self.send_back(buffer)

    def num_pipe_buffers(self) -> int:
        """Micro-batches alive at a time: one more than there are stages behind."""
        return max(1, min(self.stages - self.stage_id, self.micro_batches))
