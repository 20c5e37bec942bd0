"""The baseline: stock DeepSpeed PipelineEngine (1F1B) over the same slices of the same model.

All ranks are one world here, gradients cross every boundary, and the last stage alone has a head and a loss.
"""

from __future__ import annotations

import contextlib
import io
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from deepspeed.pipe import LayerSpec, PipelineModule
from deepspeed.runtime.config import DeepSpeedConfig
from deepspeed.runtime.pipe.engine import PipelineEngine
from torch import nn

from llm_local.adapters.deepspeed_internals import instructions_of, link_as_laid_out, set_instructions, undo_dummy_step
from llm_local.block_engine import engine_arguments, restore_buffers
from llm_local.data.packing import CONCAT, inputs_of, marked
from llm_local.device import seed_everything
from llm_local.head_plan import seed_of
from llm_local.links.packet import CHECK, EVAL, TRAIN, Packet
from llm_local.model.block import named_once
from llm_local.model.lora import add_adapters
from llm_local.model.loss import head_logits, head_loss
from llm_local.model.slices import Slice
from llm_local.model.stage import Blueprint, build_slice
from llm_local.partition import Span
from llm_local.results import EvalResult, NonFiniteLoss, StepResult
from llm_local.trace import Tracer


def id_columns(dtype: torch.dtype) -> int:
    """How many numbers of that type have the bits of an id."""
    return torch.int32.itemsize // dtype.itemsize


def with_ids(hidden: torch.Tensor, told: torch.Tensor) -> torch.Tensor:
    """Hidden states (B, T, D) and N integers a token, ids first, (B, T, N) → (B, T, D + N · id_columns), what a stage
    sends to the next.

    DeepSpeed sends tensor after tensor, and each would wait for the link's latency.
    """
    return torch.cat([hidden, told.to(torch.int32).contiguous().view(hidden.dtype)], dim=-1)


def parted(sent: torch.Tensor, num_integers: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    """The inverse of `with_ids`."""
    columns = num_integers * id_columns(sent.dtype)
    told = sent[..., -columns:].detach().clone(memory_format=torch.contiguous_format).view(torch.int32)
    return sent[..., :-columns].contiguous(), told.long()


def with_weight(rows: torch.Tensor, weight: float) -> torch.Tensor:
    """Ids (B, T) → (B, T, 2): beside each the bits of its micro-batch's weight in float32."""
    bits = torch.tensor(weight, dtype=torch.float32).view(torch.int32)
    return torch.stack([rows, bits.long().expand_as(rows)], dim=-1)


def weight_of(told: torch.Tensor) -> torch.Tensor:
    """The weight that `with_weight` gave, a float32 scalar."""
    return told[0, 0, 1].to(torch.int32).view(torch.float32)


class PipeSlice(nn.Module):
    """A slice as a layer of a PipelineModule: token ids travel along with the hidden states."""

    def __init__(self, plan: Blueprint, span: Span):
        super().__init__()
        config, anatomy, documents = plan.config, plan.anatomy, plan.documents
        self.part = build_slice(config, plan.model_config, anatomy, span, has_head=span.stop == anatomy.num_layers)
        add_adapters(config, self.part)
        self.model = self.part.model
        self.documents = documents
        self.pads = config.data.packing != CONCAT
        self.sends_labels = config.task.sends_labels
        self.has_weight = self.pads or documents is not None or self.sends_labels  # of micro-batches
        self.images = anatomy.row_shape  # whose labels stand in place of ids
        self.num_integers = 1 + self.has_weight + (self.sends_labels and not self.images)
        self.return_logits = False
        self.begin()
        for parameter in self.parameters():
            # else DeepSpeed clips by the gradient norm of stage 0 alone
            setattr(parameter, "model_parallel", True)  # noqa: B010 - not an attribute that tensors have

    def begin(self) -> None:
        """Begins to count tokens without padding, on the device where later stages see the ids only there."""
        self.tokens: int | torch.Tensor = 0
        self.measured: list[torch.Tensor] = []  # of each micro-batch of an evaluation, times its weight

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """ids (B, T, 1) on the first stage, or `with_weight`, or that and labels; `with_ids` behind it → `with_ids`, or
        at the end the loss times its weight, as DeepSpeed takes the mean of micro-batches. Padding is marked as in
        packing.py.
        """
        if self.images:
            return self._classify(inputs)
        hidden, integers = parted(inputs, self.num_integers) if inputs.is_floating_point() else (None, inputs)
        rows = integers[..., 0].contiguous()
        told = inputs_of(rows) if self.pads else {"input_ids": rows}
        ids, labels = told.pop("input_ids"), told.pop("labels", None)
        documents = None if self.return_logits else self.documents  # as in a Block
        told = documents.inputs(self.part.base(), ids, told) if documents else told
        leaving, normed = self.part(hidden, input_ids=ids, **told)
        labels = documents.labels(ids, labels) if documents else integers[..., -1] if self.sends_labels else labels
        self.tokens = self.tokens + ((rows >= 0).sum() if self.pads else rows.numel())
        if not self.part.is_last:
            return with_ids(leaving, integers)
        if self.return_logits:
            return head_logits(self.part, normed, ids)
        loss = head_loss(self.part, normed, ids, labels)
        return loss * weight_of(integers) if self.has_weight else loss

    def _classify(self, inputs: torch.Tensor) -> torch.Tensor:
        """As forward; on the first stage images (B, 1, C·H·W) are in place of hidden states."""
        hidden, integers = parted(inputs, self.num_integers)
        first = {}
        if self.part.is_first:
            first = {self.part.task.main_input: hidden.detach().reshape(len(hidden), *self.images)}
        leaving, logits = self.part(None if first else hidden, **first)
        self.tokens = self.tokens + leaving.shape[0] * leaving.shape[1]
        if not self.part.is_last:
            return with_ids(leaving, integers[:, :1].expand(-1, leaving.shape[1], -1))
        if self.return_logits:
            return logits
        labels, weight = integers[:, :1, 0], weight_of(integers)
        if not self.training:
            task = self.part.task
            self.measured.append(weight * task.measure(*task.scored(logits, None, labels)))
        return head_loss(self.part, logits, None, labels) * weight


class Pipeline(PipelineModule):
    """The stage's slice, as DeepSpeed's engine and checkpoints know it."""

    span = None

    @property
    def part(self) -> PipeSlice:
        return next(m for m in self.modules() if isinstance(m, PipeSlice))

    def saved_tensors(self) -> dict[str, torch.Tensor]:
        return named_once([("", self.part.model)])

    def tied_names(self) -> dict[str, str]:
        return {}


class BackpropEngine:
    """The stock pipeline behind LocalEngine's interface. Every rank calls every method."""

    blocks = ()

    def __init__(self, engine: PipelineEngine, load: Callable[[int, int, int], Packet] | None, seed: int):
        self.engines = [engine]
        self._seed = seed
        self._unchecked: list[tuple[int, torch.Tensor]] = []
        self._engine = engine
        self._load = load

    @property
    def part(self) -> PipeSlice:
        """This stage's slice."""
        module: Any = self._engine.module
        return module.part

    @property
    def bodies(self) -> list[Slice]:
        return [self.part.part]

    def trace(self, tracer: Tracer) -> None:
        set_instructions(self._engine, tracer.wrap(instructions_of(self._engine)))

    def train_batch(self, step: int) -> StepResult:
        """One 1F1B step; the loss is the last stage's, known to all."""
        lr = float(self._engine.get_lr()[0])
        seed_everything(seed_of(f"dropout:{self._seed}:{step}:{self._engine.global_rank}"))
        self.part.begin()
        loss = self._engine.train_batch(data_iter=self._micro_batches(TRAIN, step))
        self._unchecked.append((step, loss))
        norms = (self._engine.get_global_grad_norm(),)
        return StepResult(loss.reshape(1).float(), lr, norms, self.part.tokens)

    def check_finite(self) -> None:
        """As LocalEngine's."""
        steps, self._unchecked = self._unchecked, []
        for step, loss in steps:
            if not math.isfinite(float(loss)):
                raise NonFiniteLoss(f"the loss of stage {self._engine.num_stages - 1} is {float(loss)} at step {step}")

    def eval_batch(self, step: int, micro_batches: int) -> EvalResult:
        """The mean validation loss of the whole model."""
        data = self._micro_batches(EVAL, step)
        self.part.begin()
        loss: Any = self._engine.eval_batch(data, num_micro_batches=micro_batches)
        measured = self.part.measured  # on the last stage
        measures = torch.stack(measured).mean(dim=0)[None] if measured else torch.zeros(1, 0)
        return EvalResult(loss.reshape(1).float(), int(self.part.tokens), measures)

    def check_logits(self) -> torch.Tensor | None:
        """As LocalEngine.check_logits; None off the last stage."""
        self.part.return_logits = True
        self._engine.reset_activation_shape()
        self._engine.total_loss = None  # DeepSpeed would add the logits to the last evaluation's loss
        options: dict[str, Any] = {"reduce_output": None, "bcast_loss": False, "num_micro_batches": 1}
        monitored, self._engine.monitor.enabled = self._engine.monitor.enabled, False  # there is no loss to write
        outputs: Any = self._engine.eval_batch(self._micro_batches(CHECK, 0), compute_loss=False, **options)
        self._engine.monitor.enabled = monitored
        self.part.return_logits = False
        self._engine.reset_activation_shape()
        return outputs[0] if self.part.part.is_last else None

    def _micro_batches(self, kind: int, step: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """DeepSpeed asks the first stage for inputs and the last one for labels, which travel with the inputs here."""
        index = 0
        nothing = torch.empty(0)
        while True:
            rows = nothing
            if self._load is not None:
                packet = self._load(kind, step, index)
                rows = self._entering(packet)
            yield rows, nothing
            index += 1

    def _entering(self, packet: Packet) -> torch.Tensor:
        """What the first stage's slice reads of a micro-batch."""
        if packet.pixel_values is not None:
            assert packet.labels is not None
            return with_ids(packet.pixel_values.flatten(1)[:, None], with_weight(packet.labels, packet.weight))
        assert packet.input_ids is not None
        rows = marked(packet.input_ids, packet.attention_mask)
        rows = with_weight(rows, packet.weight) if self.part.has_weight else rows.unsqueeze(-1)
        if self.part.sends_labels:
            labels = packet.input_ids if packet.labels is None else packet.labels
            rows = torch.cat([rows, labels.unsqueeze(-1)], dim=-1)
        return rows


def make_backprop_engine(
    plan: Blueprint, settings: dict[str, Any], load: Callable[[int, int, int], Packet] | None
) -> BackpropEngine:
    """Every rank must call; only this stage's slice is built."""
    config, partition = plan.config, plan.partition
    specs = [LayerSpec(PipeSlice, plan, span) for span in partition.blocks]
    with contextlib.redirect_stdout(io.StringIO()):  # it prints its topology
        module = Pipeline(specs, num_stages=partition.num_stages, partition_method="uniform", seed_layers=False)
    buffers = {name: buffer.clone() for name, buffer in module.named_buffers()}
    arguments = engine_arguments(config, module, settings)
    mpu: Any = module.mpu()
    engine = PipelineEngine(config_class=DeepSpeedConfig(settings, mpu), mpu=mpu, **arguments)
    restore_buffers(module, buffers)
    undo_dummy_step(engine)
    link_as_laid_out(engine)
    return BackpropEngine(engine, load, config.train.seed)
