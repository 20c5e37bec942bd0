"""Which steps a job has left out of its logs, for want of room (--on_full_log skip)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from llm_local.files import writing
from llm_local.jobs.packet_log import PacketLog


class Fullness:
    """Which steps and evaluations a replica has not sent, by the number of their first packet. A life that makes them
    again leaves them out again: one replica of the next stage may have skipped them already, and another one not."""

    def __init__(self, logs: Mapping[int, PacketLog], path: Path):
        self._logs = [*logs.values()]
        self._path = path
        self._known = set(map(int, path.read_text().split())) if path.exists() else set()

    def is_full(self, number: int, num_bytes: int) -> bool:
        """Whether so many bytes have no room in one of the logs, or were left out before."""
        return number in self._known or not all(log.has_room(num_bytes) for log in self._logs)

    def remember(self, number: int) -> None:
        """Raises Unwritten."""
        if number not in self._known:
            self._known.add(number)
            with writing(self._path), self._path.open("a") as file:
                file.write(f"{number}\n")
