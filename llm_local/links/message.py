"""A packet as bytes: a header of fixed size, and the body that it describes, one tensor after the other."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from math import prod
from typing import TypeAlias

import torch

from llm_local.device import finish_queued_work, host_memory, is_queued
from llm_local.links.packet import CHECK, END, INTEGER_PARTS, KINDS, Packet
from llm_local.links.wire import CODES, decode, encode, expected, wire_dtype_of

Shaped: TypeAlias = "tuple[tuple[int, ...], torch.dtype]"

_MAGIC = 0x10CA1
_HEADER_INTS = 10
HEADER_BYTES = 8 * _HEADER_INTS
_ALIGNED = 64  # bytes; where torch lets tensors start, so that kernels treat received ones as they do its own


@dataclass(frozen=True)
class PacketHeader:
    """What a packet is, and which tensors make it up: integers (rows, tokens), or with is_by_row (rows, 1), and with
    width > 0 hidden states (rows, tokens, width) as wire_dtype has them."""

    kind: int
    step: int
    index: int
    rows: int = 0
    tokens: int = 0
    width: int = 0
    wire_dtype: str = CODES[0]
    names: tuple[str, ...] = ()
    weight: float = 1.0
    is_by_row: bool = False

    @staticmethod
    def of(packet: Packet, wire_dtype: str) -> PacketHeader:
        """Of a packet whose hidden states are to travel in wire_dtype."""
        shaped = packet.input_ids if packet.hidden is None else packet.hidden
        rows, tokens = (0, 0) if shaped is None else shaped.shape[:2]
        width = 0 if packet.hidden is None else packet.hidden.shape[-1]
        if packet.kind == CHECK and packet.hidden is not None:  # an export is compared with it: nothing is rounded then
            wire_dtype = wire_dtype_of(packet.hidden)
        parts, sizes = packet.integer_parts(), (rows, tokens, width)
        by_row = any(part.shape != (rows, tokens) for part in parts.values())
        what, names = (packet.kind, packet.step, packet.index), tuple(parts)
        return PacketHeader(*what, *sizes, wire_dtype, names, packet.weight, by_row)

    def to_bytes(self) -> torch.Tensor:
        """(HEADER_BYTES,) uint8."""
        mask = sum(1 << INTEGER_PARTS.index(name) for name in self.names) + (self.is_by_row << len(INTEGER_PARTS))
        sizes = (self.rows, self.tokens, self.width)
        weight = int(torch.tensor(self.weight, dtype=torch.float64).view(torch.int64))
        numbers = [_MAGIC, self.kind, self.step, self.index, *sizes, CODES.index(self.wire_dtype), mask, weight]
        return torch.tensor(numbers).view(torch.uint8)

    @staticmethod
    def from_bytes(received: torch.Tensor) -> PacketHeader:
        """The inverse of `to_bytes`. Raises ValueError for anything else."""
        numbers = received.view(torch.int64)
        magic, kind, step, index, rows, tokens, width, code, mask, _ = numbers.tolist()
        if magic != _MAGIC or not 0 <= kind < len(KINDS):
            raise ValueError("no packet header")
        names = tuple(name for i, name in enumerate(INTEGER_PARTS) if mask >> i & 1)
        weight = float(numbers[-1:].view(torch.float64))
        by_row = bool(mask >> len(INTEGER_PARTS) & 1)
        return PacketHeader(kind, step, index, rows, tokens, width, CODES[code], names, weight, by_row)

    @property
    def is_end(self) -> bool:
        return self.kind == END

    def integers(self) -> list[Shaped]:
        """Shape and dtype of the integer tensors."""
        return [((self.rows, 1 if self.is_by_row else self.tokens), torch.int32) for _ in self.names]

    def numbers(self) -> list[Shaped]:
        """Shape and dtype of the tensors that hidden states are on the wire."""
        return expected(self.wire_dtype, (self.rows, self.tokens, self.width)) if self.width else []

    @property
    def num_bytes(self) -> int:
        """Of the packet, this header with it, but not the less than 64 that may lie between two tensors."""
        return HEADER_BYTES + sum(prod(shape) * dtype.itemsize for shape, dtype in (*self.integers(), *self.numbers()))

    def tensors(self, packet: Packet) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """The packet's integers and numbers, as `integers` and `numbers` describe them."""
        numbers = [] if packet.hidden is None else encode(packet.hidden, self.wire_dtype)
        return [part.to(torch.int32) for part in packet.integer_parts().values()], numbers

    def packet(self, integers: Sequence[torch.Tensor], numbers: Sequence[torch.Tensor]) -> Packet:
        """The inverse of `tensors`."""
        parts = {name: part.long() for name, part in zip(self.names, integers, strict=True)}
        hidden = decode(numbers, self.width) if numbers else None
        return Packet(self.kind, self.step, self.index, hidden=hidden, weight=self.weight, row_tokens=0, **parts)


def body_size(tensors: Iterable[Shaped]) -> int:
    """Bytes that `pack` puts such tensors into."""
    return sum(-(-prod(shape) * dtype.itemsize // _ALIGNED) * _ALIGNED for shape, dtype in tensors)


def pack(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """Tensors of any device → their bytes in host memory, uint8."""
    shaped = [(tuple(tensor.shape), tensor.dtype) for tensor in tensors]
    device = next((tensor.device for tensor in tensors if is_queued(tensor.device)), torch.device("cpu"))
    body = host_memory(body_size(shaped), device)
    for place, tensor in zip(_places(body, shaped), tensors, strict=True):
        place.copy_(tensor, non_blocking=True)
    finish_queued_work(device)
    return body


def unpack(body: torch.Tensor, tensors: Sequence[Shaped]) -> list[torch.Tensor]:
    """The inverse of `pack`: views of the body, which may be longer than what is in it."""
    return list(_places(body, tensors))


def _places(body: torch.Tensor, tensors: Iterable[Shaped]) -> Iterator[torch.Tensor]:
    start = 0
    for shape, dtype in tensors:
        yield body[start : start + prod(shape) * dtype.itemsize].view(dtype).view(shape)
        start += body_size([(shape, dtype)])
