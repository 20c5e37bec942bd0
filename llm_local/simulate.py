"""When each stage works and when it waits: a schedule's instructions on one clock, without a process.

    print(picture(simulate(lambda stage: LocalSchedule(4, 2, stage), num_stages=2)))

Each stage runs its own instructions in order; its n-th message to a neighbour meets the neighbour's n-th receive.
Passes and optimizer steps take time, and so may links. Collectives are not drawn: their time belongs to `optimizer`.
"""

from __future__ import annotations

import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from math import ceil
from typing import Literal

from deepspeed.runtime.pipe import schedule as pipe

Kind = Literal["F", "B", "G", "O"]


@dataclass(frozen=True)
class Durations:
    """Time that a stage takes for a pass through one block and an optimizer step, and a message of it for its way."""

    forward: float = 1
    backward: float = 1
    optimizer: float = 1
    link: float = 0

    def __post_init__(self):
        if min(self.forward, self.backward) <= 0 or min(self.optimizer, self.link) < 0:
            raise ValueError(f"{self}: a pass must take more than 0, an optimizer step and a link 0 or more")


@dataclass(frozen=True)
class TimeSpan:
    """A pass of one stage, or its optimizer step, which has neither micro-batch nor block."""

    stage: int
    step: int
    kind: Kind
    micro_batch: int | None
    block: int | None
    start: float
    end: float


@dataclass(frozen=True)
class Timeline:
    """What `simulate` found; `spans[k]` are those of stage k, in order of time."""

    spans: tuple[tuple[TimeSpan, ...], ...]

    @property
    def makespan(self) -> float:
        return max((span.end for spans in self.spans for span in spans), default=0)

    @property
    def busy(self) -> tuple[float, ...]:
        """Time that each stage works."""
        return tuple(sum(span.end - span.start for span in spans) for spans in self.spans)

    @property
    def bubble(self) -> tuple[float, ...]:
        """Share of the whole run that each stage waits; filling and draining the pipe count."""
        return tuple(1 - busy / self.makespan if busy else 1.0 for busy in self.busy)

    @property
    def steady_bubble(self) -> tuple[float, ...]:
        """Share that each stage waits between its ends of the last two steps. ValueError if it has only one step."""
        shares = []
        for spans in self.spans:
            last = [span for span in spans if span.step == spans[-1].step]
            if len(last) == len(spans):
                raise ValueError("a steady state takes two steps; simulate with num_steps=2 or more")
            start = spans[-len(last) - 1].end
            shares.append(1 - sum(span.end - span.start for span in last) / (last[-1].end - start))
        return tuple(shares)


@dataclass
class _Channel:
    """The messages of one stage to one neighbour, in order: the time of arrival and the sender of each."""

    max_packets: int
    sent: list[tuple[float, str]] = field(default_factory=list)
    received_at: list[float] = field(default_factory=list)

    def send(self, now: float, latency: float, sender: str) -> float | None:
        """When the sender goes on; None as long as that hangs on a receive still to come."""
        makes_room = len(self.sent) - self.max_packets
        if makes_room >= len(self.received_at):
            return None
        now = max(now, self.received_at[makes_room]) if makes_room >= 0 else now
        self.sent.append((now + latency, sender))
        return now

    def receive(self, now: float) -> float | None:
        """When the receiver goes on; None as long as there is no such send."""
        if len(self.received_at) == len(self.sent):
            return None
        self.received_at.append(max(now, self.sent[len(self.received_at)][0]))
        return self.received_at[-1]


@dataclass
class _Stage:
    stage: int
    program: list[tuple[int, pipe.PipeInstruction]]
    durations: Durations
    channels: dict[tuple[int, int], _Channel]
    now: float = 0
    num_done: int = 0
    spans: list[TimeSpan] = field(default_factory=list)
    num_passes: Counter[tuple[Kind, int, int | None]] = field(default_factory=Counter)

    def advance(self) -> bool:
        """Runs up to the first instruction that has to wait; False if that is the very next one, or all are done."""
        before = self.num_done
        while self.num_done < len(self.program) and (end := self._end_of(*self.program[self.num_done])) is not None:
            self.now = end
            self.num_done += 1
        return self.num_done > before

    def where(self) -> str:
        step, instruction = self.program[self.num_done]
        return f"stage {self.stage} at {instruction!r} of step {step}"

    def _end_of(self, step: int, instruction: pipe.PipeInstruction) -> float | None:
        here, now, times = self.stage, self.now, self.durations
        match instruction:
            case pipe.ForwardPass():
                return self._work(step, "F", times.forward, getattr(instruction, "block", 0))
            case pipe.BackwardPass():
                kind = "G" if getattr(instruction, "from_above", False) else "B"
                return self._work(step, kind, times.backward, getattr(instruction, "block", 0))
            case pipe.OptimizerStep():
                return self._work(step, "O", times.optimizer, None)
            case pipe.SendActivation():
                return self.channels[here, here + 1].send(now, times.link, self.where())
            case pipe.SendGrad():
                return self.channels[here, here - 1].send(now, times.link, self.where())
            case pipe.RecvActivation():
                return self.channels[here - 1, here].receive(now)
            case pipe.RecvGrad():
                return self.channels[here + 1, here].receive(now)
            case pipe.LoadMicroBatch() | pipe.ReduceGrads() | pipe.ReduceTiedGrads():
                return now
        raise ValueError(f"{self.where()}: the simulation does not know this instruction")

    def _work(self, step: int, kind: Kind, duration: float, block: int | None) -> float:
        micro_batch = None if block is None else self.num_passes[kind, step, block]
        self.num_passes[kind, step, block] += 1
        self.spans.append(TimeSpan(self.stage, step, kind, micro_batch, block, self.now, self.now + duration))
        return self.spans[-1].end


def simulate(
    schedule: Callable[[int], Iterable[Sequence[pipe.PipeInstruction]]],
    num_stages: int,
    num_steps: int = 1,
    durations: Durations | Sequence[Durations] = Durations(),
    max_packets_in_flight: int | None = None,
) -> Timeline:
    """Runs `schedule(stage)` of every stage `num_steps` times, back to back; durations are common or one a stage.

    A send waits while max_packets_in_flight earlier ones to that neighbour are not received; None: it never waits.
    Raises ValueError naming stage and instruction if a receive has no send, or the reverse.
    """
    if max_packets_in_flight is not None and max_packets_in_flight < 1:
        raise ValueError(f"max_packets_in_flight={max_packets_in_flight} lets nothing be sent; use 1 or more, or None")
    each = [durations] * num_stages if isinstance(durations, Durations) else durations
    if len(each) != num_stages:
        raise ValueError(f"{len(each)} durations for num_stages={num_stages}; give one for each stage, or one for all")
    channels: dict[tuple[int, int], _Channel] = defaultdict(lambda: _Channel(max_packets_in_flight or sys.maxsize))
    stages = []
    for stage in range(num_stages):
        program = [(step, i) for step in range(num_steps) for commands in schedule(stage) for i in commands]
        stages.append(_Stage(stage, program, each[stage], channels))
    while any([stage.advance() for stage in stages]):  # a list: every stage gets its turn; no progress ends the loop
        pass
    blocked = [f"{stage.where()} waits for ever" for stage in stages if stage.num_done < len(stage.program)]
    unmet = [f"{sender} meets no receive" for c in channels.values() for _, sender in c.sent[len(c.received_at) :]]
    if blocked or unmet:
        raise ValueError("the schedule cannot run: " + "; ".join(blocked or unmet))
    return Timeline(tuple(tuple(stage.spans) for stage in stages))


def picture(timeline: Timeline, unit: float = 1) -> str:
    """One line a stage, one character for each `unit` of time: what runs in the middle of it, or a space."""
    width = len(str(len(timeline.spans) - 1))
    lines = []
    for stage, spans in enumerate(timeline.spans):
        line = ""
        for span in spans:
            line = line.ljust(ceil(span.start / unit - 0.5)).ljust(ceil(span.end / unit - 0.5), span.kind)
        lines.append(f"stage {stage:>{width}} | {line}".rstrip())
    return "\n".join(lines)
