"""A stage's instructions as work and messages on a clock: what simulate.py puts together."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, TypeAlias

from deepspeed.runtime.pipe import schedule as pipe

from llm_local.peer_schedules import WeightPass

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


class _Message(NamedTuple):
    """An instruction of a stage, and of a message that is sent when it arrives."""

    stage: int
    step: int
    instruction: pipe.PipeInstruction
    arrival: float = 0

    def __str__(self) -> str:
        return f"stage {self.stage} at {self.instruction!r} of step {self.step}"


@dataclass
class Channel:
    """The messages of one stage to another, in order, and when those that have arrived were received."""

    source: int
    target: int
    sent: list[_Message] = field(default_factory=list)
    received_at: list[float] = field(default_factory=list)
    free_at: float = 0

    def unmet(self) -> Sequence[_Message]:
        return self.sent[len(self.received_at) :]


class Channels(dict[tuple[int, int, bool], Channel]):
    """By source, target, and whether gradients travel; made when asked for."""

    def __missing__(self, key: tuple[int, int, bool]) -> Channel:
        self[key] = Channel(key[0], key[1])
        return self[key]


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
                raise ValueError(f"{_Message(stage, 0, i)}: the simulation does not know this instruction")
    return tuple(ops)


@dataclass
class ClockedStage:
    """A stage that runs its instructions num_steps times, as far as the messages are there."""

    stage: int
    ops: tuple[_Op, ...]
    num_steps: int
    max_packets: int | None
    now: float = 0
    step: int = 0
    place: int = 0
    spans: list[TimeSpan] = field(default_factory=list)

    @property
    def is_done(self) -> bool:
        return not self.ops or self.step == self.num_steps

    def where(self) -> str:
        return str(_Message(self.stage, self.step, self.ops[self.place].instruction))

    def advance(self) -> set[int]:
        """Runs up to the first instruction that has to wait; returns the stages that may go on for what it did."""
        woken: set[int] = set()
        while not self.is_done:
            for place in range(self.place, len(self.ops)):
                self.place, op = place, self.ops[place]
                if op.channel is None:
                    start, self.now = self.now, self.now + op.duration
                    self.spans.append(
                        TimeSpan(self.stage, self.step, op.kind, op.micro_batch, op.block, start, self.now)
                    )
                elif not (self._send(op, op.channel) if op.is_send else self._receive(op, op.channel)):
                    return woken
                else:
                    woken.add(op.channel.target if op.is_send else op.channel.source)
            self.place, self.step = 0, self.step + 1
        return woken

    def _send(self, op: _Op, channel: Channel) -> bool:
        """False as long as it hangs on a receive still to come. The sender goes on before the transfer is over."""
        if self.max_packets is not None and (makes_room := len(channel.sent) - self.max_packets) >= 0:
            if makes_room >= len(channel.received_at):
                return False
            self.now = max(self.now, channel.received_at[makes_room])
        channel.free_at = max(self.now, channel.free_at) + op.duration
        channel.sent.append(_Message(self.stage, self.step, op.instruction, channel.free_at + op.link))
        return True

    def _receive(self, op: _Op, channel: Channel) -> bool:
        """False as long as there is no such send. Raises ValueError if both ends name a micro-batch and they differ."""
        number = len(channel.received_at)
        if number == len(channel.sent):
            return False
        message = channel.sent[number]
        mine, theirs = _subject(op.instruction), _subject(message.instruction)
        if mine is not None and theirs is not None and (self.step, mine) != (message.step, theirs):
            raise ValueError(f"the schedule cannot run: {self.where()} gets what {message} sends")
        self.now = max(self.now, message.arrival)
        channel.received_at.append(self.now)
        return True


def _subject(instruction: pipe.PipeInstruction) -> tuple[int, int] | None:
    """Micro-batch and chunk that a message is of, where its schedule names them."""
    named = instruction.kwargs
    return (named["micro_batch"], named.get("chunk", 0)) if "micro_batch" in named else None
