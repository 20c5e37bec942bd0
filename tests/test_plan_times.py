"""Predicted steps: against closed forms, and the formulas for large pipes against the simulation."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

from llm_local.methods.method import local_schedules
from llm_local.plan.times import (
    PEERS,
    Link,
    Pipe,
    StageSeconds,
    estimate_seconds,
    predict,
    work_seconds,
)

EQUAL = StageSeconds((1.0,), (2.0,))
SHAPES = [(1, 1), (2, 4), (4, 4), (4, 8), (8, 16)]


@pytest.mark.parametrize(("num_stages", "micro_batches"), SHAPES)
def test_a_step_of_equal_stages_is_that_of_the_textbooks(num_stages: int, micro_batches: int):
    def step(schedule: str) -> float:
        stage = StageSeconds((0.5, 0.5), (1.0, 1.0)) if schedule == "interleaved" else EQUAL
        return predict(Pipe(schedule, [stage] * num_stages, micro_batches)).step_seconds

    behind = num_stages - 1
    assert step("local") == pytest.approx(3 * micro_batches)
    assert step("gpipe") == step("1f1b") == pytest.approx(3 * (micro_batches + behind))
    assert step("zero_bubble") == pytest.approx(3 * micro_batches + behind)
    if num_stages > 1:
        assert step("interleaved") == pytest.approx(3 * micro_batches + 3 * behind / 2)
    share = behind / (micro_batches + behind)
    assert predict(Pipe("1f1b", [EQUAL] * num_stages, micro_batches)).idle == pytest.approx([share] * num_stages)


def test_the_slowest_stage_sets_the_pace_of_a_local_pipe():
    stages = [
        StageSeconds((1.0,), (2.0,), 0.5),
        StageSeconds((2.0, 1.0), (2.0, 2.0), 1.0),
        StageSeconds((1.0,), (1.0,)),
    ]
    found = predict(Pipe("local", stages, 4, [Link(0.1, 1e-9)], forward_bytes=1e6))
    assert found.step_seconds == pytest.approx(4 * 7 + 1)
    assert found.idle == pytest.approx([1 - 12.5 / 29, 0, 1 - 8 / 29])
    assert found.timeline is not None


def test_a_slow_link_costs_1f1b_at_once_and_a_local_pipe_only_when_it_is_full():
    """A message takes a third of a stage's time for a micro-batch: hidden by one, waited for by the other."""
    links = [Link(0.0, 1e-6)]
    local = predict(Pipe("local", [EQUAL] * 4, 8, links, 1e6, 0.0))
    assert local.step_seconds == pytest.approx(24)
    assert predict(Pipe("local", [EQUAL] * 4, 8, links, 4e6, 0.0)).step_seconds == pytest.approx(32)
    assert predict(Pipe("1f1b", [EQUAL] * 4, 8, links, 1e6, 1e6)).step_seconds > 33 + 7 * 2 - 1e-9


def test_latency_is_hidden_by_packets_in_flight():
    """There and back are 12 s, a pass is 3; of 5, 4, 2 and 1 packets 4, 3, 1 and 1 are asked for ahead."""
    far = [Link(6.0)]
    for bound, seconds in ((5, 3), (4, 4), (2, 12), (1, 12)):
        found = predict(Pipe("local", [EQUAL] * 2, 12, far, max_packets_in_flight=bound))
        assert found.step_seconds == pytest.approx(12 * seconds)
        assert estimate_seconds(Pipe("local", (EQUAL,) * 2, 12, tuple(far), max_packets_in_flight=bound)) == (
            pytest.approx(found.step_seconds)
        )


def _random_pipe(schedule: str, generator: random.Random) -> Pipe:
    stages = generator.randint(2, 8)
    blocks = {"interleaved": 2}.get(schedule, generator.randint(1, 3) if schedule in local_schedules() else 1)

    def times(least: float) -> tuple[float, ...]:
        return (least * (1 + 0.15 * generator.random()),) * blocks

    made = tuple(
        StageSeconds(times(1), times(2), generator.choice([0.0, 0.5]), from_above=times(1.3)) for _ in range(stages)
    )
    links = (Link(0.02, 1e-9),)
    return Pipe(schedule, made, stages * generator.randint(2, 4), links, 2e7, 2e7)


@pytest.mark.parametrize("schedule", [*local_schedules(), *PEERS])
def test_formulas_for_large_pipes_are_near_the_simulation(schedule: str):
    generator = random.Random(7)
    for _ in range(25):
        pipe = _random_pipe(schedule, generator)
        simulated = pipe.simulate().step_time
        assert pipe.simulate(6).step_time == pytest.approx(simulated, rel=1e-6), "the pipe was not full"
        close = 1e-9 if schedule == "local" else 0.08
        assert estimate_seconds(pipe) == pytest.approx(simulated, rel=close)


def test_a_step_of_too_many_passes_is_estimated():
    pipe = Pipe("1f1b", (EQUAL,) * 4, 8)
    assert predict(pipe, most_passes=64).timeline is not None
    estimated = predict(pipe, most_passes=63)
    assert estimated.timeline is None
    assert estimated.step_seconds == pytest.approx(33)


def test_work_is_what_the_simulation_does():
    for schedule in ("local", "overlapping"):
        pipe = Pipe(schedule, (StageSeconds((1.0, 1.5), (2.0, 2.5), 0.5, from_above=(0.5, 0.75)),) * 3, 4)
        assert work_seconds(pipe) == pytest.approx([busy / 4 for busy in pipe.simulate().busy])


PIPE = Pipe("local", (EQUAL,) * 3, 2)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"schedule": "chimera"}, "schedule='chimera' is unknown; choose one of local, overlapping"),
        ({"stages": ()}, "there is no stage"),
        ({"micro_batches": 0}, "micro_batches=0 trains nothing; use 1 or more"),
        ({"links": (Link(),) * 3}, "3 links for 3 stages; give one for all, or 2"),
        ({"backward_bytes": -1.0}, "a message has 0 bytes or more"),
    ],
)
def test_what_cannot_be_is_refused(wrong: dict, message: str):
    with pytest.raises(ValueError, match=message):
        replace(PIPE, **wrong)


def test_links_and_blocks_must_be_possible():
    with pytest.raises(ValueError, match="neither can be negative"):
        Link(-1.0)
    with pytest.raises(ValueError, match=r"backward=.* has not one number for each of the 2 blocks"):
        StageSeconds((1.0, 1.0), (2.0,))
