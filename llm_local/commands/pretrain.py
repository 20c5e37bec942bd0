"""Pretrains a language model on pipeline stages: one rank of a run.

torchrun --nproc_per_node 2 -m llm_local.cli pretrain CONFIG.yaml [--name value ...]     (also deepspeed, accelerate)
"""

from __future__ import annotations

import gc
import os

from llm_local.ancestors import end_with_launcher


def main(arguments: list[str]) -> int:
    """As `train.main`, which is imported late: from here on the rank ends with its launcher."""
    end_with_launcher()
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # else a lost store prints 40 lines of C++ frames a call
    from llm_local.device import take_the_cpu_if_alone

    take_the_cpu_if_alone()
    gc.disable()  # else imports look for garbage in those before them, for a fifth of a rank's start
    from llm_local import train

    gc.freeze()  # nor do collections of the run look there
    gc.enable()
    return train.main(arguments)
