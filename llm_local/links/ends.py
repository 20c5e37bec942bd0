"""One-way links, each from a replica of a stage to one of a neighbour: to its like, where both have as many.

A link is a two-member process group of its own. Its control half is gloo on every machine: a header says what follows,
then comes a body with the integer tensors. Hidden states are in the body, too, or come by NCCL between two GPUs.
Activations go forward; only where the method has gradients come back (overlapping, final backpropagation) is there a
second link, the other way.

The receiver has asked for several packets before they are sent, so that a link's latency holds nobody up. It asks for
bodies as large as the largest that came. Where a header announces a larger one, both sides go over to the next tag,
under which the receiver asks for bodies of that size: what was asked for before is forgotten, and stays unanswered.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future
from datetime import timedelta
from queue import Empty, Queue
from typing import Any, TypeAlias

import torch
import torch.distributed as dist

from llm_local.aside import Aside
from llm_local.device import OWN_ERRORS, SideStream, use_here
from llm_local.in_flight import packets_asked_for, packets_pending
from llm_local.links.message import HEADER_BYTES, PacketHeader, Shaped, body_size, pack, unpack
from llm_local.links.packet import END, KINDS, Packet
from llm_local.links.transports import RECEIVER, SENDER, Gloo, Nccl, transport
from llm_local.peer import LostPeer, Peer
from llm_local.rendezvous import fetch
from llm_local.trace import RECEIVE, REFRESH, Event, Tracer
from llm_local.world import World

_CLOSED = "closed"
_HEADERS = 0  # their tag; bodies have the ones from 1 on
# of a thread that waits for what comes every so many steps; the watchdog knows who is gone
_PATIENCE = timedelta(days=365)
# how each tensor of a packet travels; the work does not own the tensor, which lives here until the peer has it
_Messages: TypeAlias = "list[tuple[Gloo | Nccl, Any, torch.Tensor]]"


class LinkError(LostPeer):
    """A link's peer is lost, silent for too long, or talks about something else."""


class _End:
    """What both ends of a link share: its peer, its transports, its counts, its errors.

    other, replica: the peer's stage, and its replica if that is not this one's. background: a second link beside the
    first, through host memory, at which a thread waits for as long as it takes.
    """

    def __init__(self, world: World, other: int, side: int, background: bool = False, replica: int | None = None):
        place = world.place
        source, target = (place.stage, other) if side == SENDER else (other, place.stage)
        replica = place.replica if replica is None else replica
        rank = place.peer_of(other, replica)
        self.peer: Peer = world.peers[rank]
        kind = "refresh link" if background else "link"
        ends = (place.replica, replica) if side == SENDER else (replica, place.replica)
        which = f"{ends[0]}" if len({*ends}) == 1 else f"{ends[0]}→{ends[1]}"
        self.name = f"{kind} {source}→{target}, replica {which}"
        self.bytes = 0
        self.wait_seconds = 0.0
        self._timeout = timedelta(seconds=world.timeout_seconds)
        self._is_background = background
        self._device = torch.device("cpu") if background else world.device
        self._clock = world.clock
        # of bodies
        self._capacity = 0
        self._tag = _HEADERS
        key = f"{kind}/{source}-{target}/{ends[0]}-{ends[1]}/{place.sequence_rank}"
        self._store = prefix = dist.PrefixStore(key, world.store)
        try:
            self.control = Gloo(dist.PrefixStore("control", prefix), side, self._timeout, self._device)
            way = transport(world.device_names[place.rank], world.device_names[rank])
            nccl = way == "nccl" and not background
            self._nccl = Nccl(dist.PrefixStore("payload", prefix), side, self._device) if nccl else None
        except RuntimeError as error:
            raise self.error(error) from error

    def error(self, cause: BaseException) -> LinkError:
        """Tells a silent peer from a lost one; raises the cause where it is this rank's own device."""
        if isinstance(cause, OWN_ERRORS):
            raise cause
        text = str(cause).splitlines()[0]
        if "timed out" in text.lower() or "timeout" in text.lower():
            seconds = f"{self._timeout.total_seconds():g}"
            return LinkError(f"{self.name}: waited {seconds} s for {self.peer} (--link_timeout_seconds {seconds})")
        return LinkError(f"{self.name}: lost {self.peer}")

    def _close(self) -> None:
        if self._nccl is not None:
            self._nccl.close()


class Sender(_End):
    """The sending end of a link to stage `target`. `send` blocks only while the receiver has yet to take
    `max_in_flight` packets. A packet leaves when the device has it ready: a transfer between GPUs keeps both busy from
    then on."""

    def __init__(
        self,
        world: World,
        target: int,
        wire_dtype: str,
        max_in_flight: int,
        background: bool = False,
        replica: int | None = None,
    ):
        super().__init__(world, target, SENDER, background, replica)
        self._wire_dtype = wire_dtype
        self._most_pending = packets_pending(max_in_flight)
        self._num_asked_for = packets_asked_for(max_in_flight)
        self._aside = Aside(world.device, "sender")
        self._pending: deque[Future[_Messages]] = deque()

    def send(self, *packets: Packet) -> None:
        """Hands packets over. Raises LinkError if the peer is lost or does not ask for packets in time."""
        self._bound(self._most_pending - 1)
        try:
            self._pending.append(self._hand_over(packets))
        except RuntimeError as error:
            raise self.error(error) from error

    def close(self, step: int) -> None:
        """Says that nothing follows, and waits until the peer has taken all packets.

        There is a goodbye for everything that the peer asks for ahead, so the last one leaves when it has taken the
        last packet; what it might still ask of a process that is gone would cost it what is on its way.
        """
        self.send(*[Packet(END, step, 0)] * self._num_asked_for)
        self._bound(0)
        self._store.set(_CLOSED, "1")
        self._close()

    def _hand_over(self, packets: Sequence[Packet]) -> Future[_Messages]:
        described = []
        for packet in packets:
            header = PacketHeader.of(packet, self._wire_dtype)
            described.append((header, *header.tensors(packet)))
            self.bytes += header.num_bytes

        def post() -> _Messages:
            return [message for each in described for message in self._post(*each)]

        return self._aside.after(post, *(tensor for _, _, numbers in described for tensor in numbers))

    def _post(self, header: PacketHeader, integers: list[torch.Tensor], numbers: list[torch.Tensor]) -> _Messages:
        messages = [(_HEADERS, header.to_bytes())]
        body = pack(integers if self._nccl else [*integers, *numbers])
        if len(body) > self._capacity:
            self._capacity = len(body)
            self._tag += 1
        if len(body):
            messages.append((self._tag, body))
        posted: _Messages = [(self.control, self.control.send(message, tag), message) for tag, message in messages]
        if self._nccl:
            posted += [(self._nccl, self._nccl.send(tensor), tensor) for tensor in numbers]
        return posted

    def _bound(self, allowed: int) -> None:
        if len(self._pending) <= allowed:
            return
        waited = self._clock.wait()
        while len(self._pending) > allowed:
            try:
                for way, work, _ in self._pending[0].result():
                    way.finish(work, _PATIENCE if self._is_background else self._timeout)
            except RuntimeError as error:
                raise self.error(error) from error
            self._pending.popleft()
        self.wait_seconds += waited()


class Receiver(_End):
    """The receiving end of a link from stage `source`, with the sender's max_in_flight.

    A thread takes packets as they come; a packet that is used makes room for another one to be asked for.
    """

    def __init__(
        self, world: World, source: int, max_in_flight: int, background: bool = False, replica: int | None = None
    ):
        super().__init__(world, source, RECEIVER, background, replica)
        self._ready: Queue[tuple[Packet, int] | BaseException] = Queue()  # with its bytes
        self._side = SideStream(self._device)
        self.tracer: Tracer | None = None
        self._lane = REFRESH if background else RECEIVE
        self._asking = threading.Lock()
        self._headers: Queue[tuple[Any, torch.Tensor]] = Queue()
        self._bodies: deque[tuple[Any, torch.Tensor]] = deque()
        self._num_asked_for = 0
        for _ in range(packets_asked_for(max_in_flight)):
            self._ask()
        threading.Thread(target=self._receive_all, name="receiver", daemon=True).start()

    def receive(self, kind: int, step: int, index: int) -> Packet:
        """The next packet, which must be the one named.

        Raises LinkError if the peer is lost, silent for link_timeout_seconds, or sends something else.
        """
        packet = self.take()
        if what := packet.differs(kind, step, index):
            raise LinkError(f"{self.name}: {self.peer} sent {what}")
        return packet

    def take(self) -> Packet:
        """The next packet, whatever it is. Raises LinkError if the peer is lost, or silent for link_timeout_seconds."""
        waited = self._clock.wait()
        try:
            taken = self._ready.get(timeout=None if self._is_background else self._timeout.total_seconds())
        except Empty:
            raise self.error(TimeoutError("timed out")) from None
        self.wait_seconds += waited()
        if isinstance(taken, LinkError):
            raise taken
        if isinstance(taken, BaseException):
            raise self.error(taken) from taken
        packet, num_bytes = taken
        if packet.hidden is not None:
            use_here(packet.hidden)
        if packet.kind != END:
            self.bytes += num_bytes
            self._ask()
        else:  # the sender may still wait for the other goodbyes to be taken, by a process that must not be gone
            fetch(self._store, _CLOSED, self._timeout.total_seconds(), f"{self.peer} to close {self.name}")
        return packet

    def close(self, step: int) -> None:
        """Takes the goodbye that Sender.close sends."""
        self.receive(END, step, 0)
        self._close()

    def _ask(self) -> None:
        """For one packet more. What goes wrong shows when the packets that are here have been taken."""
        try:
            with self._asking:
                self._num_asked_for += 1
                self._headers.put(self.control.ask(HEADER_BYTES, _HEADERS))
                self._ask_for_bodies()
        except RuntimeError as error:
            self._ready.put(error)

    def _ask_for_bodies(self) -> None:
        while self._capacity and len(self._bodies) < self._num_asked_for:
            self._bodies.append(self.control.ask(self._capacity, self._tag))

    def _receive_all(self) -> None:
        try:
            is_end = False
            while not is_end:
                packet, num_bytes = self._receive_one()
                self._ready.put((packet, num_bytes))
                is_end = packet.kind == END
        except BaseException as error:
            self._ready.put(error)

    def _receive_one(self) -> tuple[Packet, int]:
        try:
            header = PacketHeader.from_bytes(self._await(*self._headers.get()))
        except ValueError as error:
            raise LinkError(f"{self.name}: {self.peer} sent {error}; do both run the same version?") from error
        start = time.perf_counter()
        integers, numbers = header.integers(), header.numbers()
        in_body = integers if self._nccl else [*integers, *numbers]
        with self._side.work():
            parts = self._receive_body(in_body)
            if self._nccl:
                asked_for = [self._nccl.ask(*shaped) for shaped in numbers]
                for work, tensor in asked_for:
                    self._nccl.finish(work, self._timeout)
                    parts.append(tensor)
            whole, real = parts[: len(integers)], parts[len(integers) :]
            packet = header.packet(whole, [part.to(self._device, non_blocking=True) for part in real])
        if self.tracer is not None and not header.is_end:
            took = (start, time.perf_counter())
            at = (KINDS[packet.kind], packet.step, packet.index)
            self.tracer.record(Event(self._lane, "Packet", *took, *at, source=self.peer.stage))
        return packet, header.num_bytes

    def _receive_body(self, tensors: Sequence[Shaped]) -> list[torch.Tensor]:
        size = body_size(tensors)
        with self._asking:
            if size > self._capacity:
                self._capacity = size
                self._tag += 1
                self._bodies.clear()
                self._ask_for_bodies()
            asked_for = self._bodies.popleft() if size else None
            self._num_asked_for -= 1
        return unpack(self._await(*asked_for), tensors) if asked_for else []

    def _await(self, work: Any, tensor: torch.Tensor) -> torch.Tensor:
        self.control.finish(work, _PATIENCE)  # it is `receive` that has a time limit
        return tensor
