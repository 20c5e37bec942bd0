"""What two jobs say to each other over a connection: frames, each a header of fixed size and as many bytes as it says.

    HELLO     who this end is, and from which packet on it wants them; the first frame of both ends (JSON)
    REFUSAL   why this end has nothing to do with the other one; the last frame (JSON)
    PACKET    a packet of the stream, by its number
    TAKEN     so many packets of the other end's stream have been used here: there is room for as many more
    DURABLE   a checkpoint holds what so many packets have taught
    BEAT      a sign of life, with what is to be known of this job (JSON)
    FINISHED  this job needs nothing more and will end
    FAREWELL  that is known and written down: it may end
    GONE      it does, and the one that said farewell may, too; the last frame

Nothing that comes is unpickled, and a header that claims more than its kind may have ends the connection.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from llm_local.files import Json

HELLO, REFUSAL, PACKET, TAKEN, DURABLE, BEAT, FINISHED, FAREWELL, GONE = range(1, 10)
_WITH_TEXT = (HELLO, REFUSAL, BEAT)
TEXT_BYTES = 1 << 20
_HEADER = struct.Struct("<4sBxxxQQ")  # magic, kind, number, length
_MAGIC = b"LLMj"


class Garbled(ValueError):
    """What has come is no frame, or one that this end cannot have."""


@dataclass(frozen=True)
class Frame:
    kind: int
    number: int = 0
    body: Any = b""  # a packet's is the buffer that `room` gave

    @property
    def content(self) -> Json:
        """Of a frame with text. Raises Garbled."""
        try:
            found = json.loads(bytes(self.body))
        except (ValueError, RecursionError) as error:
            raise Garbled(f"text that is no JSON: {error}") from error
        if not isinstance(found, dict):
            raise Garbled("text that is no JSON object")
        return found


def header(kind: int, number: int = 0, length: int = 0) -> bytes:
    return _HEADER.pack(_MAGIC, kind, number, length)


def with_text(kind: int, content: Json) -> bytes:
    text = json.dumps(content).encode()
    return header(kind, 0, len(text)) + text


def parse(max_packet_bytes: int, room: Callable[[int], Any]) -> Iterator[Any]:
    """Yields writable buffers, to be filled one after the other; where a frame is whole, the Frame, and expects None.

    room: makes the buffer of a packet of so many bytes. Raises Garbled before it makes room for what is too large.
    """
    while True:
        head = bytearray(_HEADER.size)
        yield head
        magic, kind, number, length = _HEADER.unpack(head)
        if magic != _MAGIC:
            raise Garbled("bytes that are no frame")
        if not HELLO <= kind <= GONE:
            raise Garbled(f"a frame of unknown kind {kind}")
        most = max_packet_bytes if kind == PACKET else TEXT_BYTES if kind in _WITH_TEXT else 0
        if length > most:
            raise Garbled(f"a frame of kind {kind} that claims {length:,} bytes, at most {most:,} make sense")
        body = room(length) if kind == PACKET else bytearray(length)
        if length:
            yield body
        yield Frame(kind, number, body)
