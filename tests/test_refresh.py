"""When a shared head's matrix is taken, travels and is read; the way it takes between real processes."""

from __future__ import annotations

import time
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from ranks import run_ranks
from test_links import meet

from llm_local.links.ends import LinkError
from llm_local.links.links import Links
from llm_local.model.refresh import INSTALLED, Refresher, Timetable


def read_in(timetable: Timetable) -> list[int]:
    """By step, the step whose matrix it reads; 0 is what a run starts with."""
    read, now = [], 0
    for step in range(1, timetable.max_steps + 1):
        now = timetable.due(step) or now
        read.append(now)
    return read


@pytest.mark.parametrize(
    ("every", "read"),
    [
        (1, [0, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10]),
        (2, [0, 0, 0, 2, 2, 4, 4, 6, 6, 8, 8, 10]),
        (3, [0, 0, 0, 0, 0, 3, 3, 3, 6, 6, 6, 9]),
        (4, [0, 0, 0, 0, 0, 0, 4, 4, 4, 4, 8, 8]),
        (12, [0] * 12),
    ],
)
def test_a_matrix_is_read_half_a_period_after_it_was_taken(every: int, read: list[int]):
    assert read_in(Timetable(every, 12)) == read


@pytest.mark.parametrize("every", [1, 2, 3, 4, 5, 20])
@pytest.mark.parametrize("max_steps", [1, 2, 7, 23])
def test_what_is_sent_is_what_is_read_and_little_is_on_its_way(every: int, max_steps: int):
    timetable = Timetable(every, max_steps)
    taken = [step for step in range(1, max_steps + 1) if timetable.is_taken(step)]
    wanted = sorted(set(read_in(timetable)) - {0})
    assert [step for step in taken if timetable.is_sent(step)] == wanted
    for step in range(max_steps):
        arriving = [due for later in range(step + 1, max_steps + 1) if (due := timetable.due(later))]
        pending = timetable.pending(step)
        assert [t for t in pending if timetable.is_sent(t)] == [t for t in arriving if t <= step]
        assert len(pending) <= (1 if every > 1 else 2)


V, D = 11, 3


def stage_of_one_block(world: Any, is_last: bool) -> Any:
    """As much of a block as a Refresher looks at."""
    weight = torch.nn.Parameter(torch.zeros(V, D)) if is_last else torch.zeros(V, D)
    output = SimpleNamespace(weight=weight)
    head = SimpleNamespace(output_matrix=output)
    return SimpleNamespace(head=head, kind=SimpleNamespace(shares_matrix=not is_last))


def relay(every: int, max_steps: int, resume_at: int) -> Any:
    """Three stages, each at its own pace; the matrix of step t is full of t. Returns what each step read, and bytes."""
    world = meet()
    stage, is_last = world.place.stage, world.place.is_last_stage
    links = Links.join(world, "fp32", 4, back_dtype=None, refresh_dtype="fp32")
    block = stage_of_one_block(world, is_last)
    output = block.head.output_matrix
    timetable = Timetable(every, max_steps)
    refresher = Refresher([block], timetable, world, links, "fp32", world.timeout_seconds)
    state = None
    if resume_at:
        now = read_in(timetable)[resume_at - 1]
        pending = {str(t): torch.full((V, D), float(t)) for t in timetable.pending(resume_at)}
        state = pending if is_last else {INSTALLED: torch.full((V, D), float(now))}
    refresher.start(resume_at, state)
    read, sent = [], []
    for step in range(resume_at + 1, max_steps + 1):
        before = refresher.sent_bytes
        refresher.before(step)
        assert stage < 2 or torch.equal(output.weight, torch.full((V, D), float(step - 1))) or step == resume_at + 1
        read.append(int(output.weight[0, 0]))
        if is_last:
            time.sleep(0.02)
            output.weight.data.fill_(step)
        refresher.after(step)
        sent.append(refresher.sent_bytes - before)
    refresher.close(max_steps)
    links.close(max_steps)
    return read, sent


@pytest.mark.processes
@pytest.mark.parametrize("every", [1, 4])
@pytest.mark.parametrize("resume_at", [0, 5])
def test_the_matrix_is_relayed_in_the_background_and_counted(every: int, resume_at: int):
    max_steps = 12
    first, second, last = run_ranks(relay, 3, every, max_steps, resume_at)
    timetable = Timetable(every, max_steps)
    wanted = read_in(timetable)[resume_at:]
    assert first[0] == second[0] == wanted
    matrix = 80 + V * D * 4
    assert sum(first[1]) == 0
    arrivals = [timetable.due(step) for step in range(resume_at + 1, max_steps + 1)]
    assert second[1] == [matrix if due else 0 for due in arrivals], "what is handed on counts where it is installed"
    sends = [timetable.is_taken(s) and timetable.is_sent(s) for s in range(resume_at + 1, max_steps + 1)]
    assert last[1] == [matrix if sent else 0 for sent in sends]


def wait_in_vain() -> str:
    world = meet(seconds=1.0)
    links = Links.join(world, "fp32", 4, back_dtype=None, refresh_dtype="fp32")
    block = stage_of_one_block(world, world.place.is_last_stage)
    refresher = Refresher([block], Timetable(1, 9), world, links, "fp32", world.timeout_seconds)
    refresher.start(0)
    said = ""
    if world.place.stage == 0:
        with pytest.raises(LinkError) as error:
            refresher.before(3)
        said = str(error.value)
        world.publish("seen", "1")
    world.fetch("seen", 20.0, "stage 0 to give up")
    return said


@pytest.mark.processes
def test_a_matrix_that_does_not_come_names_who_owes_it():
    said, _ = run_ranks(wait_in_vain, 2)
    assert said.startswith("refresh link 1→0, replica 0: waited 1 s for stage 1, replica 0 (rank 1, pid ")
    assert said.endswith("(--link_timeout_seconds 1)")
