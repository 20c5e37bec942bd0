"""One DeepSpeed engine around one block, and the optimizer and scheduler that the flags name.

A block has its own loss, so it has its own optimizer, its own gradient norm to clip and its own checkpoint: the same
blocks train alike wherever they run.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from deepspeed.runtime.config import DeepSpeedConfig
from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.runtime.fp16.unfused_optimizer import FP16_UnfusedOptimizer
from transformers import get_scheduler
from transformers.trainer_pt_utils import get_parameter_names

from llm_local.config import RunConfig
from llm_local.stage import Block


class BlockEngine(DeepSpeedEngine):
    """An ordinary DeepSpeed engine that also knows the gradient norm where DeepSpeed keeps none (fp32, ZeRO 0)."""

    def backward(self, loss: torch.Tensor, retain_graph: bool = False, scale_wrt_gas: bool = True) -> Any:
        """DeepSpeedEngine.backward, also twice in a row: ZeRO tells a step's passes apart by forward passes between
        them, and would take the second for the first."""
        if self.zero_optimization():
            optimizer: Any = self.optimizer
            optimizer.clear_backward_seen_flag()
        return super().backward(loss, retain_graph=retain_graph, scale_wrt_gas=scale_wrt_gas)

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
    """Weight decay on all but biases and norms, as transformers' Trainer has it, and the numbers of a block's own."""
    forbidden = [r"bias", r"layernorm", r"rmsnorm", r"(?:^|\.)norm(?:$|\.)", r"_norm(?:$|\.)"]
    forbidden += [r"^temperature\.", r"^feature_scale$"]
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
