"""The machine of a plan: its devices and links, and what collectives among the replicas of a stage take on it."""

from __future__ import annotations

from dataclasses import dataclass

from llm_local.plan.times import Link


@dataclass(frozen=True)
class Machine:
    """Devices in the order of ranks, so many on each host.

    flops: what a device reaches in training, a second. memory_bytes_per_second: of a device, for the optimizer.
    link_gbps: Gb/s of a host's network, in each direction, which its devices share; local_link_gbps: from a device to
    another of its host. link_latency_seconds: between hosts; within one it is neglected.
    """

    devices: int
    memory_bytes: float
    flops: float
    memory_bytes_per_second: float
    link_gbps: float
    local_link_gbps: float
    link_latency_seconds: float = 0.0
    devices_per_host: int = 1

    def boundary(self, num_replicas: int, stage: int) -> Link:
        """From the replicas of a stage to those of the next. Of several that leave a host at once, each has a part."""
        crossing = [
            rank
            for rank in range(stage * num_replicas, (stage + 1) * num_replicas)
            if rank // self.devices_per_host != (rank + num_replicas) // self.devices_per_host
        ]
        if not crossing:
            return Link(0.0, _seconds_per_byte(self.local_link_gbps))
        together = min(len(crossing), self.devices_per_host)
        return Link(self.link_latency_seconds, together * _seconds_per_byte(self.link_gbps))

    def spans_hosts(self, num_replicas: int) -> bool:
        """Whether the replicas of some stage are on more than one host."""
        return num_replicas > self.devices_per_host or self.devices_per_host % num_replicas > 0

    def gather_seconds(self, num_bytes: float, num_replicas: int) -> float:
        """An all-gather, or reduce-scatter, of so many bytes by a ring; an all-reduce is one of each.

        Every device sends (R - 1)/R of the bytes, and a ring leaves each host once (Patarasu and Yuan 2009).
        """
        if num_replicas == 1:
            return 0.0
        moved = num_bytes * (num_replicas - 1) / num_replicas
        if not self.spans_hosts(num_replicas):
            return moved * _seconds_per_byte(self.local_link_gbps)
        slowest = max(_seconds_per_byte(self.link_gbps), _seconds_per_byte(self.local_link_gbps))
        hosts = -(-num_replicas // self.devices_per_host)
        return moved * slowest + hosts * self.link_latency_seconds


def _seconds_per_byte(gbps: float) -> float:
    return 8 / (gbps * 1e9)
