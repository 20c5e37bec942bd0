"""The sent packets that the receiving job does not have in a checkpoint yet, for a life of it that asks for them again.

The newest are in memory, the others in files of segment.py's format, each named by the number of its first packet. An
empty file is named by the number below which all were trimmed.
"""

from __future__ import annotations

import os
from bisect import bisect_right
from collections.abc import Iterable
from pathlib import Path
from threading import Condition

from llm_local.files import Unwritten, writing
from llm_local.jobs.segment import (
    SUFFIX,
    Buffer,
    Segment,
    force,
    payload_bytes,
    read_record,
    record_bytes,
    remove,
    write_record,
)

DURABLE = ".durable"
SEGMENT_BYTES = 64 << 20


class DamagedLog(RuntimeError):
    """A packet should be in the log and is not there as it was sent; the message says where, and what to do."""


def bytes_of(num_packets: int, packet_bytes: int) -> int:
    """Bytes that a log takes for packets of that size."""
    return num_packets * record_bytes(packet_bytes)


def durable_in(folder: Path) -> int:
    """Packets below this number have been trimmed from the log there, which may be another process's."""
    return max(map(_number_of, folder.glob(f"*{DURABLE}")), default=0)


class PacketLog:
    """Packets by number, 0 being the run's first, in a folder of their own.

    memory_bytes, disk_bytes: bounds of what is kept, together (None: as much as the disk takes). The files may take
    more than disk_bytes: `persist` puts the packets in memory there, too, and a segment goes as a whole.
    One thread may append while one reads and trims and one persists.
    """

    def __init__(self, folder: Path, memory_bytes: int, disk_bytes: int | None, segment_bytes: int = SEGMENT_BYTES):
        """Goes on with what an earlier life of the sender left there: Unwritten if there can be no such folder."""
        self.folder = folder
        self._memory_bytes = memory_bytes
        self._disk_bytes = disk_bytes
        self._segment_bytes = segment_bytes
        with writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
            files = sorted(path for path in folder.glob(f"*{SUFFIX}") if path.stem.isdecimal())
            if not any(folder.glob(f"*{DURABLE}")):  # while there is room
                (folder / f"{0:012}{DURABLE}").touch()
            self._segments = [Segment.found(path) for path in files]
        self._durable = durable_in(folder)
        self._next = max([self._durable, *(segment.stop for segment in self._segments)])
        self._state = Condition()  # guards all of these; nobody holds it while a packet is read or written
        self._stored = _Packets()  # in memory and on disk: older than those
        self._unstored = _Packets()  # in memory alone
        self._tail: Segment | None = None  # that this life appends to
        self._in_use: Segment | None = None  # that a thread is appending to
        self._is_closed = False

    @property
    def next(self) -> int:
        """The number of the packet that is appended next."""
        return self._next

    @property
    def durable(self) -> int:
        """Packets below this number have been trimmed."""
        return self._durable

    @property
    def first(self) -> int:
        """The number of the oldest packet that is kept; `next` if there is none."""
        with self._state:
            for segment in self._segments:
                if segment.ends and segment.stop > self._durable:
                    return max(segment.first, self._durable)
            return min([*self._unstored.oldest(), self._next])

    @property
    def num_bytes(self) -> int:
        """Of the records of all packets that are kept."""
        with self._state:
            return self._kept_bytes()

    @property
    def num_bytes_in_memory(self) -> int:
        with self._state:
            return self._stored.num_bytes + self._unstored.num_bytes

    @property
    def num_bytes_on_disk(self) -> int:
        """Of all segments, with what was trimmed of the oldest."""
        with self._state:
            return sum(segment.size for segment in self._segments)

    def start_at(self, number: int) -> None:
        """The sender goes on from where it had sent so many packets: those from there on are forgotten, as it makes
        them again, and the next one appended has that number. That some of them were durable is forgotten, too: the
        receiver may go back as far, and says so when it comes."""
        with self._state:
            self._state.wait_for(lambda: self._in_use is None)
            for packets in (self._stored, self._unstored):
                packets.remove(n for n in packets.buffers if n >= number)
            gone = [segment for segment in self._segments if segment.first >= number]
            del self._segments[len(self._segments) - len(gone) :]
            for segment in reversed(gone):
                remove(segment.path)
            if self._segments and number < (last := self._segments[-1]).stop:
                last.cut(number)
                with writing(last.path):
                    os.truncate(last.path, last.size)
            self._next = number
            self._tail = None
            was_durable, self._durable = self._durable, min(self._durable, number)
            self._state.notify_all()
        if number < was_durable:
            self._remember_durable(number)

    def append(self, *buffers: Buffer) -> int:
        """Keeps a packet, without a copy: nobody may change the buffers. Returns its number.

        The oldest in memory go to disk if there are too many; raises Unwritten where they cannot, and nothing was
        appended then. It does not ask whether there is room.
        """
        size = record_bytes(payload_bytes(buffers))
        while not self._put(buffers, size):
            self._store_oldest(self._next)
        return self._next - 1

    def has_room(self, num_bytes: int) -> bool:
        """Whether a packet of that size fits; any does if the log is empty."""
        with self._state:
            return self._has_room(num_bytes)

    def wait_for_room(self, num_bytes: int, seconds: float) -> bool:
        """Waits until there is room, or for so long, or until the log is closed; whether there is."""
        with self._state:
            self._state.wait_for(lambda: self._is_closed or self._has_room(num_bytes), seconds)
            return self._has_room(num_bytes)

    def read(self, number: int) -> tuple[Buffer, ...]:
        """Buffers that are the packet one after the other, as they were appended or as one. Raises DamagedLog."""
        with self._state:
            assert self._durable <= number < self._next, f"packet {number} is not kept"
            for packets in (self._stored, self._unstored):
                if number in packets.buffers:
                    return packets.buffers[number]
            found = bisect_right(self._segments, number, key=lambda segment: segment.first) - 1
            segment = self._segments[found] if found >= 0 else None
            if segment is None or number >= segment.stop:
                where = segment.path if segment and segment.is_damaged else self.folder
                raise _damaged(number, where)
            at = segment.start_of(number)
        payload = read_record(segment.path, at, number)
        if payload is None:
            raise _damaged(number, segment.path)
        return (payload,)

    def covers(self, start: int, stop: int) -> bool:
        """Whether all packets from start to stop - 1 are here, and intact: it reads them."""
        if start < stop and not (self._durable <= start and stop <= self._next):
            return False
        try:
            for number in range(start, stop):
                self.read(number)
        except DamagedLog:
            return False
        return True

    def trim(self, number: int) -> None:
        """Forgets the packets below number, which are durable at the receiver, and remembers that on disk."""
        with self._state:
            if number <= self._durable:
                return
            self._durable = number
            for packets in (self._stored, self._unstored):
                packets.remove(n for n in packets.buffers if n < number)
            gone: list[Segment] = []
            while self._segments and (oldest := self._segments[0]).stop <= number and oldest.first < number:
                if oldest is self._in_use:
                    break
                gone.append(self._segments.pop(0))
            if self._tail in gone:
                self._tail = None
            self._state.notify_all()
        self._remember_durable(number)  # first: a life that finds neither would look for what is gone
        for segment in gone:
            remove(segment.path)

    def go_back(self, number: int) -> None:
        """The sender's next life is to make the packets from that number on again, though they were trimmed."""
        self._remember_durable(number)

    def persist(self, number: int) -> None:
        """All packets below number that are kept are on disk, and forced there, when it returns. Raises Unwritten."""
        while self._store_oldest(number):
            pass
        with self._state:
            pending = [(s, s.size) for s in self._segments if s.first < number and s.size > s.num_synced]
        for segment, size in pending:
            try:
                force(segment.path)
            except Unwritten as error:
                if not error.is_gone or segment in self._segments:  # and not trimmed meanwhile
                    raise
            segment.num_synced = size
        if pending:
            force(self.folder)

    def close(self) -> None:
        """Nobody waits for room any more. What is in memory alone is lost with the log."""
        with self._state:
            self._is_closed = True
            self._state.notify_all()

    def _remember_durable(self, number: int) -> None:
        """In the name of a file, as a full disk has no room for another one. Raises Unwritten."""
        marks = sorted(self.folder.glob(f"*{DURABLE}"), key=_number_of)
        with writing(mark := self.folder / f"{number:012}{DURABLE}"):
            if marks:
                os.rename(marks[-1], mark)
            else:
                mark.touch()

    def _kept_bytes(self) -> int:
        return self._unstored.num_bytes + sum(s.size - s.start_of(self._durable) for s in self._segments)

    def _has_room(self, num_bytes: int) -> bool:
        kept = self._kept_bytes()
        if self._disk_bytes is None or not kept:
            return True
        return kept + record_bytes(num_bytes) <= self._memory_bytes + self._disk_bytes

    def _put(self, buffers: tuple[Buffer, ...], size: int) -> bool:
        """Whether the packet could be put into memory: not if another one must be stored first."""
        with self._state:
            room = self._memory_bytes - size - self._unstored.num_bytes
            while self._stored.num_bytes > max(room, 0):
                self._stored.remove(self._stored.oldest())
            if room < 0 and self._unstored.buffers:
                return False
            if self._next >= self._durable:  # else made again by a new life, for a receiver that is further
                self._unstored.put(self._next, buffers)
            self._next += 1
            return True

    def _store_oldest(self, below: int) -> bool:
        """Writes the oldest packet that is in memory alone, or waits for another thread that does; False if all below
        that number are on disk."""
        with self._state:
            number = min(self._unstored.oldest(), default=below)
            if number >= below:
                return False
            if self._in_use:
                self._state.wait()
                return True
            segment = self._in_use = self._segment_for(number)
            buffers = self._unstored.buffers[number]
            at = segment.size
        ends: list[int] = []
        try:
            ends.append(write_record(segment.path, at, number, buffers))
        finally:
            with self._state:
                self._in_use = None
                segment.ends += ends
                if ends and number in self._unstored.buffers:  # and not trimmed meanwhile
                    self._unstored.remove([number])
                    self._stored.put(number, buffers)
                self._state.notify_all()
        return True

    def _segment_for(self, number: int) -> Segment:
        if self._tail is None or self._tail.stop != number or self._tail.size >= self._segment_bytes:
            self._tail = Segment(self.folder / f"{number:012}{SUFFIX}", number)
            self._segments.append(self._tail)
        return self._tail


class _Packets:
    """Packets in memory by their numbers, in ascending order."""

    def __init__(self):
        self.buffers: dict[int, tuple[Buffer, ...]] = {}
        self.num_bytes = 0

    def oldest(self) -> list[int]:
        """Its number, or nothing."""
        return [next(iter(self.buffers))] if self.buffers else []

    def put(self, number: int, buffers: tuple[Buffer, ...]) -> None:
        self.buffers[number] = buffers
        self.num_bytes += record_bytes(payload_bytes(buffers))

    def remove(self, numbers: Iterable[int]) -> None:
        for number in list(numbers):
            self.num_bytes -= record_bytes(payload_bytes(self.buffers.pop(number)))


def _damaged(number: int, where: Path) -> DamagedLog:
    return DamagedLog(
        f"{where} does not have packet {number} as it was sent; restore what was there, or resume the job that sends "
        "from an earlier checkpoint, from which it makes that packet again"
    )


def _number_of(mark: Path) -> int:
    """0 of a name without one: a receiver is then thought to be less far than it is, which loses nothing."""
    return int(mark.stem) if mark.stem.isdecimal() else 0
