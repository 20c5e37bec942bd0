"""Stages in jobs of their own, as `llm-local up` plans them, whose ranks are copies of the fork server: a life takes a
second, where a process that imports all takes seven. What starts a job's ranks again is here, as torchrun's agent does.
"""

from __future__ import annotations

import os
import sys
import threading
from contextlib import redirect_stderr, redirect_stdout
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

from launching import until
from ranks import context, free_port

from llm_local.commands.assemble import main as assemble
from llm_local.commands.up import planned

SECONDS = 240.0
LOOK_SECONDS = 0.2


def _rank(log: Path, environ: dict[str, str], arguments: list[str]) -> None:
    for number in (1, 2):
        os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644), number)
    os.environ.update(environ)
    import torch

    from llm_local.train import main

    torch.set_num_threads(1)
    status = main(arguments)
    sys.stdout.flush()
    os._exit(status)  # as after a script's end, whatever threads are left


class Job:
    """The ranks of one stage."""

    def __init__(self, arguments: list[str], num_ranks: int, log: Path):
        self.is_done = False
        self._arguments, self._num_ranks, self._log, self._num_starts = arguments, num_ranks, log, 0
        self.start()

    def start(self) -> None:
        shared = {"WORLD_SIZE": self._num_ranks, "LOCAL_WORLD_SIZE": self._num_ranks, "MASTER_PORT": free_port()}
        shared |= {"TORCHELASTIC_RESTART_COUNT": self._num_starts, "MASTER_ADDR": "127.0.0.1", "OMP_NUM_THREADS": 1}
        self.ranks = []
        for rank in range(self._num_ranks):
            environ = {name: str(value) for name, value in {**shared, "RANK": rank, "LOCAL_RANK": rank}.items()}
            process = context().Process(target=_rank, args=(self._log, environ, self._arguments), daemon=True)
            process.start()
            self.ranks.append(process)
        self._num_starts += 1

    def look(self) -> None:
        """All ranks are started again when one has ended otherwise than well."""
        codes = [rank.exitcode for rank in self.ranks]
        self.is_done = all(code == 0 for code in codes)
        if any(code not in (None, 0) for code in codes):
            self.kill()
            self.start()

    def kill(self) -> None:
        for rank in self.ranks:
            rank.kill()
        for rank in self.ranks:
            rank.join()


class Lives:
    """All jobs; when the block ends, so do they. At a good end their parts have become OUTPUT/export."""

    def __init__(self, flags: list[str], log: Path):
        self._log, self._is_over = log, threading.Event()
        log.touch()
        plan = planned(flags)
        self._folder, self._jobs = plan.config.output_dir, []
        for command in plan.commands:
            num_ranks = int(command[command.index("--nproc_per_node") + 1])
            self._jobs.append(Job(command[command.index("pretrain") + 1 :], num_ranks, log))
        self._keeper = threading.Thread(target=self._keep, daemon=True)
        self._keeper.start()

    @property
    def text(self) -> str:
        return self._log.read_text(errors="replace")

    def __enter__(self) -> Lives:
        return self

    def __exit__(self, *_: Any) -> None:
        self._is_over.set()
        self._keeper.join()
        for job in self._jobs:
            job.kill()

    def ends_well(self) -> None:
        until(lambda: not self._keeper.is_alive(), SECONDS, lambda: self.text)
        assert all(job.is_done for job in self._jobs), self.text
        parts = [str(self._folder / f"stage-{stage:02d}") for stage in range(len(self._jobs))]
        with self._log.open("a") as log, redirect_stdout(log), redirect_stderr(log):
            status = assemble([*parts, str(self._folder / "export")])
        assert status == 0, self.text

    def _keep(self) -> None:
        while not self._is_over.is_set() and (left := [job for job in self._jobs if not job.is_done]):
            wait([rank.sentinel for job in left for rank in job.ranks if rank.exitcode is None], LOOK_SECONDS)
            for job in left:
                job.look()
