"""What a stage sees of a link's ends: within a launch they are those of ends.py, between jobs those of jobs/ends.py."""

from __future__ import annotations

from typing import Protocol

from llm_local.links.packet import Packet


class End(Protocol):
    @property
    def bytes(self) -> int:
        """Of the packets that have gone through it."""
        ...

    @property
    def wait_seconds(self) -> float:
        """That it has held the stage up."""
        ...

    def close(self, step: int) -> None:
        """Says, or takes, that nothing follows."""
        ...


class SendingEnd(End, Protocol):
    def send(self, *packets: Packet) -> None:
        """Hands packets over. Raises LostPeer."""
        ...


class StepReceivingEnd(End, Protocol):
    def receive(self, kind: int, step: int, index: int) -> Packet:
        """The next packet, which must be the one named. Raises LostPeer."""
        ...


class ReceivingEnd(StepReceivingEnd, Protocol):
    def take(self) -> Packet:
        """The next packet, whatever it is; END where nothing follows. Raises LostPeer."""
        ...

    def error(self, cause: BaseException) -> Exception:
        """What a failure to receive is, told with the peer's name."""
        ...
