"""How the ranks of a run meet: a store, in which each claims its place and waits for rank 0's setup."""

from __future__ import annotations

import json
import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from datetime import timedelta
from queue import Empty
from typing import Any

import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

from llm_local.ancestors import launcher_pids
from llm_local.config import ConfigError
from llm_local.launch import Launch
from llm_local.owner import Owner
from llm_local.peer import LostPeer
from llm_local.watchdog import StoreLine

SETUP = "setup"
SIGN_SECONDS = 1.0
_TOLD, _SIGNS, _NO = "told", "signs", "no: "
_OPENED = "llm_local/opened"
_POLL_SECONDS = 0.2
_LOOK_SECONDS = 2.0


class RunRefused(ConfigError):
    """Rank 0 has refused the run: its problems, which it has printed."""


@dataclass(frozen=True)
class Claim:
    """That a process is some rank of a run. output_dir: as the flag says it. launcher: what has started this process
    and rank 0, where that is known."""

    owner: Owner
    output_dir: str
    world_size: int
    launcher: int | None

    @staticmethod
    def of(launch: Launch, output_dir: str) -> Claim:
        on_first_node = launch.rank == launch.local_rank
        launcher = next(iter(launcher_pids()), None) if on_first_node else None
        return Claim(Owner.me(output_dir), output_dir, launch.world_size, launcher)

    def may_follow(self, first: Claim) -> bool:
        """Whether that rank 0 can be this run's: a process of another one may have come to the same address."""
        if (self.output_dir, self.world_size) != (first.output_dir, first.world_size):
            return False
        if self.owner.machine != first.owner.machine:
            return True
        return self.owner.folder == first.owner.folder and self.launcher in (None, first.launcher)

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @staticmethod
    def from_json(text: str) -> Claim:
        values = json.loads(text)
        return Claim(**values | {"owner": Owner(**values["owner"])})


def open_store(launch: Launch, output_dir: str, seconds: float) -> Any:
    """The rendezvous that every launcher provides; rank 0 serves it unless torchrun's agent does.

    Keys bear a name that no other run has. Raises ConfigError where another run, or this rank started twice, has the
    port or the rank's place, which is left as it is; LostPeer where nobody serves the store in time.
    """
    if "RANK" not in os.environ:
        os.environ.update(
            RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(_free_port())
        )
    address = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
    try:
        store, _, _ = next(rendezvous("env://", timeout=timedelta(seconds=seconds)))
    except RuntimeError as error:
        if "EADDRINUSE" in str(error):
            raise _taken(f"the port of {address}", _first_at(address)) from error
        raise LostPeer(f"no rendezvous with rank 0 at {address} within {seconds:.0f} s: {error}") from error
    places = dist.PrefixStore(_places(launch.restart), store)
    run = claim_place(places, launch.rank, Claim.of(launch, output_dir), address, seconds)
    return dist.PrefixStore(f"llm_local/{run}", store)


def claim_place(places: Any, rank: int, mine: Claim, address: str, seconds: float) -> str:
    """Makes the rank's place this process's, and returns the name of the run, which rank 0 gives.

    Raises ConfigError, and leaves everything as it is, where the place or the run there is another process's.
    """
    text, first = mine.to_json(), mine
    if rank != 0:
        first = Claim.from_json(fetch(places, "0", seconds, f"rank 0 at {address} to come"))
        if not mine.may_follow(first):
            raise _taken(address, first)
    holder = bytes(places.compare_set(str(rank), "", text)).decode()
    if holder != text:
        raise _taken(f"rank {rank} at {address}", Claim.from_json(holder))
    return first.owner.run


def _places(restart: int) -> str:
    """Where the claims are kept. Keys outlive a restart by torchrun, so each restart has places of its own."""
    return f"llm_local/{restart}"


def _taken(what: str, by: Claim | None) -> ConfigError:
    who = f"by another run, or by this one started twice ({by.owner})" if by else "perhaps by another run"
    flags = (
        "--master_port N of the launcher (accelerate: --main_process_port N; srun, mpirun: the variable MASTER_PORT)"
    )
    repair = f"give this run another: {flags}"
    return ConfigError([f"{what} is in use, {who}; {repair}"])


def _first_at(address: str) -> Claim | None:
    """Rank 0 of the run whose store that is, if it is one: whatever else serves there may never answer."""
    host, _, port = address.rpartition(":")

    def look(_: None) -> Claim | None:
        patience = timedelta(
            seconds=3 * _LOOK_SECONDS
        )  # torch complains on the screen at its end: this run has ended then
        store = dist.TCPStore(host, int(port), is_master=False, timeout=patience, wait_for_workers=False)
        places = dist.PrefixStore(_places(0), store)
        return Claim.from_json(bytes(places.get("0")).decode()) if places.check(["0"]) else None

    with suppress(Empty, RuntimeError, ValueError, TypeError):
        return StoreLine(None).ask(look, _LOOK_SECONDS)
    return None


class Rendezvous:
    """Where a rank meets the others: the store of the run, opened when it is first needed and then kept.

    seconds: the longest wait for others to come.
    """

    def __init__(self, launch: Launch, output_dir: str, seconds: float):
        self._launch = launch
        self._output_dir = output_dir
        self._seconds = seconds
        self._store: Any = None

    def store(self, seconds: float | None = None) -> Any:
        """As open_store."""
        if self._store is None:
            self._store = open_store(self._launch, self._output_dir, self._seconds if seconds is None else seconds)
        return self._store

    @contextmanager
    def kept_waiting(self) -> Iterator[None]:
        """Rank 0 gives a sign of life every second, so that the others may wait for its setup without a time limit."""
        if self._launch.world_size == 1:
            yield
            return
        line, ended = self.store().clone(), threading.Event()

        def beat() -> None:
            with suppress(RuntimeError):  # the store is gone: the others know
                while not ended.wait(SIGN_SECONDS):
                    line.add(_SIGNS, 1)

        threading.Thread(target=beat, name="signs of life", daemon=True).start()
        try:
            yield
        finally:
            ended.set()

    def publish(self, setup: str) -> None:
        """Rank 0 tells the others the setup, and later lives of the run that its output folder is open."""
        _below(self.store()).set(_OPENED, "1")
        self.store().set(SETUP, setup)

    def is_known(self) -> bool:
        """Whether an earlier life of this run, before a restart by torchrun, has opened the output folder."""
        return self._launch.restart > 0 and _below(self.store()).check([_OPENED])

    def say_no(self, error: Exception, seconds: float) -> None:
        """Rank 0 tells the others, who wait for it, that there is no run and why; leaves once they know."""
        if self._launch.world_size == 1:
            return
        end = time.monotonic() + seconds
        with suppress(RuntimeError, ConfigError):  # a launcher may have ended the others
            store = self.store(seconds)
            problems = error.problems if isinstance(error, ConfigError) else [f"rank 0 has failed: {error!r}"]
            store.set(SETUP, _NO + json.dumps(problems))
            while store.add(_TOLD, 0) < self._launch.world_size - 1 and time.monotonic() < end:
                time.sleep(0.05)


def _below(store: Any) -> Any:
    """The store that the lives of a run share, under torchrun the agent's."""
    while isinstance(store, dist.PrefixStore):
        store = store.underlying_store
    return store


def fetch_setup(store: Any, seconds: float, silence_seconds: float | None = None) -> str:
    """What rank 0 has published as the SETUP. It has `seconds` for that; from its first sign of life on as long as it
    wants, if it gives more of them.

    Raises RunRefused where it has said no, LostPeer where it is gone, or silent for silence_seconds.
    """
    line, start, signs, limit = StoreLine(store), time.monotonic(), 0, seconds
    seen = start
    while True:
        try:
            text, found = line.ask(_setup_and_signs, limit)
        except RuntimeError as error:
            raise LostPeer("lost rank 0, or what serves its store, while waiting for rank 0's setup") from error
        except Empty:
            text, found = None, signs
        if text is not None:
            break
        now = time.monotonic()
        if found != signs:
            signs, seen, limit = found, now, seconds if silence_seconds is None else silence_seconds
        if now - seen >= limit:
            silent = f"; no sign of life for {limit:g} s (--link_timeout_seconds {limit:g})" if signs else ""
            raise LostPeer(f"waited {now - start:.0f} s for rank 0's setup{silent}")
        time.sleep(min(_POLL_SECONDS, limit))
    if text.startswith(_NO):
        store.add(_TOLD, 1)
        raise RunRefused(json.loads(text.removeprefix(_NO)))
    return text


def _setup_and_signs(store: Any) -> tuple[str | None, int]:
    signs = store.add(_SIGNS, 0)
    return (bytes(store.get(SETUP)).decode() if store.check([SETUP]) else None), signs


def fetch(store: Any, key: str, seconds: float, what: str) -> str:
    """The value of a key once somebody publishes it. Raises LostPeer naming what was awaited."""
    start = time.monotonic()
    try:
        store.wait([key], timedelta(seconds=seconds))
        return bytes(store.get(key)).decode()
    except RuntimeError as error:  # DistStoreError is one
        waited = time.monotonic() - start
        raise LostPeer(f"waited {waited:.0f} s for {what}") from error


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
