"""The faults of the campaign: what happens to a stage, or to the link in front of it, and how it is taken back."""

from __future__ import annotations

import os
import resource
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from random import Random

import psutil

from tests.jobs import Relay, Stage, freeze

SILENCE_SECONDS = 10.0  # of llm_local.jobs.side: who says nothing for longer is taken for gone


@dataclass
class Scene:
    """What there is to be hurt. links: the relays from stage k to stage k + 1, one a replica."""

    stages: list[Stage]
    links: list[list[Relay]]
    random: Random
    longest_seconds: float


@dataclass
class Blow:
    """A fault that has been done. stage: whose training is awaited; seconds: after which `undo` takes it back, or does
    the rest; involved: stages that may end by it, beside that one."""

    stage: Stage
    detail: str = ""
    seconds: float = 0.0
    undo: Callable[[], None] = lambda: None
    involved: Sequence[Stage] = ()


Fault = Callable[[Scene, Stage], Blow]


def kill_rank(scene: Scene, stage: Stage) -> Blow:
    ranks = stage.ranks()
    if not ranks:
        return kill_job(scene, stage)
    stage.hit_at = time.time()
    victim = scene.random.choice(ranks)
    with suppress(psutil.Error):
        victim.kill()
    return Blow(stage, f"pid {victim.pid}")


def kill_launcher(scene: Scene, stage: Stage) -> Blow:
    """Its ranks end by themselves."""
    assert stage.process is not None
    stage.hit_at = time.time()
    stage.process.kill()
    return Blow(stage)


def kill_job(scene: Scene, stage: Stage) -> Blow:
    stage.hit_at = time.time()
    stage.kill()
    return Blow(stage)


def stop_rank(scene: Scene, stage: Stage) -> Blow:
    """For longer than its neighbours take it for alive."""
    ranks = stage.ranks()
    if not ranks:
        return kill_job(scene, stage)
    victim = scene.random.choice(ranks)
    freeze(victim, True)
    return Blow(stage, "", SILENCE_SECONDS + scene.random.uniform(0.5, 3), lambda: freeze(victim, False))


def cut_link(scene: Scene, stage: Stage) -> Blow:
    return _break(scene, stage, Relay.cut)


def silence_link(scene: Scene, stage: Stage) -> Blow:
    return _break(scene, stage, Relay.silence)


def _break(scene: Scene, stage: Stage, how: Callable[[Relay], None]) -> Blow:
    behind = max(stage.number, 1)
    relays = scene.links[behind - 1]
    relay = scene.random.choice(relays)
    how(relay)
    seconds = 0.1 * (scene.longest_seconds / 0.1) ** scene.random.random()
    return Blow(scene.stages[behind], f"link {behind - 1}→{behind}, {seconds:.1f} s", seconds, relay.restore)


def tear_log(scene: Scene, stage: Stage) -> Blow:
    """While the next stage has not saved all of it; those before may have to make its packets again, and start, too.
    Not where their checkpoints do not reach back so far yet, which a job says and ends."""
    stage = scene.stages[min(stage.number, len(scene.stages) - 2)]
    before = scene.stages[: stage.number + 1]
    if any(each.is_done for each in before) or not _can_be_made_again(scene, stage):
        return kill_job(scene, next(each for each in scene.stages if not each.is_done))
    share = scene.random.choice([0.0, scene.random.random()])

    def tear() -> None:
        if not any(each.is_done for each in before) and stage.logs() and _can_be_made_again(scene, stage):
            os.truncate(stage.logs()[-1], int(share * stage.logs()[-1].stat().st_size))
            for each in before:
                each.hit_at = time.time()
            stage.kill()
        for relay in scene.links[stage.number]:
            relay.restore()

    for relay in scene.links[stage.number]:
        relay.silence()
    seconds = scene.random.uniform(2, 5)
    detail = f"{share:.2f} of the newest file left, after {seconds:.1f} s without the next stage"
    return Blow(stage, detail, seconds, tear, before)


def _can_be_made_again(scene: Scene, stage: Stage) -> bool:
    """Whether it has a checkpoint from before what the next stage has saved, and so on down to the first."""
    needed = max(scene.stages[stage.number + 1].saved_steps(), default=0)
    for each in reversed(scene.stages[: stage.number + 1]):
        steps = [step for step in each.saved_steps() if step <= needed]
        if not steps:
            return False
        needed = max(steps)
    return True


def fill_disk(scene: Scene, stage: Stage) -> Blow:
    """No file of a rank grows beyond some size, until it ends: its next life has room again."""
    ranks = stage.ranks()
    if not ranks or not stage.metrics.exists():
        return kill_job(scene, stage)
    stage.hit_at = time.time()
    room = scene.random.choice([0, stage.metrics.stat().st_size + (1 << 15)])  # the second is for larger files
    for rank in ranks:
        with suppress(OSError):
            resource.prlimit(rank.pid, resource.RLIMIT_FSIZE, (room, resource.RLIM_INFINITY))
    return Blow(stage, f"no file beyond {room} bytes")


def change_zero(scene: Scene, stage: Stage) -> Blow:
    stage.zero = scene.random.choice([zero for zero in range(4) if zero != stage.zero])
    blow = kill_job(scene, stage)
    blow.detail = f"ZeRO-{stage.zero} from here on"
    return blow


KINDS: dict[str, Fault] = {
    "rank": kill_rank,
    "launcher": kill_launcher,
    "job": kill_job,
    "stop": stop_rank,
    "cut": cut_link,
    "silence": silence_link,
    "log": tear_log,
    "disk": fill_disk,
    "zero": change_zero,
}


def deal(count: int, random: Random) -> list[str]:
    """As many kinds, each about as often; another ZeRO stage, which may change rounding, near the end alone."""
    found: list[str] = []
    while len(found) < count:
        found += random.sample(sorted(KINDS), len(KINDS))
    found = ["rank" if kind == "zero" and n < count * 0.9 else kind for n, kind in enumerate(found[:count])]
    found[max(0, count - 2)] = "zero"
    return found
