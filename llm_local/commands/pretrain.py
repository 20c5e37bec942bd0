"""Pretrains a language model on pipeline stages: one rank of a run.

torchrun --nproc_per_node 2 -m llm_local.cli pretrain CONFIG.yaml [--name value ...]     (also deepspeed, accelerate)
"""

from __future__ import annotations

import os

from llm_local.ancestors import end_with_launcher
from llm_local.imports import quick_imports


def main(arguments: list[str]) -> int:
    """As `train.main`, which is imported late: from here on the rank ends with its launcher."""
    end_with_launcher()
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # else a lost store prints 40 lines of C++ frames a call
    from llm_local.device import take_the_cpu_if_alone

    take_the_cpu_if_alone()
    with quick_imports():
        from llm_local import train
    return train.main(arguments)
