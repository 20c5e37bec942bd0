"""The machine of a plan: its devices and links, and what collectives among the replicas of a stage take on it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from math import lcm
from typing import TypeAlias

from llm_local.memory.division import WHOLE, Division, Told
from llm_local.plan.times import Link

Each: TypeAlias = "float | tuple[float, ...]"  # of all devices, or of each in turn where they differ


@dataclass(frozen=True)
class Group:
    """The devices of a stage, one a replica, or as many as divide its layers or rows. Each has the same share of a step
    and waits for the others at its end, so the slowest and the smallest count.

    num_hosts: that devices with the same part of the model are on; replica_hosts: those of a replica, at most.
    """

    num_replicas: int
    num_hosts: int
    memory_bytes: float
    flops: float
    memory_bytes_per_second: float
    division: Division = WHOLE
    replica_hosts: int = 1

    @property
    def data_ranks(self) -> int:
        """Devices with the same part of the model."""
        return self.num_replicas * self.division.rows


@dataclass(frozen=True)
class Machine:
    """Devices in the order of ranks, so many on each host.

    flops: what a device reaches in training, a second. memory_bytes_per_second: of a device, for the optimizer.
    link_gbps: Gb/s of a host's network, in each direction, which its devices share; local_link_gbps: from a device to
    another of its host. link_latency_seconds: between hosts; within one it is neglected.
    """

    devices: int
    memory_bytes: Each
    flops: Each
    memory_bytes_per_second: Each
    link_gbps: float
    local_link_gbps: float
    link_latency_seconds: float = 0.0
    devices_per_host: int | tuple[int, ...] = 1

    @cached_property
    def _hosts(self) -> Sequence[int]:
        """Of each device."""
        if isinstance(self.devices_per_host, int):
            return [rank // self.devices_per_host for rank in range(self.devices)]
        return [host for host, count in enumerate(self.devices_per_host) for _ in range(count)]

    def group(self, ranks: range, division: Division = WHOLE) -> Group:
        hosts, size = self._hosts[ranks.start : ranks.stop], division.ranks
        memory, flops, rate = (_least(e, ranks) for e in (self.memory_bytes, self.flops, self.memory_bytes_per_second))
        alike = max(len({*hosts[part :: division.layers]}) for part in range(division.layers))
        replicas = max((len({*hosts[first : first + size]}) for first in range(0, len(hosts), size)), default=0)
        return Group(len(ranks) // size, alike, memory, flops, rate, division, replicas)

    def alike(self) -> list[range]:
        """The devices, in runs of equal ones."""
        starts = [rank for rank in range(self.devices) if rank == 0 or self._kind(rank) != self._kind(rank - 1)]
        return [range(a, b) for a, b in zip(starts, [*starts[1:], self.devices], strict=True)]

    def _kind(self, rank: int) -> tuple[float, ...]:
        kinds = (self.memory_bytes, self.flops, self.memory_bytes_per_second)
        return tuple(_least(each, range(rank, rank + 1)) for each in kinds)

    def boundary(self, num_replicas: int | Sequence[int], stage: int, division: Division = WHOLE) -> Link:
        """From the replicas of a stage to those of the next, which deal the micro-batches among them; num_replicas: of
        all stages, or of each. Of several pairs that send or receive on a host at once, each has a part: where rows are
        divided each device sends its own positions, of a replica whose layers are the first sends all."""
        if isinstance(num_replicas, int):
            start, mine, theirs = stage * num_replicas, num_replicas, num_replicas
        else:
            start, mine, theirs = sum(num_replicas[:stage]), *num_replicas[stage : stage + 2]
        replicas = [(start + g % mine, start + mine + g % theirs) for g in range(lcm(mine, theirs))]
        size = division.ranks
        pairs = [(a * size + own, b * size + own) for a, b in replicas for own in range(division.rows)]
        hosts = [(self._hosts[a], self._hosts[b]) for a, b in pairs]
        crossing = [(a, b) for a, b in hosts if a != b]
        if not crossing:
            return Link(0.0, _most_at_one(pairs) * _seconds_per_byte(self.local_link_gbps))
        return Link(self.link_latency_seconds, _most_at_one(crossing) * _seconds_per_byte(self.link_gbps))

    def gather_seconds(
        self, num_bytes: float, num_replicas: int, num_hosts: int | None = None, rings: int = 1
    ) -> float:
        """An all-gather, or reduce-scatter, of so many bytes by a ring; an all-reduce is one of each.

        Every device sends (R - 1)/R of the bytes, and a ring leaves each host once (Patarasu and Yuan 2009).
        num_hosts: that the replicas are on; None: as those of the first stage. rings: that leave a host at a time.
        """
        if num_replicas == 1:
            return 0.0
        moved = num_bytes * (num_replicas - 1) / num_replicas
        hosts = num_hosts or self.group(range(num_replicas)).num_hosts
        if hosts == 1:
            return moved * _seconds_per_byte(self.local_link_gbps)
        slowest = max(rings * _seconds_per_byte(self.link_gbps), _seconds_per_byte(self.local_link_gbps))
        return moved * slowest + hosts * self.link_latency_seconds

    def told_seconds(self, told: Told, group: Group) -> float:
        """Of what the devices of a replica tell each other. An exchange sends a part to each of the others, so that of
        n devices on each of several hosts all but n of the parts of all n go over its network."""
        ranks, hosts = group.division.ranks, group.replica_hosts
        if ranks == 1 or not told.times:
            return 0.0
        each = told.num_bytes / told.times
        if group.division.layers > 1 or hosts == 1:
            return told.times * self.gather_seconds(each, ranks, hosts)
        here = -(-ranks // hosts)
        crossing = here * (ranks - here) / ranks * each * _seconds_per_byte(self.link_gbps)
        return told.times * (crossing + self.link_latency_seconds)


def hosts_of(devices: int, devices_per_host: Sequence[int]) -> tuple[int, ...]:
    """The devices of each host; devices_per_host: one number for all, or theirs."""
    if len(devices_per_host) > 1:
        return tuple(devices_per_host)
    count = devices_per_host[0]
    return (count,) * (devices // count) if devices > count else (devices,)


def of_each(values: Sequence[float], devices_per_host: Sequence[int]) -> Each:
    """Of a list with one number for all devices, for each host or for each device.

    Raises ValueError for a list of another length.
    """
    devices = sum(devices_per_host)
    if len(values) == len(devices_per_host) != devices:
        values = [value for value, count in zip(values, devices_per_host, strict=True) for _ in range(count)]
    if len(values) not in (1, devices):
        hosts = f"each of the {len(devices_per_host)} hosts, or of the {devices} devices"
        raise ValueError(f"{len(values)} numbers; give one, or one for {hosts}")
    return values[0] if len(set(values)) == 1 else tuple(values)


def _least(each: Each, ranks: range) -> float:
    return min(each[ranks.start : ranks.stop]) if isinstance(each, tuple) else each


def _most_at_one(pairs: Sequence[tuple[int, int]]) -> int:
    """Most pairs that share a sending, or a receiving, end."""
    return max(max(Counter(ends).values()) for ends in zip(*pairs, strict=True))


def _seconds_per_byte(gbps: float) -> float:
    return 8 / (gbps * 1e9)
