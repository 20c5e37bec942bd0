"""What a rank of a benchmark is told, and whose turn it is to measure."""

from __future__ import annotations

import fcntl
import os
from dataclasses import dataclass
from typing import Any

TURNS = "LLM_LOCAL_BENCH_TURNS"  # names a file: ranks that are given the same one measure by turns


@dataclass(frozen=True)
class Task:
    """What a rank is told. flags: of the run, as in run.yaml. steps: measured ones, after `warmup` others."""

    measure: str
    system: str
    flags: dict[str, Any]
    steps: int
    results: str
    warmup: int = 3
    rounds: int = 1


def wait_for_turn(exclusive: bool) -> None:
    """Takes the file of TURNS, if there is one, until the process ends, or until this is called again: exclusively once
    nobody else has it, so that nobody measures while another one warms up."""
    name = os.environ.get(TURNS)
    if name is None:
        return
    if name not in _turns:
        _turns[name] = os.open(name, os.O_RDWR | os.O_CREAT)
    fcntl.flock(_turns[name], fcntl.LOCK_UN)
    fcntl.flock(_turns[name], fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH)


_turns: dict[str, int] = {}
