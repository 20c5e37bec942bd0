"""What the ranks of a run tell each other.

A stage is an ordinary DeepSpeed job: its ranks form the default process group of their processes, and no group
spans two stages (backprop's stock pipeline is the exception and takes all ranks as one world). Everything else that
ranks tell each other goes through the store of the launcher's rendezvous.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from datetime import timedelta
from functools import cache
from typing import Any

import torch
import torch.distributed as dist

from llm_local.aside import DeviceClock
from llm_local.device import DeviceName, collective_backend, local_device, prepare_cpu, set_deepspeed_device
from llm_local.launch import Launch
from llm_local.peer import Peer, decode, encode
from llm_local.place import Place
from llm_local.rendezvous import fetch
from llm_local.watchdog import Watchdog

_ELEMENTS_AT_A_TIME = 1 << 24


class ReplicaRanks:
    """The ranks of a replica, and what they tell each other. group: of these ranks."""

    def __init__(self, group: Any):
        self.group = group
        self.rank: int = dist.get_rank(group)
        self.size: int = dist.get_world_size(group)

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """Element-wise, of all ranks' values."""
        total = values.detach().clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=self.group)
        return total

    def largest(self, values: torch.Tensor) -> torch.Tensor:
        """Element-wise."""
        found = values.detach().clone(memory_format=torch.contiguous_format)
        dist.all_reduce(found, dist.ReduceOp.MAX, group=self.group)
        return found

    def gather(self, values: torch.Tensor) -> list[torch.Tensor]:
        """Those of each rank, in order."""
        mine = values.detach().contiguous()
        found = [torch.empty_like(mine) for _ in range(self.size)]
        dist.all_gather(found, mine, group=self.group)
        return found

    def exchange(self, values: torch.Tensor) -> torch.Tensor:
        """(ranks, ...), of which the n-th is for rank n → what each rank has for this one, in order."""
        found = torch.empty_like(values, memory_format=torch.contiguous_format)
        dist.all_to_all_single(found, values.detach().contiguous(), group=self.group)
        return found

    def take_from_first(self, values: torch.Tensor) -> None:
        """Puts the first rank's values in the place of these."""
        dist.broadcast(values, group=self.group, group_src=0)


class TensorRanks(ReplicaRanks):
    """Those between which its layers are divided; to DeepSpeed its model parallelism unit, by the names that it asks
    for. replicas: of those that have the same part of the model as this one."""

    def __init__(self, group: Any, replicas: Any):
        super().__init__(group)
        self.replicas = replicas

    def get_model_parallel_rank(self) -> int:
        return self.rank

    def get_model_parallel_world_size(self) -> int:
        return self.size

    def get_model_parallel_group(self) -> Any:
        return self.group

    def get_data_parallel_rank(self) -> int:
        return dist.get_rank(self.replicas)

    def get_data_parallel_world_size(self) -> int:
        return dist.get_world_size(self.replicas)

    def get_data_parallel_group(self) -> Any:
        return self.replicas


class World:
    """The ranks of this run: the store between all of them, the process group of this stage.

    is_apart: whether each replica is a world of its own to DeepSpeed. tensor, sequence: the ranks of this rank's
    replica, where they divide its layers, or its rows.
    """

    def __init__(self, place: Place, device: torch.device, store: Any, watchdog: Watchdog, timeout_seconds: float):
        self.place = place
        self.device = device
        self.store = store
        self.watchdog = watchdog
        self.timeout_seconds = timeout_seconds
        self.peers: list[Peer] = []
        self.device_names: list[DeviceName] = []
        self.clock = DeviceClock(device)
        self.replicas: Any = None  # this stage's group where it is not the default one
        self.is_apart = False
        self.tensor: TensorRanks | None = None
        self.sequence: ReplicaRanks | None = None

    def publish(self, key: str, value: str) -> None:
        self.store.set(key, value)

    def fetch(self, key: str, seconds: float, what: str) -> str:
        """The value of a key once somebody publishes it. Raises LostPeer naming what was awaited."""
        return fetch(self.store, key, seconds, what)

    def peek(self, key: str) -> str | None:
        """The value of a key if it is there, without waiting."""
        return bytes(self.store.get(key)).decode() if self.store.check([key]) else None

    def count(self, key: str) -> int:
        """Counts the callers of this key; the one that gets world_size is the last."""
        return self.store.add(key, 1)

    @property
    def shard(self) -> int:
        """This rank's number among those that share the weights of its engines."""
        return 0 if self.is_apart else self.place.data_rank

    def mean_over_replicas(self, values: torch.Tensor) -> torch.Tensor:
        """Element-wise mean of the values of this stage's data_ranks; each must call."""
        if self.place.data_ranks > 1:
            values = values.to("cpu" if self.is_apart else self.device)
            dist.all_reduce(values, group=self.replicas)
            values = values / self.place.data_ranks
        return values

    def begin_mean(self, values: torch.Tensor) -> Callable[[], torch.Tensor]:
        """`mean_over_replicas` of values in host memory, in their place and beside the training: what it returns waits
        for it, as often as it is called. Every replica must call both."""
        chunks = values.split(_ELEMENTS_AT_A_TIME)
        works = [dist.all_reduce(some, group=self.replicas, async_op=True) for some in chunks]

        @cache
        def finish() -> torch.Tensor:
            for work in works:
                assert work is not None, "this rank is a member"
                work.wait()
            return values.div_(self.place.num_replicas)

        return finish

    def take_from_first_replica(self, values: torch.Tensor) -> None:
        """Puts replica 0's values of this stage, in host memory, in place of these; every replica must call."""
        dist.broadcast(values, group=self.replicas, group_src=0)

    def everybody(self, key: str, seconds: float, what: str) -> None:
        """Waits until every rank has come here. Raises LostPeer naming what was awaited."""
        if self.count(f"{key}/arrived") == self.place.world_size:
            self.publish(f"{key}/all", "1")
        self.fetch(f"{key}/all", seconds, what)

    def stage_barrier(self) -> None:
        """Waits for the other ranks of this stage only."""
        if self.place.stage_ranks > 1:
            dist.barrier(group=None if self.tensor else self.replicas)

    def finish(self) -> None:
        """Says goodbye, and leaves the process groups."""
        self.say_goodbye()
        dist.destroy_process_group()

    def say_goodbye(self) -> None:
        """From here on this rank may end; rank 0, which may serve the store, does so last."""
        if self.place.rank == 0:
            for peer in self.peers[1:]:
                self.fetch(f"done/{peer.rank}", self.timeout_seconds, f"{peer} to finish")
        self.watchdog.done()


def announce_device(launch: Launch, store: Any) -> torch.device:
    """Tells the others the device of this rank, which may do so again, and makes it the current one."""
    device = local_device(launch.local_rank)
    store.set(f"device/{launch.rank}", DeviceName.of(device).to_json())
    return device


def device_names(store: Any, world_size: int, seconds: float) -> list[DeviceName]:
    """Those of all ranks, once they have told them. Raises LostPeer naming who has not."""
    ranks = range(world_size)
    return [DeviceName.from_json(fetch(store, f"device/{rank}", seconds, f"rank {rank} to start")) for rank in ranks]


def connect(
    launch: Launch, place: Place, store: Any, watchdog: Watchdog, startup_seconds: float, link_seconds: float
) -> World:
    """Learns who the peers are and what they have. Every rank must call.

    startup_seconds bounds the wait for slow starters, link_seconds every later wait inside the stage.
    """
    device = announce_device(launch, store)
    prepare_cpu(device, launch.local_world_size)
    world = World(place, device, store, watchdog, link_seconds)
    me = Peer.me(place.rank, place.stage, place.replica, place.num_stages)
    world.publish(f"peer/{place.rank}", encode(me))
    for rank in range(place.world_size):
        world.peers.append(decode(world.fetch(f"peer/{rank}", startup_seconds, f"rank {rank} to start")))
    world.device_names = device_names(store, place.world_size, startup_seconds)
    linked = [place.peer_of(k, r) for k in place.neighbours for r in place.dealing(k).peers]
    watchdog.watch(me, linked, world.peers, store.clone(), link_seconds)
    return world


def join_stage(world: World, one_world: bool, steps_apart: int = 0) -> None:
    """Makes the default process group: this stage's ranks, or all ranks for the stock pipeline, or this rank alone,
    where replicas train apart for so many steps; these meet through host memory, and may be as far apart in time."""
    place = world.place
    name, rank, size = f"stage{place.stage}", place.rank - place.rank_of(place.stage, 0), place.stage_ranks
    if one_world:
        name, rank, size = "all", place.rank, place.world_size
    if steps_apart:
        shared, world.is_apart = dist.PrefixStore(f"replicas{place.stage}", world.store), True
        limit = timedelta(seconds=world.timeout_seconds * steps_apart)
        world.replicas = dist.ProcessGroupGloo(shared, place.replica, place.num_replicas, limit)
        name, rank, size = f"{name}-{place.replica}", 0, 1
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
    if place.tensor_ranks > 1:
        world.tensor = _tensor_ranks(place, world.timeout_seconds)
        world.replicas = world.tensor.replicas
    if place.sequence_ranks > 1:
        world.sequence = ReplicaRanks(_replica_groups(place, world.timeout_seconds)[place.replica])
    # ZeRO-3 compares its world with the launcher's variables; the world that DeepSpeed sees is this one
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(size))
    set_deepspeed_device(world.device)
    import deepspeed

    deepspeed.init_distributed(collective_backend(world.device), verbose=False)


def _tensor_ranks(place: Place, seconds: float) -> TensorRanks:
    """Of this rank's replica, with so many for any wait."""
    count, size, limit = place.tensor_ranks, place.stage_ranks, timedelta(seconds=seconds)  # else it is half an hour
    alike = [dist.new_group(list(range(first, size, count)), limit) for first in range(count)]
    return TensorRanks(_replica_groups(place, seconds)[place.replica], alike[place.tensor_rank])


def _replica_groups(place: Place, seconds: float) -> list[Any]:
    """A group for each replica of the stage. Every rank of it makes all, in one order."""
    count, limit = place.replica_ranks, timedelta(seconds=seconds)
    return [dist.new_group(list(range(first, first + count)), limit) for first in range(0, place.stage_ranks, count)]


def join_nobody() -> None:
    """Makes this process a world of its own for DeepSpeed, for good."""
    device = local_device(0)
    prepare_cpu(device, 1)
    os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="localhost", MASTER_PORT="0")
    dist.init_process_group(collective_backend(device), store=dist.HashStore(), rank=0, world_size=1)
    import deepspeed

    deepspeed.init_distributed(collective_backend(device), verbose=False)
