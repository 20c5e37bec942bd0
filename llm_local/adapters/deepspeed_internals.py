"""What DeepSpeed keeps to itself and the library relies on, a function for each need. USED: the names, by module."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from deepspeed import comm
from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.runtime.fp16.fused_optimizer import FP16_Optimizer
from deepspeed.runtime.fp16.unfused_optimizer import FP16_UnfusedOptimizer
from deepspeed.utils.mixed_precision_linkage import link_hp_params

USED = {
    "deepspeed.ops": ("__compatible_ops__",),
    "deepspeed.runtime.engine": ("_take_model_step", "_global_grad_norm", "_configure_bf16_optimizer"),
    "deepspeed.runtime.pipe.engine": ("_INSTRUCTION_MAP",),
    "deepspeed.runtime.base_optimizer": ("clear_backward_seen_flag",),
    "deepspeed.runtime.zero.partition_parameters": ("ds_id", "ds_numel", "ds_tensor", "ds_secondary_tensor"),
    "deepspeed.runtime.zero.stage3": (
        "grad_position",
        "get_param_id",
        "fp32_partitioned_groups_flat",
        "sub_group_to_group_id",
    ),
    "deepspeed.runtime.zero.stage_1_and_2": (
        "single_partition_of_fp32_groups",
        "params_in_partition",
        "bit16_groups",
        "partition_size",
        "round_robin_gradients",
        "round_robin_bit16_groups",
        "round_robin_bit16_offsets",
        "real_dp_process_group",
        "averaged_gradients",
        "offload_gradient_dict",
        "cpu_offload",
    ),
    "deepspeed.runtime.bf16_optimizer": ("fp32_groups_flat_partition",),
    "deepspeed.runtime.fp16.fused_optimizer": ("fp16_groups", "fp32_groups_flat"),
    "deepspeed.runtime.fp16.unfused_optimizer": ("fp16_groups", "fp32_groups", "refresh_fp32_params"),
    "deepspeed.utils.mixed_precision_linkage": ("_hp_mapping", "link_hp_params"),
    "deepspeed.utils.tensor_fragment": ("lp_fragment_address", "hp_fragment_address", "param_group_index"),
}


@dataclass(frozen=True)
class Master:
    """Where the optimizer's copy of `numel` elements of a parameter, from `start` on, lies: in `holder` from `offset`
    on."""

    holder: torch.Tensor
    offset: int
    start: int
    numel: int


class HookedEngine(DeepSpeedEngine):
    """DeepSpeedEngine with a method before each optimizer step. deepspeed/runtime/engine.py"""

    def before_step(self) -> None:
        """Once a step, when its gradients are there."""

    def keep_grad_norm(self, norm: torch.Tensor) -> None:
        """Has get_global_grad_norm return it, where DeepSpeed computes none itself."""
        self._global_grad_norm = norm

    def _take_model_step(self, lr_kwargs: Any) -> None:
        self.before_step()
        super()._take_model_step(lr_kwargs)


class EngineWithoutOptimizer(DeepSpeedEngine):
    """DeepSpeedEngine around a module that nothing trains. In bf16 DeepSpeed would keep a float32 copy of it all the
    same. deepspeed/runtime/engine.py"""

    def _configure_bf16_optimizer(self, optimizer: Any) -> Any:
        assert optimizer is None


def begin_another_backward(optimizer: Any) -> None:
    """Lets a ZeRO optimizer take the next backward pass for one of the same step.
    deepspeed/runtime/base_optimizer.py"""
    optimizer.clear_backward_seen_flag()


def instructions_of(engine: Any) -> Any:
    """What a PipelineEngine does for each instruction. deepspeed/runtime/pipe/engine.py"""
    return engine._INSTRUCTION_MAP


def set_instructions(engine: Any, instructions: Any) -> None:
    """The inverse of `instructions_of`."""
    engine._INSTRUCTION_MAP = instructions


def build_no_operators(names: Iterable[str]) -> None:
    """Has DeepSpeed believe that it cannot build these, and ask about no other: that runs a compiler for each.
    deepspeed/ops/__init__.py"""
    import deepspeed.ops

    operators: Any = deepspeed.ops
    operators.__compatible_ops__ = dict.fromkeys(names, False)


def base_optimizer(optimizer: Any) -> Any:
    """The torch optimizer that DeepSpeed wraps."""
    return getattr(optimizer, "optimizer", optimizer)


def holders_of_group(optimizer: Any, number: int) -> list[torch.Tensor]:
    """The tensors that the state of a parameter group belongs to. ZeRO-3 fills in a group's own in its step.
    deepspeed/runtime/zero/stage3.py"""
    if not hasattr(optimizer, "sub_group_to_group_id"):
        return base_optimizer(optimizer).param_groups[number]["params"]
    subgroups = optimizer.sub_group_to_group_id.items()
    return [optimizer.fp32_partitioned_groups_flat[sub] for sub, owner in subgroups if owner == number]


def is_partitioned(tensor: torch.Tensor) -> bool:
    """Whether ZeRO-3 shards it. deepspeed/runtime/zero/partition_parameters.py"""
    return hasattr(tensor, "ds_id")


def is_linked(parameter: torch.Tensor) -> bool:
    """Whether the parameter knows of its copy in a flat partition. deepspeed/utils/mixed_precision_linkage.py"""
    return hasattr(parameter, "_hp_mapping")


def whole_numel(parameter: Any) -> int:
    """Elements of a parameter under ZeRO-3. deepspeed/runtime/zero/partition_parameters.py"""
    return parameter.ds_numel


def partition_of(parameter: Any) -> torch.Tensor:
    """This rank's part of a parameter under ZeRO-3, flat and padded. deepspeed/runtime/zero/partition_parameters.py"""
    return parameter.ds_tensor.detach().view(-1).narrow(0, 0, parameter.ds_tensor.ds_numel)


def forget_second_copies(engine: DeepSpeedEngine) -> None:
    """Those of zero_hpz_partition_size. deepspeed/runtime/zero/partition_parameters.py"""
    module: Any = engine.module
    for parameter in module.parameters():
        if getattr(parameter, "ds_secondary_tensor", None) is not None:
            parameter.ds_secondary_tensor = None


def master_of_partition(optimizer: Any, parameter: Any) -> tuple[torch.Tensor, int]:
    """Under ZeRO-3: the holder of this rank's part, and where it begins there. deepspeed/runtime/zero/stage3.py"""
    group, offset, _ = optimizer.grad_position[optimizer.get_param_id(parameter)]
    return optimizer.fp32_partitioned_groups_flat[group], offset


def master_in_flat_partition(optimizer: Any, parameter: Any) -> Master | None:
    """Under ZeRO 1 and 2, and of DeepSpeed's BF16_Optimizer; None where other ranks have all of it.
    deepspeed/utils/tensor_fragment.py, runtime/zero/stage_1_and_2.py, runtime/bf16_optimizer.py"""
    mapping = parameter._hp_mapping
    if mapping is None:
        return None
    groups = getattr(optimizer, "single_partition_of_fp32_groups", None) or optimizer.fp32_groups_flat_partition
    there = mapping.hp_fragment_address
    start = mapping.lp_fragment_address.start
    return Master(groups[mapping.param_group_index], there.start, start, there.numel)


def momentum_in_partition(optimizer: Any, parameter: Any) -> tuple[int, int] | None:
    """Of a parameter that Muon trains under ZeRO 1 and 2 and this rank has a part of: where its momentum begins in that
    of its group, and the length of that. deepspeed/runtime/zero/stage_1_and_2.py"""
    if not getattr(parameter, "use_muon", False) or getattr(optimizer, "cpu_offload", True):
        return None
    ours, offset = optimizer.params_in_partition[parameter._hp_mapping.param_group_index], 0
    for each in ours:
        if each is parameter:
            return offset, sum(one.numel() for one in ours)
        offset += each.numel()
    raise AssertionError("a parameter with a master is in the partition")


def master_without_zero(optimizer: Any, parameter: torch.Tensor) -> tuple[torch.Tensor, int]:
    """Without ZeRO: the parameter itself, or its float32 copy, and where it begins in a flat one of its group.
    deepspeed/runtime/fp16/fused_optimizer.py, unfused_optimizer.py"""
    if isinstance(optimizer, (FP16_UnfusedOptimizer, FP16_Optimizer)):
        for number, group in enumerate(optimizer.fp16_groups):
            offset = 0
            for index, candidate in enumerate(group):
                if candidate is parameter:
                    if isinstance(optimizer, FP16_UnfusedOptimizer):
                        return optimizer.fp32_groups[number][index], 0
                    return optimizer.fp32_groups_flat[number], offset
                offset += candidate.numel()
    return parameter, 0


def undo_dummy_step(engine: DeepSpeedEngine) -> None:
    """bf16 without ZeRO: DeepSpeed allocates Adam's state by a step on zero gradients, which counts as a step and
    applies weight decay. Start from where the weights are, with no step done.
    deepspeed/runtime/fp16/fused_optimizer.py, unfused_optimizer.py"""
    if isinstance(engine.optimizer, (FP16_UnfusedOptimizer, FP16_Optimizer)):
        engine.optimizer.refresh_fp32_params()
        engine.optimizer.optimizer.state.clear()


def link_as_laid_out(engine: DeepSpeedEngine) -> None:
    """DeepSpeed looks for a weight's float32 copy in the model's order, also where round_robin_gradients has laid the
    copies out in another. deepspeed/runtime/zero/stage_1_and_2.py"""
    zero: Any = engine.optimizer
    if not getattr(zero, "round_robin_gradients", False):
        return
    for number, (group, size) in enumerate(zip(zero.bit16_groups, zero.partition_size, strict=True)):
        ordered = zip(zero.round_robin_bit16_groups[number], zero.round_robin_bit16_offsets[number], strict=True)
        offsets = {id(parameter): offset for parameter, offset in ordered}
        replicas = zero.real_dp_process_group[number]
        link_hp_params(
            lp_param_list=group,
            flat_hp_partition=zero.single_partition_of_fp32_groups[number],
            gradient_dict=zero.averaged_gradients,
            offload_gradient_dict=zero.offload_gradient_dict,
            use_offload=zero.cpu_offload,
            param_group_index=number,
            partition_start=size * comm.get_rank(replicas),
            partition_size=size,
            dp_group=replicas,
            param_offsets=[offsets[id(parameter)] for parameter in group],
        )
