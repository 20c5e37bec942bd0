"""Ends a rank when its launcher, or any peer, is gone, and says which one.

A thread wakes once a second. It needs no reply from the main thread, which may sit in a collective that will never
return: signals reach it through a wake-up file descriptor, and it leaves with os._exit. Nor does it need one from the
store, whose calls never return once its process is stopped: another thread makes them.

- The launcher: its death orphans the ranks (the `deepspeed` runner does not pass a SIGTERM on), so the rank ends too.
- A peer whose process this one can see: its process is gone without having said that it was done.
- A peer that hangs: each rank beats in the store and follows the beats of its link peers and of the next rank.
- A peer elsewhere: whoever misses it first writes an obituary into the store, and everybody reads it there.
- SIGTERM, SIGUSR1 and Ctrl-C: an obituary that explains the signal is awaited for a moment and printed. But a run that
  saves stops at a step that its ranks agree on (stopping.py), and has `saves` seconds for that; Ctrl-C, or a second
  signal, ends it at once.
"""

from __future__ import annotations

import os
import select
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from queue import Empty, SimpleQueue
from typing import Any, NoReturn

import psutil

from llm_local.ancestors import gone, is_running, launcher_pids, watch_over
from llm_local.owner import machine
from llm_local.peer import LostPeer, Peer
from llm_local.stopping import CALLBACK, REQUEST, SIGNALS, Stop

POLL_SECONDS = 1.0
EXPLANATION_SECONDS = 4.0  # a beat is missed up to two polls late
LAST_ACT_SECONDS = 5.0
LAST_WORDS_SECONDS = 1.5  # rank 0 may serve the store: one more poll of the others
SIGTERM_SECONDS = 2.0  # launchers kill what does not end soon
SAME_SIGNAL_SECONDS = 3.0  # a scheduler that signals all processes, and a launcher that passes its own on
OBITUARY = "obituary"


def leave(code: int) -> NoReturn:
    """Ends this process and its children now, whatever the main thread waits for."""
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError):
            stream.flush()
    for child in psutil.Process().children(recursive=True):
        child.kill()
    os._exit(code)


class StoreLine:
    """A client of the store whose questions have a time limit: the store's own calls wait for a stopped server."""

    def __init__(self, store: Any):
        self._store = store
        self._questions: SimpleQueue[tuple[Callable[[Any], Any], SimpleQueue[Any]]] = SimpleQueue()
        threading.Thread(target=self._run, name="store", daemon=True).start()

    def ask(self, question: Callable[[Any], Any], seconds: float) -> Any:
        """question(store). Raises queue.Empty without an answer in time, RuntimeError if the store is gone."""
        answer: SimpleQueue[Any] = SimpleQueue()
        self._questions.put((question, answer))
        value = answer.get(timeout=seconds)
        if isinstance(value, Exception):
            raise value
        return value

    def _run(self) -> None:
        while True:
            question, answer = self._questions.get()
            try:
                answer.put(question(self._store))
            except Exception as error:
                answer.put(error)


@dataclass
class _Pulse:
    """A peer's last beat and when it was new."""

    beat: bytes
    seen: float


class Watchdog:
    """Start it early, `watch` the peers once they are known, `done` before a good exit.

    last_act: what rank 0 does with what ends a run before its time, for a few seconds at most.
    """

    def __init__(self, rank: int):
        self.rank = rank
        self.step = 0
        self.stop = Stop()
        self.last_act: Callable[[str], object] = lambda _cause: None
        self._save_seconds = 0.0
        self._signalled: float | None = None
        self._stopping: float | None = None
        self._name = f"rank {rank}"
        self._launchers = launcher_pids()
        self._peers: list[Peer] = []
        self._pulses: dict[int, _Pulse] = {}
        self._line: StoreLine | None = None
        self._answered = 0.0
        self._beats = 0
        self._obituary: str | None = None
        self._seconds = 0.0
        self._ending = threading.Lock()
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="watchdog", daemon=True)
        self._wake_read, self._wake_write = os.pipe()
        os.set_blocking(self._wake_read, False)
        os.set_blocking(self._wake_write, False)

    def start(self) -> None:
        """Watches the launcher. Signals end the process silently for now: rank 0 says what is wrong at the start."""
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        self._thread.start()
        watch_over()

    @property
    def lives(self) -> bool:
        """Whether its thread is there."""
        return self._thread.is_alive()

    def call_off(self) -> None:
        """There is no run: nothing is watched any more."""
        self._stopped.set()
        os.write(self._wake_write, b"\0")
        self._thread.join()
        os.close(self._wake_read)
        os.close(self._wake_write)

    def watch(self, me: Peer, linked: Iterable[int], peers: list[Peer], store: Any, seconds: float) -> None:
        """From here on peers are watched, and signals are explained; call it from the main thread.

        linked: ranks with which this one has links. `store` must be this watchdog's own client. A peer without a beat
        for so many seconds is lost.
        """
        self._name = f"stage {me.stage}, replica {me.replica} (rank {me.rank})"
        self._peers = peers
        self._seconds = seconds
        self._answered = time.monotonic()
        followed = {*linked, (me.rank + 1) % len(peers)} - {me.rank}
        self._pulses = {rank: _Pulse(b"", self._answered) for rank in followed}
        for number in (*SIGNALS, signal.SIGINT):
            signal.signal(number, lambda *_: None)  # the work is done by the thread, through the descriptor
        signal.set_wakeup_fd(self._wake_write, warn_on_full_buffer=False)
        self._line = StoreLine(store)

    def saves(self, seconds: float) -> None:
        """From here on a run that is told to stop does so by itself, in so many seconds; 0: it is ended."""
        self._save_seconds = seconds

    def done(self) -> None:
        """This rank has finished; its end is no longer news."""
        if self._line is not None:
            self._line.ask(lambda store: store.set(f"done/{self.rank}", "1"), self._seconds)
        self._stopped.set()

    def report(self, text: str) -> str:
        """Writes this rank's obituary unless an earlier one explains more; returns the one that stands."""
        if self._line is None:
            return text
        try:
            return bytes(self._line.ask(lambda store: store.compare_set(OBITUARY, "", text), POLL_SECONDS)).decode()
        except (RuntimeError, Empty):  # the store is lost with its rank: what we know is all there is
            return text

    def ask_to_stop(self, seconds: float) -> None:
        """Asks all ranks for a stop that is none of the process; returns when this rank begins no further step.

        Raises LostPeer where that takes longer than so many seconds.
        """
        assert self._line is not None
        end = time.monotonic() + seconds
        self._line.ask(lambda store: store.compare_set(REQUEST, "", CALLBACK), seconds)
        while not self.stop.reason:  # the watchdog's next beat learns of it
            if time.monotonic() > end:
                raise LostPeer(f"no agreement on a last step within {seconds:g} s")
            time.sleep(0.05)

    def announce(self, reason: str) -> None:
        """Tells the peers what ends this rank, as far as nothing has told them yet."""
        self.report(f"{self._name} stopped: {reason}")
        self._stopped.set()

    def explain(self, seconds: float = EXPLANATION_SECONDS) -> str | None:
        """What ended the run, as far as anybody knows within so many seconds."""
        end = time.monotonic() + seconds
        while True:
            cause = self._cause()
            if cause or time.monotonic() > end:
                return cause
            time.sleep(0.1)

    def fail(self, reason: str, cause: str | None, code: int = 1) -> None:
        """Ends this rank for a reason of its own, or for the cause of it that lies elsewhere."""
        own = f"{self._name} stopped: {reason}"
        stands = self.report(cause or own)
        self._end(reason if stands == own else stands, code)

    def _run(self) -> None:
        while not self._stopped.is_set():
            number = self._signal_within(0.1 if self.stop.reason else POLL_SECONDS)
            if self._stopped.is_set():
                return
            lost = gone(self._launchers)
            reason = "the launcher is gone" + (f" (pid {lost[0]})" if lost and lost[0] else "")
            if (number or lost) and self._lets_it_save(number, reason):
                number = None
            elif lost:
                self._end(reason, 1)
            cause = None if number else self._cause()
            if number or cause:
                self._conclude(number, cause)
            self._bound_the_stop()

    def _lets_it_save(self, number: int | None, reason: str) -> bool:
        """Whether the run stops by itself, which it is asked for here; ended at once by Ctrl-C or a second signal."""
        is_ending = self.stop.reason == CALLBACK
        if not self._save_seconds or self._line is None or number == signal.SIGINT or is_ending:
            return False
        if number is not None:
            reason, now = signal.Signals(number).name, time.monotonic()
            self._signalled = self._signalled or now
            if now - self._signalled > SAME_SIGNAL_SECONDS:
                return False
        try:
            if not self.stop.reason:
                self._line.ask(lambda store: store.compare_set(REQUEST, "", reason), POLL_SECONDS)
        except (RuntimeError, Empty):  # the store is lost: the ranks cannot agree
            return False
        return True

    def _bound_the_stop(self) -> None:
        if self.stop.reason in ("", CALLBACK):
            return
        self._stopping = self._stopping or time.monotonic()
        if time.monotonic() - self._stopping > self._save_seconds:
            seconds = f"{self._save_seconds:g} s (--signal_save_seconds {self._save_seconds:g})"
            said = f"{self.stop.reason} at step {self.step}" + (
                f"; not done in {seconds}" if self._save_seconds else ""
            )
            self._end(self.report(said), self.stop.status)

    def _conclude(self, number: int | None, cause: str | None) -> None:
        if number != signal.SIGINT:  # Ctrl-C reaches all ranks, but not at once, and launchers add a SIGTERM
            number = self._signal_within(0.2) or number
        if number is None:
            assert cause is not None
            self._end(self.report(cause), self.stop.status)
            return
        reason = f"{signal.Signals(number).name} at step {self.step}"
        if number == signal.SIGINT:
            self._end(reason, 128 + number)
        else:
            self.fail(reason, cause or self.explain(SIGTERM_SECONDS), 128 + number)

    def _signal_within(self, seconds: float) -> int | None:
        news = select.poll()  # select takes no file above 1023
        news.register(self._wake_read, select.POLLIN)
        if news.poll(1000 * seconds):
            numbers = os.read(self._wake_read, 64)
            return next((n for n in (signal.SIGINT, *SIGNALS) if n in numbers), None)
        return None

    def _end(self, cause: str, code: int) -> None:
        self._ending.acquire()  # for good: the first thread that has a cause ends the process
        if self._stopped.is_set():
            self._ending.release()
            return
        with suppress(OSError):  # what is printed may go to a full disk
            print(f"\nllm_local: {self._name} ends: {cause}", file=sys.stderr, flush=True)
        if self.rank == 0 and self._line is not None:
            end = time.monotonic() + (LAST_WORDS_SECONDS if code != 128 + signal.SIGINT else 0)
            act = threading.Thread(target=self.last_act, args=(cause,), daemon=True)  # its disk may be what hangs
            act.start()
            act.join(LAST_ACT_SECONDS)
            time.sleep(max(0.0, end - time.monotonic()))
        leave(code)

    def _cause(self) -> str | None:
        """An obituary, a dead or silent peer, or the loss of the store, in this order."""
        if self._line is None:
            return None
        lost_store = self._exchange()
        return self._obituary or self._dead_neighbour() or self._silent_peer() or lost_store

    def _exchange(self) -> str | None:
        """Beats, and reads the obituary and the followed peers' beats; returns what is wrong with the store."""
        assert self._line is not None
        server = "the launcher" if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True" else f"{self._peers[0]}"
        try:
            self._line.ask(self._beat, POLL_SECONDS)
            self._answered = time.monotonic()
        except Empty:
            if time.monotonic() - self._answered > self._seconds:
                return f"lost {server}, which serves the store: no answer for {self._limit()}"
        except RuntimeError:
            return f"lost {server}, which serves the store: it is gone"
        return None

    def _beat(self, store: Any) -> None:
        self._beats += 1
        store.set(f"beat/{self.rank}", str(self._beats))
        self.stop.exchange(store, self.rank, len(self._peers))
        if store.check([OBITUARY]):
            self._obituary = bytes(store.get(OBITUARY)).decode()
        for rank, pulse in self._pulses.items():
            beat = bytes(store.get(f"beat/{rank}")) if store.check([f"beat/{rank}"]) else b""
            if beat != pulse.beat or store.check([f"done/{rank}"]):
                pulse.beat, pulse.seen = beat, time.monotonic()

    def _silent_peer(self) -> str | None:
        for rank, pulse in self._pulses.items():
            # measured between two exchanges: while the store is silent nothing is known of the peer
            if self._answered - pulse.seen > self._seconds:
                return f"lost {self._peers[rank]}: no sign of life for {self._limit()}"
        return None

    def _limit(self) -> str:
        return f"{self._seconds:g} s (--link_timeout_seconds {self._seconds:g})"

    def _dead_neighbour(self) -> str | None:
        for peer in self._peers:
            here = peer.rank != self.rank and peer.host == machine()
            if here and not is_running(peer.pid) and not self._is_done(peer):
                return f"lost {peer}: its process is gone"
        return None

    def _is_done(self, peer: Peer) -> bool:
        assert self._line is not None
        try:
            return self._line.ask(lambda store: store.check([f"done/{peer.rank}"]), POLL_SECONDS)
        except (RuntimeError, Empty):
            return False
