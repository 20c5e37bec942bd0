"""What a method of training is: a file of this package each, and whatever else was registered."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import ClassVar

from llm_local.flags import LocalArguments
from llm_local.methods.final_steps import GlobalSchedule
from llm_local.methods.schedule import GRADIENT, SOFT_TARGETS, LocalSchedule, Schedule
from llm_local.methods.soft_targets import MOST_ZERO, DistillationSchedule, distillation_problems
from llm_local.registry import METHODS

PLAIN_ZERO = 3  # DeepSpeed has no more


class Method:
    """How a model is cut into blocks, what trains them, and what crosses a boundary; as it stands, blocks of so many
    layers with a loss each, and nothing comes back.

    name: what --method calls it; `register_method` gives it. has_local_losses: each block has a head and a loss of its
    own; otherwise the model has one of each. is_cut_by_hand: the flags say how long blocks are. own_schedule: of a step
    that nothing is combined with. is_delayed: gradients are those of the weights of one step before.
    """

    name = ""
    has_local_losses: ClassVar[bool] = True
    is_cut_by_hand: ClassVar[bool] = True
    own_schedule: ClassVar[type[Schedule]] = LocalSchedule
    is_delayed: ClassVar[bool] = False

    def block_layers(self, local: LocalArguments) -> int | None:
        """Layers of a block, or of a window; None: each stage is one block."""
        return local.layers_per_block

    def window_stride(self, local: LocalArguments) -> int | None:
        """Layers from window to window; None: blocks do not overlap."""
        return None

    def block_flags(self, layers: int) -> dict[str, int]:
        """The flags that make blocks of so many layers, in a study."""
        return {"layers_per_block": layers} if self.is_cut_by_hand else {}

    def is_pipelined(self, local: LocalArguments) -> bool:
        """Whether DeepSpeed's own pipeline trains."""
        return False

    def schedule(self, local: LocalArguments, heads_alone: bool = False) -> type[Schedule]:
        """Of a step before the final ones; heads_alone: in which heads warm up."""
        return DistillationSchedule if local.distillation_weight > 0 else self.own_schedule

    def schedule_at(self, local: LocalArguments, max_steps: int, step: int) -> Callable[..., Schedule]:
        """Of one step, to be called as a Schedule is made."""
        if step > max_steps - local.final_backprop_steps:
            return GlobalSchedule
        alone = step <= local.head_warmup_steps
        return partial(self.schedule(local, alone), heads_alone=alone)

    def crosses_back(self, local: LocalArguments) -> str | None:
        """What comes back over a boundary in some step: GRADIENT, SOFT_TARGETS, or nothing."""
        return self.schedule(local).back or (GRADIENT if local.final_backprop_steps > 0 else None)

    def back_dtype(self, local: LocalArguments, precision: str, wire_dtype: str) -> str | None:
        """The wire's dtype of that, of a run of that precision."""
        # a gradient's few large numbers would cost the others their digits; token numbers are among the soft targets
        gradient = precision if wire_dtype in ("int8", "int4") else wire_dtype
        gradient = "fp32" if gradient == "fp16" else gradient  # which loses small ones
        return {None: None, GRADIENT: gradient, SOFT_TARGETS: "fp32"}[self.crosses_back(local)]

    def problems(self, local: LocalArguments) -> list[str]:
        """What is wrong with the flags for this method."""
        problems = distillation_problems(local)
        if not self.is_cut_by_hand and local.layers_per_block not in (None, 1):
            takers = ", ".join(name for name, method in METHODS.items() if method.is_cut_by_hand)
            problems.append(f"layers_per_block={local.layers_per_block} is for method={takers}, not {self.name}")
        if local.delay_correction and not self.is_delayed:
            takers = ", ".join(name for name, method in METHODS.items() if method.is_delayed)
            problems.append(f"delay_correction=True is for method={takers}, not {self.name}; leave it out")
        if local.block_stride is not None and self.window_stride(local) is None:
            takers = ", ".join(name for name, method in METHODS.items() if method.window_stride(local))
            problems.append(f"block_stride={local.block_stride} is for method={takers}, not {self.name}")
        return problems

    def zero_problems(self, local: LocalArguments, stage: int, offloads: bool = False) -> list[str]:
        """What is wrong with the ZeRO stage; offloads: the optimizer's states are in host memory."""
        if local.distillation_weight and stage > MOST_ZERO:
            return [
                f"ZeRO stage {stage} does not work with distillation_weight, which reads a head outside its forward "
                "pass; use 0, 1 or 2"
            ]
        return []

    def most_zero(self, local: LocalArguments) -> int:
        """The highest ZeRO stage that works."""
        return max(stage for stage in range(PLAIN_ZERO + 1) if not self.zero_problems(local, stage))

    def router_problems(self, local: LocalArguments) -> list[str]:
        """Why the router loss of a mixture of experts cannot be had, behind its flag's name."""
        return []

    def describe(self, num_blocks: int) -> str:
        """How a model was trained, for its card."""
        return (
            f"trained by local parallelism (Laskin et al. 2020, arXiv 2012.03837): {num_blocks} blocks of layers with "
            f"a loss each, and no gradient between them"
        )


def register_method(name: str, method: Method) -> None:
    """Lets --method name it. Every rank must call, before its flags are checked. Raises ValueError for a name that
    is taken."""
    METHODS.add(name, method)
    method.name = name


def local_methods() -> list[str]:
    """Names of those whose blocks have losses of their own."""
    return [name for name, method in METHODS.items() if method.has_local_losses]


def local_schedules() -> dict[str, type[Schedule]]:
    """Those that local methods follow before the final steps, by name."""
    own = [METHODS[name].own_schedule for name in local_methods()]
    return {kind.name: kind for kind in (*own, DistillationSchedule)}
