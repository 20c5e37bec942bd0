"""Each layer a block, trained by its own loss alone."""

from __future__ import annotations

from llm_local.flags import LocalArguments
from llm_local.methods.method import Method, register_method


class Greedy(Method):
    """Blocks of one layer."""

    is_cut_by_hand = False

    def block_layers(self, local: LocalArguments) -> int | None:
        return 1


register_method("greedy", Greedy())
