"""Where a job's links stand after a step, which its checkpoint has to hold, and the names of what a job writes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

NOTE = "links.json"  # of a checkpoint's stage
# of the job's folder: its run and its life; what it does; the steps after which it has ended for good; its logs
IDENTITY, STATUS, DONE, LOG, LOG_BACK = "job.json", "status.json", "done", "log", "log-back"
SKIPPED = "skipped"  # of a replica's logs: numbers of packets from which on a step, or an evaluation, was not sent


@dataclass(frozen=True)
class Positions:
    """Packets used and sent, matrices of a shared head that were due, and steps of which the stage before sent nothing,
    all since the run's first step; and whether the stage's exits were evaluated."""

    received: int = 0
    sent: int = 0
    refreshed: int = 0
    evaluated: bool = False
    skipped: int = 0


class Neighbourhood(Protocol):
    """What a checkpoint of a job is to its neighbours."""

    @property
    def run(self) -> str:
        """The run's identity."""
        ...

    def rescue(self) -> Path | None:
        """The checkpoint from which all can be made again that the neighbours may want, should a log be lost."""
        ...

    def persist(self, positions: Positions) -> None:
        """Forces to disk what was sent until there, as a checkpoint of it is to be committed. Raises Unwritten."""
        ...

    def made_durable(self, positions: Positions) -> None:
        """The checkpoint is committed: the neighbours need to keep nothing from before it."""
        ...
