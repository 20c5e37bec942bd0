"""What two channels say to each other over one connection, until it breaks."""

from __future__ import annotations

import select
import ssl
import time
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import torch

from llm_local.jobs.frames import (
    BEAT,
    DURABLE,
    FAREWELL,
    FINISHED,
    GONE,
    HELLO,
    PACKET,
    REFUSAL,
    TAKEN,
    Frame,
    Garbled,
    header,
    parse,
    with_text,
)
from llm_local.jobs.hello import Hello, Refusal
from llm_local.jobs.segment import payload_bytes
from llm_local.jobs.side import BEAT_SECONDS, Side

_READ_AT_A_TIME = 4 << 20


class Conversation:
    """Over one connection, until it breaks."""

    def __init__(self, side: Side, connection: ssl.SSLSocket, other: Hello, mine: Hello):
        self._side, self._connection = side, connection
        self._said_taken, self._said_durable, self._said_finish = mine.taken, mine.durable, mine.finished
        self._said_farewell, self._said_gone = mine.farewell, False
        self._standing, self._is_welcome = mine.standing, False
        self._cursor = 0 if other.wants is None else other.wants
        self._peer_taken, self._peer_window = other.taken, other.window
        self._parser = parse(side.limits.packet_bytes, _room)
        self._reading = memoryview(next(self._parser))
        self._writing: deque[memoryview] = deque()
        self._now = self._heard = time.monotonic()
        self._beaten = 0.0
        if side.log is not None:
            side.log.trim(other.durable)
        if other.finished:
            self._finished()
        if other.farewell:
            side.peer_knows.set()

    def go_on(self) -> None:
        """Until it is over. Raises OSError or Garbled where it breaks."""
        try:
            self._go_on()
        finally:
            if self._said_gone:  # who closes before the other end has read that may take it back
                self._side.parted.set()

    def _go_on(self) -> None:
        side, connection = self._side, self._connection
        connection.setblocking(False)
        waits = select.poll()  # select takes no file above 1023
        waits.register(connection)
        waits.register(side.wake_read, select.POLLIN)
        while not side.is_over:
            self._now = time.monotonic()
            self._read()
            if self._now - self._heard > side.limits.silence_seconds:
                raise TimeoutError(f"no sign of life for {side.limits.silence_seconds:g} s")
            if (met := side.way.visitor()) and side.changes(met, self._now - self._heard):
                raise ConnectionAbortedError("the other end has come again")
            is_stuck = self._write()
            if self._connection.pending():
                continue
            waits.modify(connection, select.POLLIN | (select.POLLOUT if is_stuck else 0))
            waits.poll(1000 * BEAT_SECONDS)
            with suppress(BlockingIOError):
                side.wake_read.recv(4096)

    def _read(self) -> None:
        left = _READ_AT_A_TIME
        while left > 0:
            try:
                count = self._connection.recv_into(self._reading)
            except (ssl.SSLWantReadError, ssl.SSLWantWriteError):
                return
            if not count:
                raise ConnectionResetError("the connection has ended")
            left -= count
            self._heard = self._now
            self._reading = self._reading[count:]
            if not self._reading:
                wanted = next(self._parser)
                while isinstance(wanted, Frame):
                    self._hear(wanted)
                    wanted = next(self._parser)
                self._reading = memoryview(wanted)

    def _write(self) -> bool:
        """Sends as much as goes; whether the connection takes no more for the moment."""
        while True:
            if not self._writing:
                self._writing.extend(memoryview(each).cast("B") for each in self._next_frame())
                if not self._writing:
                    return False
            try:
                count = self._connection.send(self._writing[0])
            except (ssl.SSLWantReadError, ssl.SSLWantWriteError):
                return True
            rest = self._writing[0][count:]
            if rest:
                self._writing[0] = rest
            else:
                self._writing.popleft()

    def _next_frame(self) -> Sequence[Any]:
        """What is to be said next, the news before the packets; nothing where there is none."""
        side = self._side
        if self._said_taken != side.taken:
            self._said_taken = side.taken
            return [header(TAKEN, self._said_taken)]
        if self._said_durable != side.durable:
            self._said_durable = side.durable
            return [header(DURABLE, self._said_durable)]
        if side.is_finished and not self._said_finish:
            self._said_finish = True
            return [header(FINISHED)]
        if side.peer_finished.is_set() and not self._said_farewell:
            self._said_farewell = True
            return [header(FAREWELL)]
        if side.is_parting and side.is_finished and not self._said_gone:
            self._said_gone = True
            return [header(GONE)]
        if self._now - self._beaten >= BEAT_SECONDS:
            self._beaten = self._now
            return [with_text(BEAT, side.beat())]
        log = side.log
        if log is None or self._cursor >= min(log.next, self._peer_taken + self._peer_window):
            return []
        packet = log.read(self._cursor)
        self._cursor += 1
        return [header(PACKET, self._cursor - 1, payload_bytes(packet)), *packet]

    def _hear(self, frame: Frame) -> None:
        side = self._side
        if frame.kind == REFUSAL:  # by the end that comes, which is the second to know
            refusal = Refusal.of(frame)
            side.disagree(refusal.reason, refusal.standing, self._standing)
            raise ConnectionAbortedError(refusal.reason)
        if not self._is_welcome:
            self._is_welcome = True
            side.welcomed()
        if frame.kind == PACKET:
            room = side.taken + side.window
            if frame.number != side.received or frame.number >= room:
                raise Garbled(f"packet {frame.number}, where {side.received} was due and there is room up to {room}")
            side.received += 1
            side.ready.put(torch.from_numpy(frame.body))
        elif frame.kind in (TAKEN, DURABLE) and frame.number > self._cursor:
            raise Garbled(f"news of {frame.number} packets, of which {self._cursor} were sent")
        elif frame.kind == TAKEN:
            self._peer_taken = frame.number
        elif frame.kind == DURABLE and side.log is not None:
            side.log.trim(frame.number)
        elif frame.kind == BEAT:
            side.neighbour = frame.content
        elif frame.kind == FINISHED:
            self._finished()
        elif frame.kind == FAREWELL:
            side.peer_knows.set()
        elif frame.kind == GONE:
            side.parted.set()
        elif frame.kind == HELLO:
            raise Garbled("a second hello")

    def _finished(self) -> None:
        if not self._side.peer_finished.is_set():
            self._side.finished()
            self._side.peer_finished.set()


def _room(num_bytes: int) -> Any:
    """Where a packet comes to lie: as torch lets its own tensors start, so that kernels treat both alike."""
    return torch.empty(num_bytes, dtype=torch.uint8).numpy()


def describe(error: Exception) -> str:
    """A failure of the network in a line."""
    if isinstance(error, ssl.SSLError):
        return f"it has not the same key, or is no job of llm_local ({error.reason or error})"
    return str(error) or type(error).__name__
