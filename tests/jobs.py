"""The jobs of the fault campaign: a stage's launcher and its ranks, and the relay that its link goes through."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from llm_local.ancestors import on_death_of_parent

ROOT = Path(__file__).parent.parent
RANK = str(ROOT / "tests" / "paced.py")
FORKS = "CAMPAIGN_FORKS"  # if set, ranks are forks of their launcher
RESTARTS = 100_000
SPAWN_SECONDS = 0.5  # between the ranks of a life; one of them may end before the others
RESET = struct.pack("ii", 1, 0)  # SO_LINGER: close() sends RST


def launcher(num_ranks: int, restarts: int) -> list[str]:
    if FORKS in os.environ:
        return [sys.executable, "-m", "tests.agent", str(num_ranks), str(restarts)]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--local_addr", "127.0.0.1"]
    return [*torchrun, "--nproc_per_node", str(num_ranks), "--max_restarts", str(restarts), RANK]


def environment(**more: str) -> dict[str, str]:
    return os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)} | more


class Relay:
    """A port that passes all on to another one, until it is told to reset connections, or to let nothing through."""

    def __init__(self, target: int, port: int = 0):
        self._target = target
        self._listener = socket.create_server(("127.0.0.1", port))
        self.port = self._listener.getsockname()[1]
        self._flows, self._is_cut = threading.Event(), False
        self._flows.set()
        self._sockets: set[socket.socket] = set()
        threading.Thread(target=self._accept, daemon=True).start()

    def cut(self) -> None:
        """Resets all connections, and those that come, until `restore`."""
        self._is_cut = True
        for each in list(self._sockets):
            self._reset(each)

    def silence(self) -> None:
        """Keeps what arrives, and says nothing, until `restore`."""
        self._flows.clear()

    def restore(self) -> None:
        self._is_cut = False
        self._flows.set()

    def _accept(self) -> None:
        while True:
            near, _ = self._listener.accept()
            self._flows.wait()
            self._sockets.add(near)
            try:
                if self._is_cut:
                    raise ConnectionResetError
                far = socket.create_connection(("127.0.0.1", self._target), timeout=5)
                far.settimeout(None)
            except OSError:
                self._reset(near)
                continue
            self._sockets.add(far)
            for ends in ((near, far), (far, near)):
                threading.Thread(target=self._pump, args=ends, daemon=True).start()

    def _pump(self, source: socket.socket, target: socket.socket) -> None:
        with suppress(OSError):
            while data := source.recv(1 << 16):
                self._flows.wait()
                target.sendall(data)
        self._reset(source)
        self._reset(target)

    def _reset(self, each: socket.socket) -> None:
        self._sockets.discard(each)
        with suppress(OSError):
            each.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
            each.shutdown(socket.SHUT_RDWR)  # who waits in recv wakes up
        each.close()


@dataclass
class Life:
    """The time between two starts of a rank 0. created: when its process began; ready: when the model was loaded."""

    pid: int
    created: float
    zero: int
    resumed: int = 0
    ready: float | None = None


@dataclass
class Stage:
    """A job, as the campaign sees it. step: the last that was trained, at `moved`. hit_at: when a fault has ended it,
    until it trains again."""

    number: int
    output: Path
    flags: list[str]
    num_ranks: int
    max_steps: int
    variables: dict[str, str]
    zero: int = 0
    process: subprocess.Popen[str] | None = None
    lives: list[Life] = field(default_factory=list)
    step: int = 0
    moved: float = 0.0
    hit_at: float | None = 0.0
    is_done: bool = False
    news: list[str] = field(default_factory=list)

    @property
    def life(self) -> Life:
        return self.lives[-1]

    @property
    def metrics(self) -> Path:
        return self.output / f"metrics/stage-{self.number:02d}.jsonl"

    def start(self) -> None:
        zero = ["--deepspeed", str(ROOT / f"configs/ds/zero{self.zero}.json")]
        self.process = subprocess.Popen(
            [*launcher(self.num_ranks, RESTARTS), *self.flags, *zero],
            env=environment(**self.variables),
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,
            preexec_fn=end_with_parent,
        )
        threading.Thread(target=self._listen, args=(self.process,), daemon=True).start()

    def ranks(self) -> list[psutil.Process]:
        """Children of the launcher that live."""
        assert self.process is not None
        with suppress(psutil.Error):
            found = psutil.Process(self.process.pid).children()
            return [each for each in found if each.status() != psutil.STATUS_ZOMBIE]
        return []

    def look(self) -> list[str]:
        """Sees what has changed, starts the launcher again if it has ended; returns what should not have happened."""
        assert self.process is not None
        wrong = []
        if not self.is_done and (status := self.process.poll()) is not None:
            self.is_done = status == 0
            if status != 0:
                if self.hit_at is None:
                    wrong.append(f"the launcher of stage {self.number} has ended with {status}: {self.last_news()}")
                self.start()
        if ranks := self.ranks():
            first = min(ranks, key=lambda each: each.pid)
            if not self.lives or first.create_time() > self.life.created + SPAWN_SECONDS:
                if self.hit_at is None:
                    wrong.append(f"stage {self.number} has ended, which no fault has hit: {self.last_news()}")
                with suppress(psutil.Error):
                    self.lives.append(Life(first.pid, first.create_time(), self.zero))
        step = self._last_step()
        if step is not None and step != self.step:
            self.step, self.moved = step, time.time()
        return wrong

    def trains_since(self, moment: float) -> bool:
        """Whether it has trained a step in the life that it is in now, after that moment; or has finished."""
        if self.is_done:
            return True
        ready = self.life.ready if self.lives else None
        if ready is None or self.life.resumed == self.max_steps:
            return ready is not None
        return self.moved > max(ready, moment) and self.step > self.life.resumed

    def is_back(self, moment: float) -> bool:
        """Whether it trains in a life that began after the fault which has ended the one before, if any has."""
        is_old = self.hit_at is not None and not (self.lives and self.life.created > self.hit_at - 0.2)
        return self.is_done or (not is_old and self.trains_since(moment))

    def last_news(self) -> str:
        return " / ".join(line for line in self.news[-8:])

    def kill(self) -> None:
        """The whole job at once."""
        assert self.process is not None
        ranks = self.ranks()
        self.process.kill()
        for rank in ranks:
            with suppress(psutil.Error):
                rank.kill()
        self.process.wait()

    def saved_steps(self) -> list[int]:
        """Of its checkpoints, the oldest first."""
        return sorted(int(path.parent.name[5:]) for path in self.output.glob("checkpoints/step-*/manifest.json"))

    def logs(self) -> list[Path]:
        """The segments of what it keeps for the next stage, the newest last."""
        return sorted(self.output.glob("log/replica-*/*.packets"), key=lambda path: path.name)

    def _listen(self, process: subprocess.Popen[str]) -> None:
        assert process.stdout is not None
        with (self.output.parent / f"stage-{self.number:02d}.log").open("a") as log:
            for line in process.stdout:
                log.write(f"{time.time():.2f} {line}")
                log.flush()
                if "llm_local" not in line or not self.lives:
                    continue
                self.news.append(line.strip())
                if found := re.search(r"goes on after .*/step-(\d+)", line):
                    self.life.resumed = int(found[1])
                if f"llm_local: stage {self.number} of " in line:
                    self.life.ready = time.time()

    def _last_step(self) -> int | None:
        """Of the newest record."""
        try:
            with self.metrics.open("rb") as file:
                file.seek(max(0, os.fstat(file.fileno()).st_size - 4096))
                lines = file.read().split(b"\n")
            return int(json.loads(lines[-2])["step"])
        except (OSError, ValueError, IndexError):
            return None


def end_with_parent() -> None:
    on_death_of_parent(signal.SIGTERM)


def freeze(process: psutil.Process, stops: bool) -> None:
    with suppress(psutil.Error, ProcessLookupError):
        process.send_signal(signal.SIGSTOP if stops else signal.SIGCONT)
