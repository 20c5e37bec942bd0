"""torchrun's agent over ranks that are forks of it: python -m tests.agent RANKS RESTARTS SCRIPT_FLAG...

It imports once what every rank would, so that a rank's life begins at once. All else is torchrun's: the rendezvous, the
ranks' environment, and that all are started again when one has died.
"""

from __future__ import annotations

import importlib
import sys
import uuid
from contextlib import suppress

from tests import imports, paced
from tests.ranks import PRELOAD


def rank(*arguments: str) -> None:
    if status := paced.main(list(arguments)):
        sys.exit(status)


def main(arguments: list[str]) -> int:
    for name in PRELOAD:
        with suppress(ImportError):  # of modules that tests alone have on their path
            importlib.import_module(name)
    imports.are_done()
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    num_ranks, restarts, *flags = arguments
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=int(num_ranks),
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="127.0.0.1:0",
        local_addr="127.0.0.1",
        max_restarts=int(restarts),
        start_method="fork",
    )
    try:
        elastic_launch(config, rank)(*flags)
    except ChildFailedError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
