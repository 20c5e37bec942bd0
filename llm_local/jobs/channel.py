"""A link between the same replicas of two neighbouring jobs: packets in order, each once, whatever breaks.

A thread makes a connection, says hello, and sends and receives until it breaks; then it makes another one. Packets have
numbers, from the run's first step on. What is sent comes out of a log, from the packet on that the other end says it
wants, and stays there until the other end says that it is durable. A stage that goes on from a checkpoint makes the
same packets again, under the same numbers, so the other end gets each once.

    stage k       packets 17, 18, 19 ──►      ◄── taken 16, durable 9, beat      stage k + 1
"""

from __future__ import annotations

import ssl
import threading
import time
from dataclasses import replace
from queue import Empty
from typing import Any

import torch

from llm_local.jobs.conversation import Conversation, describe
from llm_local.jobs.frames import REFUSAL, Frame, Garbled
from llm_local.jobs.hello import TRAINING, Hello, Refusal
from llm_local.jobs.segment import payload_bytes
from llm_local.jobs.side import BEAT_SECONDS, Side
from llm_local.peer import LostPeer

LINGER_SECONDS = 20.0  # for a last word that may be lost, and for the next life of one that has died before it
SKIPPED = b"\0"  # in the place of a packet
_POLL_SECONDS = 0.1


class Channel(Side):
    """What a stage does with its side, and the thread that makes connections for it."""

    def start(self) -> None:
        self._thread = threading.Thread(target=self._run, name=f"channel {self.name}", daemon=True)
        self._thread.start()

    def check(self) -> None:
        """Raises LostPeer where the other end has refused this one or is away for too long, DamagedLog, Unwritten."""
        if self._failure is not None:
            raise self._failure
        is_missed = not (self._is_connected or self.peer_finished.is_set())
        away = time.monotonic() - self._away_since if is_missed else 0.0
        most = self.limits.absent_seconds
        if most is not None and away > most:
            limit = f"{most:g}"
            raise LostPeer(
                f"{self.name}: stage {self.terms.stage} is away for {limit} s (--absent_peer_timeout {limit})"
                + (f"; {self.trouble}" if self.trouble else "")
            )

    def send(self, *buffers: Any) -> None:
        """Puts a packet into the log, and waits as long as that is full. Raises as `check`, and Unwritten."""
        assert self.log is not None
        if self.peer_finished.is_set():  # this end has gone back once more, and makes its last packets for nobody
            self.log.append(SKIPPED)
            self.log.trim(self.log.next)
            return
        size = payload_bytes(buffers)
        while not self.log.wait_for_room(size, BEAT_SECONDS):
            self.check()
            self.say("full", f"{self.name}: the log is full; this stage waits until stage {self.terms.stage} has saved")
        self.check()
        self._has_trained = True
        self.log.append(*buffers)
        self.wake()

    def skip(self) -> None:
        """Sends in a packet's place that there is none, which has room in any log. Raises as `check`, and Unwritten."""
        assert self.log is not None
        self.check()
        self._has_trained = True
        self.say("skips", f"{self.name}: stage {self.terms.stage} skips steps (--on_full_log skip)")
        self.log.append(SKIPPED)
        self.wake()

    def take(self) -> torch.Tensor | None:
        """The next packet, whose place it gives free; None where the other end has gone. Raises as `check`."""
        while True:
            try:
                found = self.ready.get(timeout=BEAT_SECONDS)
                break
            except Empty:
                if self.parted.is_set():
                    return None
                self.check()
        self._has_trained = True
        self.taken += 1
        self.wake()
        return found

    def made_durable(self, number: int) -> None:
        """A checkpoint of this end holds what so many packets have taught, and it goes back to none from before."""
        self.durable = max(self.durable, number)
        self.wake()

    def await_finish(self) -> None:
        """Until the other end needs nothing any more. Raises as `check`."""
        while not self.peer_finished.wait(BEAT_SECONDS):
            self.check()

    def finish(self) -> None:
        """Says that this end needs nothing more, until the other one has that written down, and has saved what a next
        life of it would want out of the log. Raises as `check`."""
        self.is_finished = True
        self.wake()
        while not self.peer_knows.wait(BEAT_SECONDS):
            self.check()
        while self.log is not None and self.log.durable < self.log.next:
            time.sleep(_POLL_SECONDS)
            self.check()

    def part(self) -> None:
        """What both ends know to be over may end: the one that has finished says so and goes."""
        self.is_parting = True
        self.wake()

    def await_parted(self, seconds: float) -> None:
        """Until the one that has finished has gone, which may come again before; for so long without a connection."""
        self.parted.wait(max(seconds, 0.0))
        self.parted.set()

    def knew(self) -> None:
        """An earlier life of this end has written down that the other one has finished."""
        self.peer_finished.set()

    def close(self) -> None:
        self.stopped.set()
        self.wake()
        self._thread.join(BEAT_SECONDS)
        self.way.close()

    # from here on: the channel's thread

    def _run(self) -> None:
        while not self.is_over:
            try:
                met, self._next = self._next or self.way.connection(self._hello, BEAT_SECONDS), None
                if met is not None:
                    with met[0] as connection:
                        self._meet(connection, met[1])
            except (OSError, Garbled, UnicodeError) as error:
                if not (self.stopped.is_set() or self.peer_finished.is_set() or self.parted.is_set()):
                    self.trouble = describe(error)
                    self.say(self.trouble, f"{self.name}: no connection to stage {self.terms.stage}: {self.trouble}")
            except Exception as error:  # DamagedLog and Unwritten among them: a thread alone would end unheard
                self._failure = error
            finally:
                if self._is_connected:
                    self._is_connected, self._away_since = False, time.monotonic()

    def _hello(self) -> Hello:
        """What this end says of itself now; the conversation that follows goes by it."""
        self._mine = replace(
            self.terms.mine,
            standing=TRAINING if self.is_welcome or self._has_trained else self.terms.mine.standing,
            wants=self.received,
            taken=self.taken,
            durable=self.durable,
            finished=self.is_finished,
            farewell=self.peer_finished.is_set(),
        )
        return self._mine

    def _meet(self, connection: ssl.SSLSocket, first: Frame) -> None:
        # who has dialled has said it already: what has become true since is still to be said
        mine = self._hello() if self.way.is_visited else self._mine
        if first.kind == REFUSAL:
            refusal = Refusal.of(first)
            self.disagree(refusal.reason, refusal.standing, mine.standing)
            return
        other = Hello.of(first)
        self.terms.log_begins = max(self.log.first, self.log.durable) if self.log is not None else 0
        connection.settimeout(BEAT_SECONDS)
        if objection := self.terms.objection(other):
            connection.sendall(Refusal(objection, mine.standing).to_bytes())
            if other.wants is not None and self.terms.is_too_early(other) and self.goes_back(other.wants):
                what = f"stage {other.stage} has gone back to packet {other.wants}"
                self._failure = LostPeer(f"{self.name}: {what}; this stage goes back, too, and makes it again")
                return
            self.disagree(objection, other.standing, mine.standing)
            return
        if self.way.is_visited:
            connection.sendall(mine.to_bytes())
        if other.wants is None:  # it only asks
            return
        self._present = other
        self._is_connected = True
        self.num_connections += 1
        Conversation(self, connection, other, mine).go_on()
