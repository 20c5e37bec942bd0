"""What failures cost, as jobs and in one launch: a model of time alone, beside what can be calculated."""

from __future__ import annotations

import pytest

from llm_local.simulator.failures import Failures, as_jobs, in_one_launch

DAY = 24 * 3600


def failures(mean_seconds: float, **changes: float) -> Failures:
    values = {"restart_seconds": 120.0, "save_steps": 500, "log_steps": 2000} | changes
    return Failures(mean_seconds, **values)  # pyright: ignore[reportArgumentType]


@pytest.mark.processes
def test_nothing_fails_and_nothing_is_lost():
    assert as_jobs([1.0] * 4, failures(1e15)) == pytest.approx(1.0)
    assert in_one_launch(1.0, 4, failures(1e15)) == pytest.approx(1.0)


@pytest.mark.parametrize("num_stages", [1, 8])
def test_one_launch_loses_the_restart_and_half_an_interval_a_failure(num_stages: int):
    """Young's formula (1974), where failures are rare beside checkpoints."""
    expected = 1 / (1 + num_stages / DAY * (120 + 500 / 2))
    found = [in_one_launch(1.0, num_stages, failures(DAY), seed) for seed in range(8)]
    assert sum(found) / 8 == pytest.approx(expected, abs=0.01)


@pytest.mark.processes
def test_one_stage_is_the_same_as_a_job():
    found = [as_jobs([1.0], failures(DAY), seed) for seed in range(8)]
    assert sum(found) / 8 == pytest.approx(1 / (1 + 370 / DAY), abs=0.01)


@pytest.mark.processes
@pytest.mark.parametrize("num_stages", [8, 64, 256])
def test_stages_that_live_alone_lose_less(num_stages: int):
    ours, theirs = as_jobs([1.0] * num_stages, failures(DAY)), in_one_launch(1.0, num_stages, failures(DAY))
    assert 1 - ours < 0.5 * (1 - theirs)
    assert ours <= 1.0


def test_a_larger_log_is_not_worse_and_a_slower_stage_hides_the_failures_of_others():
    small, large = (as_jobs([1.0] * 32, failures(DAY / 8, log_steps=steps)) for steps in (600, 5000))
    assert small < large
    slow = [as_jobs([2.0, 1.0, 1.0, 1.0][:count], failures(DAY / 8)) for count in (1, 4)]
    assert slow[1] == pytest.approx(slow[0], abs=0.02)


@pytest.mark.processes
def test_a_stage_waits_for_the_one_before_and_hardly_for_others():
    """However large logs are: each is away with the stage that keeps it."""

    def loss(*step_seconds: float) -> float:
        found = [as_jobs(step_seconds, failures(DAY, log_steps=50_000), seed) for seed in range(6)]
        return 1 - sum(found) / 6

    alone = loss(1.0)
    assert loss(1.0, 1.0) == pytest.approx(2 * alone, rel=0.2)
    assert loss(*[1.0] * 8) < 3.5 * alone
    assert loss(1.0, 0.5) == pytest.approx(alone, rel=0.2)  # who is faster makes up for it


def test_who_fails_more_often_than_he_saves_does_not_come_on():
    assert in_one_launch(1.0, 1024, failures(3600)) == 0.0
    assert as_jobs([1.0], failures(10.0)) == 0.0
