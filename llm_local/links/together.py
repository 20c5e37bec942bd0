"""A link's end that the ranks of a replica share: the first has it, and tells the others what comes."""

from __future__ import annotations

import time

import torch

from llm_local.links.link import StepReceivingEnd
from llm_local.links.message import HEADER_BYTES, PacketHeader
from llm_local.links.packet import Packet
from llm_local.links.wire import wire_dtype_of
from llm_local.world import TensorRanks


class SharedReceiver:
    """Receives what the first rank's end does, once over the link whatever the number of ranks; end: None on others,
    who count no bytes. device: of the ranks' collectives."""

    def __init__(self, end: StepReceivingEnd | None, ranks: TensorRanks, device: torch.device):
        self._end = end
        self._ranks = ranks
        self._device = device
        self._waited = 0.0

    @property
    def bytes(self) -> int:
        return 0 if self._end is None else self._end.bytes

    @property
    def wait_seconds(self) -> float:
        return self._waited if self._end is None else self._end.wait_seconds

    def receive(self, kind: int, step: int, index: int) -> Packet:
        if self._end is None:
            return self._take()
        packet = self._end.receive(kind, step, index)
        exact = "fp32" if packet.hidden is None else wire_dtype_of(packet.hidden)
        header = PacketHeader.of(packet, exact)
        integers, numbers = header.tensors(packet)
        for tensor in (header.to_bytes(), *integers, *numbers):
            self._ranks.take_from_first(tensor.to(self._device).contiguous())
        return packet

    def _take(self) -> Packet:
        begun = time.perf_counter()
        told = self._told((HEADER_BYTES,), torch.uint8)
        self._waited += time.perf_counter() - begun
        header = PacketHeader.from_bytes(told.cpu())
        integers = [self._told(*shaped).cpu() for shaped in header.integers()]
        return header.packet(integers, [self._told(*shaped) for shaped in header.numbers()])

    def _told(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        values = torch.empty(shape, dtype=dtype, device=self._device)
        self._ranks.take_from_first(values)
        return values

    def close(self, step: int) -> None:
        if self._end is not None:
            self._end.close(step)
