"""One-way links: replica i of a stage sends its micro-batches to replica i of a neighbour.

A link is a two-member process group of its own. Its control half is gloo on every machine: a fixed-size header says
what follows (a gloo receive of the wrong size aborts the process or fills half the buffer), then come the integer
tensors. Hidden states take the same way on a CPU, and NCCL between two GPUs. Activations go forward; only where the
method has gradients come back (overlapping, final backpropagation) is there a second link, the other way.

A send returns at once; its completion means that the receiver asked for it, so bounding the pending sends bounds how
far a stage runs ahead. The receiver keeps one packet ready ahead of its use.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from dataclasses import dataclass
from datetime import timedelta
from queue import Queue
from typing import Any

import torch
import torch.distributed as dist

from llm_local.packet import CHECK, END, INTEGER_PARTS, KINDS, Packet
from llm_local.trace import RECEIVE, REFRESH, Event, Tracer
from llm_local.watchdog import LostPeer, Peer
from llm_local.wire import CODES, decode, encode, expected, wire_dtype_of
from llm_local.world import World

_MAGIC = 0x10CA1
_HEADER_INTS = 10
_SENDER, _RECEIVER = 0, 1
# of a thread that waits for what comes every so many steps; the watchdog knows who is gone
_PATIENCE = timedelta(days=365)


class LinkError(LostPeer):
    """A link's peer is lost, silent for too long, or talks about something else."""


class _Gloo:
    """Tensors through host memory."""

    def __init__(self, store: Any, side: int, timeout: timedelta):
        self._group: Any = dist.ProcessGroupGloo(store, side, 2, timeout)

    def send(self, tensor: torch.Tensor) -> Any:
        return self._group.send([tensor.cpu().contiguous().view(torch.uint8)], _RECEIVER, 0)

    def receive(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        tensor = torch.empty(shape, dtype=dtype)
        self._group.recv([tensor.view(torch.uint8)], _SENDER, 0).wait()
        return tensor

    def finish(self, work: Any) -> None:
        work.wait()


class _Nccl:
    """Tensors from GPU to GPU. Completion is polled, so that no compute stream waits for a peer."""

    def __init__(self, store: Any, side: int, timeout: timedelta, device: torch.device):
        options = dist.ProcessGroupNCCL.Options()
        options._timeout = timeout
        self._group: Any = dist.ProcessGroupNCCL(store, side, 2, options)
        self._group.eager_connect_single_device(device)
        self._device = device
        self._seconds = timeout.total_seconds()

    def send(self, tensor: torch.Tensor) -> Any:
        return self._group.send([tensor.contiguous()], _RECEIVER, 0)

    def receive(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        tensor = torch.empty(shape, dtype=dtype, device=self._device)
        self.finish(self._group.recv([tensor], _SENDER, 0))
        return tensor

    def finish(self, work: Any) -> None:
        end = time.monotonic() + self._seconds
        while not work.is_completed():
            if time.monotonic() > end:
                raise RuntimeError(f"Timed out waiting {self._seconds * 1000:.0f}ms")
            time.sleep(0.0002)


def transport(device: torch.device, mine: str, theirs: str) -> str:
    """How hidden states travel: 'nccl' between two different GPUs, else 'gloo'. NCCL refuses a GPU twice."""
    return "nccl" if device.type == "cuda" and mine != theirs else "gloo"


class _End:
    """What both ends of a link share: its peer, its transports, its counts, its errors.

    background: a second link beside the first, through host memory, at which a thread waits for as long as it takes.
    """

    def __init__(self, world: World, other: int, side: int, background: bool = False):
        place = world.place
        source, target = (place.stage, other) if side == _SENDER else (other, place.stage)
        rank = other * place.num_replicas + place.replica
        self.peer: Peer = world.peers[rank]
        kind = "refresh link" if background else "link"
        self.name = f"{kind} {source}→{target}, replica {place.replica}"
        self.bytes = 0
        self.wait_seconds = 0.0
        self.tracer: Tracer | None = None
        self._seconds = world.timeout_seconds
        timeout = _PATIENCE if background else timedelta(seconds=world.timeout_seconds)
        prefix = dist.PrefixStore(f"{kind}/{source}-{target}/{place.replica}", world.store)
        try:
            self.control = _Gloo(dist.PrefixStore("control", prefix), side, timeout)
            way = transport(world.device, world.device_ids[place.rank], world.device_ids[rank])
            nccl = way == "nccl" and not background
            self.payload = (
                _Nccl(dist.PrefixStore("payload", prefix), side, timeout, world.device) if nccl else self.control
            )
        except RuntimeError as error:
            raise self.error(error) from error

    def error(self, cause: BaseException) -> LinkError:
        """Tells a silent peer from a lost one."""
        text = str(cause).splitlines()[0]
        if "timed out" in text.lower() or "timeout" in text.lower():
            return LinkError(
                f"{self.name}: waited {self._seconds:g} s for {self.peer} (--link_timeout_seconds {self._seconds:g})"
            )
        return LinkError(f"{self.name}: lost {self.peer}")


class Sender(_End):
    """The sending end of a link to stage `target`. `send` blocks only while `max_in_flight` packets have not been
    asked for."""

    def __init__(self, world: World, target: int, wire_dtype: str, max_in_flight: int, background: bool = False):
        super().__init__(world, target, _SENDER, background)
        self._wire = wire_dtype
        self._max_in_flight = max_in_flight
        self._pending: deque[list[tuple[Any, Any]]] = deque()

    def send(self, packet: Packet) -> None:
        """Hands the packet over. Raises LinkError if the peer is lost or does not ask for packets in time."""
        self._bound(self._max_in_flight - 1)
        try:
            self._pending.append(self._post(packet))
        except RuntimeError as error:
            raise self.error(error) from error

    def close(self, step: int) -> None:
        """Says that nothing follows, and waits until the peer has asked for all of it."""
        self.send(Packet(END, step, 0))
        self._bound(0)

    def _post(self, packet: Packet) -> list[tuple[Any, Any]]:
        parts = {name: part.to(torch.int32) for name, part in packet.integer_parts().items()}
        mask = sum(1 << INTEGER_PARTS.index(name) for name in parts)
        shaped = packet.input_ids if packet.hidden is None else packet.hidden
        rows, tokens = (0, 0) if shaped is None else shaped.shape[:2]
        width = 0 if packet.hidden is None else packet.hidden.shape[-1]
        wire = self._wire
        if packet.kind == CHECK and packet.hidden is not None:  # an export is compared with it: nothing is rounded then
            wire = wire_dtype_of(packet.hidden)
        code = CODES.index(wire)
        header = torch.tensor([_MAGIC, packet.kind, packet.step, packet.index, rows, tokens, width, code, mask, 0])
        tensors: list[tuple[_Gloo | _Nccl, torch.Tensor]] = [(self.control, header)]
        tensors += [(self.control, part) for part in parts.values()]
        if packet.hidden is not None:
            tensors += [(self.payload, part) for part in encode(packet.hidden, wire)]
        self.bytes += sum(t.numel() * t.element_size() for _, t in tensors)
        # The work does not own the tensor: both stay in the list until the peer has it.
        return [(way, (way.send(tensor), tensor)) for way, tensor in tensors]

    def _bound(self, allowed: int) -> None:
        start = time.perf_counter()
        while len(self._pending) > allowed:
            for way, (work, _) in self._pending[0]:
                try:
                    way.finish(work)
                except RuntimeError as error:
                    raise self.error(error) from error
            self._pending.popleft()
        self.wait_seconds += time.perf_counter() - start


class Receiver(_End):
    """The receiving end of a link from stage `source`. A thread receives one packet ahead of its use.

    It starts with the first use where nothing may be sent for a long time (eager=False): a receive has a time limit.
    """

    def __init__(self, world: World, source: int, eager: bool = True, background: bool = False):
        super().__init__(world, source, _RECEIVER, background)
        self._ready: Queue[Packet | BaseException] = Queue()
        self._room = threading.Semaphore(1)
        self._lane = REFRESH if background else RECEIVE
        self._thread = threading.Thread(target=self._receive_all, name="receiver", daemon=True)
        if eager:
            self._thread.start()

    def receive(self, kind: int, step: int, index: int) -> Packet:
        """The next packet, which must be the one named.

        Raises LinkError if the peer is lost, silent for link_timeout_seconds, or sends something else.
        """
        if not self._thread.ident:
            self._thread.start()
        start = time.perf_counter()
        packet = self._ready.get()
        self.wait_seconds += time.perf_counter() - start
        if isinstance(packet, LinkError):
            raise packet
        if isinstance(packet, BaseException):
            raise self.error(packet) from packet
        self._room.release()
        if (packet.kind, packet.step, packet.index) != (kind, step, index):
            expected = f"{KINDS[kind]} micro-batch {index} of step {step}"
            raise LinkError(f"{self.name}: {self.peer} sent {packet.title}, expected was {expected}")
        return packet

    def close(self, step: int) -> None:
        """Takes the goodbye that Sender.close sends."""
        self.receive(END, step, 0)

    def _receive_all(self) -> None:
        while True:
            self._room.acquire()
            try:
                packet = self._receive_one()
            except BaseException as error:
                self._ready.put(error)
                return
            self._ready.put(packet)
            if packet.kind == END:
                return

    def _receive_one(self) -> Packet:
        header = self.control.receive((_HEADER_INTS,), torch.int64).tolist()
        start = time.perf_counter()
        magic, kind, step, index, rows, tokens, width, code, mask, _ = header
        if magic != _MAGIC:
            raise LinkError(f"{self.name}: {self.peer} sent no packet header; do both run the same version?")
        if kind == END:
            return Packet(END, step, index)
        names = [name for i, name in enumerate(INTEGER_PARTS) if mask >> i & 1]
        integers = [self.control.receive((rows, tokens), torch.int32) for _ in names]
        shapes = expected(CODES[code], (rows, tokens, width)) if width else []
        numbers = [self.payload.receive(*shape) for shape in shapes]
        self.bytes += 8 * _HEADER_INTS + sum(t.numel() * t.element_size() for t in (*integers, *numbers))
        parts = {name: part.long() for name, part in zip(names, integers, strict=True)}
        packet = Packet(kind, step, index, hidden=decode(numbers) if numbers else None, **parts)
        if self.tracer is not None:
            took = (start, time.perf_counter())
            self.tracer.record(Event(self._lane, "Packet", *took, KINDS[kind], step, index, source=self.peer.stage))
        return packet


@dataclass(frozen=True)
class Links:
    """The links of one rank, as far as it has them: activations come in and go out, gradients come back and go back.

    The refresh links, whose way is that of gradients, are refresh.py's to use, wait for and close.
    """

    receiver: Receiver | None = None
    sender: Sender | None = None
    gradient_receiver: Receiver | None = None
    gradient_sender: Sender | None = None
    refresh_receiver: Receiver | None = None
    refresh_sender: Sender | None = None

    @staticmethod
    def join(
        world: World, wire_dtype: str, max_in_flight: int, back_dtype: str | None, refresh_dtype: str | None
    ) -> Links:
        """Makes them, boundary by boundary. Every rank must call. back_dtype: that of gradients or soft targets, and
        refresh_dtype: that of a shared head's matrix, where the run has such."""
        place = world.place
        before, behind = place.stage - 1, place.stage + 1
        receiver = None if place.is_first_stage else Receiver(world, before)
        gradient_sender = None
        if back_dtype is not None and not place.is_first_stage:
            gradient_sender = Sender(world, before, back_dtype, max_in_flight)
        refresh_sender = None
        if refresh_dtype is not None and not place.is_first_stage:
            refresh_sender = Sender(world, before, refresh_dtype, max_in_flight=2, background=True)
        sender = None if place.is_last_stage else Sender(world, behind, wire_dtype, max_in_flight)
        gradient_receiver = None
        if back_dtype is not None and not place.is_last_stage:
            gradient_receiver = Receiver(world, behind, eager=False)
        refresh_receiver = None
        if refresh_dtype is not None and not place.is_last_stage:
            refresh_receiver = Receiver(world, behind, background=True)
        return Links(receiver, sender, gradient_receiver, gradient_sender, refresh_receiver, refresh_sender)

    def all(self) -> list[Sender | Receiver]:
        found = (self.receiver, self.sender, self.gradient_receiver, self.gradient_sender)
        return [link for link in found if link is not None]

    def trace(self, tracer: Tracer) -> None:
        for link in (*self.all(), self.refresh_receiver):
            if link is not None:
                link.tracer = tracer

    def close(self, step: int) -> None:
        """Goodbyes over each link, forward first."""
        for link in (self.receiver, self.sender, self.gradient_sender, self.gradient_receiver):
            if link is not None:
                link.close(step)
