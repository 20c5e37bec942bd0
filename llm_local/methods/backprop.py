"""The baseline: one loss for all layers; on several stages DeepSpeed's own pipeline trains (backprop.py)."""

from __future__ import annotations

from llm_local.flags import FLAGS, LocalArguments
from llm_local.methods.method import Method, register_method


class Backprop(Method):
    """The whole model is one block."""

    has_local_losses = False
    is_cut_by_hand = False

    def block_layers(self, local: LocalArguments) -> int | None:
        return None

    def is_pipelined(self, local: LocalArguments) -> bool:
        return local.num_stages > 1

    def problems(self, local: LocalArguments) -> list[str]:
        problems, steps, defaults = super().problems(local), local.final_backprop_steps, LocalArguments()
        if steps > 0:
            problems.append(f"final_backprop_steps={steps}: every step of method={self.name} is one; leave it out")
        many = [name for name, flag in FLAGS.items() if flag.of_local_heads]
        if given := [name for name in many if getattr(local, name) != getattr(defaults, name)]:
            problems.append(f"method={self.name} has one head, the model's own; leave out {', '.join(given)}")
        return problems

    def zero_problems(self, local: LocalArguments, stage: int, offloads: bool = False) -> list[str]:
        if self.is_pipelined(local) and stage > 1:
            return [f"ZeRO stage {stage} does not work with method=backprop (DeepSpeed's pipeline); use 0 or 1"]
        return []

    def router_problems(self, local: LocalArguments) -> list[str]:
        if not self.is_pipelined(local):
            return []
        return [
            ": with method=backprop on several stages the router loss is one number of all their layers, which no "
            "stage has; use num_stages=1, or set it to false"
        ]

    def describe(self, num_blocks: int) -> str:
        return "trained by backpropagation through all of its layers"


register_method("backprop", Backprop())
