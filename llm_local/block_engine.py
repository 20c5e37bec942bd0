"""One DeepSpeed engine around one block, and the optimizer and scheduler that the flags name.

A block has its own loss, so it has its own optimizer, its own gradient norm to clip and its own checkpoint: the same
blocks train alike wherever they run.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from deepspeed import set_optimizer_flags
from deepspeed.runtime import lr_schedules
from deepspeed.runtime.config import MUON_OPTIMIZER, DeepSpeedConfig
from deepspeed.runtime.engine import DeepSpeedEngine
from torch.optim import lr_scheduler
from torch.optim.lr_scheduler import LambdaLR
from transformers import get_scheduler
from transformers.trainer_pt_utils import get_parameter_names

from llm_local.adapters.deepspeed_internals import (
    EngineWithoutOptimizer,
    HookedEngine,
    base_optimizer,
    begin_another_backward,
    holders_of_group,
    link_as_laid_out,
    undo_dummy_step,
)
from llm_local.adapters.torch_internals import buffers_of
from llm_local.config import Config
from llm_local.ds_config import SEQUENCE_PARALLEL, fit_bucket
from llm_local.model.block import Block
from llm_local.model.tensor_parallel import part_of
from llm_local.world import TensorRanks

WAITS = "waits"  # key of the parameter groups that are not trained while heads train alone


class BlockEngine(HookedEngine):
    """An ordinary DeepSpeed engine that also knows the gradient norm where DeepSpeed keeps none (fp32, ZeRO 0).

    waiting_steps: first steps in which only the block's head is trained. ranks: between which the block is divided.
    """

    waiting_steps = 0
    ranks: TensorRanks | None = None

    def of_step(self, step: int) -> Any:
        """What computes in that step, called as a Block is."""
        return self

    def backward(self, loss: torch.Tensor, retain_graph: bool = False, scale_wrt_gas: bool = True) -> Any:
        """DeepSpeedEngine.backward, also twice in a row: ZeRO tells a step's passes apart by forward passes between
        them, and would take the second for the first."""
        if self.zero_optimization():
            begin_another_backward(self.optimizer)
        return super().backward(loss, retain_graph=retain_graph, scale_wrt_gas=scale_wrt_gas)

    def before_step(self) -> None:
        if not (self.fp16_enabled() or self.bfloat16_enabled() or self.zero_optimization()):
            self.keep_grad_norm(self._norm().float())
        if self.waiting_steps and self.lr_scheduler is not None:
            scheduler: Any = self.lr_scheduler
            if scheduler.last_epoch == self.waiting_steps:
                _forget_waiting(self)

    def _norm(self) -> torch.Tensor:
        """Of the gradients, each part of a parameter counted once, float64."""
        trained = [p for p in block_of(self).parameters() if p.grad is not None]
        if self.ranks is None:
            return _norm_of(trained)
        parts = [p for p in trained if part_of(p) is not None]
        whole = [p for p in trained if part_of(p) is None]
        return torch.sqrt(_norm_of(whole) ** 2 + self.ranks.sum(_norm_of(parts) ** 2))

    def clip_fp32_gradients(self) -> None:
        """By the norm that is known already."""
        norm: Any = self.get_global_grad_norm()
        torch.nn.utils.clip_grads_with_norm_(block_of(self).parameters(), self.gradient_clipping(), norm)


def _norm_of(parameters: Sequence[torch.nn.Parameter]) -> torch.Tensor:
    """Of their gradients, float64."""
    grads = [p.grad for p in parameters if p.grad is not None]
    # row by row: on a CPU torch's norm of a million float32 numbers is off by 1e-5, which ZeRO's is not
    rows = [torch.linalg.vector_norm(grad, dim=-1).reshape(-1) for grad in grads]
    return torch.linalg.vector_norm(torch.cat(rows), dtype=torch.float64)


class FrozenEngine(EngineWithoutOptimizer):
    """An engine around a block that is not trained: no gradient, no optimizer, and of ZeRO what shards the weights.

    Its schedule goes on with the others', so that a run may train the block later.
    """

    def of_step(self, step: int) -> Any:
        return self

    def backward(self, loss: torch.Tensor, retain_graph: bool = False, scale_wrt_gas: bool = True) -> None:
        """Nothing: a schedule may not know of frozen blocks."""

    def step(self, lr_kwargs: Any = None) -> None:
        count_step(self)

    def get_lr(self) -> list[float]:
        scheduler: Any = self.lr_scheduler
        return scheduler.get_last_lr()

    def get_global_grad_norm(self) -> float:
        return 0.0


def block_of(engine: DeepSpeedEngine) -> Block:
    """What the engine trains."""
    module: Any = engine.module
    return module


def count_step(engine: DeepSpeedEngine) -> None:
    """A step in which nothing is trained: the learning rate's schedule goes on."""
    scheduler: Any = engine.lr_scheduler
    scheduler.step()
    engine.global_steps += 1
    engine.micro_steps += engine.gradient_accumulation_steps()
    engine.global_samples += engine.train_batch_size()


def _forget_waiting(engine: DeepSpeedEngine) -> None:
    """Lets Adam begin with the layers that have waited: steps on no gradient count in its bias corrections, and the
    first updates would be several times too large."""
    inner = base_optimizer(engine.optimizer)
    for number, group in enumerate(inner.param_groups):
        for holder in holders_of_group(engine.optimizer, number) if group.get(WAITS) else ():
            inner.state.pop(holder, None)


def make_optimizer(config: Config) -> Callable[[Any], torch.optim.Optimizer]:
    """transformers' default: torch's fused AdamW, which resumes bit for bit and needs no compiler."""

    def make(groups: Any) -> torch.optim.Optimizer:
        train = config.train
        betas = (train.adam_beta1, train.adam_beta2)
        return torch.optim.AdamW(groups, lr=train.learning_rate, betas=betas, eps=train.adam_epsilon, fused=True)

    return make


def parameter_groups(config: Config, module: torch.nn.Module, waiting: Collection[str] = ()) -> list[dict[str, Any]]:
    """Weight decay on all but biases and norms, as transformers' Trainer has it, and the numbers of a block's own.

    waiting: names of parameters that are not trained at first. They are in groups of their own, behind the others.
    """
    forbidden = [r"bias", r"layernorm", r"rmsnorm", r"(?:^|\.)norm(?:$|\.)", r"_norm(?:$|\.)"]
    forbidden += [r"^transform\.", r"^feature_scale$"]
    decayed = set(get_parameter_names(module, [torch.nn.LayerNorm], forbidden))
    trained = [(name, p) for name, p in module.named_parameters() if p.requires_grad]
    groups = []
    for waits in (False, True):
        some = [(name, p) for name, p in trained if (name in waiting) == waits]
        marks = {WAITS: True} if waits else {}
        decay = config.train.weight_decay
        groups.append({"params": [p for n, p in some if n in decayed], "weight_decay": decay, **marks})
        groups.append({"params": [p for n, p in some if n not in decayed], "weight_decay": 0.0, **marks})
    return [group for group in groups if group["params"]]


def waiting_parameters(config: Config, block: Block) -> set[str]:
    """Names of those that wait while heads train alone: all of the body, if there is a block behind this one."""
    if not config.local.head_warmup_steps or block.body.is_last:
        return set()
    # what head and body share, tied embeddings, is the body's
    return {name for name, _ in block.named_parameters() if name.startswith("body_model.")}


def make_scheduler(config: Config) -> Callable[[torch.optim.Optimizer], Any]:
    """The learning rate of the flags; that of what waits is 0 as long as it does, and then what it is for all."""
    train, steps = config.train, config.local.head_warmup_steps

    def make(optimizer: torch.optim.Optimizer) -> Any:
        scheduler: Any = get_scheduler(
            train.lr_scheduler_type, optimizer, num_warmup_steps=config.warmup_steps, num_training_steps=train.max_steps
        )
        if not any(group.get(WAITS) for group in optimizer.param_groups):
            return scheduler

        def after(step: int, factor: Callable[[int], float]) -> float:
            return factor(step) if step >= steps else 0.0

        groups = zip(optimizer.param_groups, scheduler.lr_lambdas, strict=True)
        factors = [partial(after, factor=factor) if group.get(WAITS) else factor for group, factor in groups]
        return LambdaLR(optimizer, factors)

    return make


def engine_arguments(
    config: Config, module: torch.nn.Module, settings: dict[str, Any], waiting: Collection[str] = ()
) -> dict[str, Any]:
    """What every DeepSpeed engine gets; an optimizer or scheduler in the JSON wins over the flags' own."""
    own_optimizer = "optimizer" not in settings
    _tag_for_muon(settings, module)
    trained = [p for p in module.parameters() if p.requires_grad]
    parameters = parameter_groups(config, module, waiting) if own_optimizer else trained
    return {
        "args": None,
        "model": module,
        "model_parameters": parameters,
        "optimizer": make_optimizer(config) if own_optimizer else None,
        "lr_scheduler": _named_scheduler(settings) if "scheduler" in settings else make_scheduler(config),
        "config": settings,
        "dist_init_required": False,
    }


def _tag_for_muon(settings: dict[str, Any], module: torch.nn.Module) -> None:
    """What deepspeed.initialize does, and embeddings of whatever name: Muon's are the matrices, Adam's the others."""
    optimizer = settings.get("optimizer", {})
    name = optimizer.get("type", "").lower()
    kind: Any = SimpleNamespace(optimizer_name=name, optimizer_params=optimizer.get("params"))
    set_optimizer_flags(kind, module)
    for part in module.modules():
        if name == MUON_OPTIMIZER and isinstance(part, torch.nn.Embedding):
            setattr(part.weight, "use_muon", False)  # noqa: B010 - not an attribute that tensors have


def _named_scheduler(settings: dict[str, Any]) -> Callable[[torch.optim.Optimizer], Any] | None:
    """The JSON's, where it is one of torch's: DeepSpeed would make it for ZeRO's optimizer, which torch refuses."""
    name = settings["scheduler"]["type"]
    if hasattr(lr_schedules, name):
        return None
    return partial(getattr(lr_scheduler, name), **settings["scheduler"].get("params", {}))


def make_block_engine(
    config: Config,
    block: Block,
    settings: dict[str, Any],
    ranks: TensorRanks | None = None,
    kind: type[BlockEngine] = BlockEngine,
) -> BlockEngine | FrozenEngine:
    """A DeepSpeed engine around one block. Every rank of the stage must call; ranks: between which it is divided."""
    if block.is_frozen:
        return _frozen_engine(config, block, settings)
    settings = fit_bucket(settings, sum(p.numel() for p in block.parameters() if p.requires_grad))
    if (size := config.local.sequence_parallel_size) > 1:
        settings[SEQUENCE_PARALLEL] = size  # by which it counts rows; it reduces over all ranks alike
    buffers = {name: buffer.clone() for name, buffer in block.named_buffers()}
    waiting = waiting_parameters(config, block)
    arguments = engine_arguments(config, block, settings, waiting)
    engine = kind(config_class=DeepSpeedConfig(settings, ranks), mpu=ranks, **arguments)
    engine.ranks = ranks
    engine.waiting_steps = config.local.head_warmup_steps if waiting else 0
    if engine.dp_world_size == 1 and not engine.zero_optimization():
        engine.enable_backward_allreduce = False  # which copies all gradients to a buffer and back
    restore_buffers(block, buffers)
    undo_dummy_step(engine)
    link_as_laid_out(engine)
    return engine


def _frozen_engine(config: Config, block: Block, settings: dict[str, Any]) -> FrozenEngine:
    """DeepSpeed refuses an optimizer without parameters, and ZeRO 1 and 2 without an optimizer."""
    zero = settings["zero_optimization"]
    left = {name: value for name, value in settings.items() if name not in ("optimizer", "scheduler")}
    left["zero_optimization"] = zero if zero.get("stage") == 3 else {"stage": 0}
    buffers = {name: buffer.clone() for name, buffer in block.named_buffers()}
    engine = FrozenEngine(None, block, config=left, config_class=DeepSpeedConfig(left), dist_init_required=False)
    restore_buffers(block, buffers)
    rate = torch.optim.SGD([torch.zeros(1)], lr=config.train.learning_rate)
    engine.lr_scheduler = make_scheduler(config)(rate)
    rate.step()  # torch warns of a schedule whose optimizer never steps
    return engine


def restore_buffers(module: torch.nn.Module, originals: dict[str, torch.Tensor]) -> None:
    """DeepSpeed casts buffers with the weights; rotary frequencies in bf16 would be another model's."""
    for name, original in originals.items():
        owner, _, leaf = name.rpartition(".")
        buffers = buffers_of(module.get_submodule(owner))
        cast = buffers[leaf]
        if cast is not None and cast.dtype != original.dtype:
            buffers[leaf] = original.to(cast.device)
