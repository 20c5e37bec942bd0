"""Segment files of a packet log: a row of records, each a header and a packet's bytes.

A header is little-endian: magic, CRC-32 of all that follows it, the packet's number, its length in bytes.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from struct import Struct

from llm_local.files import writing

Buffer = bytes | bytearray | memoryview

SUFFIX = ".packets"
_MAGIC = b"LLP1"
_HEADER = Struct("<4sIQQ")
_CHECKED = Struct("<QQ")  # the header's share of the checksum


def record_bytes(packet_bytes: int) -> int:
    """Bytes that a packet takes in a log, in memory as on disk."""
    return _HEADER.size + packet_bytes


@dataclass(eq=False)
class Segment:
    """A file of packets. ends: of each intact record, its end in the file. num_synced: bytes that were forced to disk.
    is_damaged: something that is no intact record follows."""

    path: Path
    first: int
    ends: list[int] = field(default_factory=list)
    num_synced: int = 0
    is_damaged: bool = False

    @classmethod
    def found(cls, path: Path) -> Segment:
        """A segment by its headers alone."""
        segment = cls(path, int(path.stem))
        with path.open("rb", buffering=0) as file:
            size = os.fstat(file.fileno()).st_size
            while len(header := file.read(_HEADER.size)) == _HEADER.size:
                magic, _, number, length = _HEADER.unpack(header)
                end = segment.size + record_bytes(length)
                if (magic, number) != (_MAGIC, segment.stop) or end > size:
                    break
                segment.ends.append(end)
                file.seek(end)
        segment.is_damaged = segment.size < size
        return segment

    @property
    def stop(self) -> int:
        return self.first + len(self.ends)

    @property
    def size(self) -> int:
        return self.ends[-1] if self.ends else 0

    def start_of(self, number: int) -> int:
        """Where the record begins in the file; 0 or the file's size for packets before or after its own."""
        index = min(number - self.first, len(self.ends))
        return self.ends[index - 1] if index > 0 else 0

    def cut(self, number: int) -> None:
        """Forgets the records from that packet on."""
        del self.ends[number - self.first :]


def payload_bytes(buffers: Sequence[Buffer]) -> int:
    return sum(memoryview(buffer).nbytes for buffer in buffers)


def _checksum(number: int, length: int, buffers: Iterable[Buffer]) -> int:
    crc = zlib.crc32(_CHECKED.pack(number, length))
    for buffer in buffers:
        crc = zlib.crc32(buffer, crc)
    return crc


def write_record(path: Path, at: int, number: int, buffers: Sequence[Buffer]) -> int:
    """Where the record ends in the file. Raises Unwritten."""
    length = payload_bytes(buffers)
    header = _HEADER.pack(_MAGIC, _checksum(number, length, buffers), number, length)
    with writing(path):
        try:
            with path.open("r+b" if at else "wb") as file:
                file.seek(at)
                for buffer in (header, *buffers):
                    file.write(buffer)
        except OSError:
            with suppress(OSError):
                os.truncate(path, at)  # half a record would take room for nothing
            raise
    return at + record_bytes(length)


def read_record(path: Path, at: int, number: int) -> bytes | None:
    """The packet, or None where its record is not as it was written, or the disk does not give it."""
    try:
        with path.open("rb") as file:
            file.seek(at)
            header = file.read(_HEADER.size)
            if len(header) < _HEADER.size:
                return None
            magic, crc, found, length = _HEADER.unpack(header)
            if (magic, found) != (_MAGIC, number) or length > os.fstat(file.fileno()).st_size:
                return None
            payload = file.read(length)
    except OSError:
        return None
    return payload if len(payload) == length and _checksum(number, length, [payload]) == crc else None


def remove(path: Path) -> None:
    with writing(path):
        path.unlink(missing_ok=True)


def force(path: Path) -> None:
    """A file, or the names in a folder, to the disk itself."""
    with writing(path):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
