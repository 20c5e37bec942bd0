"""When each stage works and when it waits: a schedule's instructions on one clock, without a process.

    print(picture(simulate(lambda stage: LocalSchedule(4, 2, stage), num_stages=2)))

Each stage runs its own instructions in order; its n-th message to a neighbour meets the neighbour's n-th receive.
Passes and optimizer steps take time, and so may links. Collectives are not drawn: their time belongs to `optimizer`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from heapq import heappop, heappush
from math import ceil

from deepspeed.runtime.pipe import schedule as pipe

from llm_local.simulator.channel import Channels
from llm_local.simulator.clock import ClockedStage, Core, Durations, Kind, TimeSpan, make_ops

__all__ = ["Durations", "Kind", "TimeSpan", "Timeline", "picture", "simulate"]

_UNIT = Durations()


@dataclass(frozen=True)
class Timeline:
    """What `simulate` found; `spans[k]` are those of stage k, in order of time.

    messages: how many each stage sent to each other one, by (from, to), in all steps.
    """

    spans: tuple[tuple[TimeSpan, ...], ...]
    messages: Mapping[tuple[int, int], int] = field(default_factory=dict)

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
            last, start = _last_step(spans)
            shares.append(1 - sum(span.end - span.start for span in last) / (last[-1].end - start))
        return tuple(shares)

    @property
    def step_time(self) -> float:
        """Time between the last stage's ends of the last two steps: what a step takes once the pipe is full.

        Raises ValueError if there is only one step.
        """
        last, start = _last_step(self.spans[-1])
        return last[-1].end - start

    @property
    def peak_alive(self) -> tuple[int, ...]:
        """The most passes (a micro-batch through a block) that each stage holds the activations of at a time: from the
        start of the forward pass to the end of the last pass that reads them."""
        peaks = []
        for spans in self.spans:
            passes = [(span.step, span.micro_batch, span.block) for span in spans]
            last = {name: place for place, name in enumerate(passes)}
            alive = peak = 0
            for place, span in enumerate(spans):
                alive += span.kind == "F"
                peak = max(peak, alive)
                alive -= span.kind != "O" and last[passes[place]] == place
            peaks.append(peak)
        return tuple(peaks)


def _last_step(spans: Sequence[TimeSpan]) -> tuple[Sequence[TimeSpan], float]:
    """The spans of the last step, and when the one before ended."""
    last = [span for span in spans if span.step == spans[-1].step]
    if len(last) == len(spans):
        raise ValueError("a steady state takes two steps; simulate with num_steps=2 or more")
    return last, spans[-len(last) - 1].end


def simulate(
    schedule: Callable[[int], Iterable[Sequence[pipe.PipeInstruction]]],
    num_stages: int,
    num_steps: int = 1,
    durations: Durations | Sequence[Durations] = _UNIT,
    max_packets_in_flight: int | None = None,
    num_cores: int | None = None,
) -> Timeline:
    """Runs `schedule(stage)` of every stage `num_steps` times, back to back; durations are common or one a stage.

    A send waits while the neighbour has yet to receive max_packets_in_flight earlier ones and the one before them, and
    for the way of what asks for it; None: it never waits.
    num_cores: stage k works on core k % num_cores, in equal parts with the others that work there, also after its own
    num_steps as long as others have not done theirs; None: each stage has a core.
    Raises ValueError naming stage and instruction if a receive has no send, the reverse, or gets another message.
    """
    if max_packets_in_flight is not None and max_packets_in_flight < 1:
        raise ValueError(f"max_packets_in_flight={max_packets_in_flight} lets nothing be sent; use 1 or more, or None")
    if num_cores is not None and num_cores < 1:
        raise ValueError(f"num_cores={num_cores} can do no work; use 1 or more, or None for one each")
    each = [durations] * num_stages if isinstance(durations, Durations) else durations
    if len(each) != num_stages:
        raise ValueError(f"{len(each)} durations for num_stages={num_stages}; give one for each stage, or one for all")
    if num_cores is not None:  # who goes on while another waits for ever would never end
        simulate(schedule, num_stages, 1, durations, max_packets_in_flight)
    channels = Channels(max_packets_in_flight)
    events: list[tuple[float, int]] = [(0.0, stage) for stage in range(num_stages)]  # when a stage may go on
    stages: list[ClockedStage] = []
    for stage in range(num_stages):
        program = (instruction for commands in schedule(stage) for instruction in commands)
        ops = make_ops(stage, program, each[stage], channels)
        wake = partial(_wake, events, num_stages)
        stages.append(ClockedStage(stage, ops, num_steps, wake, num_cores is not None))
    _run(stages, events, [Core() for _ in range(min(num_cores or num_stages, num_stages))])
    blocked = [f"{stage.where()} waits for ever" for stage in stages if not stage.is_done]
    unmet = [f"{m} meets no receive" for channel in channels.values() for m in channel.unmet() if m.step < num_steps]
    if blocked or unmet:
        raise ValueError("the schedule cannot run: " + "; ".join(blocked or unmet))
    messages: Counter[tuple[int, int]] = Counter()
    for channel in channels.values():
        messages[channel.source, channel.target] += sum(message.step < num_steps for message in channel.sent)
    return Timeline(tuple(tuple(stage.spans) for stage in stages), dict(messages))


def _wake(events: list[tuple[float, int]], num_stages: int, stage: int, at: float) -> None:
    if 0 <= stage < num_stages:
        heappush(events, (at, stage))


def _run(stages: Sequence[ClockedStage], events: list[tuple[float, int]], cores: Sequence[Core]) -> None:
    """Until nothing happens any more. Raises ValueError where a stage gets another message than it waits for."""
    unfinished = {stage.stage for stage in stages if not stage.is_done}
    while events and unfinished:
        now, number = heappop(events)
        stage, core = stages[number], cores[number % len(cores)]
        due = core.due
        if due == (now, number):
            core.end(number, now)
            stage.end_work(now)
            due = None
        duration = stage.advance(now)
        if duration is not None:
            core.begin(number, duration, now)
        if core.due and core.due != due:
            heappush(events, core.due)
        if stage.is_done:
            unfinished.discard(number)


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
