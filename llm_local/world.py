"""Where a rank lives, and how the ranks of a run meet.

A stage is an ordinary DeepSpeed job: its replicas form the default process group of their processes, and no group
spans two stages (backprop's stock pipeline is the exception and takes all ranks as one world). Everything else that
ranks tell each other goes through the store of the launcher's rendezvous.
"""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from queue import Empty
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

from llm_local.config import ConfigError
from llm_local.device import collective_backend, device_identity, local_device, prepare_cpu
from llm_local.watchdog import LostPeer, Peer, StoreLine, Watchdog, decode, encode

LAUNCHERS = (
    "deepspeed --num_gpus N, torchrun --nproc_per_node N, or accelerate launch --config_file configs/accelerate/"
)


PLAN = "plan"
SIGN_SECONDS = 1.0
_TOLD, _SIGNS = "told", "signs"
_OPENED = "llm_local/opened"
_POLL_SECONDS = 0.2


class Refused(Exception):
    """Rank 0 has refused the run, and says why."""


@dataclass(frozen=True)
class Launch:
    """What the launcher's environment says of this process."""

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    restart: int

    @staticmethod
    def from_environment(environ: Mapping[str, str]) -> Launch:
        """Reads the variables of deepspeed, torchrun and accelerate; without any, the process is a world of one.

        Raises ConfigError for `accelerate launch --cpu`, which starts one process and gives it no rank.
        """
        if "RANK" not in environ:
            if any(name.startswith("ACCELERATE_") for name in environ):
                raise ConfigError(
                    [f"accelerate launch --cpu starts one process without a rank; use instead {LAUNCHERS}cpu.yaml"]
                )
            return Launch(0, 1, 0, 1, 0)
        missing = [n for n in ("WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT") if n not in environ]
        if missing:
            raise ConfigError([f"RANK is set but not {', '.join(missing)}; start with {LAUNCHERS}*.yaml"])
        world_size = int(environ["WORLD_SIZE"])
        local = environ.get("LOCAL_WORLD_SIZE") or environ.get("LOCAL_SIZE") or world_size
        restart = int(environ.get("TORCHELASTIC_RESTART_COUNT", "0"))
        return Launch(int(environ["RANK"]), world_size, int(environ["LOCAL_RANK"]), int(local), restart)


@dataclass(frozen=True)
class Place:
    """A rank's stage and replica: ranks count through the replicas of stage 0 first."""

    rank: int
    num_stages: int
    num_replicas: int

    @staticmethod
    def of(rank: int, world_size: int, num_stages: int) -> Place:
        assert world_size % num_stages == 0, "checked in problems.py"
        return Place(rank, num_stages, world_size // num_stages)

    @property
    def stage(self) -> int:
        return self.rank // self.num_replicas

    @property
    def replica(self) -> int:
        return self.rank % self.num_replicas

    @property
    def world_size(self) -> int:
        return self.num_stages * self.num_replicas

    @property
    def is_first_stage(self) -> bool:
        return self.stage == 0

    @property
    def is_last_stage(self) -> bool:
        return self.stage == self.num_stages - 1

    @property
    def is_recorder(self) -> bool:
        """Replica 0 speaks for its stage."""
        return self.replica == 0


class World:
    """The ranks of this run: the store between all of them, the process group of this stage."""

    def __init__(self, place: Place, device: torch.device, store: Any, watchdog: Watchdog, timeout_seconds: float):
        self.place = place
        self.device = device
        self.store = store
        self.watchdog = watchdog
        self.timeout_seconds = timeout_seconds
        self.peers: list[Peer] = []
        self.device_ids: list[str] = []
        self.replicas: Any = None  # this stage's group where it is not the default one

    def publish(self, key: str, value: str) -> None:
        self.store.set(key, value)

    def fetch(self, key: str, seconds: float, what: str) -> str:
        """The value of a key once somebody publishes it. Raises LostPeer naming what was awaited."""
        return _fetch(self.store, key, seconds, what)

    def peek(self, key: str) -> str | None:
        """The value of a key if it is there, without waiting."""
        return bytes(self.store.get(key)).decode() if self.store.check([key]) else None

    def count(self, key: str) -> int:
        """Counts the callers of this key; the one that gets world_size is the last."""
        return self.store.add(key, 1)

    def mean_over_replicas(self, values: torch.Tensor) -> torch.Tensor:
        """Element-wise mean of each replica's values of this stage; every replica must call."""
        if self.place.num_replicas > 1:
            values = values.to(self.device)
            dist.all_reduce(values, group=self.replicas)
            values = values / self.place.num_replicas
        return values

    def everybody(self, key: str, seconds: float, what: str) -> None:
        """Waits until every rank has come here. Raises LostPeer naming what was awaited."""
        if self.count(f"{key}/arrived") == self.place.world_size:
            self.publish(f"{key}/all", "1")
        self.fetch(f"{key}/all", seconds, what)

    def stage_barrier(self) -> None:
        """Waits for the other replicas of this stage only."""
        if self.place.num_replicas > 1:
            dist.barrier(group=self.replicas)

    def finish(self) -> None:
        """Says goodbye; rank 0, which may serve the store, leaves last."""
        if self.place.rank == 0:
            for peer in self.peers[1:]:
                self.fetch(f"done/{peer.rank}", self.timeout_seconds, f"{peer} to finish")
        self.watchdog.done()
        dist.destroy_process_group()


def open_store(launch: Launch, run: str, seconds: float) -> Any:
    """The rendezvous that every launcher provides; rank 0 serves it unless torchrun's agent does.

    Keys outlive a torchrun restart, so they carry the restart's number. Raises ConfigError where the port is taken,
    LostPeer where nobody serves it in time.
    """
    if "RANK" not in os.environ:
        os.environ.update(
            RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(_free_port())
        )
    try:
        store, _, _ = next(rendezvous("env://", timeout=timedelta(seconds=seconds)))
    except RuntimeError as error:
        address = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        if "EADDRINUSE" in str(error):
            repair = "give this run another: --master_port N of the launcher (accelerate: --main_process_port N)"
            raise ConfigError([f"the port of {address} is in use, perhaps by another run; {repair}"]) from error
        raise LostPeer(f"no rendezvous with rank 0 at {address} within {seconds:.0f} s: {error}") from error
    return dist.PrefixStore(f"{run}/{launch.restart}", store)


class Rendezvous:
    """Where a rank meets the others: the store of the run, opened when it is first needed and then kept.

    seconds: the longest wait for others to come.
    """

    def __init__(self, launch: Launch, run: str, seconds: float):
        self._launch = launch
        self._run = run
        self._seconds = seconds
        self._store: Any = None

    def store(self, seconds: float | None = None) -> Any:
        """As open_store."""
        if self._store is None:
            self._store = open_store(self._launch, self._run, self._seconds if seconds is None else seconds)
        return self._store

    @contextmanager
    def kept_waiting(self) -> Iterator[None]:
        """Rank 0 gives a sign of life every second, so that the others may wait for its plan without a time limit."""
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

    def publish(self, plan: str) -> None:
        """Rank 0 tells the others the plan, and later lives of the run that its output folder is open."""
        _below(self.store()).set(_OPENED, "1")
        self.store().set(PLAN, plan)

    def is_known(self) -> bool:
        """Whether an earlier life of this run, before a restart by torchrun, has opened the output folder."""
        return self._launch.restart > 0 and _below(self.store()).check([_OPENED])

    def say_no(self, seconds: float) -> None:
        """Rank 0 tells the others, who wait for it, that there is no run; leaves once they know."""
        if self._launch.world_size == 1:
            return
        end = time.monotonic() + seconds
        with suppress(RuntimeError, ConfigError):  # a launcher may have ended the others
            store = self.store(seconds)
            store.set(PLAN, "")
            while store.add(_TOLD, 0) < self._launch.world_size - 1 and time.monotonic() < end:
                time.sleep(0.05)


def _below(store: Any) -> Any:
    """The store that the lives of a run share, under torchrun the agent's."""
    while isinstance(store, dist.PrefixStore):
        store = store.underlying_store
    return store


def fetch_plan(store: Any, seconds: float, silence_seconds: float | None = None) -> str:
    """What rank 0 has published as the PLAN. It has `seconds` for that; from its first sign of life on as long as it
    wants, if it gives more of them.

    Raises Refused where it has said no, LostPeer where it is gone, or silent for silence_seconds.
    """
    line, start, signs, limit = StoreLine(store), time.monotonic(), 0, seconds
    seen = start
    while True:
        try:
            text, found = line.ask(_plan_and_signs, limit)
        except RuntimeError as error:
            raise LostPeer("lost rank 0, or what serves its store, while waiting for rank 0's plan") from error
        except Empty:
            text, found = None, signs
        if text is not None:
            break
        now = time.monotonic()
        if found != signs:
            signs, seen, limit = found, now, seconds if silence_seconds is None else silence_seconds
        if now - seen >= limit:
            silent = f"; no sign of life for {limit:g} s (--link_timeout_seconds {limit:g})" if signs else ""
            raise LostPeer(f"waited {now - start:.0f} s for rank 0's plan{silent}")
        time.sleep(min(_POLL_SECONDS, limit))
    if not text:
        store.add(_TOLD, 1)
        raise Refused
    return text


def _plan_and_signs(store: Any) -> tuple[str | None, int]:
    signs = store.add(_SIGNS, 0)
    return (bytes(store.get(PLAN)).decode() if store.check([PLAN]) else None), signs


def _fetch(store: Any, key: str, seconds: float, what: str) -> str:
    start = time.monotonic()
    try:
        store.wait([key], timedelta(seconds=seconds))
        return bytes(store.get(key)).decode()
    except RuntimeError as error:  # DistStoreError is one
        waited = time.monotonic() - start
        raise LostPeer(f"waited {waited:.0f} s for {what}") from error


def connect(
    launch: Launch, place: Place, store: Any, watchdog: Watchdog, startup_seconds: float, link_seconds: float
) -> World:
    """Makes the stage's process group and learns who the peers are. Every rank must call.

    startup_seconds bounds the wait for slow starters, link_seconds every later wait inside the stage.
    """
    device = local_device(launch.local_rank)
    prepare_cpu(device, launch.local_world_size)
    world = World(place, device, store, watchdog, link_seconds)
    me = Peer.me(place.rank, place.stage, place.replica, place.num_stages)
    world.publish(f"peer/{place.rank}", encode(me))
    world.publish(f"device/{place.rank}", device_identity(device))
    for rank in range(place.world_size):
        world.peers.append(decode(world.fetch(f"peer/{rank}", startup_seconds, f"rank {rank} to start")))
        world.device_ids.append(world.fetch(f"device/{rank}", startup_seconds, f"rank {rank} to start"))
    watchdog.watch(me, world.peers, store.clone(), link_seconds)
    return world


def join_stage(world: World, one_world: bool) -> None:
    """Makes the default process group: this stage's replicas, or all ranks for the stock pipeline."""
    place = world.place
    name, rank, size = f"stage{place.stage}", place.replica, place.num_replicas
    if one_world:
        name, rank, size = "all", place.rank, place.world_size
    dist.init_process_group(
        collective_backend(world.device),
        store=dist.PrefixStore(name, world.store),
        rank=rank,
        world_size=size,
        timeout=timedelta(seconds=world.timeout_seconds),
    )
    if one_world:
        stages = [range(k * place.num_replicas, (k + 1) * place.num_replicas) for k in range(place.num_stages)]
        groups = [dist.new_group(list(ranks)) for ranks in stages]
        world.replicas = groups[place.stage]
    # ZeRO-3 compares its world with the launcher's variables; the world that DeepSpeed sees is this one
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(size))
    import deepspeed

    deepspeed.init_distributed(collective_backend(world.device), verbose=False)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
