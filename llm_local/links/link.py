"""What a stage sees of a link's ends: within a launch they are those of ends.py, between jobs those of jobs/ends.py."""

from __future__ import annotations

from typing import Protocol

from llm_local.links.packet import Packet
from llm_local.trace import Tracer


class End(Protocol):
    """bytes: of the packets that have gone through it. wait_seconds: that it has held the stage up."""

    bytes: int
    wait_seconds: float
    tracer: Tracer | None

    def close(self, step: int) -> None:
        """Says, or takes, that nothing follows."""
        ...


class SendingEnd(End, Protocol):
    def send(self, *packets: Packet) -> None:
        """Hands packets over. Raises LostPeer."""
        ...


class ReceivingEnd(End, Protocol):
    def receive(self, kind: int, step: int, index: int) -> Packet:
        """The next packet, which must be the one named. Raises LostPeer."""
        ...

    def take(self) -> Packet:
        """The next packet, whatever it is; END where nothing follows. Raises LostPeer."""
        ...

    def error(self, cause: BaseException) -> Exception:
        """What a failure to receive is, told with the peer's name."""
        ...
