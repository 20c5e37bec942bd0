"""Pipelines of backpropagation: their pictures, and the textbooks' figures of bubble and memory."""

import textwrap

import pytest
from deepspeed.runtime.pipe.schedule import BackwardPass, ForwardPass, TrainSchedule

from llm_local.simulator import peer_schedules
from llm_local.simulator.peer_schedules import GPipeSchedule, InterleavedSchedule, WeightPass, ZeroBubbleSchedule
from llm_local.simulator.simulate import Durations, Timeline, picture, simulate

SHAPES = [(1, 3), (2, 2), (2, 6), (3, 6), (4, 4), (4, 8), (8, 16)]
THIRDS = Durations(1, 2, optimizer=0, weight=1)  # F, B and W take the same


def run(make, num_stages: int, micro_batches: int, durations: Durations = THIRDS, steps: int = 3) -> Timeline:
    return simulate(lambda stage: make(micro_batches, num_stages, stage), num_stages, steps, durations)


def bubble(make, num_stages: int, micro_batches: int, durations: Durations = THIRDS) -> float:
    """Time of a step beside the work of a stage, which all stages have the same of."""
    timeline = run(make, num_stages, micro_batches, durations)
    assert len(set(timeline.busy)) == 1
    return timeline.step_time - timeline.busy[0] / 3


def test_docstring_shows_what_the_simulation_draws():
    drawn = [
        picture(run(GPipeSchedule, 3, 4, Durations(), 1)),
        picture(run(ZeroBubbleSchedule, 3, 4, Durations(1, 2, 1, weight=1), 1)),
        picture(run(InterleavedSchedule, 2, 4, Durations(), 1)),
    ]
    assert peer_schedules.__doc__
    lines = [line for line in peer_schedules.__doc__.splitlines() if line.lstrip().startswith("stage ")]
    assert textwrap.dedent("\n".join(lines)) == "\n".join(drawn)


@pytest.mark.parametrize(("num_stages", "micro_batches"), SHAPES)
def test_bubbles_of_the_papers(num_stages: int, micro_batches: int):
    """With F = B = W: 1F1B and GPipe wait for (p - 1)(F + B + W), ZB-H1 for a third of it, chunks for 1/v."""
    behind = num_stages - 1
    assert bubble(GPipeSchedule, num_stages, micro_batches) == 3 * behind
    assert bubble(TrainSchedule, num_stages, micro_batches) == 3 * behind
    assert bubble(ZeroBubbleSchedule, num_stages, micro_batches) == behind
    if num_stages > 1:
        halves = Durations(1 / 2, 1, optimizer=0)
        assert bubble(InterleavedSchedule, num_stages, micro_batches, halves) == pytest.approx(3 * behind / 2)


@pytest.mark.parametrize(("num_stages", "micro_batches"), SHAPES)
def test_activations_of_the_papers(num_stages: int, micro_batches: int):
    everything = (micro_batches,) * num_stages
    assert run(GPipeSchedule, num_stages, micro_batches).peak_alive == everything
    falling = tuple(min(num_stages - stage, micro_batches) for stage in range(num_stages))
    assert run(TrainSchedule, num_stages, micro_batches).peak_alive == falling
    assert run(ZeroBubbleSchedule, num_stages, micro_batches).peak_alive == (falling[0],) * num_stages


@pytest.mark.parametrize("make", [GPipeSchedule, ZeroBubbleSchedule, InterleavedSchedule])
@pytest.mark.parametrize(("num_stages", "micro_batches"), [s for s in SHAPES if s[0] > 1])
def test_each_pass_is_done_once_and_in_order(make, num_stages: int, micro_batches: int):
    """A part's forward pass is behind that of the part before, its backward pass behind that of the part after."""
    chunks = 2 if make is InterleavedSchedule else 1
    timeline = run(make, num_stages, micro_batches, Durations(1, 2, 1, link=0.5, weight=1), steps=2)
    when = {
        (s.kind, s.step, s.micro_batch, (s.block or 0) * num_stages + s.stage): s
        for spans in timeline.spans
        for s in spans
    }
    parts, kinds = chunks * num_stages, 3 if make is ZeroBubbleSchedule else 2
    assert len(when) == 2 * (kinds * micro_batches * parts + num_stages)
    for (kind, step, micro_batch, part), span in when.items():
        if kind == "F" and part > 0:
            assert span.start >= when["F", step, micro_batch, part - 1].end + 0.5
        elif kind == "B" and part < parts - 1:
            assert span.start >= when["B", step, micro_batch, part + 1].end + 0.5
        elif kind == "B":
            assert span.start >= when["F", step, micro_batch, part].end
        elif kind == "W":
            assert span.start >= when["B", step, micro_batch, part].end


def test_every_message_says_what_it_is_of():
    """A stage that took another chunk's message would compute garbage, which counting messages does not show."""
    timeline = run(InterleavedSchedule, 4, 8)
    boundaries = {(k, k + 1): 2 * 8 * 3 for k in range(3)} | {(k + 1, k): 2 * 8 * 3 for k in range(3)}
    assert timeline.messages == boundaries | {(3, 0): 8 * 3, (0, 3): 8 * 3}  # 3 steps, 2 chunks; one wraps around


@pytest.mark.parametrize("stage", range(3))
def test_zero_bubble_puts_weights_off_by_as_many_micro_batches_as_stages_before(stage: int):
    passes = [i for commands in ZeroBubbleSchedule(6, 3, stage) for i in commands]
    kinds = [type(i) for i in passes if isinstance(i, (BackwardPass, WeightPass))]
    assert kinds[: stage + 1] == [BackwardPass] * (stage + 1)
    assert kinds[stage + 1] is WeightPass
    assert sum(isinstance(i, ForwardPass) for i in passes) == kinds.count(WeightPass) == 6


def test_interleaving_wants_a_multiple_of_the_stages():
    with pytest.raises(ValueError, match="cannot divide 6 micro-batches by 4 stages; use a multiple of 4"):
        InterleavedSchedule(6, 4, 0)


def test_pipe_buffers_are_the_micro_batches_alive():
    for stage in range(4):
        assert InterleavedSchedule(8, 4, stage).num_pipe_buffers() == run(InterleavedSchedule, 4, 8).peak_alive[stage]
        assert ZeroBubbleSchedule(8, 4, stage).num_pipe_buffers() == 4
        assert GPipeSchedule(8, 4, stage).num_pipe_buffers() == 8
