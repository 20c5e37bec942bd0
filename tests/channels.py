"""Two ends of a link between jobs in one process, with a relay between them that a test can break."""

from __future__ import annotations

import select
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import pytest
from ranks import free_port

from llm_local.jobs.channel import Channel
from llm_local.jobs.frames import Frame
from llm_local.jobs.hello import Hello, Terms
from llm_local.jobs.key import make_key, tls
from llm_local.jobs.packet_log import PacketLog
from llm_local.jobs.side import Limits
from llm_local.jobs.ways import Address, Dial, Door, first_frame

SIZE = 5000
MOST = 1 << 20
SECONDS = 30.0  # none of what is awaited takes so long
HELLO = Hello(0, 0, "here", 1, {"seed": 7}, run="5eed")


def packet(number: int, size: int = SIZE) -> bytes:
    return Random(number).randbytes(size)


def hello(number: int, **changes: Any) -> Hello:
    return replace(HELLO, **{"stage": number, "place": f"stage {number}'s machine", **changes})


class Ends:
    """A sender, stage 0, and receivers, stage 1, each in as many lives as a test wants. All are closed at the end."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.key = folder / "run.key"
        make_key(self.key)
        self.port = free_port()
        self.news: list[str] = []  # 'finished', when the sender hears it
        self._closing: list[Any] = []

    def sender(self, start_at: int | None = 0, port: int | None = None, **options: Any) -> Channel:
        """start_at: what the life's checkpoint holds. log: memory and disk of it, in bytes."""
        memory, disk = options.pop("log", (3 * SIZE, None))
        self.log = PacketLog(self.folder / options.pop("folder", "log"), memory, disk, segment_bytes=4 * SIZE)
        if start_at is not None:
            self.log.start_at(start_at)
        way = Dial(Address("127.0.0.1", port or self.port), tls(options.pop("key", self.key), server=False))
        return self._channel(0, way, 1, self.log, **options)

    def receiver(self, first: int = 0, window: int = 4, log: PacketLog | None = None, **options: Any) -> Channel:
        way = Door(Address("127.0.0.1", self.port), tls(self.key, server=True)).visits[0]
        return self._channel(1, way, 0, log, first=first, window=window, **options)

    def _channel(self, stage: int, way: Any, other: int, log: PacketLog | None, **options: Any) -> Channel:
        mine = hello(stage, window=options.pop("window", 0), **options.pop("says", {}))
        first, durable = options.pop("first", 0), options.pop("durable", None)
        channel = Channel(way, Terms(mine, other, (0,)), log, first, Limits(MOST, **options), durable)
        channel.beat = lambda: {"stage": stage}
        channel.finished = lambda: self.news.append("finished")
        channel.start()
        self._closing.append(channel)
        return channel

    def relay(self) -> Relay:
        relay = Relay(self.port)
        self._closing.append(relay)
        return relay

    def close(self) -> None:
        for each in reversed(self._closing):
            each.close()


@pytest.fixture
def ends(tmp_path: Path) -> Iterator[Ends]:
    made = Ends(tmp_path)
    yield made
    made.close()


def until(condition: Callable[[], Any], what: str = "") -> None:
    end = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < end, f"never {what}"
        time.sleep(0.01)


class Sending(threading.Thread):
    """Sends the packets from one number on; `join` raises what went wrong. pause: seconds between two."""

    def __init__(self, channel: Channel, start: int, stop: int, pause: float = 0.0):
        super().__init__(daemon=True)
        self.sent = start
        self._error: Exception | None = None
        self._is_stopped = False
        self._channel, self._stop_at, self._pause = channel, stop, pause
        self.start()

    def run(self) -> None:
        try:
            for number in range(self.sent, self._stop_at):
                if self._is_stopped:
                    return
                whole = packet(number)
                self._channel.send(whole[:80], memoryview(whole)[80:])
                self.sent = number + 1
                time.sleep(self._pause)
        except Exception as error:
            self._error = error

    def stop(self) -> None:
        self._is_stopped = True
        self.join()

    def join(self, timeout: float | None = SECONDS) -> None:
        super().join(timeout)
        if self._error is not None:
            raise self._error
        assert not self.is_alive()


class Waiting(threading.Thread):
    """Calls what waits; `join` raises what went wrong."""

    def __init__(self, wait: Callable[[], None]):
        super().__init__(daemon=True)
        self._wait = wait
        self._error: Exception | None = None
        self.start()

    def run(self) -> None:
        try:
            self._wait()
        except Exception as error:
            self._error = error

    def join(self, timeout: float | None = SECONDS) -> None:
        super().join(timeout)
        if self._error is not None:
            raise self._error
        assert not self.is_alive()


def take(channel: Channel, start: int, stop: int) -> None:
    """The next packets are those, whole and in order."""
    for number in range(start, stop):
        found = channel.take()
        assert found is not None
        assert found.numpy().tobytes() == packet(number), f"packet {number}"


def part(*channels: Channel) -> None:
    """As a job does once it has finished."""
    for channel in channels:
        channel.part()
    for channel in channels:
        assert channel.parted.wait(SECONDS), "never apart"  # in which it would have lingered


class Relay:
    """Passes bytes on from `port` to another one, until it is told otherwise."""

    def __init__(self, to: int):
        self._to = to
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self.is_black_hole = False
        self.loses = False  # what goes to the one that listens
        self.bytes_at_a_time, self.pause = 1 << 16, 0.0
        self._pairs: list[tuple[socket.socket, socket.socket]] = []
        threading.Thread(target=self._accept, daemon=True).start()

    def reset(self) -> None:
        """Both ends see their connection end at once."""
        pairs, self._pairs = self._pairs, []
        for each in (each for pair in pairs for each in pair):
            with suppress(OSError):
                each.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
                each.shutdown(socket.SHUT_RDWR)
                each.close()

    def close(self) -> None:
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self.reset()

    def _accept(self) -> None:
        while True:
            try:
                one, _ = self._listener.accept()
            except OSError:
                return
            try:
                other = socket.create_connection(("127.0.0.1", self._to))
            except OSError:  # as of an end that is between two lives
                one.close()
                continue
            self._pairs.append((one, other))
            threading.Thread(target=self._pass_on, args=(one, other), daemon=True).start()

    def _pass_on(self, one: socket.socket, other: socket.socket) -> None:
        goes = {one: other, other: one}
        with suppress(OSError, ValueError), one, other:
            while True:
                for each in select.select([one, other], [], [], 0.1)[0]:
                    while self.is_black_hole:
                        time.sleep(0.01)
                    if not (some := each.recv(self.bytes_at_a_time)):
                        return
                    if not (self.loses and each is one):
                        goes[each].sendall(some)
                    time.sleep(self.pause)


class Stranger:
    """A connection to a port, once somebody listens there; with a key, or as plain TCP."""

    def __init__(self, port: int, key: Path | None = None):
        end = time.monotonic() + SECONDS
        while True:
            try:
                self.socket: socket.socket = socket.create_connection(("127.0.0.1", port), timeout=SECONDS)
                break
            except ConnectionRefusedError:
                assert time.monotonic() < end, "nobody listens"
                time.sleep(0.05)
        if key is not None:
            self.socket = tls(key, server=False).wrap_socket(self.socket)

    def say(self, data: bytes) -> None:
        self.socket.sendall(data)

    def hears(self) -> Frame:
        assert isinstance(self.socket, ssl.SSLSocket)
        return first_frame(self.socket, SECONDS)

    def is_sent_away(self) -> bool:
        """Waits for it."""
        with suppress(OSError):
            while self.socket.recv(1 << 16):
                pass
        return True

    def close(self) -> None:
        self.socket.close()
