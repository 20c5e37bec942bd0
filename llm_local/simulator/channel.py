"""Messages from one stage to another on a clock."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, TypeAlias

from deepspeed.runtime.pipe import schedule as pipe

from llm_local.in_flight import packets_asked_for, packets_pending

# tells a stage, which may wait for it, when it may go on
Wake: TypeAlias = Callable[[int, float], None]


class Message(NamedTuple):
    """An instruction of a stage, and of a message that is sent how long the link takes."""

    stage: int
    step: int
    instruction: pipe.PipeInstruction
    transfer: float = 0
    latency: float = 0

    def __str__(self) -> str:
        return f"stage {self.stage} at {self.instruction!r} of step {self.step}"


@dataclass
class Channel:
    """The messages of one stage to another, in order.

    max_packets: as max_packets_in_flight. A message leaves when it is asked for (links/ends.py); the receiver asks for
    some at the start, and for one more whenever it takes one. None: all may leave at once.
    """

    source: int
    target: int
    max_packets: int | None = None
    sent: list[Message] = field(default_factory=list)
    num_received: int = 0
    _arrivals: list[float] = field(default_factory=list)  # of those that have left
    _waiting: deque[tuple[float, Message]] = field(default_factory=deque)  # since when
    _leaving: deque[float] = field(default_factory=deque)  # when the last of their bytes are on the link
    _asked: list[float] = field(default_factory=list)  # when the source knew
    _free_at: float = 0

    def has_room(self, now: float) -> bool:
        """Whether the source may send."""
        if self.max_packets is None:
            return True
        while self._leaving and self._leaving[0] <= now:
            self._leaving.popleft()
        return len(self._waiting) + len(self._leaving) < packets_pending(self.max_packets)

    def send(self, message: Message, now: float, wake: Wake) -> None:
        if self.max_packets is not None and not self.sent:
            self._asked = [0.0] * packets_asked_for(self.max_packets)
        self.sent.append(message)
        self._waiting.append((now, message))
        self._let_go(wake)

    def next(self, now: float) -> Message | None:
        """What is there for the target to take."""
        if self.num_received < len(self._arrivals) and self._arrivals[self.num_received] <= now:
            return self.sent[self.num_received]
        return None

    def take(self, now: float, wake: Wake) -> None:
        self._asked.append(now + self.sent[self.num_received].latency)
        self.num_received += 1
        self._let_go(wake)

    def unmet(self) -> Sequence[Message]:
        return self.sent[self.num_received :]

    def _let_go(self, wake: Wake) -> None:
        while self._waiting and (self.max_packets is None or len(self._arrivals) < len(self._asked)):
            since, message = self._waiting.popleft()
            asked = 0.0 if self.max_packets is None else self._asked[len(self._arrivals)]
            self._free_at = max(since, asked, self._free_at) + message.transfer
            self._leaving.append(self._free_at)
            self._arrivals.append(self._free_at + message.latency)
            wake(self.source, self._free_at)
            wake(self.target, self._arrivals[-1])


class Channels(dict[tuple[int, int, bool], Channel]):
    """By source, target, and whether gradients travel; made when asked for."""

    def __init__(self, max_packets: int | None):
        super().__init__()
        self._max_packets = max_packets

    def __missing__(self, key: tuple[int, int, bool]) -> Channel:
        self[key] = Channel(key[0], key[1], self._max_packets)
        return self[key]
