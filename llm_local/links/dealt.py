"""Ends of links with the several replicas of a neighbour that has more of them than this stage, or fewer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from llm_local.links.link import End, SendingEnd, StepReceivingEnd
from llm_local.links.packet import CHECK, Packet
from llm_local.replicas import Dealing


class _Ends:
    """Several as one."""

    def __init__(self, ends: Sequence[End]):
        self._all = ends

    @property
    def bytes(self) -> int:
        return sum(end.bytes for end in self._all)

    @property
    def wait_seconds(self) -> float:
        return sum(end.wait_seconds for end in self._all)

    def close(self, step: int) -> None:
        for end in self._all:
            end.close(step)


class SenderToAll(_Ends):
    """Sends each packet to all of them, who may be none."""

    def __init__(self, ends: Sequence[SendingEnd]):
        super().__init__(ends)
        self._ends = ends

    def send(self, *packets: Packet) -> None:
        for end in self._ends:
            end.send(*packets)


class DealingSender(_Ends):
    """Sends each micro-batch to the replica whose it is, under the number that it has there; ends: by replica."""

    def __init__(self, ends: Mapping[int, SendingEnd], dealing: Dealing):
        super().__init__([*ends.values()])
        self._ends, self._dealing = ends, dealing

    def send(self, *packets: Packet) -> None:
        for packet in packets:
            if packet.kind == CHECK:  # each replica gets one
                for target in self._dealing.targets:
                    self._ends[target].send(packet)
            else:
                replica, index = self._dealing.at(packet.index)
                self._ends[replica].send(replace(packet, index=index))


class DealingReceiver(_Ends):
    """Receives each micro-batch from the replica that has it; ends: by replica."""

    def __init__(self, ends: Mapping[int, StepReceivingEnd], dealing: Dealing):
        super().__init__([*ends.values()])
        self._ends, self._dealing = ends, dealing

    def receive(self, kind: int, step: int, index: int) -> Packet:
        replica = self._dealing.source if kind == CHECK else self._dealing.at(index)[0]
        return self._ends[replica].receive(kind, step, index)


def sender_of(ends: Mapping[int, SendingEnd], dealing: Dealing) -> SendingEnd:
    """Of ends by replica, one for all of a step's micro-batches."""
    return next(iter(ends.values())) if dealing.mine == dealing.theirs else DealingSender(ends, dealing)


def receiver_of(ends: Mapping[int, StepReceivingEnd], dealing: Dealing) -> StepReceivingEnd:
    return next(iter(ends.values())) if dealing.mine == dealing.theirs else DealingReceiver(ends, dealing)
