"""The steps of a run in a terminal: a line for each stage, with its last loss, below what is printed meanwhile."""

from __future__ import annotations

import time
from collections.abc import Sequence

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

REFRESH_SECONDS = 0.25


class Bars:
    """Drawn by the thread that trains, whenever a step ends: what hangs, stands."""

    def __init__(self, stages: Sequence[int], num_steps: int, first_step: int, console: Console | None = None):
        self.console = console or Console(stderr=True)
        columns = (
            TextColumn("{task.description}", markup=False),
            BarColumn(20),
            MofNCompleteColumn(),
            TextColumn("{task.fields[said]}", markup=False),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
        )
        self._progress = Progress(*columns, console=self.console, auto_refresh=False, speed_estimate_period=120)
        self._tasks = {
            stage: self._progress.add_task(f"stage {stage}", total=num_steps, completed=first_step, said="")
            for stage in stages
        }
        self._refreshed = 0.0
        self._progress.start()
        self.console.show_cursor(True)  # a run that is ended from outside could not bring it back

    def move(self, stage: int, step: int, said: str | None = None) -> None:
        """The stage is through with the step. said: what stands behind its bar from now on."""
        if said is not None:
            self._progress.update(self._tasks[stage], said=said)
        self._progress.update(self._tasks[stage], completed=step)

    def refresh(self) -> None:
        now = time.monotonic()
        if now - self._refreshed >= REFRESH_SECONDS:
            self._refreshed = now
            self._progress.refresh()

    def say(self, text: str) -> None:
        """A line above the bars."""
        self.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def close(self) -> None:
        """They stay as they are."""
        self._progress.stop()
