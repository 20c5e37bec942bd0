"""A run that records itself: every instruction of the schedule, on one clock for all ranks."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Trainer, records
from deepspeed.runtime.pipe.schedule import ForwardPass, OptimizerStep, TrainSchedule
from ranks import free_port
from torch.distributed import TCPStore

from llm_local.checks.output_folder import open_output
from llm_local.checks.preflight import preflight
from llm_local.config import ConfigError, parse
from llm_local.files import Unwritten
from llm_local.methods.overlapping import OverlapSchedule
from llm_local.methods.schedule import LocalSchedule
from llm_local.place import Place
from llm_local.timeline.chrome_trace import meetings
from llm_local.timeline.measured import Row, RunTrace, measured, read_trace, stage_times
from llm_local.timeline.replay import simulated
from llm_local.trace import (
    BUFFERED_EVENTS,
    COMPUTE,
    OUTER_STEP,
    RECEIVE,
    REFRESH,
    REFRESH_WAIT,
    Event,
    Reading,
    TraceHeader,
    Tracer,
    read_clock,
)
from llm_local.watchdog import Watchdog
from llm_local.world import World

MICRO_BATCHES, STEPS = 3, 4
METHODS: dict[str, dict[str, Any]] = {
    "local": {"layers_per_block": 1},
    "overlapping": {"method": "overlapping", "layers_per_block": 2, "block_stride": 1},
    "backprop": {"method": "backprop"},
}


def schedule_of(method: str, stage: int) -> Any:
    if method == "backprop":
        return TrainSchedule(MICRO_BATCHES, 2, stage)
    kind = OverlapSchedule if method == "overlapping" else LocalSchedule
    return kind(MICRO_BATCHES, 2, stage, num_blocks=1 if method == "overlapping" and stage == 0 else 2)


@pytest.fixture
def tracer(tmp_path: Path) -> Tracer:
    return Tracer(tmp_path, TraceHeader("a", 0, 0, 1, 1, "chunked", 4, "here/cpu"), None)


def read_both(skew: float) -> tuple[Reading, Reading]:
    """What two ranks find through a real store, where the second one's clock is ahead by so many seconds."""
    server: Any = TCPStore("127.0.0.1", free_port(), None, True, timedelta(seconds=30), wait_for_workers=False)

    def rank(number: int) -> Reading:
        world = World(Place(number, (1, 1)), torch.device("cpu"), server.clone(), Watchdog(number), 30.0)
        clock: Callable[[], float] = (lambda: time.perf_counter() + skew) if number else time.perf_counter
        return read_clock(world, number, 2, "start", 30.0, clock)

    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(rank, range(2))
    return first, second


class TestClock:
    def test_the_offset_is_off_by_no_more_than_it_says(self):
        first, second = read_both(skew=5.0)
        assert first.offset_seconds == 0
        assert 0 < second.error_seconds < 5
        assert abs(second.offset_seconds + 5) <= second.error_seconds

    def test_ranks_of_one_machine_share_a_clock(self):
        _, second = read_both(skew=0.0)
        assert (second.offset_seconds, second.error_seconds) == (0, 0)


class TestTracer:
    def test_a_wrapped_instruction_runs_and_is_recorded(self, tracer: Tracer):
        done = []
        run = tracer.wrap({ForwardPass: lambda buffer_id, block: done.append((buffer_id, block))})[ForwardPass]
        tracer.start(Reading(0.0, 0.0, 0.0))
        with tracer.batch("train", 1):
            for command in (ForwardPass(0, block=1), ForwardPass(1, block=1)):
                run(**command.kwargs)
        tracer.close(Reading(1.0, 0.0, 0.0))
        run(buffer_id=0, block=0)  # an export's check, say: nothing belongs to it
        assert done == [(0, 1), (1, 1), (0, 0)]
        events = [e for e in read_trace(tracer.path.parents[1]).ranks[0].events if e.lane == COMPUTE]
        assert [(e.name, e.step, e.micro_batch, e.block) for e in events] == [
            ("ForwardPass", 1, 0, 1),
            ("ForwardPass", 1, 1, 1),
        ]

    def test_the_work_of_a_device_is_waited_for_at_both_ends(self, tmp_path: Path, tracer: Tracer):
        log = []
        slow = Tracer(tmp_path, tracer.header, lambda: log.append("waited"))
        slow.wrap({OptimizerStep: lambda: log.append("stepped")})[OptimizerStep]()
        assert log == ["waited", "stepped", "waited"]

    def test_events_do_not_pile_up_in_memory(self, tracer: Tracer):
        tracer.start(Reading(0.0, 0.0, 0.0))
        for step in (1, 2):
            with tracer.batch("train", step):
                for _ in range(BUFFERED_EVENTS):
                    tracer.record(Event(COMPUTE, "ForwardPass", 0.0, 1.0, "train", step))
        assert len(tracer.path.read_text().splitlines()) == 1 + 2 * (BUFFERED_EVENTS + 1)

    def test_a_full_disk_is_named(self, tracer: Tracer):
        tracer.path.parent.mkdir()
        tracer.path.symlink_to("/dev/full")
        with pytest.raises(Unwritten) as caught:
            tracer.start(Reading(0.0, 0.0, 0.0))
        assert str(caught.value) == (
            f"{tracer.path} could not be written (No space left on device); make room there or change its permissions, "
            "and start again"
        )


@pytest.fixture(scope="module")
def train(tmp_path_factory: pytest.TempPathFactory, cache: Path) -> Callable[..., Path]:
    """Runs of a model of four layers on two stages, each trained once."""
    trainer = Trainer(tmp_path_factory.mktemp("runs"), cache)
    shared = {"num_stages": 2, "max_steps": STEPS, "gradient_accumulation_steps": MICRO_BATCHES, "trace": True}
    done: dict[str, Path] = {}

    def run(name: str, ranks: int = 2, **settings: Any) -> Path:
        if name not in done:
            done[name] = trainer.run(name, ranks, **shared | settings)
        return done[name]

    return run


@pytest.fixture(params=METHODS)
def method(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def output(train: Callable[..., Path], method: str) -> Path:
    return train(method, **METHODS[method])


@pytest.mark.processes
class TestOfARun:
    def test_every_instruction_of_the_schedule_is_there_in_order(self, output: Path, method: str):
        for rank in read_trace(output).ranks:
            wanted = [command for commands in schedule_of(method, rank.header.stage).steps() for command in commands]
            for step in range(1, STEPS + 1):
                found = [e for e in rank.events if (e.lane, e.split, e.step) == (COMPUTE, "train", step)]
                names = [(c.name, c.kwargs.get("block"), c.kwargs.get("from_above", False)) for c in wanted]
                assert [(e.name, e.block, e.from_above) for e in found] == names
                for kind in {(e.name, e.block, e.from_above) for e in found if e.micro_batch is not None}:
                    indices = [e.micro_batch for e in found if (e.name, e.block, e.from_above) == kind]
                    assert indices == list(range(MICRO_BATCHES)), kind

    def test_evaluations_are_there_as_well(self, output: Path):
        for rank in read_trace(output).ranks:
            passes = [e for e in rank.events if e.split == "eval" and e.name == "ForwardPass" and e.block in (0, None)]
            assert [e.micro_batch for e in passes] == [0, 1]

    def test_no_receive_ends_before_its_send_begins(self, output: Path):
        trace = read_trace(output)
        met = list(meetings(list(trace.ranks)))
        assert len(met) == sum(e.name.startswith("Recv") for rank in trace.ranks for e in rank.events)
        for sender, send, receiver, receive in met:
            assert receive.end >= send.start - sender.error_seconds - receiver.error_seconds
        error = sum(rank.error_seconds for rank in trace.ranks)
        for rank in trace.ranks:
            for packet in (event for event in rank.events if event.lane == RECEIVE):
                sends = [e for r, e, _, _ in met if r.header.stage == packet.source]
                same = [e for e in sends if (e.step, e.micro_batch) == (packet.step, packet.micro_batch)]
                assert any(packet.end >= send.start - error for send in same)

    def test_the_instructions_of_a_step_follow_each_other_and_fill_it(self, output: Path):
        """Of a whole run: a single step may be held up anywhere on a busy machine."""
        trace = read_trace(output)
        for row in measured(trace, trace.steps):
            recorded = {record["step"]: record["step_seconds"] for record in records(output, row.stage)}
            for step, (start, end) in row.steps.items():
                bars = [bar for bar in row.bars if bar.step == step and bar.split == "train"]
                edges = [start, *(edge for bar in bars for edge in (bar.start, bar.end)), end]
                assert edges == sorted(edges)
                assert end - start <= recorded[step] + 1e-6
            assert seconds(row) > 0.5 * sum(recorded.values())

    def test_the_simulation_has_the_same_passes(self, output: Path):
        trace = read_trace(output)
        real, ideal = measured(trace, trace.steps), simulated(trace, trace.steps)
        for mine, other in zip(real, ideal, strict=True):
            passes = [(b.kind, b.step, b.micro_batch, b.block or 0) for b in mine.bars if b.split == "train"]
            kinds = ("forward", "backward", "from above")
            assert [p for p in passes if p[0] in kinds] == [
                (b.kind, b.step, b.micro_batch, b.block) for b in other.bars if b.kind in kinds
            ]
        assert all(0 <= time.bubble < 1 for time in stage_times(ideal))

    def test_the_run_joins_the_files_of_all_ranks(self, output: Path):
        content = json.loads((output / "trace/trace.json").read_text())
        spans = [event for event in content["traceEvents"] if event["ph"] == "X"]
        assert len(spans) == sum(len(rank.events) for rank in read_trace(output).ranks)
        assert {event["pid"] for event in spans} == {0, 1}
        assert content["otherData"]["run"] == read_trace(output).ranks[0].header.run


def seconds(row: Row) -> float:
    return sum(bar.end - bar.start for bar in row.bars if bar.split == "train")


@pytest.mark.processes
class TestOfOtherRuns:
    def test_replicas_and_the_shared_head(self, train: Callable[..., Path]):
        trace: RunTrace = read_trace(train("shared", 4, head="shared", head_refresh_steps=2, max_steps=5))
        places = [(rank.header.stage, rank.header.replica) for rank in trace.ranks]
        assert places == [(0, 0), (0, 1), (1, 0), (1, 1)]
        for rank in trace.ranks:
            assert sum(e.name == REFRESH_WAIT for e in rank.events) == 5
            arrived = [e.step for e in rank.events if e.lane == REFRESH]
            assert arrived == ([2] if rank.header.stage == 0 else [])
        assert len(stage_times(measured(trace, trace.steps))) == 2

    def test_replicas_apart(self, train: Callable[..., Path]):
        trace: RunTrace = read_trace(train("apart", 2, num_stages=1, replica_sync_steps=2, max_steps=4))
        for rank in trace.ranks:
            assert sum(e.name == OUTER_STEP for e in rank.events) == 4, "a look at the number of each step"
        assert simulated(trace, trace.steps)
        assert [row.seconds(["wait"]) > 0 for row in measured(trace, trace.steps)] == [True, True]

    def test_a_run_without_the_flag_writes_none(self, trainer: Trainer):
        assert not (trainer.run("plain", 1, max_steps=1) / "trace").exists()

    def test_a_resumed_run_traces_its_own_steps(self, train: Callable[..., Path], trainer: Trainer):
        output = train("saved", save_steps=2, max_steps=2)
        first = read_trace(output).ranks[0].header.run
        resumed = train("saved on", max_steps=3, output_dir=output, resume_from_checkpoint=True)
        assert resumed != output
        trace = read_trace(output)
        assert trace.steps == [3]
        assert trace.ranks[0].header.run != first

    def test_no_step_to_record_is_refused(self, trainer: Trainer):
        output = trainer.run("done", 1, max_steps=1, save_steps=1, trace=True)
        checkpoint = output / "checkpoints/step-00000001"
        again = parse(trainer.flags("done", max_steps=1, trace=True, resume_from_checkpoint=True))
        with pytest.raises(ConfigError) as caught:
            preflight(again, 1)
        assert caught.value.problems == [
            f"trace=True finds no step to record: {checkpoint} is at max_steps; raise it, or leave trace off"
        ]

    def test_a_trace_goes_with_the_run_that_is_replaced(self, trainer: Trainer):
        output = trainer.run("old", 1, max_steps=1, trace=True)
        config = parse(trainer.flags("old", overwrite_output_dir=True))
        open_output(preflight(config, 1))
        assert not (output / "trace").exists()
