"""What failures cost a run: stages that live alone, each started again while the others go on, and one launch of all.

    print(as_jobs([1.0] * 8, Failures(mean_seconds=1e5, restart_seconds=60, save_steps=500, log_steps=2000)))

Both are shares of the throughput without failures. A stage fails at random, at a constant rate while it is there. It is
back after restart_seconds, and trains again what it had trained since its last checkpoint. As jobs, a stage begins a
step when it is through with the one before, its log has room (what the next stage has saved is out of it), and the
stage before is there and has the step's packets: its log goes and comes back with it. In one launch a failure of any
stage brings all back to the last checkpoint.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import ceil, inf
from random import Random

_MOST = 1_500_000  # passes of a stage through a grain of steps that are looked at
_GRAINS = 10  # of an interval between checkpoints
_MOST_TRIES = 10_000
_FAILURES = 30.0  # of a stage, that are waited for if that is not too long


@dataclass(frozen=True)
class Failures:
    """mean_seconds: between two of one stage. save_steps: between checkpoints. log_steps: whose packets a log holds,
    more than save_steps."""

    mean_seconds: float
    restart_seconds: float
    save_steps: int
    log_steps: int


class _Stage:
    """A clock that stops for a restart, for what is trained again, and as long as the stage before is away."""

    def __init__(self, grain_seconds: float, failures: Failures, random: Random, before: _Stage | None = None):
        self.now = 0.0
        self.saved = [0.0]  # when each checkpoint was
        self._grain, self._failures, self._random, self._before = grain_seconds, failures, random, before
        self._fails = [random.expovariate(1 / failures.mean_seconds)]  # it does so whatever it does: the next is known
        self._failed = 0
        self._trained: list[
            tuple[float, int]
        ] = []  # when each grain was, for the first time, and after how many failures

    def train(self, has_room: float = 0.0) -> None:
        """One grain more, which can begin when the log has room."""
        number = len(self._trained)
        ends = self._receive(number, max(self.now, has_room)) + self._grain
        tries = 0
        while self._fails[self._failed] < ends:
            ends = self._back(self._failed)
            self._failed += 1
            for grain in range(number - number % _GRAINS, number + 1):
                ends = self._receive(grain, ends) + self._grain
            ends = max(ends, has_room + self._grain)
            tries += 1
            if ends == inf or tries > _MOST_TRIES:  # it does not come from one checkpoint to the next
                ends = self._fails[self._failed] = inf
        self.now = ends
        self._trained.append((ends, self._failed))
        if (number + 1) % _GRAINS == 0:
            self.saved.append(ends)

    def _receive(self, grain: int, at: float) -> float:
        return at if self._before is None else self._before.send(grain, at)

    def send(self, grain: int, at: float) -> float:
        """When the next stage has the grain, if it asks for it at that time: it waits for a stage that is away, and for
        what that one makes again because its last checkpoint did not have it."""
        trained, number = self._trained[grain]
        at = max(at, trained)
        while (fails := self._fails[number]) < at:
            saved = (bisect_right(self.saved, fails) - 1) * _GRAINS
            at = max(at, self._back(number) + max(0, grain + 1 - saved) * self._grain)
            number += 1
        return at

    def _back(self, number: int) -> float:
        """When it is there again after that failure; then the next one is known."""
        back = self._fails[number] + self._failures.restart_seconds
        if number + 1 == len(self._fails):
            self._fails.append(back + self._random.expovariate(1 / self._failures.mean_seconds))
        return back


def as_jobs(step_seconds: Sequence[float], failures: Failures, seed: int = 0) -> float:
    """Of stages that live alone; step_seconds: of each."""
    assert failures.log_steps > failures.save_steps, "else the next stage does not come to its next checkpoint"
    steps_a_grain = failures.save_steps / _GRAINS
    stages: list[_Stage] = []
    for number, each in enumerate(step_seconds):
        before = stages[-1] if stages else None
        stages.append(_Stage(each * steps_a_grain, failures, Random(f"{seed}/{number}"), before))
    num_grains = _num_grains(max(step_seconds) * steps_a_grain, failures.mean_seconds, len(stages))
    room = int(failures.log_steps / steps_a_grain)
    half = 0.0
    for grain in range(num_grains):
        needed = max(0, ceil((grain + 1 - room) / _GRAINS))  # checkpoints of the next stage
        for stage, behind in zip(stages, [*stages[1:], None], strict=True):
            stage.train(behind.saved[needed] if behind else 0.0)
        if grain + 1 == num_grains // 2:
            half = stages[-1].now
    took = stages[-1].now - half if half < inf else inf
    return (num_grains - num_grains // 2) * max(step_seconds) * steps_a_grain / took


def in_one_launch(step_seconds: float, num_stages: int, failures: Failures, seed: int = 0) -> float:
    """Of stages that end and come back together; step_seconds: of the whole."""
    steps_a_grain = failures.save_steps / _GRAINS
    grain = step_seconds * steps_a_grain
    mean = failures.mean_seconds / num_stages
    whole = _Stage(grain, replace(failures, mean_seconds=mean), Random(f"{seed}/all"))
    num_grains = _num_grains(grain, mean, 1)
    for _ in range(num_grains):
        whole.train()
    return num_grains * grain / whole.now


def _num_grains(grain_seconds: float, mean_seconds: float, num_stages: int) -> int:
    wanted = 2 * _FAILURES * mean_seconds / grain_seconds
    return int(min(max(wanted, 20 * _GRAINS), max(_MOST / num_stages, 20 * _GRAINS))) // _GRAINS * _GRAINS
