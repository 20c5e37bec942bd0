"""What a step of a pipe takes, from the seconds of each stage's passes and what its links can do.

    stages = [StageSeconds(forward=(0.010,), backward=(0.020,), optimizer=0.002)] * 4
    link = Link(latency_seconds=5e-6, seconds_per_byte=1e-9)
    predict(Pipe("1f1b", stages, 8, links=[link], forward_bytes=8e6, backward_bytes=8e6)).step_seconds

The seconds may be measured, or come from FLOPs as in plan/layouts.py. A step is simulated instruction by instruction;
where it has more passes than a person would wait for, it is estimated by the formulas below, and says so.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import lcm

from deepspeed.runtime.pipe.schedule import PipeInstruction, RecvActivation, SendActivation, TrainSchedule

from llm_local.in_flight import packets_asked_for
from llm_local.methods.method import local_schedules
from llm_local.methods.schedule import Schedule
from llm_local.simulator.peer_schedules import GPipeSchedule, InterleavedSchedule, ZeroBubbleSchedule
from llm_local.simulator.simulate import Durations, Timeline, simulate

PEERS = ("gpipe", "1f1b", "interleaved", "zero_bubble")
MOST_PASSES = 20_000  # of all stages in a step that a simulation takes on by default: about a second
_STEPS, _PEER_STEPS = 4, 2  # until the pipe is full; backpropagation drains in each


@dataclass(frozen=True)
class StageSeconds:
    """Seconds that a stage takes for a micro-batch through each of its blocks, or chunks, and once a step.

    weights: the part of each backward pass that computes gradients of weights, which zero_bubble puts off; None: half.
    from_above: a pass for the gradient that the next block sends back; None: as backward.
    optimizer: the step itself, and the collectives that do not run beside the passes.
    """

    forward: tuple[float, ...]
    backward: tuple[float, ...]
    optimizer: float = 0.0
    weights: tuple[float, ...] | None = None
    from_above: tuple[float, ...] | None = None

    def __post_init__(self):
        for name in ("backward", "weights", "from_above"):
            given = getattr(self, name)
            if given is not None and len(given) != len(self.forward):
                raise ValueError(f"{name}={given} has not one number for each of the {len(self.forward)} blocks")

    @property
    def once(self) -> tuple[float, float]:
        """Forward and backward of one micro-batch through all blocks."""
        return sum(self.forward), sum(self.backward)


@dataclass(frozen=True)
class Link:
    """What a link between two stages can do, in each direction."""

    latency_seconds: float = 0.0
    seconds_per_byte: float = 0.0

    def __post_init__(self):
        if min(self.latency_seconds, self.seconds_per_byte) < 0:
            raise ValueError(f"{self}: neither can be negative")

    def seconds(self, num_bytes: float) -> float:
        """From the send of a message to its arrival."""
        return self.latency_seconds + self.seconds_per_byte * num_bytes


@dataclass(frozen=True)
class Prediction:
    """step_seconds: of the full pipe, step after step. idle: the share of it that each stage waits.

    timeline: None where the step was estimated and not simulated.
    """

    step_seconds: float
    idle: tuple[float, ...]
    timeline: Timeline | None = None


@dataclass(frozen=True)
class Pipe:
    """A schedule with all that its step's time depends on. links: one for each boundary, or one for all.

    forward_bytes, backward_bytes: of a message to the stage behind and to the one before. num_cores: as in simulate.
    replicas: of each stage, where they differ and nothing comes back: micro-batch g is trained by replica g mod R, and
    each pair of replicas has a link of its own. Clocks of a stage's replicas run apart.
    Raises ValueError for what cannot be.
    """

    schedule: str
    stages: Sequence[StageSeconds]
    micro_batches: int
    links: Sequence[Link] = (Link(),)
    forward_bytes: float = 0.0
    backward_bytes: float = 0.0
    max_packets_in_flight: int = 4
    num_cores: int | None = None
    replicas: tuple[int, ...] = ()

    def __post_init__(self):
        known = (*local_schedules(), *PEERS)
        if self.schedule not in known:
            raise ValueError(f"schedule={self.schedule!r} is unknown; choose one of {', '.join(known)}")
        if not self.stages:
            raise ValueError("there is no stage; give the seconds of one or more")
        if self.micro_batches < 1:
            raise ValueError(f"micro_batches={self.micro_batches} trains nothing; use 1 or more")
        if len(self.links) not in (1, len(self.stages) - 1):
            raise ValueError(
                f"{len(self.links)} links for {len(self.stages)} stages; give one for all, or {len(self.stages) - 1}"
            )
        if min(self.forward_bytes, self.backward_bytes) < 0:
            raise ValueError("a message has 0 bytes or more")
        if len(self.replicas) not in (0, len(self.stages)) or any(self.micro_batches % r for r in self.replicas):
            raise ValueError(
                f"replicas={self.replicas}: give one number for each of the {len(self.stages)} stages that divides "
                f"the {self.micro_batches} micro-batches"
            )
        assert not self.replicas or (self.local is not None and self.local.back is None), "dealt one way"

    @property
    def local(self) -> type[Schedule] | None:
        """The schedule, where it is one of local learning."""
        return local_schedules().get(self.schedule)

    @property
    def num_stages(self) -> int:
        return len(self.stages)

    @property
    def num_passes(self) -> int:
        """Of all stages in one step."""
        return self.micro_batches * sum(len(stage.forward) + len(stage.backward) for stage in self.stages)

    @property
    def replicas_of(self) -> tuple[int, ...]:
        return self.replicas or (1,) * len(self.stages)

    @property
    def places(self) -> tuple[tuple[int, int], ...]:
        """Stage and replica of all that are simulated, in the order of a timeline's spans."""
        return tuple((stage, r) for stage, count in enumerate(self.replicas_of) for r in range(count))

    def link(self, boundary: int) -> Link:
        """Of the stage behind the given one; the slowest where the last stage sends to the first."""
        if 0 <= boundary < self.num_stages - 1:
            return self.links[boundary if len(self.links) > 1 else 0]
        return max(self.links, key=lambda link: link.seconds(self.forward_bytes))

    def make(self, stage: int) -> Iterable[Sequence[PipeInstruction]]:
        """The instructions of a stage, on each of its replicas."""
        count, blocks = self.micro_batches // self.replicas_of[stage], len(self.stages[stage].forward)
        peers = {"gpipe": GPipeSchedule, "1f1b": TrainSchedule, "zero_bubble": ZeroBubbleSchedule}
        if self.local is not None:
            return self.local(count, self.num_stages, stage, blocks)
        if self.schedule == "interleaved":
            return InterleavedSchedule(count, self.num_stages, stage, blocks)
        return peers[self.schedule](count, self.num_stages, stage)

    def durations(self, stage: int) -> Durations:
        own, ahead, back = self.stages[stage], self.link(stage), self.link(stage - 1)
        splits = self.schedule == "zero_bubble"
        weights = own.weights or tuple(seconds / 2 for seconds in own.backward)
        return Durations(
            own.forward,
            own.backward,
            own.optimizer,
            link=ahead.latency_seconds,
            transfer=ahead.seconds_per_byte * self.forward_bytes,
            link_back=back.latency_seconds,
            transfer_back=back.seconds_per_byte * self.backward_bytes,
            weight=weights if splits else 0,
            from_above=own.from_above,
        )

    def simulate(self, num_steps: int | None = None) -> Timeline:
        """Every instruction of so many steps; by default as many as it takes until each is like the one before."""
        bound = None if self.local is None else self.max_packets_in_flight
        steps = num_steps or (_PEER_STEPS if self.local is None else _STEPS)
        durations = [self.durations(stage) for stage, _ in self.places]
        made = self.make if not self.replicas else self._dealt
        return simulate(made, len(durations), steps, durations, bound, self.num_cores)

    def _dealt(self, number: int) -> Iterable[Sequence[PipeInstruction]]:
        """The instructions of one of `places`, whose messages name the other end's number."""
        stage, replica = self.places[number]
        sources, targets = self._peers(stage, replica, stage - 1), self._peers(stage, replica, stage + 1)

        def addressed(each: PipeInstruction) -> PipeInstruction:
            if isinstance(each, RecvActivation):
                return RecvActivation(**each.kwargs, source=next(sources))
            return SendActivation(**each.kwargs, target=next(targets)) if isinstance(each, SendActivation) else each

        return ([addressed(each) for each in commands] for commands in self.make(stage))

    def _peers(self, stage: int, replica: int, other: int) -> Iterator[int]:
        """Who of the other stage has this one's micro-batches, one after the other."""
        first, count = sum(self.replicas[:other]), self.replicas[other]
        for micro_batch in range(replica, self.micro_batches, self.replicas[stage]):
            yield first + micro_batch % count


def predict(pipe: Pipe, most_passes: int = MOST_PASSES) -> Prediction:
    """A step of the full pipe, simulated if a step has at most so many passes, else estimated."""
    timeline = None
    if pipe.num_passes <= most_passes or pipe.num_cores is not None:  # the formulas know of no shared core
        timeline = pipe.simulate()
        step = timeline.step_time
    else:
        step = estimate_seconds(pipe)
    return Prediction(step, tuple(max(0.0, 1 - work / step) for work in work_seconds(pipe)), timeline)


def work_seconds(pipe: Pipe) -> tuple[float, ...]:
    """What each stage computes in a step."""
    found = []
    for number, stage in enumerate(pipe.stages):
        again = 0.0
        if pipe.local is not None and pipe.local.passes_again:
            above = stage.backward if stage.from_above is None else stage.from_above
            again = sum(above[:-1] if number == pipe.num_stages - 1 else above)
        share = pipe.micro_batches // pipe.replicas_of[number]
        found.append(share * (sum(stage.once) + again) + stage.optimizer)
    return tuple(found)


def estimate_seconds(pipe: Pipe) -> float:
    """Formulas for what a simulation finds; exact for stages of equal cost and free links."""
    boundaries = range(pipe.num_stages - 1)
    ahead = [pipe.link(k).seconds(pipe.forward_bytes) for k in boundaries]
    back = [pipe.link(k).seconds(pipe.backward_bytes) for k in boundaries]
    if pipe.local is None:
        slowest = max(map(sum, zip(ahead, back, strict=True)), default=0.0)
        return _estimates[pipe.schedule](pipe, sum(ahead) + sum(back), slowest)
    step = max(work_seconds(pipe))
    for k, seconds in enumerate(ahead):
        # a link that carries packets more slowly than stages work, or whose packets in flight are all on their way
        link = pipe.link(k)
        there_and_back = seconds + link.latency_seconds
        each = there_and_back / packets_asked_for(pipe.max_packets_in_flight)
        packets = pipe.micro_batches // lcm(*pipe.replicas_of[k : k + 2])
        step = max(step, packets * max(link.seconds_per_byte * pipe.forward_bytes, each))
    waits = []
    for k, (own, behind) in enumerate(pairwise(pipe.stages)):
        backward = (own.backward[-1], (own.from_above or own.backward)[-1])
        waits.append(pipe.local.last_wait(backward, (behind.forward[0], behind.backward[0]), ahead[k] + back[k]))
    return step + max(waits, default=0.0)


def _of_gpipe(pipe: Pipe, links: float, _slowest: float) -> float:
    """Huang et al. 2019: both halves of the step fill and drain the pipe."""
    each = [stage.once for stage in pipe.stages]
    fill = sum(f + b for f, b in each)
    most = max(f for f, _ in each) + max(b for _, b in each)
    return fill + (pipe.micro_batches - 1) * most + links + _optimizer(pipe)


def _of_1f1b(pipe: Pipe, links: float, slowest: float) -> float:
    """(m + p - 1) passes (Narayanan et al. 2019, arXiv 1806.03377). DeepSpeed's order lets a stage wait for a link both
    ways in every pair of passes."""
    each = [sum(stage.once) for stage in pipe.stages]
    return sum(each) + (pipe.micro_batches - 1) * (max(each) + slowest) + links + _optimizer(pipe)


def _of_interleaved(pipe: Pipe, links: float, _slowest: float) -> float:
    """m + (p - 1)/v passes (Narayanan et al. 2021, arXiv 2104.04473), and each link once for every chunk."""
    each = [sum(stage.once) for stage in pipe.stages]
    chunks = len(pipe.stages[0].forward)
    return pipe.micro_batches * max(each) + (sum(each) - max(each)) / chunks + chunks * links + _optimizer(pipe)


def _of_zero_bubble(pipe: Pipe, links: float, _slowest: float) -> float:
    """m passes and (p - 1)(F + B - 2W) beside them, B being the whole backward pass (Qi et al. 2023, ZB-H1)."""
    each = [sum(stage.once) for stage in pipe.stages]
    weights = [sum(stage.weights or (sum(stage.backward) / 2,)) for stage in pipe.stages]
    waits = [max(0.0, time - 2 * weight) for time, weight in zip(each, weights, strict=True)]
    return pipe.micro_batches * max(each) + sum(waits) - min(waits) + links + _optimizer(pipe)


def _optimizer(pipe: Pipe) -> float:
    return max(stage.optimizer for stage in pipe.stages)


_estimates: dict[str, Callable[[Pipe, float, float], float]] = {
    "gpipe": _of_gpipe,
    "1f1b": _of_1f1b,
    "interleaved": _of_interleaved,
    "zero_bubble": _of_zero_bubble,
}
