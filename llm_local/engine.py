"""Drives the blocks of a stage through a schedule: one DeepSpeed engine a block, one instruction at a time.

A block has its own loss, so it has its own optimizer, its own gradient norm to clip and its own checkpoint: the same
blocks train alike wherever they run. Its activations are freed before the next block of the stage runs.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from deepspeed.runtime.config import DeepSpeedConfig
from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.runtime.fp16.unfused_optimizer import FP16_UnfusedOptimizer
from deepspeed.runtime.pipe import schedule as instructions
from transformers import get_scheduler
from transformers.trainer_pt_utils import get_parameter_names

from llm_local.config import RunConfig
from llm_local.links import CHECK, EVAL, TRAIN, Packet, Receiver, Sender
from llm_local.schedule import LocalEvalSchedule, LocalSchedule
from llm_local.stage import Block


class NonFiniteLoss(RuntimeError):
    """A loss that is NaN or infinite: the run stops before it spoils a checkpoint."""


class BlockEngine(DeepSpeedEngine):
    """An ordinary DeepSpeed engine that also knows the gradient norm where DeepSpeed keeps none (fp32, ZeRO 0)."""

    def _take_model_step(self, lr_kwargs: Any) -> None:
        if not (self.fp16_enabled() or self.bfloat16_enabled() or self.zero_optimization()):
            module: Any = self.module
            grads = [p.grad for p in module.parameters() if p.grad is not None]
            self._global_grad_norm = torch.nn.utils.get_total_norm(grads)
        super()._take_model_step(lr_kwargs)


def make_optimizer(config: RunConfig) -> Callable[[Any], torch.optim.Optimizer]:
    """transformers' default: torch's AdamW, which resumes bit for bit and needs no compiler."""

    def make(groups: Any) -> torch.optim.Optimizer:
        train = config.train
        betas = (train.adam_beta1, train.adam_beta2)
        return torch.optim.AdamW(groups, lr=train.learning_rate, betas=betas, eps=train.adam_epsilon)

    return make


def parameter_groups(config: RunConfig, module: torch.nn.Module) -> list[dict[str, Any]]:
    """Weight decay on all but biases and norms, as transformers' Trainer has it."""
    forbidden = [r"bias", r"layernorm", r"rmsnorm", r"(?:^|\.)norm(?:$|\.)", r"_norm(?:$|\.)"]
    decayed = set(get_parameter_names(module, [torch.nn.LayerNorm], forbidden))
    trained = [(name, p) for name, p in module.named_parameters() if p.requires_grad]
    groups = [
        {"params": [p for n, p in trained if n in decayed], "weight_decay": config.train.weight_decay},
        {"params": [p for n, p in trained if n not in decayed], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def make_scheduler(config: RunConfig) -> Callable[[torch.optim.Optimizer], Any]:
    train = config.train
    return lambda optimizer: get_scheduler(
        train.lr_scheduler_type, optimizer, num_warmup_steps=train.warmup_steps, num_training_steps=train.max_steps
    )


def engine_arguments(config: RunConfig, module: torch.nn.Module, settings: dict[str, Any]) -> dict[str, Any]:
    """What every DeepSpeed engine gets; an optimizer or scheduler in the JSON wins over the flags' own."""
    own_optimizer = "optimizer" not in settings
    trained = [p for p in module.parameters() if p.requires_grad]
    parameters = parameter_groups(config, module) if own_optimizer else trained
    return {
        "args": None,
        "model": module,
        "model_parameters": parameters,
        "optimizer": make_optimizer(config) if own_optimizer else None,
        "lr_scheduler": None if "scheduler" in settings else make_scheduler(config),
        "config": settings,
        "dist_init_required": False,
    }


def make_block_engine(config: RunConfig, block: Block, settings: dict[str, Any]) -> BlockEngine:
    """A DeepSpeed engine around one block. Every replica of the stage must call."""
    buffers = {name: buffer.clone() for name, buffer in block.named_buffers()}
    engine = BlockEngine(config_class=DeepSpeedConfig(settings), **engine_arguments(config, block, settings))
    restore_buffers(block, buffers)
    undo_dummy_step(engine)
    return engine


def restore_buffers(module: torch.nn.Module, originals: dict[str, torch.Tensor]) -> None:
    """DeepSpeed casts buffers with the weights; rotary frequencies in bf16 would be another model's."""
    for name, original in originals.items():
        owner, _, leaf = name.rpartition(".")
        buffers = module.get_submodule(owner)._buffers
        cast = buffers[leaf]
        if cast is not None and cast.dtype != original.dtype:
            buffers[leaf] = original.to(cast.device)


def undo_dummy_step(engine: DeepSpeedEngine) -> None:
    """bf16 without ZeRO: DeepSpeed allocates Adam's state by a step on zero gradients, which counts as a step and
    applies weight decay. Start from where the weights are, with no step done."""
    if isinstance(engine.optimizer, FP16_UnfusedOptimizer):
        engine.optimizer.refresh_fp32_params()
        engine.optimizer.optimizer.state.clear()


@dataclass(frozen=True)
class StepResult:
    """losses: (blocks,) float32, means over the step's micro-batches on this replica. lr: the rate that the step used.
    grad_norms: one a block, before clipping; NaN where DeepSpeed computes none."""

    losses: torch.Tensor
    lr: float
    grad_norms: tuple[float, ...]


class LocalEngine:
    """One stage of local training. `load(kind, step, index)` gives stage 0 its micro-batches."""

    def __init__(
        self,
        engines: list[BlockEngine],
        stage: int,
        num_stages: int,
        micro_batches: int,
        load: Callable[[int, int, int], Packet] | None,
        receiver: Receiver | None,
        sender: Sender | None,
    ):
        self.engines = engines
        self.stage = stage
        self.num_stages = num_stages
        self.micro_batches = micro_batches
        self._load = load
        self._receiver = receiver
        self._sender = sender
        self._kind = TRAIN
        self._step = 0
        self._index = 0
        self._packet: Packet | None = None
        self._hidden: torch.Tensor | None = None
        self._loss: torch.Tensor | None = None
        self._sums = torch.zeros(len(engines))
        self._instruction_map: dict[type, Callable[..., None]] = {
            instructions.LoadMicroBatch: self._exec_load,
            instructions.RecvActivation: self._exec_receive,
            instructions.ForwardPass: self._exec_forward,
            instructions.SendActivation: self._exec_send,
            instructions.BackwardPass: self._exec_backward,
            instructions.ReduceGrads: self._exec_reduce,
            instructions.OptimizerStep: self._exec_step,
        }

    def train_batch(self, step: int) -> StepResult:
        """Trains every block on the step's micro-batches. Raises NonFiniteLoss naming stage and step."""
        for engine in self.engines:
            engine.train()
        schedule = LocalSchedule(self.micro_batches, self.num_stages, self.stage, len(self.engines))
        lr = float(self.engines[-1].get_lr()[0])
        losses = self._run(schedule, TRAIN, step, self.micro_batches)
        norms = [engine.get_global_grad_norm() for engine in self.engines]
        return StepResult(losses, lr, tuple(float("nan") if norm is None else float(norm) for norm in norms))

    @torch.no_grad()
    def check_logits(self) -> torch.Tensor:
        """Logits (1, T, V) of the stage's last head on the micro-batch that an export is checked with."""
        for engine in self.engines:
            engine.eval()
        self._kind, self._step, self._index = CHECK, 0, 0
        self._exec_load(0) if self._receiver is None else self._exec_receive(0)
        assert self._packet is not None
        logits = torch.empty(0)
        for engine in self.engines:
            ids = self._packet.input_ids.to(engine.device)
            logits, self._hidden = engine(hidden=self._hidden, input_ids=ids, return_logits=True)
        if self._sender is not None:
            self._exec_send(0)
        return logits

    @torch.no_grad()
    def eval_batch(self, step: int, micro_batches: int) -> torch.Tensor:
        """Mean loss of every block over so many validation micro-batches, (blocks,) float32, with today's weights."""
        for engine in self.engines:
            engine.eval()
        schedule = LocalEvalSchedule(micro_batches, self.num_stages, self.stage, len(self.engines))
        return self._run(schedule, EVAL, step, micro_batches)

    def _run(self, schedule: Iterable[list[Any]], kind: int, step: int, micro_batches: int) -> torch.Tensor:
        self._kind, self._step = kind, step
        self._sums = torch.zeros(len(self.engines), device=self.engines[0].device)
        for self._index, commands in enumerate(schedule):
            for command in commands:
                self._instruction_map[type(command)](**command.kwargs)
        return self._sums / micro_batches

    def _exec_load(self, buffer_id: int) -> None:
        assert self._load is not None, "only the first stage loads"
        self._packet = self._load(self._kind, self._step, self._index)
        self._hidden = None

    def _exec_receive(self, buffer_id: int) -> None:
        assert self._receiver is not None, "the first stage does not receive"
        self._packet = self._receiver.receive(self._kind, self._step, self._index)
        assert self._packet.hidden is not None
        self._hidden = self._packet.hidden.to(self.engines[0].device)

    def _exec_forward(self, buffer_id: int, block: int) -> None:
        assert self._packet is not None
        device = self.engines[0].device
        inputs = {name: tensor.to(device) for name, tensor in self._packet.integer_parts().items()}
        loss, self._hidden = self.engines[block](hidden=self._hidden, **inputs)
        self._loss = loss
        self._sums[block] += loss.detach()

    def _exec_send(self, buffer_id: int) -> None:
        assert self._sender is not None
        assert self._packet is not None
        self._sender.send(dataclasses.replace(self._packet, hidden=self._hidden))

    def _exec_backward(self, buffer_id: int, block: int) -> None:
        self.engines[block].backward(self._loss)
        self._loss = None

    def _exec_reduce(self) -> None:
        """DeepSpeed reduces in backward() (ZeRO 2, 3) or in step() (ZeRO 0, 1): nothing is left to do here."""

    def _exec_step(self) -> None:
        self._check_finite()
        for engine in self.engines:
            engine.step()

    def _check_finite(self) -> None:
        if not bool(torch.isfinite(self._sums).all()):
            block = int((~torch.isfinite(self._sums)).nonzero()[0])
            value = float(self._sums[block])
            raise NonFiniteLoss(f"the loss of stage {self.stage} (its block {block}) is {value} at step {self._step}")
