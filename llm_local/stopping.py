"""A run that is told to stop: its ranks agree on a last step, through the store and beside the training.

It is threads that answer, so that no rank waits for what another is computing: each says which step it has begun, and
begins none until all have. Then all go on to the furthest of these steps.
"""

from __future__ import annotations

import signal
import threading
from typing import Any

REQUEST, TOLD, LAST = "stop/request", "stop/told", "stop/last"
SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
CALLBACK = "a callback"  # asks for a stop after which the run ends as it does after its last step


class Stop:
    """One for each rank. reason: what asks for a stop, '' as long as nothing does; last: the step that is agreed on."""

    def __init__(self) -> None:
        self.reason = ""
        self.last: int | None = None
        self._begun = 0
        self._turn = threading.Condition()

    @property
    def status(self) -> int:
        """The process's, conventional for a signal."""
        return next((128 + number for number in SIGNALS if number.name == self.reason), 1)

    def exchange(self, store: Any, rank: int, world_size: int) -> None:
        """Learns of a request, answers it, and learns what was agreed on; to be called again and again."""
        if not self.reason and store.check([REQUEST]):
            reason = bytes(store.get(REQUEST)).decode()
            with self._turn:
                self.reason, begun = reason, self._begun
            store.set(f"stop/{rank}", str(begun))
            if store.add(TOLD, 1) == world_size:
                store.set(LAST, str(max(int(store.get(f"stop/{other}")) for other in range(world_size))))
        if self.reason and self.last is None and store.check([LAST]):
            with self._turn:
                self.last = int(store.get(LAST))
                self._turn.notify_all()

    def begins(self, step: int) -> bool:
        """Whether the training may begin the step; waits while that is being agreed on. The watchdog bounds it."""
        with self._turn:
            while self.reason and self.last is None:
                self._turn.wait()
            if self.last is not None and step > self.last:
                return False
            self._begun = step
            return True
