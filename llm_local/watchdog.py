"""Ends a rank when its launcher, or any peer, is gone, and says which one.

A thread wakes once a second. It needs no reply from the main thread, which may sit in a collective that will never
return: signals reach it through a wake-up file descriptor, and it leaves with os._exit.

- The launcher: its death orphans the ranks (the `deepspeed` runner does not pass a SIGTERM on), so the rank ends too.
- A peer on this host: its process is gone without having said that it was done.
- A peer elsewhere: whoever misses it first writes an obituary into the store, and everybody reads it there.
- SIGTERM and Ctrl-C: an obituary that explains the signal is awaited for a moment and printed.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import threading
import time
from dataclasses import asdict, dataclass
from typing import Any

import psutil

POLL_SECONDS = 1.0
EXPLANATION_SECONDS = 2.0
OBITUARY = "obituary"


@dataclass(frozen=True)
class Peer:
    """Who a rank is, as it says itself in the store."""

    rank: int
    stage: int
    replica: int
    host: str
    pid: int
    links: str

    @staticmethod
    def me(rank: int, stage: int, replica: int, num_stages: int) -> Peer:
        links = [f"{k}→{k + 1}" for k in (stage - 1, stage) if 0 <= k < num_stages - 1]
        text = f"link {' and '.join(links)}" if links else "no link"
        return Peer(rank, stage, replica, socket.gethostname(), os.getpid(), text)

    def __str__(self) -> str:
        return f"stage {self.stage}, replica {self.replica} (rank {self.rank}, pid {self.pid}, {self.links})"


def encode(peer: Peer) -> str:
    return json.dumps(asdict(peer))


def decode(text: str | bytes) -> Peer:
    return Peer(**json.loads(text))


def launcher_pids() -> list[int]:
    """The processes whose death ends the run: the parent, and deepspeed's runner above its per-node launcher."""
    parent = psutil.Process().parent()
    if parent is None:
        return []
    pids = [parent.pid]
    try:
        command = " ".join(parent.cmdline())
        above = parent.parent()
    except psutil.Error:
        return pids
    if "deepspeed.launcher.launch" in command and above is not None:
        pids.append(above.pid)
    return pids


def is_running(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def leave(code: int) -> None:
    """Ends this process and its children now, whatever the main thread waits for."""
    sys.stdout.flush()
    sys.stderr.flush()
    for child in psutil.Process().children(recursive=True):
        child.kill()
    os._exit(code)


class Watchdog:
    """Start it early, `watch` the peers once they are known, `done` before a good exit."""

    def __init__(self, rank: int):
        self.rank = rank
        self.step = 0
        self._name = f"rank {rank}"
        self._launchers = launcher_pids()
        self._peers: list[Peer] = []
        self._store: Any = None
        self._lock = threading.Lock()
        self._stopped = threading.Event()
        self._wake_read, self._wake_write = os.pipe()
        os.set_blocking(self._wake_read, False)
        os.set_blocking(self._wake_write, False)

    def start(self) -> None:
        """Watches the launcher. Signals end the process silently for now: rank 0 says what is wrong at the start."""
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        threading.Thread(target=self._run, name="watchdog", daemon=True).start()

    def take_signals(self) -> None:
        """From here on SIGTERM and Ctrl-C are explained; call it from the main thread."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: None)  # the work is done by the thread, through the descriptor
        signal.set_wakeup_fd(self._wake_write, warn_on_full_buffer=False)

    def watch(self, me: Peer, peers: list[Peer], store: Any) -> None:
        """From here on peers are watched too. `store` must be this thread's own client."""
        self._name = f"stage {me.stage}, replica {me.replica} (rank {me.rank})"
        self._store = store
        self._peers = [peer for peer in peers if peer.rank != me.rank]

    def done(self) -> None:
        """This rank has finished; its end is no longer news."""
        self._stopped.set()
        if self._store is not None:
            with self._lock:
                self._store.set(f"done/{self.rank}", "1")

    def report(self, text: str) -> str:
        """Writes this rank's obituary unless an earlier one explains more; returns the one that stands."""
        if self._store is None:
            return text
        try:
            with self._lock:
                return bytes(self._store.compare_set(OBITUARY, "", text)).decode()
        except Exception:  # the store died with its rank: what we know is all there is
            return text

    def explain(self, seconds: float = EXPLANATION_SECONDS) -> str | None:
        """What ended the run, as far as anybody knows within so many seconds."""
        end = time.monotonic() + seconds
        while True:
            cause = self._obituary() or self._dead_neighbour()
            if cause or time.monotonic() > end:
                return cause
            time.sleep(0.1)

    def fail(self, reason: str, by_a_peer: bool) -> None:
        """Ends this rank for a reason that its main thread met, unless an earlier one explains it."""
        if by_a_peer:
            self._end(self.report(self.explain() or reason), 1)
        else:
            self.report(f"{self._name} stopped: {reason}")
            self._end(reason, 1)

    def _run(self) -> None:
        while not self._stopped.is_set():
            number = self._signal_within(POLL_SECONDS)
            if self._stopped.is_set():
                return
            if number is not None:
                cause = self.explain() if number == signal.SIGTERM else None
                self._end(cause or f"{signal.Signals(number).name} at step {self.step}", 128 + number)
            gone = [pid for pid in self._launchers if not is_running(pid)]
            if gone:
                self._end(f"the launcher (pid {gone[0]}) is gone", 1)
            cause = self._dead_neighbour() or self._obituary()
            if cause:
                time.sleep(0.5)  # a main thread that met the same loss says more; it ends the process first
                self._end(self.report(cause), 1)

    def _signal_within(self, seconds: float) -> int | None:
        import select

        if select.select([self._wake_read], [], [], seconds)[0]:
            for number in os.read(self._wake_read, 64):
                if number in (signal.SIGTERM, signal.SIGINT):
                    return number
        return None

    def _end(self, cause: str, code: int) -> None:
        if self._stopped.is_set():
            return
        print(f"\nllm_local: {self._name} ends: {cause}", file=sys.stderr, flush=True)
        leave(code)

    def _obituary(self) -> str | None:
        if self._store is None:
            return None
        try:
            with self._lock:
                return self._store.get(OBITUARY).decode() if self._store.check([OBITUARY]) else None
        except Exception as error:
            return f"lost the store that rank 0 or the launcher serves ({str(error).splitlines()[0]})"

    def _dead_neighbour(self) -> str | None:
        for peer in self._peers:
            if peer.host == socket.gethostname() and not is_running(peer.pid) and not self._is_done(peer):
                return f"lost {peer}: its process is gone"
        return None

    def _is_done(self, peer: Peer) -> bool:
        try:
            with self._lock:
                return self._store.check([f"done/{peer.rank}"])
        except Exception:
            return False
