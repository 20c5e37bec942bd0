"""What durations say: blocks that differ, links of a certain rate, messages of a certain micro-batch."""

import pytest
from deepspeed.runtime.pipe.schedule import (
    BackwardPass,
    ForwardPass,
    RecvActivation,
    RecvGrad,
    SendActivation,
    SendGrad,
    TrainSchedule,
)

from llm_local.methods.final_steps import GlobalSchedule
from llm_local.methods.overlapping import OverlapSchedule
from llm_local.methods.schedule import LocalSchedule
from llm_local.methods.soft_targets import DistillationSchedule
from llm_local.plan.times import Pipe, StageSeconds, predict
from llm_local.simulator.simulate import Durations, Timeline, simulate


def starts(timeline: Timeline, stage: int, kind: str) -> list[float]:
    return [span.start for span in timeline.spans[stage] if span.kind == kind]


def test_blocks_may_take_different_times():
    durations = Durations((1, 3), (2, 4), optimizer=0.5, from_above=(0.25, 9))
    timeline = simulate(lambda stage: OverlapSchedule(1, 1, stage, 2), 1, durations=durations)
    took = [(s.kind, s.block, s.end - s.start) for s in timeline.spans[0]]
    assert took == [("F", 0, 1), ("B", 0, 2), ("F", 1, 3), ("B", 1, 4), ("G", 0, 0.25), ("O", None, 0.5)]


def test_messages_hold_their_link_one_after_the_other():
    """Three packets of 4 each, sent at 1, 3 and 5, arrive 0.5 after their transfers end at 5, 9 and 13."""
    durations = [Durations(1, 1, 0, link=0.5, transfer=4), Durations(1, 1, 0)]
    timeline = simulate(lambda stage: LocalSchedule(3, 2, stage), 2, durations=durations)
    assert starts(timeline, 0, "F") == [0, 2, 4]
    assert starts(timeline, 1, "F") == [5.5, 9.5, 13.5]


def test_a_link_that_is_slower_than_the_stages_sets_the_pace():
    free = simulate(lambda stage: LocalSchedule(8, 2, stage), 2, 4, Durations(1, 1, 0, transfer=1.9), 4)
    slow = simulate(lambda stage: LocalSchedule(8, 2, stage), 2, 4, Durations(1, 1, 0, transfer=3), 4)
    assert free.step_time == pytest.approx(16)
    assert slow.step_time == pytest.approx(24)


def test_what_comes_back_has_times_of_its_own():
    def ends(**options: float) -> float:
        timeline = simulate(lambda stage: GlobalSchedule(1, 2, stage), 2, durations=Durations(1, 1, 0, **options))
        return timeline.makespan

    assert ends() == 4
    assert ends(link=1, transfer=2) == 4 + 2 * 3
    assert ends(link=1, transfer=2, link_back=0, transfer_back=0.5) == 4 + 3 + 0.5


def test_a_message_of_another_micro_batch_is_named():
    def schedule(stage: int):
        if stage == 0:
            return [[SendActivation(0, micro_batch=1), SendActivation(0, micro_batch=0)]]
        return [[RecvActivation(0, micro_batch=0), RecvActivation(0, micro_batch=1)]]

    wanted = (
        r"stage 1 at RecvActivation\(.*micro_batch=0\) of step 0 gets what stage 0 at SendActivation\(.*micro_batch=1\)"
    )
    with pytest.raises(ValueError, match=wanted):
        simulate(schedule, 2)


def test_messages_are_counted():
    timeline = simulate(lambda stage: OverlapSchedule(5, 3, stage), 3, num_steps=2)
    assert timeline.messages == {(0, 1): 10, (1, 2): 10, (1, 0): 10, (2, 1): 10}


@pytest.mark.parametrize("num_blocks", [1, 2, 3])
@pytest.mark.parametrize("num_stages", [1, 2, 6])
def test_a_local_stage_keeps_one_micro_batch_of_one_block(num_stages: int, num_blocks: int):
    timeline = simulate(lambda stage: LocalSchedule(6, num_stages, stage, num_blocks), num_stages, 2)
    assert timeline.peak_alive == (1,) * num_stages


def test_stages_that_hear_of_the_next_one_keep_two():
    for make in (OverlapSchedule, DistillationSchedule):
        assert simulate(lambda stage, make=make: make(6, 4, stage), 4, 2).peak_alive == (2, 2, 2, 1)


def test_the_time_of_a_step_is_the_slowest_stages():
    durations = [Durations(1, 2, 0), Durations(2, 4, 1), Durations(1, 1, 0)]
    timeline = simulate(lambda stage: LocalSchedule(4, 3, stage), 3, 3, durations)
    assert timeline.step_time == 4 * 6 + 1
    with pytest.raises(ValueError, match="num_steps=2 or more"):
        _ = simulate(lambda stage: LocalSchedule(4, 1, stage), 1).step_time


@pytest.mark.parametrize("weight", [-0.5, 2, (1, 1, 2)])
def test_weights_are_a_part_of_the_backward_pass(weight):
    with pytest.raises(ValueError, match="must be 0 or more and less than backward"):
        Durations(1, (2, 2, 2), weight=weight)


@pytest.mark.parametrize(
    "values", [{"transfer": -1}, {"link_back": -1}, {"transfer_back": -1}, {"from_above": 0}, {"backward": (1, 0)}]
)
def test_durations_must_be_possible(values):
    with pytest.raises(ValueError, match="a pass must take more than 0, an optimizer step and a link 0 or more"):
        Durations(**values)


def test_stages_without_a_neighbour_are_named_wherever_they_send():
    with pytest.raises(ValueError, match="stage 0 at SendGrad"):
        simulate(lambda _stage: [[ForwardPass(0), BackwardPass(0), SendGrad(0)]], 1)


def test_stages_that_share_a_core_work_half_as_fast():
    durations = [Durations(2, 2, 0), Durations(1, 1, 0)]
    timeline = simulate(lambda _stage: [[ForwardPass(0)]], 2, 2, durations, num_cores=1)
    assert [[span.end for span in spans] for spans in timeline.spans] == [[4, 8], [2, 4]]


def test_a_stage_that_waits_lends_its_core():
    work = [[ForwardPass(0), SendActivation(0), RecvGrad(0)], [RecvActivation(0), ForwardPass(0), SendGrad(0)]]
    durations = [Durations(2, 2, 0), Durations(1, 1, 0)]
    assert simulate(lambda stage: [work[stage]], 2, 3, durations, num_cores=1).makespan == 9


@pytest.mark.parametrize("micro_batches", [1, 4])
@pytest.mark.parametrize(("num_cores", "passes"), [(1, 4), (2, 2), (3, 2), (4, 1), (9, 1)])
def test_a_full_local_pipe_is_as_fast_as_its_busiest_core(num_cores: int, passes: int, micro_batches: int):
    """Stage k works on core k % num_cores."""
    stages = [StageSeconds((1.0,), (2.0,), 0.5)] * 4
    found = predict(Pipe("local", stages, micro_batches, num_cores=num_cores))
    assert found.step_seconds == pytest.approx(passes * (3 * micro_batches + 0.5), rel=0.02)


def test_backpropagation_lends_the_core_of_a_stage_that_waits():
    def step(num_cores: int | None) -> float:
        return simulate(lambda stage: TrainSchedule(1, 4, stage), 4, 2, Durations(1, 2, 0), None, num_cores).step_time

    assert step(1) == step(2) == step(None) == 12


def test_no_core_is_refused():
    with pytest.raises(ValueError, match="num_cores=0 can do no work; use 1 or more"):
        simulate(lambda stage: LocalSchedule(2, 2, stage), 2, num_cores=0)


def test_a_schedule_that_cannot_run_is_refused_on_shared_cores_too():
    with pytest.raises(ValueError, match=r"stage 1 at RecvActivation.* waits for ever"):
        simulate(lambda stage: [[RecvActivation(0)] if stage else [ForwardPass(0)]], 2, num_cores=1)
