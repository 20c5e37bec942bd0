"""Backpropagation without bubbles: each step's gradients are those of the weights of one step before.

PipeDream-2BW (Narayanan et al. 2020, arXiv 2006.09503). With W(t) the weights after step t and U the optimizer's
update, W(t) = W(t-1) - U(gradient of step t's batch at W(t-2)), on every stage, however many there are; so a stage can
begin with the next step before the gradients of this one are back. Two steps of four micro-batches, as in schedule.py;
two forward passes in front of an O are of the next step, if there is one:

    stage 0 | FFFGFGFGFGOFGFG G GO
    stage 1 |  FBFBFBFBOFBFBFBFBO

The error that a step makes so is known a step later. `delay_correction` feeds it back, W(t) = W(t-1) - 2 U(t) + U(t-1),
after an idea of Zmushko et al. 2026 (arXiv 2606.30634): what is computed with then is the optimizer's weights and one
more step in the direction of the last one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING, Any

from llm_local.flags import LocalArguments
from llm_local.methods.backprop import Backprop
from llm_local.methods.method import register_method
from llm_local.methods.schedule import GRADIENT, Schedule

if TYPE_CHECKING:
    from deepspeed.runtime.pipe.schedule import PipeInstruction


_UNTRIED = ("replica_sync_steps", "lora_rank", "tensor_parallel_size")
_DEFAULTS = LocalArguments()


class DelayedSchedule(Schedule):
    """One step, and the forward passes of the next one for which there is time before its last gradient is back.

    entered: micro-batches of this step that are in the stage already. is_end: no step follows.
    """

    name = "delayed"
    back = GRADIENT

    def __init__(self, *shape: Any, entered: int = 0, is_end: bool = False, **told: Any):
        super().__init__(*shape, **told)
        self.entered = entered
        self.is_end = is_end

    def steps(self) -> Iterator[list[PipeInstruction]]:
        entered, passed = self.entered, min(self.entered, self.ahead(self.stage_id))
        last = self.micro_batches if self.is_end else self.micro_batches + self.ahead(self.stage_id)
        for micro_batch in range(self.micro_batches):
            commands = []
            while passed < min(micro_batch + 1 + self.ahead(self.stage_id), last):
                if passed == entered:
                    commands.append(self.enter(self.buffer(entered)))
                    entered += 1
                for block in range(self.num_blocks):
                    commands += self.forward(self.buffer(passed), block, keep_graph=True)
                passed += 1
            yield commands + self._backward(self.buffer(micro_batch)) + self.end(micro_batch)
        if not self.is_first_stage and not self.is_end:  # whatever follows on the link finds it empty
            sent = self.micro_batches + self.ahead(self.stage_id - 1)
            yield [self.enter(self.buffer(number)) for number in range(entered, sent)]

    def _backward(self, buffer: int) -> list[PipeInstruction]:
        commands = self.receive_back(buffer)
        for block in reversed(range(self.num_blocks)):
            above = not self.is_last(block)
            commands.append(self.backward(buffer, block, from_above=above, passes_down=True))
        return commands + self.send_back(buffer)

    def ahead(self, stage: int) -> int:
        """Micro-batches that the stage has passed on before the first one's gradient is back: one for each pass through
        the stages behind and one for each link, at most a step's, as the one after the next has no weights yet."""
        return min(2 * (self.stages - stage - 1), self.micro_batches)

    def buffer(self, micro_batch: int) -> int:
        return micro_batch % self.num_pipe_buffers()

    def num_pipe_buffers(self) -> int:
        return self.ahead(max(0, self.stage_id - 1)) + 2

    @classmethod
    def alive_passes(cls, behind: int, micro_batches: int, num_blocks: int) -> int:
        return num_blocks * (1 + min(2 * behind, micro_batches))


class Delayed(Backprop):
    """Blocks of the model with one loss at its end, each with an optimizer, and a gradient norm to clip, of its own."""

    is_cut_by_hand = True
    own_schedule = DelayedSchedule
    is_delayed = True

    def block_layers(self, local: LocalArguments) -> int | None:
        return local.layers_per_block

    def is_pipelined(self, local: LocalArguments) -> bool:
        return False

    def crosses_back(self, local: LocalArguments) -> str | None:
        return GRADIENT

    def schedule_at(self, local: LocalArguments, max_steps: int, step: int) -> Callable[..., Schedule]:
        return partial(DelayedSchedule, is_end=step == max_steps)

    def problems(self, local: LocalArguments) -> list[str]:
        given = {name: getattr(local, name) for name in _UNTRIED if getattr(local, name) != getattr(_DEFAULTS, name)}
        return super().problems(local) + [
            f"{name}={value} has not been tried with method=delayed; leave it out" for name, value in given.items()
        ]

    def zero_problems(self, local: LocalArguments, stage: int, offloads: bool = False) -> list[str]:
        if stage == 3:
            return [
                "ZeRO stage 3 does not work with method=delayed, which keeps whole weights of a step before; use 0 to 2"
            ]
        return []

    def router_problems(self, local: LocalArguments) -> list[str]:
        return [
            ": with method=delayed the router loss is one number of all layers, which no stage has; use "
            "method=chunked, or set it to false"
        ]

    def describe(self, num_blocks: int) -> str:
        return "trained by backpropagation through all of its layers, with gradients of the weights of one step before"


register_method("delayed", Delayed())
