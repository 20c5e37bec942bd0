"""One side of a channel: what it has sent, taken and heard, for the stage's thread and the channel's own to share."""

from __future__ import annotations

import socket
import ssl
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from queue import Queue

import torch

from llm_local.files import Json
from llm_local.jobs.frames import Frame, Garbled
from llm_local.jobs.hello import TRAINING, Hello, Refusal, Terms
from llm_local.jobs.packet_log import PacketLog
from llm_local.jobs.ways import Way
from llm_local.peer import LostPeer

BEAT_SECONDS = 1.0
SILENCE_SECONDS = 10.0
SIGN_SECONDS = 3.0  # in which one that is there has been heard
_SAY_AGAIN_SECONDS = 60.0


@dataclass(frozen=True)
class Limits:
    """packet_bytes: the most that is taken. absent_seconds: how long the other end may be away; None: for ever.
    silence_seconds: after which a connection counts as broken."""

    packet_bytes: int
    absent_seconds: float | None = None
    silence_seconds: float = SILENCE_SECONDS


class Side:
    """One end. log: what it sends, if it does; terms: whom it takes for the other end; way: where that comes from.

    first: the number of the first packet that it has not; durable: of the first that it may want again, if that is
    another one. received, taken: packets of the other end that have come, and that have been used.

    To be set before the start: beat: what the other end is to know of this job; finished: called, once, when it needs
    nothing any more; goes_back: whether the next life of this end goes back to before a packet, which the other end
    wants again.
    """

    def __init__(
        self, way: Way, terms: Terms, log: PacketLog | None, first: int, limits: Limits, durable: int | None = None
    ):
        self.name = terms.link
        self.neighbour: Json = {}  # what the other end's last beat says
        self.num_connections = 0
        self.trouble = ""
        self.beat: Callable[[], Json] = dict
        self.finished: Callable[[], None] = lambda: None
        self.goes_back: Callable[[int], bool] = lambda number: False
        self.way = way
        self.terms = terms
        self.log = log
        self.limits = limits
        self.received = self.taken = first
        self.durable = first if durable is None else durable
        self.window = terms.mine.window
        self.ready: Queue[torch.Tensor] = Queue()
        self._failure: Exception | None = None
        self._mine = terms.mine  # as it was said last
        self._present = terms.mine  # the other end, once there was one
        self._is_connected, self._away_since = False, time.monotonic()
        self.is_finished = self.is_welcome = False
        self.peer_finished, self.peer_knows = threading.Event(), threading.Event()
        self.is_parting, self.parted = False, threading.Event()
        self._has_trained = False
        self._next: tuple[ssl.SSLSocket, Frame] | None = None
        self._said: dict[str, float] = {}
        self.stopped = threading.Event()
        self.wake_read, self._wake_write = socket.socketpair()
        self.wake_read.setblocking(False)
        self._wake_write.setblocking(False)

    @property
    def is_connected(self) -> bool:
        return self._is_connected

    @property
    def is_over(self) -> bool:
        return self.stopped.is_set() or self.parted.is_set() or self._failure is not None

    def wake(self) -> None:
        with suppress(OSError):  # it is full of the same news
            self._wake_write.send(b"\0")

    def welcomed(self) -> None:
        """The other end agrees, too."""
        self.is_welcome = True
        self.trouble = ""
        self._said.clear()

    def changes(self, met: tuple[ssl.SSLSocket, Frame], silent_seconds: float) -> bool:
        """Whether who has come now takes the place of the present one, whose connection may have gone without a sign.
        Another one, while that is heard, is refused."""
        connection, first = met
        with suppress(Garbled):
            if Hello.of(first).place == self._present.place or silent_seconds > SIGN_SECONDS:
                self._next = met
                return True
            reason = f"stage {self._present.stage} is there already: {self._present}"
            with suppress(OSError):
                connection.settimeout(BEAT_SECONDS)
                connection.sendall(Refusal(reason, TRAINING).to_bytes())
        connection.close()
        return False

    def disagree(self, reason: str, theirs: int, mine: int) -> None:
        """Who trains goes on, and waits for the right one; who has just come ends."""
        if mine > theirs or mine == TRAINING:
            self.trouble = reason
            self.say(reason, f"{self.name}: {reason}; this stage goes on")
            time.sleep(BEAT_SECONDS)
        else:
            self._failure = LostPeer(f"{self.name}: {reason}")

    def say(self, what: str, line: str) -> None:
        """Once a minute."""
        now = time.monotonic()
        if now - self._said.get(what, -_SAY_AGAIN_SECONDS) >= _SAY_AGAIN_SECONDS:
            self._said[what] = now
            with suppress(OSError):
                print(f"llm_local: {line}", file=sys.stderr, flush=True)
