"""A cable between two network namespaces with a rate and a delay that can be set, for measurements of slow links.

Each end is a TUN device: what the kernel of a namespace sends there, this process reads, keeps for as long as the
cable would take, and writes to the other end. It works where the kernel has no netem queue to do the same.
"""

from __future__ import annotations

import fcntl
import os
import select
import struct
import threading
import time
from collections import deque
from dataclasses import dataclass, field

_DEVICE = "/dev/net/tun"
_TUNSETIFF, _IFF_TUN, _IFF_NO_PI = 0x400454CA, 0x0001, 0x1000  # linux/if_tun.h
MTU = 64000  # bytes; each packet costs a core that computes some time


def open_tun(name: str) -> int:
    """Makes a TUN device of that name, which lives as long as the file descriptor. Raises OSError without the right."""
    end = os.open(_DEVICE, os.O_RDWR | os.O_NONBLOCK)
    try:
        fcntl.ioctl(end, _TUNSETIFF, struct.pack("16sH", name.encode(), _IFF_TUN | _IFF_NO_PI))
    except OSError:
        os.close(end)
        raise
    return end


@dataclass
class _Direction:
    """Packets on their way from one end to the other, each with the time of its arrival."""

    source: int
    target: int
    free_at: float = 0.0
    under_way: deque[tuple[float, bytes]] = field(default_factory=deque)

    def take_in(self, now: float, bytes_a_second: float | None, delay_seconds: float) -> None:
        try:
            while packet := os.read(self.source, MTU):
                held = 0.0 if bytes_a_second is None else len(packet) / bytes_a_second
                self.free_at = max(now, self.free_at) + held
                self.under_way.append((self.free_at + delay_seconds, packet))
        except BlockingIOError:
            pass

    def hand_out(self, now: float) -> None:
        while self.under_way and self.under_way[0][0] <= now:
            os.write(self.target, self.under_way.popleft()[1])


class Relay:
    """Carries packets between two file descriptors in both directions, in a thread, until `stop`.

    bytes_a_second, delay_seconds: of each direction; None: no limit. They may be set at any time.
    """

    def __init__(self, one: int, other: int):
        self.bytes_a_second: float | None = None
        self.delay_seconds = 0.0
        self._directions = (_Direction(one, other), _Direction(other, one))
        self._stopping, self._stop = os.pipe()
        self._thread = threading.Thread(target=self._carry, name="relay", daemon=True)
        self._thread.start()

    def _carry(self) -> None:
        sources = [direction.source for direction in self._directions]
        while True:
            waiting = [d.under_way[0][0] for d in self._directions if d.under_way]
            wait = max(0.0, min(waiting) - time.monotonic()) if waiting else None
            ready, _, _ = select.select([*sources, self._stopping], [], [], wait)
            if self._stopping in ready:
                return
            now = time.monotonic()
            for direction in self._directions:
                if direction.source in ready:
                    direction.take_in(now, self.bytes_a_second, self.delay_seconds)
                direction.hand_out(now)

    def stop(self) -> None:
        """What is under way is lost."""
        os.write(self._stop, b"x")
        self._thread.join()
        os.close(self._stop)
        os.close(self._stopping)
