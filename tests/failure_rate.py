"""What failures cost three real jobs, beside what the simulator says: whole jobs are killed at random, at a known rate.

python -m tests.failure_rate [--minutes 10] [--mean_seconds 60] [--log_steps 40] [--pace 0.5] [--seed 1] [--output DIR]

Each step of each stage sleeps for `pace` seconds, so that a busy machine hardly changes what a step takes. First comes
a minute without failures; then each stage is killed, ranks and launcher, mean_seconds on average after it has loaded
its model, and started again at once. The share of the throughput that the last stage keeps is compared with as_jobs of
what was measured in the same run: seconds of a step, of a restart, and between failures. Exit status 1 if they differ
by more than a tenth. OUTPUT/rate.json has the figures.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean
from types import SimpleNamespace
from typing import Any

from llm_local.jobs.packet_log import bytes_of
from llm_local.links.message import HEADER_BYTES
from llm_local.simulator.failures import Failures, as_jobs, in_one_launch
from tests.campaign import LOOK_SECONDS, MODEL, NUM_STAGES, Campaign
from tests.jobs import Stage

SAVE_STEPS, ROWS, TOKENS = 10, 2, 32  # as the campaign's jobs have it
CALM_SECONDS, START_SECONDS = 60.0, 180.0
PACKET_BYTES = HEADER_BYTES + ROWS * TOKENS * 4 * (1 + MODEL["hidden_size"])  # token ids, and hidden states in float32
SEEDS = 20
TOLERANCE = 0.1


@dataclass
class Kill:
    """Of a stage, `at` seconds after the first minute. restart_seconds: from there until its model is loaded."""

    stage: int
    step: int
    at: float
    restart_seconds: float | None = None


@dataclass
class Chance:
    """When a stage is killed. kill: the last one; up_since: when its life was ready; up_seconds: those of all lives."""

    stage: Stage
    kill: Kill | None = None
    fails_at: float | None = None
    up_since: float | None = None
    up_seconds: float = 0.0


class Rate:
    def __init__(self, campaign: Campaign, mean_seconds: float):
        self._campaign, self._mean = campaign, mean_seconds
        self._chances = [Chance(stage) for stage in campaign.scene.stages]
        self._reached = 0
        self.kills: list[Kill] = []
        self.wrong: list[str] = []

    def steps(self, seconds: float, kills: bool) -> float:
        """How many the last stage trains a second, for the first time each, in so many seconds."""
        start = reached = self._look()
        begun = time.time()
        while time.time() - begun < seconds:
            time.sleep(LOOK_SECONDS)
            reached = self._look()
            for chance in self._chances if kills else []:
                self._strike(chance, begun)
        for chance in self._chances:
            self._falls(chance)
        return (reached - start) / (time.time() - begun)

    def wait_until_all_train(self) -> None:
        begun = time.time()
        while self._look() < 3:
            assert time.time() - begun < START_SECONDS, [chance.stage.last_news() for chance in self._chances]
            time.sleep(LOOK_SECONDS)

    @property
    def mean_seconds(self) -> float:
        """Between two failures of a stage that is there, as they came."""
        return sum(chance.up_seconds for chance in self._chances) / len(self.kills)

    @property
    def restarts(self) -> list[float]:
        return [kill.restart_seconds for kill in self.kills if kill.restart_seconds is not None]

    def _look(self) -> int:
        for chance in self._chances:
            self.wrong += chance.stage.look()
            if chance.stage.is_back(0):
                chance.stage.hit_at = None
        self._reached = max(self._reached, self._chances[-1].stage.step)
        return self._reached

    def _strike(self, chance: Chance, begun: float) -> None:
        stage, kill, now = chance.stage, chance.kill, time.time()
        is_old = kill is not None and stage.life.created < begun + kill.at - 0.2
        if chance.fails_at is None and not is_old and stage.life.ready is not None:
            if kill is not None:
                kill.restart_seconds = round(stage.life.ready - begun - kill.at, 2)
            chance.up_since = now
            chance.fails_at = now + self._campaign.random.expovariate(1 / self._mean)
        if chance.fails_at is not None and now >= chance.fails_at:
            self._falls(chance)
            chance.kill = Kill(stage.number, stage.step, round(now - begun, 2))
            self.kills.append(chance.kill)
            stage.hit_at = now
            stage.kill()
            print(f"{chance.kill.at:7.1f} s  stage {stage.number} at step {stage.step}", flush=True)

    def _falls(self, chance: Chance) -> None:
        if chance.up_since is not None:
            chance.up_seconds += time.time() - chance.up_since
        chance.fails_at = chance.up_since = None


def measure(given: argparse.Namespace) -> dict[str, Any]:
    capacity = bytes_of(given.log_steps, PACKET_BYTES)
    flags = ["--log_memory_gb", f"{capacity / 1e9:.9f}", "--log_disk_gb", "0", "--eval_steps", "0"]
    asked = SimpleNamespace(kills=0, replicas="1,1,1", steps=10**6, longest=0.0, soon=0.0, minutes=given.minutes)
    campaign = Campaign(argparse.Namespace(**vars(asked), seed=given.seed, output=given.output.absolute()), flags)
    campaign.num_paced = NUM_STAGES
    (campaign.folder / "pace").write_text(str(given.pace))
    campaign.begin()
    try:
        rate = Rate(campaign, given.mean_seconds)
        rate.wait_until_all_train()
        calm = rate.steps(CALM_SECONDS, kills=False)
        broken = rate.steps(60 * given.minutes, kills=True)
    finally:
        campaign.end()
    restart = mean(rate.restarts)
    failures = Failures(rate.mean_seconds, restart, SAVE_STEPS, given.log_steps)
    predicted = mean(as_jobs([1 / calm] * NUM_STAGES, failures, seed) for seed in range(SEEDS))
    launch = mean(in_one_launch(1 / calm, NUM_STAGES, failures, seed) for seed in range(SEEDS))
    return {
        "minutes": given.minutes,
        "kills": len(rate.kills),
        "mean_seconds": round(rate.mean_seconds, 1),
        "step_seconds": round(1 / calm, 4),
        "restart_seconds": round(restart, 2),
        "save_steps": SAVE_STEPS,
        "log_steps": given.log_steps,
        "measured": round(broken / calm, 4),
        "predicted": round(predicted, 4),
        "predicted_one_launch": round(launch, 4),
        "ratio": round(predicted * calm / broken, 4),
        "wrong": rate.wrong,
        "each": [asdict(kill) for kill in rate.kills],
    }


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.failure_rate", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=10.0, help="with failures (10)")
    parser.add_argument("--mean_seconds", type=float, default=60.0, help="that a stage is there between two (60)")
    parser.add_argument("--log_steps", type=int, default=40, help="whose packets a log holds (40)")
    parser.add_argument("--pace", type=float, default=0.5, help="seconds for which each step sleeps (0.5)")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--output", type=Path, default=Path("runs/failure_rate"), help="a new folder")
    figures = measure(given := parser.parse_args(arguments))
    (given.output / "rate.json").write_text(json.dumps(figures, indent=1) + "\n")
    print(json.dumps({name: value for name, value in figures.items() if name != "each"}, indent=1))
    return 0 if abs(figures["ratio"] - 1) <= TOLERANCE and not figures["wrong"] else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
