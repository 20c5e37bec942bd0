"""A stage's instructions as work and messages on a clock: what simulate.py puts together."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, TypeAlias

from deepspeed.runtime.pipe import schedule as pipe

from llm_local.simulator.channel import Channel, Channels, Message, Wake
from llm_local.simulator.peer_schedules import WeightPass

Kind = Literal["F", "B", "G", "W", "O"]
Times: TypeAlias = "float | tuple[float, ...]"


@dataclass(frozen=True)
class Durations:
    """Time that a stage takes for a pass through one block and an optimizer step, and a message of it for its way.

    forward, backward: of all blocks, or one for each. weight: the part of `backward` that computes gradients of weights
    and that a schedule may put off. from_above: a backward pass from what the next block sent back; None: as backward.
    link: from the end of a message's transfer to its arrival. transfer: the time that a message holds its link, which
    the next one waits for. link_back, transfer_back: of messages to the stage before; None: as the others.
    """

    forward: Times = 1
    backward: Times = 1
    optimizer: float = 1
    link: float = 0
    transfer: float = 0
    link_back: float | None = None
    transfer_back: float | None = None
    weight: Times = 0
    from_above: Times | None = None

    def __post_init__(self):
        backward, weight = _each(self.backward), _each(self.weight)
        above = backward if self.from_above is None else _each(self.from_above)
        links = (self.link, self.transfer, self.link_back or 0, self.transfer_back or 0)
        if min(*_each(self.forward), *backward, *above) <= 0 or min(self.optimizer, *links) < 0:
            raise ValueError(f"{self}: a pass must take more than 0, an optimizer step and a link 0 or more")
        if min(weight) < 0 or any(_at(self.weight, i) >= whole for i, whole in enumerate(backward)):
            raise ValueError(f"{self}: weight={self.weight} must be 0 or more and less than backward, a part of it")

    def of(self, kind: Kind, block: int, input_only: bool = False) -> float:
        """The time of a pass through the block."""
        if kind == "F":
            return _at(self.forward, block)
        if kind == "W":
            return _at(self.weight, block)
        whole = self.backward if kind == "B" or self.from_above is None else self.from_above
        return _at(whole, block) - (_at(self.weight, block) if input_only else 0)


def _each(times: Times) -> tuple[float, ...]:
    return times if isinstance(times, tuple) else (times,)


def _at(times: Times, block: int) -> float:
    return times[block] if isinstance(times, tuple) else times


class TimeSpan(NamedTuple):
    """A pass of one stage, or its optimizer step, which has neither micro-batch nor block."""

    stage: int
    step: int
    kind: Kind
    micro_batch: int | None
    block: int | None
    start: float
    end: float


class _Op(NamedTuple):
    """An instruction that takes time (no channel), or one end of a message; duration of a send: of its transfer."""

    instruction: pipe.PipeInstruction
    duration: float = 0
    kind: Kind = "O"
    micro_batch: int | None = None
    block: int | None = None
    channel: Channel | None = None
    is_send: bool = False
    link: float = 0


_FREE = (pipe.LoadMicroBatch, pipe.ReduceGrads, pipe.ReduceTiedGrads)
_PASSES: dict[type, Kind] = {pipe.ForwardPass: "F", pipe.BackwardPass: "B", WeightPass: "W"}


def make_ops(
    stage: int, program: Iterable[pipe.PipeInstruction], times: Durations, channels: Channels
) -> tuple[_Op, ...]:
    """One step of a stage. Raises ValueError naming an instruction that is unknown."""
    ops: list[_Op] = []
    num_passes: Counter[tuple[Kind, int]] = Counter()
    link_back = times.link if times.link_back is None else times.link_back
    transfer_back = times.transfer if times.transfer_back is None else times.transfer_back
    for i in program:
        named: dict[str, Any] = i.kwargs
        match i:
            case pipe.ForwardPass() | pipe.BackwardPass() | WeightPass():
                kind: Kind = "G" if named.get("from_above") else _PASSES[type(i)]
                block = named.get("block", 0)
                micro_batch = named.get("micro_batch", num_passes[kind, block])
                num_passes[kind, block] += 1
                ops.append(_Op(i, times.of(kind, block, named.get("input_only", False)), kind, micro_batch, block))
            case pipe.OptimizerStep():
                ops.append(_Op(i, times.optimizer))
            case pipe.SendActivation():
                channel = channels[stage, named.get("target", stage + 1), False]
                ops.append(_Op(i, times.transfer, channel=channel, is_send=True, link=times.link))
            case pipe.SendGrad():
                channel = channels[stage, named.get("target", stage - 1), True]
                ops.append(_Op(i, transfer_back, channel=channel, is_send=True, link=link_back))
            case pipe.RecvActivation():
                ops.append(_Op(i, channel=channels[named.get("source", stage - 1), stage, False]))
            case pipe.RecvGrad():
                ops.append(_Op(i, channel=channels[named.get("source", stage + 1), stage, True]))
            case _ if not isinstance(i, _FREE):
                raise ValueError(f"{Message(stage, 0, i)}: the simulation does not know this instruction")
    return tuple(ops)


@dataclass
class ClockedStage:
    """A stage that runs its instructions as far as the messages are there: num_steps times, or goes_on for ever."""

    stage: int
    ops: tuple[_Op, ...]
    num_steps: int
    wake: Wake
    goes_on: bool = False
    step: int = 0
    place: int = 0
    began: float | None = None
    spans: list[TimeSpan] = field(default_factory=list)

    @property
    def is_done(self) -> bool:
        return not self.ops or self.step >= self.num_steps

    def where(self) -> str:
        return str(Message(self.stage, self.step, self.ops[self.place].instruction))

    def end_work(self, now: float) -> None:
        """The pass that `advance` began is over."""
        op, begin = self.ops[self.place], self.began
        assert begin is not None
        if not self.is_done:
            self.spans.append(TimeSpan(self.stage, self.step, op.kind, op.micro_batch, op.block, begin, now))
        self.began = None
        self._next()

    def advance(self, now: float) -> float | None:
        """Runs up to the next pass and begins it: its duration; None where the stage waits, works or is done."""
        while self.began is None and self.ops and (self.goes_on or not self.is_done):
            op = self.ops[self.place]
            if op.channel is None:
                self.began = now
                return op.duration
            if not (self._send(op, op.channel, now) if op.is_send else self._receive(op, op.channel, now)):
                return None
            self._next()
        return None

    def _next(self) -> None:
        self.place += 1
        if self.place == len(self.ops):
            self.place, self.step = 0, self.step + 1

    def _send(self, op: _Op, channel: Channel, now: float) -> bool:
        """False as long as it hangs on a receive still to come. The sender goes on before the transfer is over."""
        if not channel.has_room(now):
            return False
        channel.send(Message(self.stage, self.step, op.instruction, op.duration, op.link), now, self.wake)
        return True

    def _receive(self, op: _Op, channel: Channel, now: float) -> bool:
        """False as long as no such message is there. Raises ValueError if both ends name a micro-batch and they
        differ."""
        message = channel.next(now)
        if message is None:
            return False
        mine, theirs = _subject(op.instruction), _subject(message.instruction)
        if mine is not None and theirs is not None and (self.step, mine) != (message.step, theirs):
            raise ValueError(f"the schedule cannot run: {self.where()} gets what {message} sends")
        channel.take(now, self.wake)
        return True


@dataclass
class Core:
    """What stages work on, in equal parts where more than one of them does.

    due: when, as things stand, the next stage is done with its pass, and which one.
    """

    due: tuple[float, int] | None = None
    _left: dict[int, float] = field(default_factory=dict)  # of each stage's pass, in seconds of a whole core
    _since: float = 0

    def begin(self, stage: int, duration: float, now: float) -> None:
        self._settle(now)
        self._left[stage] = duration
        self._plan()

    def end(self, stage: int, now: float) -> None:
        self._settle(now)
        del self._left[stage]
        self._plan()

    def _settle(self, now: float) -> None:
        if now > self._since:
            for stage in self._left:
                self._left[stage] -= (now - self._since) / len(self._left)
        self._since = now

    def _plan(self) -> None:
        self.due = None
        if self._left:
            stage = min(self._left, key=lambda stage: self._left[stage])
            self.due = (self._since + max(0.0, self._left[stage]) * len(self._left), stage)


def _subject(instruction: pipe.PipeInstruction) -> tuple[int, int] | None:
    """Micro-batch and chunk that a message is of, where its schedule names them."""
    named = instruction.kwargs
    return (named["micro_batch"], named.get("chunk", 0)) if "micro_batch" in named else None
