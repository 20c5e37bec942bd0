"""The ends of a link between two jobs, as those of a link within a launch (links/ends.py): packets in and out."""

from __future__ import annotations

import time
from typing import Any

import torch

from llm_local.jobs.channel import SKIPPED as SKIPPED_MARK
from llm_local.jobs.channel import Channel
from llm_local.links.message import HEADER_BYTES, PacketHeader, body_size, pack, unpack
from llm_local.links.packet import END, SKIPPED, Packet
from llm_local.peer import LostPeer

_BODY = 128  # where it begins: behind the header, and as aligned as tensors are


def to_buffers(packet: Packet, wire_dtype: str) -> tuple[list[Any], int]:
    """A packet as bytes, to be sent one after the other, and how many of them there are without padding."""
    header = PacketHeader.of(packet, wire_dtype)
    integers, numbers = header.tensors(packet)
    head = torch.zeros(_BODY, dtype=torch.uint8)
    head[:HEADER_BYTES] = header.to_bytes()
    return [head.numpy(), pack([*integers, *numbers]).numpy()], header.num_bytes


def from_buffer(received: torch.Tensor) -> tuple[Packet, int]:
    """The inverse of `to_buffers`. Raises ValueError for anything else."""
    try:
        header = PacketHeader.from_bytes(received[:HEADER_BYTES].clone())
        integers, numbers = header.integers(), header.numbers()
        if len(received) != _BODY + body_size([*integers, *numbers]):
            raise ValueError("a packet of another size than it says")
        parts = unpack(received[_BODY:], [*integers, *numbers])
        return header.packet(parts[: len(integers)], parts[len(integers) :]), header.num_bytes
    except (IndexError, RuntimeError) as error:
        raise ValueError("no packet") from error


class LogSender:
    """Sends to the next job, or with its shared head's matrix to the one before, through the log. number: packets that
    have been sent since the run's first step. A full log is all that `send` waits for."""

    def __init__(self, channel: Channel, wire_dtype: str, number: int):
        self.bytes = 0
        self.is_skipping = False  # what it is given, until somebody says otherwise
        self.wait_seconds = 0.0
        self.number = number
        self._channel = channel
        self._wire_dtype = wire_dtype

    def send(self, *packets: Packet) -> None:
        """Raises LostPeer, Unwritten and DamagedLog."""
        for packet in packets:
            if self.is_skipping:
                self.skip(1)
                continue
            buffers, num_bytes = to_buffers(packet, self._wire_dtype)
            start = time.perf_counter()
            self._channel.send(*buffers)
            self.wait_seconds += time.perf_counter() - start
            self.bytes += num_bytes
            self.number += 1

    def skip(self, count: int) -> None:
        """So many packets do not come. Raises LostPeer, and Unwritten."""
        for _ in range(count):
            self._channel.skip()
            self.number += 1

    def close(self, step: int) -> None:
        """The channel is closed by itself."""


class LogReceiver:
    """Receives from the job before, or the next one's shared head's matrix, and waits as long as that is away."""

    def __init__(self, channel: Channel):
        self.bytes = 0
        self.wait_seconds = 0.0
        self.name = channel.name
        self._channel = channel
        self._held: torch.Tensor | None = None  # was looked at before it is used

    @property
    def number(self) -> int:
        """Packets that have been used since the run's first step."""
        return self._channel.taken - (self._held is not None)

    def receive(self, kind: int, step: int, index: int) -> Packet:
        """The next packet, which must be the one named. Raises LostPeer for another one, and where none comes."""
        packet = self.take()
        if what := packet.differs(kind, step, index):
            raise LostPeer(f"{self.name}: there came {what}")
        return packet

    def is_skipped(self) -> bool:
        """Whether there is nothing in the next packet's place. Raises LostPeer."""
        self._held = self._take()
        return self._held is not None and len(self._held) == len(SKIPPED_MARK)

    def skip(self, count: int) -> None:
        """Takes so many packets in whose place is nothing. Raises LostPeer for another one."""
        for _ in range(count):
            if (packet := self.take()).kind != SKIPPED:
                raise LostPeer(f"{self.name}: {packet.title} has come in a step that is skipped")

    def take(self) -> Packet:
        """The next packet; END where the other job has gone. Raises LostPeer."""
        received, self._held = self._take(), None
        if received is None:
            return Packet(END, 0, 0)
        if len(received) == len(SKIPPED_MARK):
            return Packet(SKIPPED, 0, 0)
        try:
            packet, num_bytes = from_buffer(received)
        except ValueError as error:
            raise LostPeer(f"{self.name}: {error} has come; do both jobs run the same version?") from error
        self.bytes += num_bytes
        return packet

    def _take(self) -> torch.Tensor | None:
        if self._held is not None:
            return self._held
        start = time.perf_counter()
        received = self._channel.take()
        self.wait_seconds += time.perf_counter() - start
        return received

    def error(self, cause: BaseException) -> LostPeer:
        return LostPeer(f"{self.name}: {cause}")

    def close(self, step: int) -> None:
        """The channel is closed by itself."""
