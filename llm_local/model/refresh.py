"""Keeps the copies of a shared head's matrix up to date: when, by which way, and what a checkpoint needs of it.

The last block's output matrix as it is after step t = S, 2S, ... is read by every other block from step t + d + 1 on,
where d is half of S, rounded up, and S is --head_refresh_steps. That depends on step numbers alone, so that the blocks
train alike wherever they run; and it leaves the matrix d steps to travel, against the stream of activations, while the
pipe stays full. S = 4:

    step       1  2  3  4  5  6  7  8  9 10 11 12
    taken               *           *           *       after the step
    read       0  0  0  0  0  0  4  4  4  4  8  8       0: what the last block started with

On each boundary it goes by a link of its own, from the last stage to the first. A thread of each stage on the way takes
it and hands it on at once, whatever its training does; the training waits only for what is due and not there.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from queue import Empty, Queue

import deepspeed
import torch

from llm_local.adapters.deepspeed_internals import is_partitioned
from llm_local.config import Config
from llm_local.device import DTYPES
from llm_local.links.link import ReceivingEnd, SendingEnd
from llm_local.links.links import Links
from llm_local.links.packet import END, REFRESH, Packet
from llm_local.model.block import Block
from llm_local.model.heads.head import head_of
from llm_local.model.heads.shared import install, installed
from llm_local.partition import Partition
from llm_local.world import World

INSTALLED = "installed"


@dataclass(frozen=True)
class Timetable:
    """When the matrix is taken, and when it is read; steps count from 1."""

    every: int
    max_steps: int

    @property
    def delay(self) -> int:
        """Steps that a matrix may travel: it is read from the step after these on."""
        return (self.every + 1) // 2

    def is_taken(self, step: int) -> bool:
        """Whether the matrix is taken after this step; near the end, too, for a run that goes on from there."""
        return step % self.every == 0

    def is_sent(self, taken: int) -> bool:
        """Whether a step of this run will read the matrix that was taken after step `taken`."""
        return taken + self.delay < self.max_steps

    def due(self, step: int) -> int | None:
        """The step whose matrix is installed before this one; None: that of the step before stays."""
        taken = step - self.delay - 1
        return taken if taken > 0 and self.is_taken(taken) else None

    def pending(self, step: int) -> list[int]:
        """The steps whose matrices are on their way after this one: at most one, with every=1 two."""
        return [t for t in range(max(1, step - self.delay), step + 1) if self.is_taken(t)]


@dataclass(frozen=True)
class _Arrival:
    """A matrix that has come, and been handed on in so many bytes."""

    packet: Packet
    relayed_bytes: int


class Refresher:
    """The copies that one rank's blocks read, and on the last stage the matrix that they are copies of.

    wait_seconds: blocked on the way of the matrix. sent_bytes: handed to the stage before; on a stage in between they
    count when what it hands on is installed, so that a step always has the same. num_due: matrices that were due since
    the run's first step.
    """

    def __init__(
        self,
        blocks: Sequence[Block],
        timetable: Timetable,
        world: World,
        links: Links,
        precision: str,
        link_seconds: float | None,
    ):
        self.timetable = timetable
        self.wait_seconds = 0.0
        self.sent_bytes = 0
        self._readers = [block.head for block in blocks if block.kind.shares_matrix]
        self._source = None if links.refresh_receiver else blocks[-1].head.output_matrix
        self._receiver = links.refresh_receiver
        self._sender = links.refresh_sender
        self._dtype = DTYPES[precision]
        self._device = world.device
        self._link_seconds = link_seconds
        self.num_due = 0
        self._pending: dict[int, torch.Tensor] = {}
        self._arrived: Queue[_Arrival | BaseException] = Queue()
        self._thread: threading.Thread | None = None
        if self._readers:
            self._install(installed(self._readers[0]))

    def start(self, step: int, state: dict[str, torch.Tensor] | None = None) -> None:
        """Goes on after so many steps. Of a resumed run, state is what `state` returned then, on any stage, as far as
        it was saved: what is still on its way leaves again. All replicas must call."""
        if state is not None:
            if self._readers:
                self._install(state[INSTALLED])
            if self._source is not None:  # with another interval than before, some have not been taken
                on_their_way = self.timetable.pending(step)
                self._pending = {t: state[str(t)] if str(t) in state else self._take() for t in on_their_way}
        for taken, matrix in sorted(self._pending.items()):
            self._send(taken, matrix)
        if self._receiver is not None:
            ways = (self._receiver, self._sender)
            self._thread = threading.Thread(target=self._relay, args=ways, name="refresh", daemon=True)
            self._thread.start()

    def before(self, step: int) -> None:
        """Installs what is due in this step. Raises LinkError if it has not come within link_timeout_seconds."""
        taken = self.timetable.due(step)
        if taken is None:
            return
        self.num_due += 1
        matrix = self._pending.pop(taken) if self._receiver is None else self._await(taken, self._receiver)
        if self._readers:
            self._install(matrix)

    def after(self, step: int) -> None:
        """Takes the matrix as it is after this step, on the last stage. All its replicas must call."""
        if self._source is not None and self.timetable.is_taken(step):
            self._pending[step] = self._take()
            self._send(step, self._pending[step])

    def _take(self) -> torch.Tensor:
        """The last block's output matrix as it is, (V, D). All replicas must call."""
        assert self._source is not None
        weight = self._source.weight
        with deepspeed.zero.GatheredParameters([weight], enabled=is_partitioned(weight)):
            return weight.detach().clone()

    def state(self) -> dict[str, torch.Tensor]:
        """What a checkpoint after this step needs: the copy that is read, and what is on its way, by the step."""
        now = {INSTALLED: installed(self._readers[0])} if self._readers else {}
        return now | {str(taken): matrix for taken, matrix in self._pending.items()}

    def close(self, step: int) -> None:
        """Goodbyes over the links, once nothing is to come."""
        if self._thread is not None:
            self._thread.join()
        elif self._sender is not None:
            self._sender.close(step)

    def _install(self, matrix: torch.Tensor) -> None:
        here = matrix.to(self._device, self._dtype, non_blocking=True)
        for head in self._readers:
            install(head, here)

    def _send(self, taken: int, matrix: torch.Tensor) -> None:
        if self._sender is None or not self.timetable.is_sent(taken):
            return
        waited, sent = self._sender.wait_seconds, self._sender.bytes
        self._sender.send(Packet(REFRESH, taken, 0, hidden=matrix[None]))
        self.wait_seconds += self._sender.wait_seconds - waited
        self.sent_bytes += self._sender.bytes - sent

    def _await(self, taken: int, receiver: ReceivingEnd) -> torch.Tensor:
        start = time.perf_counter()
        try:
            arrival = self._arrived.get(timeout=self._link_seconds)
        except Empty:
            raise receiver.error(TimeoutError("timed out")) from None
        self.wait_seconds += time.perf_counter() - start
        if isinstance(arrival, BaseException):
            raise arrival
        packet = arrival.packet
        assert packet.step == taken, f"the matrix of step {packet.step} has come, that of step {taken} is due"
        assert packet.hidden is not None
        self.sent_bytes += arrival.relayed_bytes
        return packet.hidden[0]

    def _relay(self, receiver: ReceivingEnd, sender: SendingEnd | None) -> None:
        """Until the last stage says that nothing follows: it alone knows, as a run may end before its last step."""
        try:
            while (packet := receiver.take()).kind != END:
                relayed = 0
                if sender is not None:
                    before = sender.bytes
                    sender.send(packet)
                    relayed = sender.bytes - before
                self._arrived.put(_Arrival(packet, relayed))
            if sender is not None:
                sender.close(packet.step)
        except Exception as error:
            self._arrived.put(error)


def make_refresher(
    config: Config, partition: Partition, world: World, links: Links, blocks: Sequence[Block], num_due: int = 0
) -> Refresher | None:
    """Of a stage's blocks; None where no head is shared. num_due: as Refresher has it, at the start."""
    if not head_of(config).shares_matrix or len(partition.blocks) == 1:
        return None
    timetable = Timetable(config.local.head_refresh_steps, config.train.max_steps)
    seconds = None if config.is_job else world.timeout_seconds  # a job's links say themselves who is away for too long
    refresher = Refresher(blocks, timetable, world, links, config.precision, seconds)
    refresher.num_due = num_due
    return refresher
