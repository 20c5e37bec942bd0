"""A link between the same replicas of two neighbouring jobs: packets in order, each once, whatever breaks.

A thread makes a connection, says hello, and sends and receives until it breaks; then it makes another one. Packets have
numbers, from the run's first step on. What is sent comes out of a log, from the packet on that the other end says it
wants, and stays there until the other end says that it is durable. A stage that goes on from a checkpoint makes the
same packets again, under the same numbers, so the other end gets each once.

    stage k       packets 17, 18, 19 ──►      ◄── taken 16, durable 9, beat      stage k + 1
"""

from __future__ import annotations

import select
import socket
import ssl
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from queue import Empty, Queue
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
from llm_local.jobs.hello import TRAINING, Hello, Refusal, Terms
from llm_local.jobs.packet_log import PacketLog
from llm_local.jobs.segment import payload_bytes
from llm_local.jobs.ways import Way
from llm_local.watchdog import LostPeer

BEAT_SECONDS = 1.0
SILENCE_SECONDS = 10.0
SIGN_SECONDS = 3.0  # in which one that is there has been heard
LINGER_SECONDS = 20.0  # for a last word that may be lost, and for the next life of one that has died before it
SKIPPED = b"\0"  # in the place of a packet
_SAY_AGAIN_SECONDS = 60.0
_POLL_SECONDS = 0.1
_READ_AT_A_TIME = 4 << 20


@dataclass(frozen=True)
class Limits:
    """packet_bytes: the most that is taken. absent_seconds: how long the other end may be away; None: for ever.
    silence_seconds: after which a connection counts as broken."""

    packet_bytes: int
    absent_seconds: float | None = None
    silence_seconds: float = SILENCE_SECONDS


class Channel:
    """One end. log: what it sends, if it does; terms: whom it takes for the other end; way: where that comes from.

    first: the number of the first packet that it has not; durable: of the first that it may want again, if that is
    another one. To be set before the start: beat: what the other end is to know of this job; finished: called, once,
    when it needs nothing any more; goes_back: whether the next life of this end goes back to before a packet, which
    the other end wants again.
    """

    def __init__(
        self,
        way: Way,
        terms: Terms,
        log: PacketLog | None,
        first: int,
        limits: Limits,
        durable: int | None = None,
    ):
        self.name = terms.link
        self.neighbour: dict[str, Any] = {}  # what the other end's last beat says
        self.num_connections = 0
        self.trouble = ""
        self.beat: Callable[[], dict[str, Any]] = dict
        self.finished: Callable[[], None] = lambda: None
        self.goes_back: Callable[[int], bool] = lambda number: False
        self._way = way
        self._terms = terms
        self._log = log
        self._limits = limits
        self._received = self._taken = first
        self._durable = first if durable is None else durable
        self._window = terms.mine.window
        self._ready: Queue[torch.Tensor] = Queue()
        self._failure: Exception | None = None
        self._mine = terms.mine  # as it was said last
        self._present = terms.mine  # the other end, once there was one
        self._is_connected, self._away_since = False, time.monotonic()
        self._is_finished = self._is_welcome = False
        self._peer_finished, self._peer_knows = threading.Event(), threading.Event()
        self._is_parting, self._parted = False, threading.Event()
        self._has_trained = False
        self._next: tuple[ssl.SSLSocket, Frame] | None = None
        self._said: dict[str, float] = {}
        self._stopped = threading.Event()
        self._wake_read, self._wake_write = socket.socketpair()
        self._wake_read.setblocking(False)
        self._wake_write.setblocking(False)
        self._thread = threading.Thread(target=self._run, name=f"channel {terms.link}", daemon=True)

    def start(self) -> None:
        self._thread.start()

    @property
    def is_connected(self) -> bool:
        return self._is_connected

    @property
    def _is_over(self) -> bool:
        return self._stopped.is_set() or self._parted.is_set() or self._failure is not None

    @property
    def taken(self) -> int:
        """Packets of the other end that have been used."""
        return self._taken

    def check(self) -> None:
        """Raises LostPeer where the other end has refused this one or is away for too long, DamagedLog, Unwritten."""
        if self._failure is not None:
            raise self._failure
        is_missed = not (self._is_connected or self._peer_finished.is_set())
        away = time.monotonic() - self._away_since if is_missed else 0.0
        most = self._limits.absent_seconds
        if most is not None and away > most:
            limit = f"{most:g}"
            raise LostPeer(
                f"{self.name}: stage {self._terms.stage} is away for {limit} s (--absent_peer_timeout {limit})"
                + (f"; {self.trouble}" if self.trouble else "")
            )

    def send(self, *buffers: Any) -> None:
        """Puts a packet into the log, and waits as long as that is full. Raises as `check`, and Unwritten."""
        assert self._log is not None
        if self._peer_finished.is_set():  # this end has gone back once more, and makes its last packets for nobody
            self._log.append(SKIPPED)
            self._log.trim(self._log.next)
            return
        size = payload_bytes(buffers)
        while not self._log.wait_for_room(size, BEAT_SECONDS):
            self.check()
            self._say(
                "full", f"{self.name}: the log is full; this stage waits until stage {self._terms.stage} has saved"
            )
        self.check()
        self._has_trained = True
        self._log.append(*buffers)
        self.wake()

    def skip(self) -> None:
        """Sends in a packet's place that there is none, which has room in any log. Raises as `check`, and Unwritten."""
        assert self._log is not None
        self.check()
        self._has_trained = True
        self._say("skips", f"{self.name}: stage {self._terms.stage} skips steps (--on_full_log skip)")
        self._log.append(SKIPPED)
        self.wake()

    def take(self) -> torch.Tensor | None:
        """The next packet, whose place it gives free; None where the other end has gone. Raises as `check`."""
        while True:
            try:
                found = self._ready.get(timeout=BEAT_SECONDS)
                break
            except Empty:
                if self._parted.is_set():
                    return None
                self.check()
        self._has_trained = True
        self._taken += 1
        self.wake()
        return found

    def made_durable(self, number: int) -> None:
        """A checkpoint of this end holds what so many packets have taught, and it goes back to none from before."""
        self._durable = max(self._durable, number)
        self.wake()

    def await_finish(self) -> None:
        """Until the other end needs nothing any more. Raises as `check`."""
        while not self._peer_finished.wait(BEAT_SECONDS):
            self.check()

    def finish(self) -> None:
        """Says that this end needs nothing more, until the other one has that written down, and has saved what a next
        life of it would want out of the log. Raises as `check`."""
        self._is_finished = True
        self.wake()
        while not self._peer_knows.wait(BEAT_SECONDS):
            self.check()
        while self._log is not None and self._log.durable < self._log.next:
            time.sleep(_POLL_SECONDS)
            self.check()

    def part(self) -> None:
        """What both ends know to be over may end: the one that has finished says so and goes."""
        self._is_parting = True
        self.wake()

    def await_parted(self, seconds: float) -> None:
        """Until the one that has finished has gone, which may come again before; for so long without a connection."""
        self._parted.wait(max(seconds, 0.0))
        self._parted.set()

    def knew(self) -> None:
        """An earlier life of this end has written down that the other one has finished."""
        self._peer_finished.set()

    def close(self) -> None:
        self._stopped.set()
        self.wake()
        self._thread.join(BEAT_SECONDS)
        self._way.close()

    def wake(self) -> None:
        with suppress(OSError):  # it is full of the same news
            self._wake_write.send(b"\0")

    # from here on: the channel's thread

    def _run(self) -> None:
        while not self._is_over:
            try:
                met, self._next = self._next or self._way.connection(self._hello, BEAT_SECONDS), None
                if met is not None:
                    with met[0] as connection:
                        self._meet(connection, met[1])
            except (OSError, Garbled, UnicodeError) as error:
                if not (self._stopped.is_set() or self._peer_finished.is_set() or self._parted.is_set()):
                    self.trouble = describe(error)
                    self._say(self.trouble, f"{self.name}: no connection to stage {self._terms.stage}: {self.trouble}")
            except Exception as error:  # DamagedLog and Unwritten among them: a thread alone would end unheard
                self._failure = error
            finally:
                if self._is_connected:
                    self._is_connected, self._away_since = False, time.monotonic()

    def _hello(self) -> Hello:
        """What this end says of itself now; the conversation that follows goes by it."""
        self._mine = replace(
            self._terms.mine,
            standing=TRAINING if self._is_welcome or self._has_trained else self._terms.mine.standing,
            wants=self._received,
            taken=self._taken,
            durable=self._durable,
            finished=self._is_finished,
            farewell=self._peer_finished.is_set(),
        )
        return self._mine

    def _meet(self, connection: ssl.SSLSocket, first: Frame) -> None:
        # who has dialled has said it already: what has become true since is still to be said
        mine = self._hello() if self._way.is_visited else self._mine
        if first.kind == REFUSAL:
            refusal = Refusal.of(first)
            self._disagree(refusal.reason, refusal.standing, mine.standing)
            return
        other = Hello.of(first)
        self._terms.log_begins = max(self._log.first, self._log.durable) if self._log is not None else 0
        connection.settimeout(BEAT_SECONDS)
        if objection := self._terms.objection(other):
            connection.sendall(Refusal(objection, mine.standing).to_bytes())
            if other.wants is not None and self._terms.is_too_early(other) and self.goes_back(other.wants):
                what = f"stage {other.stage} has gone back to packet {other.wants}"
                self._failure = LostPeer(f"{self.name}: {what}; this stage goes back, too, and makes it again")
                return
            self._disagree(objection, other.standing, mine.standing)
            return
        if self._way.is_visited:
            connection.sendall(mine.to_bytes())
        if other.wants is None:  # it only asks
            return
        self._present = other
        self._is_connected = True
        self.num_connections += 1
        _Conversation(self, connection, other, mine).go_on()

    def _welcomed(self) -> None:
        """The other end agrees, too."""
        self._is_welcome = True
        self.trouble = ""
        self._said.clear()

    def _changes(self, met: tuple[ssl.SSLSocket, Frame], silent_seconds: float) -> bool:
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

    def _disagree(self, reason: str, theirs: int, mine: int) -> None:
        """Who trains goes on, and waits for the right one; who has just come ends."""
        if mine > theirs or mine == TRAINING:
            self.trouble = reason
            self._say(reason, f"{self.name}: {reason}; this stage goes on")
            time.sleep(BEAT_SECONDS)
        else:
            self._failure = LostPeer(f"{self.name}: {reason}")

    def _say(self, what: str, line: str) -> None:
        """Once a minute."""
        now = time.monotonic()
        if now - self._said.get(what, -_SAY_AGAIN_SECONDS) >= _SAY_AGAIN_SECONDS:
            self._said[what] = now
            with suppress(OSError):
                print(f"llm_local: {line}", file=sys.stderr, flush=True)


class _Conversation:
    """Over one connection, until it breaks."""

    def __init__(self, channel: Channel, connection: ssl.SSLSocket, other: Hello, mine: Hello):
        self._channel, self._connection = channel, connection
        self._said_taken, self._said_durable, self._said_finish = mine.taken, mine.durable, mine.finished
        self._said_farewell, self._said_gone = mine.farewell, False
        self._standing, self._is_welcome = mine.standing, False
        self._cursor = 0 if other.wants is None else other.wants
        self._peer_taken, self._peer_window = other.taken, other.window
        self._parser = parse(channel._limits.packet_bytes, _room)
        self._reading = memoryview(next(self._parser))
        self._writing: deque[memoryview] = deque()
        self._now = self._heard = time.monotonic()
        self._beaten = 0.0
        if channel._log is not None:
            channel._log.trim(other.durable)
        if other.finished:
            self._finished()
        if other.farewell:
            channel._peer_knows.set()

    def go_on(self) -> None:
        """Until it is over. Raises OSError or Garbled where it breaks."""
        try:
            self._go_on()
        finally:
            if self._said_gone:  # who closes before the other end has read that may take it back
                self._channel._parted.set()

    def _go_on(self) -> None:
        channel, connection = self._channel, self._connection
        connection.setblocking(False)
        waits = select.poll()  # select takes no file above 1023
        waits.register(connection)
        waits.register(channel._wake_read, select.POLLIN)
        while not channel._is_over:
            self._now = time.monotonic()
            self._read()
            if self._now - self._heard > channel._limits.silence_seconds:
                raise TimeoutError(f"no sign of life for {channel._limits.silence_seconds:g} s")
            if (met := channel._way.visitor()) and channel._changes(met, self._now - self._heard):
                raise ConnectionAbortedError("the other end has come again")
            is_stuck = self._write()
            if self._connection.pending():
                continue
            waits.modify(connection, select.POLLIN | (select.POLLOUT if is_stuck else 0))
            waits.poll(1000 * BEAT_SECONDS)
            with suppress(BlockingIOError):
                channel._wake_read.recv(4096)

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
        channel = self._channel
        if self._said_taken != channel._taken:
            self._said_taken = channel._taken
            return [header(TAKEN, self._said_taken)]
        if self._said_durable != channel._durable:
            self._said_durable = channel._durable
            return [header(DURABLE, self._said_durable)]
        if channel._is_finished and not self._said_finish:
            self._said_finish = True
            return [header(FINISHED)]
        if channel._peer_finished.is_set() and not self._said_farewell:
            self._said_farewell = True
            return [header(FAREWELL)]
        if channel._is_parting and channel._is_finished and not self._said_gone:
            self._said_gone = True
            return [header(GONE)]
        if self._now - self._beaten >= BEAT_SECONDS:
            self._beaten = self._now
            return [with_text(BEAT, channel.beat())]
        log = channel._log
        if log is None or self._cursor >= min(log.next, self._peer_taken + self._peer_window):
            return []
        packet = log.read(self._cursor)
        self._cursor += 1
        return [header(PACKET, self._cursor - 1, payload_bytes(packet)), *packet]

    def _hear(self, frame: Frame) -> None:
        channel = self._channel
        if frame.kind == REFUSAL:  # by the end that comes, which is the second to know
            refusal = Refusal.of(frame)
            channel._disagree(refusal.reason, refusal.standing, self._standing)
            raise ConnectionAbortedError(refusal.reason)
        if not self._is_welcome:
            self._is_welcome = True
            channel._welcomed()
        if frame.kind == PACKET:
            room = channel._taken + channel._window
            if frame.number != channel._received or frame.number >= room:
                raise Garbled(
                    f"packet {frame.number}, where {channel._received} was due and there is room up to {room}"
                )
            channel._received += 1
            channel._ready.put(torch.from_numpy(frame.body))
        elif frame.kind in (TAKEN, DURABLE) and frame.number > self._cursor:
            raise Garbled(f"news of {frame.number} packets, of which {self._cursor} were sent")
        elif frame.kind == TAKEN:
            self._peer_taken = frame.number
        elif frame.kind == DURABLE and channel._log is not None:
            channel._log.trim(frame.number)
        elif frame.kind == BEAT:
            channel.neighbour = frame.content
        elif frame.kind == FINISHED:
            self._finished()
        elif frame.kind == FAREWELL:
            channel._peer_knows.set()
        elif frame.kind == GONE:
            channel._parted.set()
        elif frame.kind == HELLO:
            raise Garbled("a second hello")

    def _finished(self) -> None:
        if not self._channel._peer_finished.is_set():
            self._channel.finished()
            self._channel._peer_finished.set()


def _room(num_bytes: int) -> Any:
    """Where a packet comes to lie: as torch lets its own tensors start, so that kernels treat both alike."""
    return torch.empty(num_bytes, dtype=torch.uint8).numpy()


def describe(error: Exception) -> str:
    """A failure of the network in a line."""
    if isinstance(error, ssl.SSLError):
        return f"it has not the same key, or is no job of llm_local ({error.reason or error})"
    return str(error) or type(error).__name__
