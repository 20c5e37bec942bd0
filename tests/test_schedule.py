"""The local schedule: its picture, its instructions, and what it saves against 1F1B."""

import textwrap

import pytest
from deepspeed.runtime.pipe.schedule import (
    BackwardPass,
    ForwardPass,
    LoadMicroBatch,
    OptimizerStep,
    RecvActivation,
    RecvGrad,
    ReduceGrads,
    SendActivation,
    SendGrad,
    TrainSchedule,
)

from llm_local.methods import schedule
from llm_local.methods.final_steps import GlobalSchedule
from llm_local.methods.overlapping import OverlapSchedule
from llm_local.methods.schedule import EvalSchedule, LocalSchedule, Schedule
from llm_local.methods.soft_targets import DistillationSchedule
from llm_local.simulator.simulate import Durations, picture, simulate

SHAPES = [(1, 1), (1, 4), (2, 1), (2, 4), (3, 2), (4, 4), (4, 8), (5, 3), (8, 16)]


def instructions(schedule_of_stage):
    return [instruction for commands in schedule_of_stage for instruction in commands]


def names(schedule_of_stage):
    return [instruction.name for instruction in instructions(schedule_of_stage)]


def test_docstring_shows_what_the_simulation_draws():
    drawn = [
        picture(simulate(lambda stage, make=make: make(4, 2, stage), num_stages=2, num_steps=2))
        for make in (LocalSchedule, TrainSchedule, OverlapSchedule)
    ]
    lines = [line for line in schedule.__doc__.splitlines() if line.lstrip().startswith("stage ")]
    assert textwrap.dedent("\n".join(lines)) == "\n".join(drawn)


def test_a_step_of_the_first_and_of_the_last_stage():
    assert names(LocalSchedule(2, 2, 0)) == [
        *("LoadMicroBatch", "ForwardPass", "SendActivation", "BackwardPass"),
        *("LoadMicroBatch", "ForwardPass", "SendActivation", "BackwardPass"),
        *("ReduceGrads", "OptimizerStep"),
    ]
    assert names(LocalSchedule(2, 2, 1)) == [
        *("RecvActivation", "ForwardPass", "BackwardPass"),
        *("RecvActivation", "ForwardPass", "BackwardPass"),
        *("ReduceGrads", "OptimizerStep"),
    ]


def test_one_list_a_micro_batch():
    assert len(list(LocalSchedule(5, 3, 1))) == 5


def test_each_block_is_trained_before_the_next_and_the_output_leaves_before_the_last_backward_pass():
    got = instructions(LocalSchedule(1, 2, 0, num_blocks=3))
    shown = [(type(i), getattr(i, "block", None)) for i in got]
    assert shown == [
        (LoadMicroBatch, None),
        (ForwardPass, 0),
        (BackwardPass, 0),
        (ForwardPass, 1),
        (BackwardPass, 1),
        (ForwardPass, 2),
        (SendActivation, None),
        (BackwardPass, 2),
        (ReduceGrads, None),
        (OptimizerStep, None),
    ]


@pytest.mark.parametrize("num_blocks", [1, 2])
@pytest.mark.parametrize(("num_stages", "micro_batches"), SHAPES)
def test_no_gradient_crosses_a_boundary_and_every_send_is_met(num_stages, micro_batches, num_blocks):
    stages = [instructions(LocalSchedule(micro_batches, num_stages, k, num_blocks)) for k in range(num_stages)]
    for stage, program in enumerate(stages):
        assert not any(isinstance(i, (SendGrad, RecvGrad)) for i in program)
        received = sum(isinstance(i, RecvActivation) for i in program)
        sent = sum(isinstance(i, SendActivation) for i in program)
        assert received == (0 if stage == 0 else micro_batches)
        assert sent == (0 if stage == num_stages - 1 else micro_batches)
        assert sum(isinstance(i, LoadMicroBatch) for i in program) == (micro_batches if stage == 0 else 0)
        for work in (ForwardPass, BackwardPass):
            assert sum(isinstance(i, work) for i in program) == micro_batches * num_blocks
        assert [type(i) for i in program[-2:]] == [ReduceGrads, OptimizerStep]
        assert sum(isinstance(i, OptimizerStep) for i in program) == 1


@pytest.mark.parametrize(("num_stages", "micro_batches"), SHAPES)
def test_one_buffer_whatever_the_pipe(num_stages, micro_batches):
    for stage in range(num_stages):
        local = LocalSchedule(micro_batches, num_stages, stage, num_blocks=2)
        assert local.num_pipe_buffers() == 1
        assert {i.buffer_id for i in instructions(local) if hasattr(i, "buffer_id")} == {0}


@pytest.mark.parametrize("num_stages", [1, 2, 3])
def test_evaluation_is_the_forward_half(num_stages):
    skipped = (BackwardPass, ReduceGrads, OptimizerStep)
    for stage in range(num_stages):
        train = instructions(LocalSchedule(3, num_stages, stage, num_blocks=2))
        evaluation = instructions(EvalSchedule(3, num_stages, stage, num_blocks=2))
        kept = [repr(i) for i in train if not isinstance(i, skipped)]
        assert [repr(i) for i in evaluation] == kept


@pytest.mark.parametrize("durations", [Durations(), Durations(1, 2, 3, link=5), Durations(optimizer=0)])
@pytest.mark.parametrize("num_blocks", [1, 3])
@pytest.mark.parametrize(("num_stages", "micro_batches"), SHAPES)
def test_local_stages_of_equal_cost_never_wait_once_the_pipe_is_full(num_stages, micro_batches, num_blocks, durations):
    def local(stage):
        return LocalSchedule(micro_batches, num_stages, stage, num_blocks)

    assert simulate(local, num_stages, num_steps=3, durations=durations).steady_bubble == (0,) * num_stages


@pytest.mark.parametrize("backward", [1, 2])
@pytest.mark.parametrize(("num_stages", "micro_batches"), SHAPES)
def test_1f1b_waits_for_the_textbook_share(num_stages, micro_batches, backward):
    def one_f_one_b(stage):
        return TrainSchedule(micro_batches, num_stages, stage)

    timeline = simulate(one_f_one_b, num_stages, num_steps=3, durations=Durations(1, backward, optimizer=0))
    share = (num_stages - 1) / (micro_batches + num_stages - 1)
    assert timeline.steady_bubble == pytest.approx((share,) * num_stages)


@pytest.mark.parametrize(("num_stages", "micro_batches"), SHAPES)
def test_filling_the_pipe_costs_a_forward_pass_a_stage(num_stages, micro_batches):
    def local(stage):
        return LocalSchedule(micro_batches, num_stages, stage)

    num_steps = 4
    timeline = simulate(local, num_stages, num_steps, Durations(forward=1, backward=2, optimizer=1))
    assert timeline.makespan == num_steps * (3 * micro_batches + 1) + num_stages - 1


GOLDEN = {
    OverlapSchedule: """\
stage 0 | FBFBGGOFBFBGGO
stage 1 |  FBFBGGOFBFBGGO
stage 2 |   FBFBO  FBFBO
""",
    DistillationSchedule: """\
stage 0 | FFBBOFF BBO
stage 1 |  FFB BOFFB BO
stage 2 |   FBFBO FBFBO
""",
    GlobalSchedule: """\
stage 0 | FF   G GOFF   G GO
stage 1 |  FF G GO  FF G GO
stage 2 |   FBFBO    FBFBO
""",
}


@pytest.mark.parametrize("make", GOLDEN)
def test_pictures_of_what_sends_back(make: type[Schedule]):
    """Three stages, two micro-batches, two steps."""
    drawn = picture(simulate(lambda stage: make(2, 3, stage), num_stages=3, num_steps=2, max_packets_in_flight=1))
    assert drawn == GOLDEN[make].rstrip()


@pytest.mark.parametrize("make", GOLDEN)
@pytest.mark.parametrize(("micro_batches", "stages"), SHAPES)
@pytest.mark.parametrize("num_blocks", [1, 3])
def test_every_micro_batch_comes_and_goes_once(make: type[Schedule], micro_batches, stages, num_blocks):
    """Every message meets its receive with one packet in flight, and no buffer is taken before it is free."""
    schedules = [make(micro_batches, stages, stage, num_blocks) for stage in range(stages)]
    simulate(lambda stage: schedules[stage], stages, num_steps=2, max_packets_in_flight=1)
    for stage, made in enumerate(schedules):
        sent_back = [i for i in instructions(made) if isinstance(i, SendGrad)]
        assert len(sent_back) == (micro_batches if stage > 0 else 0)
        backward = [i for i in instructions(made) if isinstance(i, BackwardPass)]
        owed = set()
        for i in instructions(made):
            if isinstance(i, (LoadMicroBatch, RecvActivation)):
                assert not owed & {(i.buffer_id, block) for block in range(num_blocks)}, "the buffer is in use"
                owed |= {(i.buffer_id, block) for block in range(num_blocks)}
            is_last = stage == stages - 1
            if isinstance(i, BackwardPass):
                above = getattr(i, "from_above", False)
                twice = make is OverlapSchedule and not above and not (is_last and i.block == num_blocks - 1)
                if not twice:
                    owed.discard((i.buffer_id, i.block))
        assert not owed
        wanted = num_blocks * micro_batches
        if make is OverlapSchedule:
            wanted += (num_blocks - (stage == stages - 1)) * micro_batches
        assert len(backward) == wanted


def test_nobody_waits_for_more_than_the_next_stage():
    """The steady state of eight overlapping stages is that of two: a gradient makes one hop, not a chain."""
    bubbles = {}
    for stages in (3, 8):
        drawn = simulate(lambda stage, n=stages: OverlapSchedule(1, n, stage), stages, num_steps=6)
        bubbles[stages] = max(drawn.steady_bubble[:-1])
    assert bubbles[8] == bubbles[3]
    chain = simulate(lambda stage: GlobalSchedule(1, 8, stage), 8, num_steps=6)
    assert chain.steady_bubble[0] > 2 * bubbles[8]
