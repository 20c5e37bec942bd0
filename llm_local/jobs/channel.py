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
        Conversation(self, connection, other, mine).go_on()
