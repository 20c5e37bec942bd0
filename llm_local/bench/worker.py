"""One rank of a benchmark: trains by one of the systems that are compared, and measures what it was told to.

    torchrun --nproc_per_node 2 -m llm_local.bench.worker '{"measure": "rate", "system": "local", ...}'

Every system trains the same slices of the same model on the same rows: local learning and DeepSpeed's PipelineEngine as
pretrain.py starts them, and those of torch.distributed.pipelining with the schedules of that library.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

from llm_local.bench.task import Task, wait_for_turn
from llm_local.imports import quick_imports
from llm_local.screen import quiet_libraries


def main(text: str) -> None:
    wait_for_turn(exclusive=False)
    with quick_imports():
        import torch

        from llm_local.bench.measures import MEASURES
    task = Task(**json.loads(text))
    rank = int(os.environ["RANK"])
    if not torch.accelerator.is_available():
        cores = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, {cores[rank % len(cores)]})  # one core each, also for the threads of gloo
    quiet_libraries()
    result = MEASURES[task.measure](task)
    Path(task.results, f"rank-{rank}.json").write_text(json.dumps(result))
    os._exit(0)  # process groups of peers need not be taken down in order


if __name__ == "__main__":
    main(sys.argv[1])
