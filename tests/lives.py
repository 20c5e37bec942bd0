"""Stages in jobs of their own, as `llm-local up` plans them, whose ranks are copies of the fork server: a life takes a
second, where a process that imports all takes seven. What starts a job's ranks again is here, as torchrun's agent does.
"""

from __future__ import annotations

import io
import threading
from contextlib import redirect_stderr, redirect_stdout
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

from launching import Rank, ending, until
from ranks import free_port

from llm_local.commands.assemble import main as assemble
from llm_local.commands.up import planned

SECONDS = 240.0
LOOK_SECONDS = 0.2


class Job:
    """The ranks of one stage."""

    def __init__(self, arguments: list[str], num_ranks: int, folder: Path):
        self.is_done = False
        self._arguments, self._num_ranks, self._folder = arguments, num_ranks, folder
        self._lives: list[list[Rank]] = []
        self.start()

    @property
    def ranks(self) -> list[Rank]:
        return self._lives[-1]

    @property
    def text(self) -> str:
        """What the ranks of all lives have said."""
        return "".join(rank.text for ranks in self._lives for rank in ranks if rank.log.exists())

    def start(self) -> None:
        life, size, port = len(self._lives), self._num_ranks, free_port()
        more = {"LOCAL_WORLD_SIZE": str(size), "TORCHELASTIC_RESTART_COUNT": str(life)}
        logs = [self._folder / f"life-{life}-rank-{n}.txt" for n in range(size)]
        self._lives.append([Rank(n, size, port, self._arguments, log, **more) for n, log in enumerate(logs)])

    def look(self) -> None:
        """All ranks are started again when one has ended otherwise than well."""
        codes = [rank.process.exitcode for rank in self.ranks]
        self.is_done = all(code == 0 for code in codes)
        if any(code not in (None, 0) for code in codes):
            self.kill()
            self.start()

    def kill(self) -> None:
        with ending(self.ranks):
            pass


class Lives:
    """All jobs; when the block ends, so do they. At a good end their parts have become OUTPUT/export."""

    def __init__(self, flags: list[str], logs: Path):
        self._is_over, self._said = threading.Event(), io.StringIO()
        plan = planned(flags)
        self._folder, self._jobs = plan.config.output_dir, []
        for stage, command in enumerate(plan.commands):
            folder = logs / f"stage-{stage}"
            folder.mkdir(parents=True)
            num_ranks = int(command[command.index("--nproc_per_node") + 1])
            self._jobs.append(Job(command[command.index("pretrain") + 1 :], num_ranks, folder))
        self._keeper = threading.Thread(target=self._keep, daemon=True)
        self._keeper.start()

    @property
    def text(self) -> str:
        return "".join(job.text for job in self._jobs) + self._said.getvalue()

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
        with redirect_stdout(self._said), redirect_stderr(self._said):
            status = assemble([*parts, str(self._folder / "export")])
        assert status == 0, self.text

    def _keep(self) -> None:
        while not self._is_over.is_set() and (left := [job for job in self._jobs if not job.is_done]):
            ranks = [rank.process for job in left for rank in job.ranks]
            wait([each.sentinel for each in ranks if each.exitcode is None], LOOK_SECONDS)
            for job in left:
                job.look()
