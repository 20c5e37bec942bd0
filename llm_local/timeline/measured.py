"""A run's trace, read back and checked: what each stage did when, and how long it computed and waited.

    trace = read_trace(Path("runs/quickstart"))
    print(stage_times(measured(trace, trace.steps)))

A stage's *bubble* is the share of its steps in which it computes nothing; *link wait* is the part of it spent in
instructions that send or receive. The rest of the bubble is Python between instructions, and for the stock pipeline
the loss, which the last stage tells all others at the end of a step.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from llm_local.files import Json
from llm_local.trace import (
    COMPUTE,
    FOLDER,
    FORMAT,
    LANES,
    OUTER_STEP,
    RECEIVE,
    REFRESH_WAIT,
    STEP,
    Event,
    TraceHeader,
    trace_file,
)

FORWARD, BACKWARD, FROM_ABOVE, OPTIMIZER, LOAD, WAIT = "forward", "backward", "from above", "optimizer", "load", "wait"
SAVE = "save"
WORK = (FORWARD, BACKWARD, FROM_ABOVE, OPTIMIZER, LOAD)
KINDS = {
    "LoadMicroBatch": LOAD,
    "ForwardPass": FORWARD,
    "BackwardPass": BACKWARD,
    "ReduceGrads": OPTIMIZER,
    "ReduceTiedGrads": OPTIMIZER,
    "OptimizerStep": OPTIMIZER,
    "SendActivation": WAIT,
    "RecvActivation": WAIT,
    "SendGrad": WAIT,
    "RecvGrad": WAIT,
    REFRESH_WAIT: WAIT,
    OUTER_STEP: WAIT,
}
TRAIN, EVAL = "train", "eval"


@dataclass(frozen=True)
class RankTrace:
    """Events in order of time, on the clock of rank 0, which the rank's own is told from up to error_seconds."""

    header: TraceHeader
    events: tuple[Event, ...]
    error_seconds: float

    @cached_property
    def steps(self) -> dict[int, tuple[float, float]]:
        """Start and end of each training step that was recorded to its end."""
        return {e.step: (e.start, e.end) for e in self.events if e.lane == STEP and e.split == TRAIN}


@dataclass(frozen=True)
class RunTrace:
    """The traces of all ranks of a run, stage by stage."""

    folder: Path
    ranks: tuple[RankTrace, ...]

    @cached_property
    def steps(self) -> list[int]:
        """The training steps that all ranks have recorded to their end."""
        return sorted(set.intersection(*(set(rank.steps) for rank in self.ranks)))

    def select(self, text: str) -> list[int]:
        """'5-8' or '7' as steps. Raises ValueError where that is no such text, or the trace has no such step."""
        first, dash, last = text.partition("-")
        last = last if dash else first
        if not (first.isdecimal() and last.isdecimal()):
            raise ValueError(f"--steps {text}: give one step, or the first and the last of some, as 5-8")
        found = [step for step in self.steps if int(first) <= step <= int(last)]
        if not found:
            raise ValueError(f"--steps {text}: {self.folder} has the steps {self.steps[0]}-{self.steps[-1]}")
        return found


@dataclass(frozen=True)
class Bar:
    """What a stage did from start to end, in seconds. kind: one of WORK, WAIT or SAVE."""

    kind: str
    start: float
    end: float
    step: int
    micro_batch: int | None = None
    block: int | None = None
    split: str = TRAIN


@dataclass(frozen=True)
class Row:
    """One rank's bars, its steps, and beside them the packets that its threads received."""

    stage: int
    replica: int
    bars: tuple[Bar, ...]
    steps: Mapping[int, tuple[float, float]]
    packets: tuple[tuple[float, float], ...] = ()

    def seconds(self, kinds: Sequence[str]) -> float:
        """How long training steps took for bars of these kinds."""
        return sum(b.end - b.start for b in self.bars if b.kind in kinds and b.split == TRAIN and b.step in self.steps)


@dataclass(frozen=True)
class StageTime:
    """Means over a stage's steps and replicas."""

    stage: int
    step_seconds: float
    compute_seconds: float
    wait_seconds: float

    @property
    def bubble(self) -> float:
        return 1 - self.compute_seconds / self.step_seconds

    @property
    def wait_share(self) -> float:
        return self.wait_seconds / self.step_seconds


def read_trace(run: Path) -> RunTrace:
    """The trace in a run's folder.

    Raises ValueError naming the file where there is none, one is missing, damaged or no trace, or two are of different
    runs.
    """
    folder = run / FOLDER
    paths = sorted(folder.glob("stage-*.jsonl"))
    if not paths:
        raise ValueError(f"{run} has no {FOLDER}/stage-*.jsonl; name the --output_dir of a run with --trace true")
    ranks = [_read_rank(path) for path in paths]
    first = ranks[0].header
    for path, rank in zip(paths, ranks, strict=True):
        if rank.header.run != first.run:
            raise ValueError(f"{path} is of another run than {paths[0].name}; keep the files of one run in a folder")
        if rank.header.file_name != path.name:
            raise ValueError(f"{path} is what its run wrote as {rank.header.file_name}; give it that name again")
    wanted = [trace_file(s, r) for s in range(first.num_stages) for r in range(first.num_replicas)]
    for name in wanted:
        if folder / name not in paths:
            raise ValueError(f"{folder} lacks {name}, one of {len(wanted)} files of this run; copy it there")
    trace = RunTrace(folder, tuple(ranks))
    if not trace.steps:
        raise ValueError(f"{folder} has no training step that all stages ended; a run writes it as it goes")
    return trace


def _read_rank(path: Path) -> RankTrace:
    try:
        lines = path.read_text().splitlines()
    except UnicodeDecodeError:
        lines = []
    readings, events, header = [], [], None
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
            if number == 1:
                header, clock = _read_header(record)
                readings.append(clock)
            elif "clock" in record:
                readings.append(record["clock"])
            else:
                events.append(_checked(Event(**record)))
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            if number == 1:
                break
            if number == len(lines):  # a run that was killed left it half written
                continue
            raise ValueError(f"{path}, line {number}, is damaged: {' '.join(str(error).split())}") from error
    if header is None:
        raise ValueError(f"{path} is no trace: its first line is not the header that --trace true writes")
    moved = [replace(e, start=_common(readings, e.start), end=_common(readings, e.end)) for e in events]
    return RankTrace(header, tuple(sorted(moved, key=lambda e: e.start)), max(c["error_seconds"] for c in readings))


def _read_header(record: Json) -> tuple[TraceHeader, dict[str, float]]:
    if record.pop("llm_local_trace") != FORMAT:
        raise ValueError("written by another version")
    clock = record.pop("clock")
    return TraceHeader(**record), clock


def _checked(event: Event) -> Event:
    if event.lane not in LANES or (event.lane == COMPUTE and event.name not in KINDS):
        raise ValueError(f"there is no {event.lane} {event.name}")
    if not event.start <= event.end:
        raise ValueError(f"{event.name} ends before it starts")
    return event


def _common(readings: Sequence[Mapping[str, float]], at: float) -> float:
    """A rank's time on rank 0's clock: the offset changes linearly from the first reading to the last."""
    first, last = readings[0], readings[-1]
    span = last["at"] - first["at"]
    drift = (last["offset_seconds"] - first["offset_seconds"]) / span if span > 0 else 0.0
    return at + first["offset_seconds"] + drift * (at - first["at"])


def kind_of(event: Event) -> str:
    return FROM_ABOVE if event.from_above else KINDS[event.name]


def measured(trace: RunTrace, steps: Iterable[int]) -> list[Row]:
    """A row for each rank, with what it did from the start of its first step to the end of the last."""
    chosen, rows = set(steps), []
    for rank in trace.ranks:
        spans = {step: span for step, span in rank.steps.items() if step in chosen}
        start, end = min(s for s, _ in spans.values()), max(e for _, e in spans.values())
        inside = [e for e in rank.events if e.end > start and e.start < end]
        bars = [
            Bar(kind_of(e), e.start, e.end, e.step, e.micro_batch, e.block, e.split)
            for e in inside
            if e.lane == COMPUTE
        ]
        bars += [Bar(SAVE, e.start, e.end, e.step, split=SAVE) for e in inside if (e.lane, e.split) == (STEP, SAVE)]
        packets = tuple((e.start, e.end) for e in inside if e.lane == RECEIVE)
        rows.append(Row(rank.header.stage, rank.header.replica, tuple(bars), spans, packets))
    return rows


def stage_times(rows: Sequence[Row]) -> list[StageTime]:
    """One for each stage."""
    times = []
    for stage in sorted({row.stage for row in rows}):
        mine = [row for row in rows if row.stage == stage]
        count = sum(len(row.steps) for row in mine)
        step = sum(end - start for row in mine for start, end in row.steps.values()) / count
        work, wait = (sum(row.seconds(kinds) for row in mine) / count for kinds in (WORK, (WAIT,)))
        times.append(StageTime(stage, step, work, wait))
    return times


def table(times: Sequence[StageTime], ideal: Sequence[StageTime]) -> str:
    """A line a stage; the last two columns are those of the simulation."""
    lines = ["stage   step ms   compute ms   link wait ms   link wait   bubble | simulated: step ms   bubble"]
    for time, other in zip(times, ideal, strict=True):
        lines.append(
            f"{time.stage:>5} {1000 * time.step_seconds:>9.1f} {1000 * time.compute_seconds:>12.1f} "
            f"{1000 * time.wait_seconds:>14.1f} {time.wait_share:>11.1%} {time.bubble:>8.1%} | "
            f"{1000 * other.step_seconds:>18.1f} {other.bubble:>8.1%}"
        )
    return "\n".join(lines)
