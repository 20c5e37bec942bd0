"""What is known of the jobs of a run on this machine: the files that they write once a second."""

from __future__ import annotations

import json
import time
from collections import deque
from pathlib import Path

from llm_local.files import Json
from llm_local.jobs.positions import STATUS

RATE_SECONDS = 30.0


def read_status(output_dir: Path) -> list[Json]:
    """What each stage was last known to do, in order: by itself, or as its neighbours have told the jobs of this
    machine."""
    found: dict[int, Json] = {}
    for path in sorted(output_dir.glob(f"stage-*/{STATUS}")):
        try:
            told = json.loads(path.read_text())
        except (OSError, ValueError):  # it is being replaced
            continue
        for stage in told.values():
            known = found.get(stage["stage"])
            if known is None or known["time"] < stage["time"]:
                found[stage["stage"]] = stage
    return [found[number] for number in sorted(found)]


class Rate:
    """Tokens a second over the last half a minute, of steps of so many."""

    def __init__(self, tokens_per_step: int):
        self._tokens = tokens_per_step
        self._past: deque[tuple[float, int]] = deque()

    def at(self, step: int) -> float:
        """When the step has been trained."""
        now = time.monotonic()
        self._past.append((now, step))
        while now - self._past[0][0] > RATE_SECONDS:
            self._past.popleft()
        then, before = self._past[0]
        return round((step - before) * self._tokens / (now - then), 1) if now - then > 1 else 0.0
