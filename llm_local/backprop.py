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
from transformers import PretrainedConfig

from llm_local.block_engine import engine_arguments, restore_buffers, undo_dummy_step
from llm_local.config import RunConfig
from llm_local.data.packing import CONCAT, inputs_of, marked
from llm_local.device import seed_everything
from llm_local.engine import EvalResult, NonFiniteLoss, StepResult
from llm_local.head_plan import seed_of
from llm_local.links.packet import CHECK, EVAL, TRAIN, Packet
from llm_local.model.anatomy import Anatomy
from llm_local.model.document_mask import DocumentMask
from llm_local.model.heads import head_logits, head_loss, scored_share
from llm_local.model.stage import build_slice
from llm_local.partition import Partition, Span
from llm_local.trace import Tracer


def id_columns(dtype: torch.dtype) -> int:
    """How many numbers of that type have the bits of an id."""
    return torch.int32.itemsize // dtype.itemsize


def with_ids(hidden: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """Hidden states (B, T, D) and ids (B, T) → (B, T, D + id_columns), what a stage sends to the next.

    DeepSpeed sends tensor after tensor, and each would wait for the link's latency.
    """
    return torch.cat([hidden, rows.to(torch.int32).unsqueeze(-1).view(hidden.dtype)], dim=-1)


def parted(sent: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The inverse of `with_ids`."""
    columns = id_columns(sent.dtype)
    ids = sent[..., -columns:].detach().clone(memory_format=torch.contiguous_format).view(torch.int32).squeeze(-1)
    return sent[..., :-columns].contiguous(), ids.long()


class PipeSlice(nn.Module):
    """A slice as a layer of a PipelineModule: token ids travel along with the hidden states."""

    def __init__(
        self,
        config: RunConfig,
        model_config: PretrainedConfig,
        anatomy: Anatomy,
        span: Span,
        documents: DocumentMask | None = None,
    ):
        super().__init__()
        self.part = build_slice(config, model_config, anatomy, span, has_head=span.stop == anatomy.num_layers)
        self.model = self.part.model
        self.documents = documents
        self.pads = config.data.packing != CONCAT
        self.return_logits = False
        self.begin()
        for parameter in self.parameters():
            # else DeepSpeed clips by the gradient norm of stage 0 alone
            setattr(parameter, "model_parallel", True)  # noqa: B010 - not an attribute that tensors have

    def begin(self) -> None:
        """Begins to count: tokens without padding, and by micro-batch the share of positions that are scored. Both may
        be on the device, for the later stages see the ids only there."""
        self.tokens: int | torch.Tensor = 0
        self.shares: float | torch.Tensor = 0.0

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """ids (B, T) on the first stage, `with_ids` behind it → `with_ids`, or the loss at the end.

        Among the ids padding is marked as in packing.py. A loss of an evaluation is times the share of positions that
        are scored, as DeepSpeed takes the mean of micro-batches.
        """
        hidden, rows = parted(inputs) if inputs.is_floating_point() else (None, inputs)
        told = inputs_of(rows) if self.pads else {"input_ids": rows}
        ids, labels = told.pop("input_ids"), told.pop("labels", None)
        documents = None if self.return_logits else self.documents  # as in a Block
        told = documents.inputs(self.part.base(), ids, told) if documents else told
        leaving, normed = self.part(hidden, input_ids=ids, **told)
        labels = documents.labels(ids, labels) if documents else labels
        share = 1.0 if self.training or labels is None else scored_share(labels)
        self.tokens = self.tokens + ((rows >= 0).sum() if self.pads else rows.numel())
        self.shares = self.shares + share
        if not self.part.is_last:
            return with_ids(leaving, rows)
        if self.return_logits:
            return head_logits(self.part, normed, ids)
        return head_loss(self.part, normed, ids, labels) * share


class BackpropEngine:
    """The stock pipeline behind LocalEngine's interface. Every rank calls every method."""

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
        return next(m for m in module.modules() if isinstance(m, PipeSlice))

    def trace(self, tracer: Tracer) -> None:
        instruction_map: Any = tracer.wrap(self._engine._INSTRUCTION_MAP)
        self._engine._INSTRUCTION_MAP = instruction_map

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
        share = float(self.part.shares) / micro_batches
        # DeepSpeed's mean is over the replicas, too; each divides by its own share, for which it is weighted
        return EvalResult(loss.reshape(1).float() / (share or 1.0), share, int(self.part.tokens))

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
                assert packet.input_ids is not None
                rows = marked(packet.input_ids, packet.attention_mask)
            yield rows, nothing
            index += 1


def make_backprop_engine(
    config: RunConfig,
    model_config: PretrainedConfig,
    anatomy: Anatomy,
    partition: Partition,
    settings: dict[str, Any],
    load: Callable[[int, int, int], Packet] | None,
    documents: DocumentMask | None = None,
) -> BackpropEngine:
    """Every rank must call; only this stage's slice is built."""
    specs = [LayerSpec(PipeSlice, config, model_config, anatomy, span, documents) for span in partition.blocks]
    with contextlib.redirect_stdout(io.StringIO()):  # it prints its topology
        module = PipelineModule(specs, num_stages=partition.num_stages, partition_method="uniform", seed_layers=False)
    buffers = {name: buffer.clone() for name, buffer in module.named_buffers()}
    arguments = engine_arguments(config, module, settings)
    mpu: Any = module.mpu()
    engine = PipelineEngine(config_class=DeepSpeedConfig(settings, mpu), mpu=mpu, **arguments)
    restore_buffers(module, buffers)
    undo_dummy_step(engine)
    return BackpropEngine(engine, load, config.train.seed)
