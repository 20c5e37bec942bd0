"""What failures cost a run: stages that live alone, each started again while the others go on, and one launch of all.

    print(as_jobs([1.0] * 8, Failures(mean_seconds=1e5, restart_seconds=60, save_steps=500, log_steps=2000)))

Both are shares of the throughput without failures. A stage fails at random, at a constant rate while it is there. It is
back after restart_seconds, and trains again what it had trained since its last checkpoint. As jobs, a stage begins a
step when it is through with the one before, the stage before has sent it, and the log has room: what the next stage has
saved is out of it. In one launch a failure of any stage brings all back to the last checkpoint.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
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
    """A clock that stops for a restart, and for what is trained again."""

    def __init__(self, grain_seconds: float, mean_seconds: float, restart_seconds: float, random: Random):
        self.now = 0.0
        self._grain, self._mean, self._restart = grain_seconds, mean_seconds, restart_seconds
        self._random = random
        self._fails = random.expovariate(1 / mean_seconds)

    def train(self, arrives: float, unsaved: int) -> None:
        """One grain more, which can begin when it has arrived; so many were trained since the last checkpoint."""
        ends = max(self.now, arrives) + self._grain
        tries = 0
        while self._fails < ends:
            tries += 1
            if tries > _MOST_TRIES:  # it does not come from one checkpoint to the next
                self.now = self._fails = inf
                return
            back = self._fails + self._restart
            self._fails = back + self._random.expovariate(1 / self._mean)
            ends = max(back + unsaved * self._grain, arrives) + self._grain
        self.now = ends


def as_jobs(step_seconds: Sequence[float], failures: Failures, seed: int = 0) -> float:
    """Of stages that live alone; step_seconds: of each."""
    assert failures.log_steps > failures.save_steps, "else the next stage does not come to its next checkpoint"
    steps_a_grain = failures.save_steps / _GRAINS
    stages = [
        _Stage(each * steps_a_grain, failures.mean_seconds, failures.restart_seconds, Random(f"{seed}/{number}"))
        for number, each in enumerate(step_seconds)
    ]
    num_grains = _num_grains(max(step_seconds) * steps_a_grain, failures.mean_seconds, len(stages))
    room = int(failures.log_steps / steps_a_grain)
    saved: list[list[float]] = [[0.0] for _ in stages]  # when each checkpoint was
    half = 0.0
    for grain in range(num_grains):
        before = 0.0
        needed = max(0, ceil((grain + 1 - room) / _GRAINS))  # checkpoints of the next stage
        for number, stage in enumerate(stages):
            behind = saved[number + 1][needed] if number + 1 < len(stages) else 0.0
            stage.train(max(before, behind), grain % _GRAINS)
            before = stage.now
            if (grain + 1) % _GRAINS == 0:
                saved[number].append(stage.now)
        if grain + 1 == num_grains // 2:
            half = stages[-1].now
    took = stages[-1].now - half if half < inf else inf
    return (num_grains - num_grains // 2) * max(step_seconds) * steps_a_grain / took


def in_one_launch(step_seconds: float, num_stages: int, failures: Failures, seed: int = 0) -> float:
    """Of stages that end and come back together; step_seconds: of the whole."""
    steps_a_grain = failures.save_steps / _GRAINS
    grain = step_seconds * steps_a_grain
    mean = failures.mean_seconds / num_stages
    whole = _Stage(grain, mean, failures.restart_seconds, Random(f"{seed}/all"))
    num_grains = _num_grains(grain, mean, 1)
    for number in range(num_grains):
        whole.train(0.0, number % _GRAINS)
    return num_grains * grain / whole.now


def _num_grains(grain_seconds: float, mean_seconds: float, num_stages: int) -> int:
    wanted = 2 * _FAILURES * mean_seconds / grain_seconds
    return int(min(max(wanted, 20 * _GRAINS), max(_MOST / num_stages, 20 * _GRAINS))) // _GRAINS * _GRAINS
