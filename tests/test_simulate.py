"""The clock of simulate.py: what waits for what, and which schedules cannot run."""

from itertools import pairwise

import pytest
from deepspeed.runtime.pipe.schedule import (
    BackwardPass,
    ForwardPass,
    InferenceSchedule,
    LoadMicroBatch,
    OptimizerStep,
    PipeInstruction,
    RecvActivation,
    RecvGrad,
    SendActivation,
    SendGrad,
    TrainSchedule,
)

from llm_local.methods.schedule import EvalSchedule, LocalSchedule
from llm_local.simulator.simulate import Durations, Timeline, TimeSpan, picture, simulate


def local(micro_batches: int, num_stages: int, **options) -> Timeline:
    return simulate(lambda stage: LocalSchedule(micro_batches, num_stages, stage), num_stages, **options)


def one_f_one_b(micro_batches: int, num_stages: int, **options) -> Timeline:
    return simulate(lambda stage: TrainSchedule(micro_batches, num_stages, stage), num_stages, **options)


def by_hand(*stages: list[PipeInstruction], **options) -> Timeline:
    return simulate(lambda stage: [[instruction] for instruction in stages[stage]], len(stages), **options)


def ends(timeline: Timeline, stage: int, kind: str) -> list[float]:
    return [span.end for span in timeline.spans[stage] if span.kind == kind]


def starts(timeline: Timeline, stage: int, kind: str) -> list[float]:
    return [span.start for span in timeline.spans[stage] if span.kind == kind]


def test_spans_name_step_micro_batch_and_block():
    timeline = simulate(lambda stage: LocalSchedule(2, 1, stage, num_blocks=2), num_stages=1, num_steps=2)
    expected = []
    for step in range(2):
        for micro_batch in range(2):
            for block in range(2):
                expected += [(step, "F", micro_batch, block), (step, "B", micro_batch, block)]
        expected.append((step, "O", None, None))
    assert [(s.step, s.kind, s.micro_batch, s.block) for s in timeline.spans[0]] == expected
    assert timeline.spans[0][0] == TimeSpan(0, 0, "F", 0, 0, 0, 1)
    assert timeline.makespan == 18
    assert timeline.busy == (18,)
    assert timeline.bubble == (0,)


def test_a_later_stage_starts_when_the_earlier_ones_output_arrives():
    timeline = local(1, 3, durations=Durations(forward=2, link=0.5))
    assert [starts(timeline, stage, "F") for stage in range(3)] == [[0], [2.5], [5]]


@pytest.mark.parametrize("make", [local, one_f_one_b])
@pytest.mark.parametrize("max_packets", [None, 1, 3])
@pytest.mark.parametrize(("num_stages", "micro_batches"), [(1, 3), (2, 4), (3, 2), (4, 7)])
def test_work_is_complete_and_never_before_its_input(make, max_packets, num_stages, micro_batches):
    durations = [Durations(1 + k % 2, 2, 0.5, 0.25 * k) for k in range(num_stages)]
    timeline = make(micro_batches, num_stages, num_steps=3, durations=durations, max_packets_in_flight=max_packets)
    done = {(s.stage, s.kind, s.step, s.micro_batch): s for spans in timeline.spans for s in spans}
    assert len(done) == num_stages * 3 * (2 * micro_batches + 1)
    for (stage, kind, step, micro_batch), span in done.items():
        if kind == "F" and stage > 0:
            before = done[stage - 1, "F", step, micro_batch]
        elif kind == "B" and make is one_f_one_b and stage < num_stages - 1:
            before = done[stage + 1, "B", step, micro_batch]
        elif kind == "B":
            assert span.start >= done[stage, "F", step, micro_batch].end
            continue
        else:
            continue
        assert span.start >= before.end + durations[before.stage].link
    for spans in timeline.spans:
        assert all(a.end <= b.start for a, b in pairwise(spans))


@pytest.mark.parametrize("make", [local, one_f_one_b])
def test_steps_run_back_to_back_and_each_starts_a_fresh_schedule(make):
    timeline = make(4, 2, num_steps=3)
    assert [len(ends(timeline, stage, "O")) for stage in range(2)] == [3, 3]
    assert [span.micro_batch for span in timeline.spans[0] if span.kind == "F"] == [0, 1, 2, 3] * 3


def test_a_fast_stage_waits_for_a_slow_one_before_it_and_never_for_one_behind_it():
    slow_first = local(4, 2, num_steps=3, durations=[Durations(2, 4, 0), Durations(1, 2, 0)])
    assert slow_first.steady_bubble == (0, 0.5)
    slow_last = local(4, 2, num_steps=3, durations=[Durations(1, 2, 0), Durations(2, 4, 0)])
    assert slow_last.steady_bubble == (0, 0)
    assert ends(slow_last, 0, "O") == [12, 24, 36]


@pytest.mark.parametrize("max_packets", [1, 2, 4])
def test_back_pressure_bounds_the_packets_in_flight(max_packets):
    durations = [Durations(1, 1, 0), Durations(3, 3, 0)]
    timeline = local(20, 2, durations=durations, max_packets_in_flight=max_packets)
    # A send lies between its forward and its backward pass, and only it can keep the two apart.
    sent, received = starts(timeline, 0, "B"), starts(timeline, 1, "F")
    in_flight = [number + 1 - sum(r <= time for r in received) for number, time in enumerate(sent)]
    assert max(in_flight) == max_packets + 1
    assert timeline.makespan == local(20, 2, durations=durations).makespan
    assert ends(timeline, 0, "B")[-1] > 40


def test_without_a_bound_a_send_never_waits():
    timeline = local(20, 2, durations=[Durations(1, 1), Durations(3, 3)])
    assert ends(timeline, 0, "B")[-1] == 40


def test_stock_schedules_for_evaluation_and_ours_draw_the_same():
    def stock(stage):
        return InferenceSchedule(3, 3, stage)

    def ours(stage):
        return EvalSchedule(3, 3, stage)

    expected = "stage 0 | FFF\nstage 1 |  FFF\nstage 2 |   FFF"
    assert picture(simulate(stock, 3)) == picture(simulate(ours, 3)) == expected


def test_a_message_leaves_when_it_has_been_asked_for():
    """With a bound of 2 the receiver asks for one at a time: the second time from when it has taken the first."""
    durations = Durations(forward=1, backward=1, optimizer=0, link=10, transfer=2)
    timeline = local(3, 2, durations=durations, max_packets_in_flight=2)
    # a pass, its transfer and its way; then what asks for the next one, and again a transfer and a way
    assert starts(timeline, 1, "F") == [13, 13 + 22, 13 + 44]
    assert starts(timeline, 0, "B") == [1, 3, 5], "two are waiting to leave, and nobody waits for them"
    assert starts(local(4, 2, durations=durations, max_packets_in_flight=2), 0, "B") == [1, 3, 5, 25]


def test_picture_draws_a_character_for_each_unit():
    timeline = local(2, 2, durations=Durations(forward=1, backward=2, optimizer=1, link=1))
    assert picture(timeline) == "stage 0 | FBBFBBO\nstage 1 |   FBBFBBO"
    assert picture(timeline, unit=0.5) == "stage 0 | FFBBBBFFBBBBOO\nstage 1 |     FFBBBBFFBBBBOO"


def test_picture_draws_what_runs_in_the_middle_of_a_unit():
    work = [ForwardPass(0), BackwardPass(0), OptimizerStep()]
    assert picture(by_hand(work, durations=Durations(0.75, 1.5, 0.25))) == "stage 0 | FB"
    assert picture(by_hand(work, durations=Durations(0.25, 1.5, 1))) == "stage 0 | BBO"


def test_picture_aligns_ten_stages_and_more():
    lines = picture(local(1, 11)).splitlines()
    assert lines[0] == "stage  0 | FBO"
    assert lines[10] == "stage 10 |" + " " * 11 + "FBO"


def test_a_receive_without_a_send_is_named():
    with pytest.raises(ValueError, match=r"stage 1 at RecvActivation\(buffer_id=0\) of step 0 waits for ever"):
        simulate(lambda stage: LocalSchedule(3 + stage, 2, stage), num_stages=2)


def test_a_send_without_a_receive_is_named():
    with pytest.raises(ValueError, match=r"stage 0 at SendActivation\(buffer_id=0\) of step 1 meets no receive"):
        by_hand([SendActivation(0)] * 2, [RecvActivation(0)] * 1 + [ForwardPass(0)] * 2, num_steps=2)


def test_stages_that_wait_for_each_other_are_all_named():
    with pytest.raises(ValueError, match="cannot run") as error:
        by_hand([RecvGrad(3), SendActivation(0)], [RecvActivation(1), SendGrad(0)])
    assert "stage 0 at RecvGrad(buffer_id=3)" in str(error.value)
    assert "stage 1 at RecvActivation(buffer_id=1)" in str(error.value)


def test_a_send_that_nobody_makes_room_for_is_named():
    with pytest.raises(ValueError, match=r"stage 0 at SendActivation\(buffer_id=2\) of step 0 waits for ever"):
        by_hand([SendActivation(buffer) for buffer in range(3)], [ForwardPass(0)], max_packets_in_flight=1)


@pytest.mark.parametrize("instruction", [SendGrad(0), RecvActivation(0)])
def test_the_first_stage_has_nobody_before_it(instruction):
    with pytest.raises(ValueError, match=f"stage 0 at {instruction.name}"):
        by_hand([LoadMicroBatch(0), instruction])


@pytest.mark.parametrize("instruction", [SendActivation(0), RecvGrad(0)])
def test_the_last_stage_has_nobody_behind_it(instruction):
    with pytest.raises(ValueError, match=f"stage 1 at {instruction.name}"):
        by_hand([ForwardPass(0)], [instruction])


def test_an_unknown_instruction_is_named():
    class Wander(PipeInstruction):
        pass

    with pytest.raises(ValueError, match=r"stage 0 at Wander\(\) of step 0: the simulation does not know"):
        by_hand([Wander()])


@pytest.mark.parametrize("values", [{"forward": 0}, {"backward": -1}, {"optimizer": -1}, {"link": -0.5}])
def test_durations_must_be_possible(values):
    with pytest.raises(ValueError, match="a pass must take more than 0, an optimizer step and a link 0 or more"):
        Durations(**values)


def test_durations_must_fit_the_stages():
    with pytest.raises(ValueError, match="3 durations for num_stages=2; give one for each stage"):
        local(2, 2, durations=[Durations()] * 3)


def test_a_bound_of_no_packet_is_refused():
    with pytest.raises(ValueError, match="max_packets_in_flight=0 lets nothing be sent; use 1 or more"):
        local(2, 2, max_packets_in_flight=0)


def test_a_steady_state_takes_two_steps():
    with pytest.raises(ValueError, match="num_steps=2 or more"):
        _ = local(2, 2).steady_bubble


def test_a_stage_without_work_is_all_bubble():
    timeline = by_hand([ForwardPass(0)], [])
    assert timeline.bubble == (0, 1)
    assert by_hand([]).bubble == (1,)
    assert by_hand([]).makespan == 0
