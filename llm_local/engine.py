"""Drives the blocks of a stage through a schedule, one instruction at a time.

A block's activations are freed before the next block of the stage runs, unless a gradient is still to come back to it.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from deepspeed.runtime.pipe import schedule as instructions

from llm_local.block_engine import BlockEngine, FrozenEngine, block_of
from llm_local.device import seed_everything
from llm_local.head_plan import HeadPlan
from llm_local.links.links import Links
from llm_local.links.packet import CHECK, EVAL, GRADIENT, TRAIN, Packet
from llm_local.methods.schedule import Backward, EvalSchedule, Forward, Schedule
from llm_local.model.block import Block
from llm_local.model.distillation import Distillation, distillation_loss, soft_targets
from llm_local.model.sequence_parallel import completed, own_part
from llm_local.model.slices import Slice
from llm_local.model.standins import Seam
from llm_local.model.windows import draw_window
from llm_local.results import EvalResult, NonFiniteLoss, StepResult
from llm_local.trace import Tracer
from llm_local.world import World


@dataclass
class _MicroBatch:
    """A micro-batch on its way through the blocks of the stage.

    packet: what blocks read of it; received: as it goes on. share: what this rank's losses count in the mean over the
    ranks that have a part of its rows, if there are such. hidden: what the next block reads. entering, leaving: by
    block, the leaf that came in and the output with its graph. seams: by block, where its graph is in two pieces.
    normed: by block, what its output matrix read. from_above: by block, what the next one says to it: the gradient of
    its output, or soft targets; under -1, for the stage before.
    """

    packet: Packet
    received: Packet
    share: torch.Tensor | None
    index: int
    hidden: torch.Tensor | None
    losses: dict[int, torch.Tensor] = field(default_factory=dict)
    entering: dict[int, torch.Tensor | None] = field(default_factory=dict)
    leaving: dict[int, torch.Tensor] = field(default_factory=dict)
    seams: dict[int, Seam] = field(default_factory=dict)
    normed: dict[int, torch.Tensor] = field(default_factory=dict)
    from_above: dict[int, torch.Tensor] = field(default_factory=dict)


@dataclass
class _Totals:
    """Of the micro-batches of a step that have run. losses: (blocks,); tokens: without padding."""

    losses: torch.Tensor
    tokens: int = 0


@dataclass(frozen=True)
class TrainingPlan:
    """What a stage does in each step. micro_batches: of a step. schedule_of(step) makes the schedule that it follows;
    what that lets into the stage before its step, it finds there in that."""

    micro_batches: int
    schedule_of: Callable[[int], Callable[..., Schedule]]
    heads: HeadPlan
    distillation: Distillation


class LocalEngine:
    """One stage of local training. `load(kind, step, index)` gives stage 0 its micro-batches."""

    def __init__(
        self,
        engines: Sequence[BlockEngine | FrozenEngine],
        plan: TrainingPlan,
        world: World,
        links: Links,
        load: Callable[[int, int, int], Packet] | None,
    ):
        self.engines = engines
        self._plan = plan
        self._heads = plan.heads
        self._place = world.place
        self._sequence = world.sequence
        self.links = links
        self._load = load
        frozen = [number for number, block in enumerate(self.blocks) if block.is_frozen]
        # where the whole model has one loss, what stands in front of its head has none
        self._reported = slice(-1 if any(not block.has_head for block in self.blocks) else None, None)
        self._told = {"frozen": frozen} if frozen else {}  # a schedule from elsewhere may not know of it
        self._kind = TRAIN
        self._step = 0
        self._count = plan.micro_batches  # of the step, or of the evaluation
        self._num_entered = 0
        self._buffers: dict[int, _MicroBatch] = {}
        self._of_next_step: dict[int, _MicroBatch] = {}
        self._totals: dict[tuple[int, int], _Totals] = {}  # by kind and step
        self._measures: list[torch.Tensor] = []  # (M,) float64 of each block
        self._unchecked: list[tuple[int, torch.Tensor]] = []  # steps, and their losses
        self.check_row: torch.Tensor | None = None  # of images the first stage's alone
        self._instruction_map: dict[type, Callable[..., None]] = {
            instructions.LoadMicroBatch: self._exec_load,
            instructions.RecvActivation: self._exec_receive,
            instructions.ForwardPass: self._exec_forward,
            instructions.SendActivation: self._exec_send,
            instructions.BackwardPass: self._exec_backward,
            instructions.SendGrad: self._exec_send_gradient,
            instructions.RecvGrad: self._exec_receive_gradient,
            instructions.ReduceGrads: self._exec_reduce,
            instructions.OptimizerStep: self._exec_step,
        }

    @property
    def blocks(self) -> list[Block]:
        return [block_of(engine) for engine in self.engines]

    @property
    def bodies(self) -> list[Slice]:
        return [block.body for block in self.blocks]

    def trace(self, tracer: Tracer) -> None:
        self._instruction_map = tracer.wrap(self._instruction_map)

    def train_batch(self, step: int) -> StepResult:
        """Trains every block on the step's micro-batches; a loss that is not finite is check_finite's to find."""
        for engine in self.engines:
            engine.train()
        lr = float(self.engines[-1].get_lr()[0])
        count = self._plan.micro_batches
        totals = self._run(self._plan.schedule_of(step), TRAIN, step, count)
        losses = totals.losses[self._reported] / count
        self._unchecked.append((step, losses))
        return StepResult(losses, lr, tuple(engine.get_global_grad_norm() for engine in self.engines), totals.tokens)

    def check_finite(self) -> None:
        """Raises NonFiniteLoss naming stage and step if a loss since the last call was none. Waits for the device."""
        steps, self._unchecked = self._unchecked, []
        for step, losses in steps:
            for block, loss in enumerate(losses.tolist()):
                if not math.isfinite(loss):
                    whose = f"the loss of stage {self._place.stage} (its block {block})"
                    raise NonFiniteLoss(f"{whose} is {loss} at step {step}")

    @torch.no_grad()
    def check_logits(self) -> torch.Tensor:
        """Logits (1, T, V) of the stage's last head on the micro-batch that an export is checked with, check_row."""
        for engine in self.engines:
            engine.eval()
        self._kind, self._step, self._num_entered, self._buffers = CHECK, 0, 0, {}
        self._exec_load(0) if self.links.receiver is None else self._exec_receive(0)
        entered = self._buffers.pop(0)
        self.check_row = entered.packet.inputs().get(self.blocks[-1].body.task.main_input)
        logits, hidden = torch.empty(0), entered.hidden
        for engine in self.engines:
            inputs = self._inputs(entered.packet)
            logits, hidden, _ = engine(hidden=hidden, return_logits=True, **inputs)
        if self.links.sender is not None:
            self.links.sender.send(dataclasses.replace(entered.received, hidden=hidden))
        if self._sequence is not None and self.blocks[-1].has_head:
            logits = torch.cat(self._sequence.gather(logits), 1)
        for engine in self.engines:
            engine.empty_partition_cache()  # ZeRO-3 has fetched for a backward pass, and an export gathers by itself
        return logits

    @torch.no_grad()
    def eval_batch(self, step: int, micro_batches: int) -> EvalResult:
        """Mean loss of every block over so many validation micro-batches with today's weights."""
        for engine in self.engines:
            engine.eval()
        self._measures = [torch.zeros_like(block.measured) for block in self.blocks]
        totals = self._run(EvalSchedule, EVAL, step, micro_batches)
        measures = torch.stack(self._measures[self._reported]) / micro_batches
        return EvalResult(totals.losses[self._reported] / micro_batches, totals.tokens, measures)

    def _run(self, schedule: Callable[..., Schedule], kind: int, step: int, micro_batches: int) -> _Totals:
        self._kind, self._step, self._count = kind, step, micro_batches
        self._buffers = self._of_next_step if kind == TRAIN else {}
        self._num_entered = len(self._buffers)
        told = self._told | ({"entered": self._num_entered} if self._num_entered else {})
        made = schedule(micro_batches, self._place.num_stages, self._place.stage, len(self.engines), **told)
        for commands in made.steps():
            for command in commands:
                self._instruction_map[type(command)](**command.kwargs)
        if kind == TRAIN:
            early = [batch for batch in self._buffers.values() if batch.packet.step > step]
            self._of_next_step = {batch.index % made.num_pipe_buffers(): batch for batch in early}
        self._buffers = {}
        return self._totals.pop((kind, step))

    def _totals_of(self, packet: Packet) -> _Totals:
        key = self._kind, packet.step
        if key not in self._totals:
            self._totals[key] = _Totals(torch.zeros(len(self.engines), device=self.engines[0].device))
        return self._totals[key]

    def _position(self) -> tuple[int, int]:
        """Step and number of the next micro-batch that enters."""
        further, index = divmod(self._num_entered, self._count)
        return self._step + further, index

    def _exec_load(self, buffer_id: int) -> None:
        assert self._load is not None, "only the first stage loads"
        packet = self._load(self._kind, *self._position())
        self._enter(buffer_id, packet if self._sequence is None else own_part(packet, self._sequence))

    def _exec_receive(self, buffer_id: int) -> None:
        assert self.links.receiver is not None, "the first stage does not receive"
        self._enter(buffer_id, self.links.receiver.receive(self._kind, *self._position()))

    def _enter(self, buffer_id: int, received: Packet) -> None:
        device: Any = self.engines[0].device
        packet, share = received, None
        if self._sequence is not None:
            packet, share = completed(received, self._sequence, device)
        hidden = None if packet.hidden is None else packet.hidden.to(device, non_blocking=True)
        self._buffers[buffer_id] = _MicroBatch(packet, received, share, self._position()[1], hidden)
        self._num_entered += 1
        self._totals_of(packet).tokens += received.num_tokens

    def _inputs(self, packet: Packet) -> dict[str, torch.Tensor]:
        device = self.engines[0].device
        return {name: part.to(device, non_blocking=True) for name, part in packet.inputs().items()}

    def _exec_forward(self, buffer_id: int, block: int, **said: bool) -> None:
        """The block's loss and output, and what else a Forward of that says."""
        batch, meaning = self._buffers[buffer_id], Forward(**said)
        entering = batch.hidden
        if meaning.keep_graph and entering is not None:
            entering.requires_grad_()
        inputs: dict[str, Any] = self._inputs(batch.packet)
        compute: Any = self.engines[block]
        if self._kind == TRAIN:
            step = batch.packet.step
            compute = compute.of_step(step)
            seed_everything(self._heads.dropout_seed(step, batch.index, block))
            inputs["window"] = draw_window(self._heads, step, batch.index, block, inputs.get("input_ids"))
        with torch.no_grad() if meaning.no_graph else nullcontext():
            loss, batch.hidden, leaving = compute(hidden=entering, meaning=meaning, **inputs)
            loss = loss if batch.share is None else batch.share * loss
        batch.losses[block] = self._heads.weights[block] * batch.packet.weight * loss
        if meaning.keep_graph:
            batch.entering[block], batch.leaving[block] = entering, leaving
            if seam := self.blocks[block].body.border.take_seam():
                batch.seams[block] = seam
        if meaning.keeps_normed:
            part = self.blocks[block]
            normed = part.take_normed()
            if meaning.learns:
                batch.normed[block] = normed
            if meaning.teaches:
                asked = self._plan.distillation
                batch.from_above[block - 1] = soft_targets(part.head, normed, asked.top_k, asked.samples)
        self._totals_of(batch.packet).losses[block].add_(loss.detach(), alpha=batch.packet.weight)
        if self._kind == EVAL:
            measured = self.blocks[block].measured
            self._measures[block] = self._measures[block].to(measured.device) + batch.packet.weight * measured

    def _exec_send(self, buffer_id: int) -> None:
        assert self.links.sender is not None, "the last stage does not send"
        batch = self._buffers[buffer_id]
        self.links.sender.send(dataclasses.replace(batch.received, hidden=batch.hidden))

    def _exec_backward(self, buffer_id: int, block: int, **said: bool) -> None:
        """The block's gradients, as a Backward of that says."""
        batch, engine, meaning = self._buffers[buffer_id], self.engines[block], Backward(**said)
        if meaning.from_above:
            loss = batch.losses.pop(block) / engine.gradient_accumulation_steps() if meaning.beside_loss else 0.0
            _continue_backward(engine, batch.leaving.pop(block), batch.from_above.pop(block), loss)
        else:
            loss = batch.losses.pop(block)
            loss = loss + self._divergence(batch, block) if meaning.learns else loss
            engine.backward(loss, retain_graph=meaning.again)
        if meaning.passes_down:
            if block in batch.seams:
                seam = batch.seams.pop(block)
                _continue_backward(engine, seam.below, _gradient_of(engine, seam.above))
            entering = batch.entering.get(block)
            if entering is not None:
                batch.from_above[block - 1] = _gradient_of(engine, entering)

    def _divergence(self, batch: _MicroBatch, block: int) -> torch.Tensor:
        """From the next block's soft targets, weighted."""
        normed, targets, mask = batch.normed.pop(block), batch.from_above.pop(block), batch.packet.attention_mask
        mask = None if mask is None else mask.to(normed.device, non_blocking=True)
        weight = self._plan.distillation.weight * batch.packet.weight
        return weight * distillation_loss(self.blocks[block].head, normed, targets, mask)

    def _exec_send_gradient(self, buffer_id: int) -> None:
        assert self.links.gradient_sender is not None, "the first stage sends no gradient"
        batch = self._buffers[buffer_id]
        packet = Packet(GRADIENT, self._step, batch.index, hidden=batch.from_above.pop(-1))
        self.links.gradient_sender.send(packet)

    def _exec_receive_gradient(self, buffer_id: int) -> None:
        assert self.links.gradient_receiver is not None, "the last stage receives no gradient"
        batch = self._buffers[buffer_id]
        gradient = self.links.gradient_receiver.receive(GRADIENT, self._step, batch.index).hidden
        assert gradient is not None
        batch.from_above[len(self.engines) - 1] = gradient.to(self.engines[-1].device, non_blocking=True)

    def _exec_reduce(self) -> None:
        """DeepSpeed reduces in backward() (ZeRO 2, 3) or in step() (ZeRO 0, 1): nothing is left to do here."""

    def _exec_step(self) -> None:
        for engine in self.engines:
            engine.step()


def _gradient_of(engine: Any, leaf: torch.Tensor) -> torch.Tensor:
    """What backward passes left on the leaf, without fp16's loss scale: each block's engine has its own. In float32
    then, as fp16 has no numbers so small."""
    gradient, leaf.grad = leaf.grad, None
    assert gradient is not None
    return gradient.float() / engine.optimizer.loss_scale if engine.fp16_enabled() else gradient


def _continue_backward(
    engine: Any, output: torch.Tensor, gradient: torch.Tensor, loss: torch.Tensor | float = 0.0
) -> None:
    """A backward pass from the gradient of an output, and from a loss beside it, as the scalar that DeepSpeed wants."""
    engine.backward((output * gradient.to(output.device)).sum() + loss, scale_wrt_gas=False)
