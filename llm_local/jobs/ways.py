"""How two jobs come together: one dials an address until somebody answers, the other one has a door at which it knocks.

Who has not the run's key is refused in the handshake of TLS, within HANDSHAKE_SECONDS, before a byte of its is read.
"""

from __future__ import annotations

import socket
import ssl
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from queue import Empty, Queue
from typing import Protocol

from llm_local.jobs.frames import Frame, Garbled, parse
from llm_local.jobs.hello import Hello

HANDSHAKE_SECONDS = 0.9  # a client's share of it is a round trip
ANSWER_SECONDS = 10.0
_HANDSHAKES = 16  # at a time
_BACKOFF = (0.1, 2.0)  # seconds, from the first failure to the tenth
_BIND_SECONDS = 5.0  # of a port that the job's life before this one had


class Way(Protocol):
    """What gives an end its connections."""

    def connection(self, hello: Callable[[], Hello], seconds: float) -> tuple[ssl.SSLSocket, Frame] | None:
        """The next one, and the first frame of the other end; None: not within so many seconds. Raises OSError and
        Garbled, which say why."""
        ...

    is_visited: bool  # whether it is the other end that comes, and says hello first

    def visitor(self) -> tuple[ssl.SSLSocket, Frame] | None:
        """Who has come while there is a connection."""
        ...

    def close(self) -> None: ...


@dataclass(frozen=True)
class Address:
    host: str
    port: int

    @staticmethod
    def of(text: str) -> Address:
        """Of 'siteB:7001' or '[::1]:7001'. Raises ValueError."""
        host, colon, port = text.strip().rpartition(":")
        if not (colon and host and port.isdecimal() and 0 < int(port) < 65536):
            raise ValueError(f"{text!r} is no HOST:PORT")
        return Address(host.strip("[]"), int(port))

    def after(self, ports: int) -> Address:
        return Address(self.host, self.port + ports)

    def __str__(self) -> str:
        return f"{self.host}:{self.port}"


class Dial:
    """The way of the end that sends: it tries again until the other one is there, after ever longer pauses."""

    is_visited = False

    def __init__(self, address: Address, context: ssl.SSLContext):
        self.address = address
        self._context = context
        self._failures = 0

    def connection(self, hello: Callable[[], Hello], seconds: float) -> tuple[ssl.SSLSocket, Frame] | None:
        if self._failures:
            time.sleep(min(_BACKOFF[0] * 1.4 ** (self._failures - 1), _BACKOFF[1], seconds))
        self._failures += 1
        plain = socket.create_connection((self.address.host, self.address.port), timeout=ANSWER_SECONDS)
        try:
            secured = _secured(plain, self._context, server_side=False, seconds=ANSWER_SECONDS)
        except BaseException:
            plain.close()
            raise
        try:
            secured.sendall(hello().to_bytes())
            found = first_frame(secured, ANSWER_SECONDS)
        except BaseException:
            secured.close()
            raise
        self._failures = 0
        return secured, found

    def visitor(self) -> tuple[ssl.SSLSocket, Frame] | None:
        return None

    def close(self) -> None:
        """There is nothing to close."""


class Visits:
    """The way of an end that receives: those who have come to a door for it."""

    is_visited = True

    def __init__(self, door: Door):
        self._door = door
        self._arrived: Queue[tuple[ssl.SSLSocket, Frame]] = Queue()

    def connection(self, hello: Callable[[], Hello], seconds: float) -> tuple[ssl.SSLSocket, Frame] | None:
        """Of those that have come the last: the others have gone."""
        try:
            found = self._arrived.get(timeout=seconds)
            while not self._arrived.empty():
                found[0].close()
                found = self._arrived.get()
            return found
        except Empty:
            return None

    def visitor(self) -> tuple[ssl.SSLSocket, Frame] | None:
        try:
            return self._arrived.get_nowait()
        except Empty:
            return None

    def put(self, met: tuple[ssl.SSLSocket, Frame]) -> None:
        self._arrived.put(met)

    def close(self) -> None:
        self._door.close()


class Door:
    """Where the replicas of the stage before come to. visits: by replica; any other one is shown to the first of them.
    num_refused: those who came without the key, or said no hello."""

    def __init__(self, address: Address, context: ssl.SSLContext, replicas: Sequence[int] = (0,)):
        self.address = address
        self.num_refused = 0
        self.visits = {replica: Visits(self) for replica in replicas}
        self._first = self.visits[replicas[0]]
        self._context = context
        self._places = threading.BoundedSemaphore(_HANDSHAKES)
        self._listener = _listen_soon(address)
        self._thread = threading.Thread(target=self._welcome, name="door", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """The port is free when it returns, and who has come and was not met hears that nobody is here."""
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)  # else `accept` goes on, on a port that nobody has closed
        self._listener.close()
        self._thread.join()
        self._send_away()

    def _send_away(self) -> None:
        for visits in self.visits.values():
            while met := visits.visitor():
                met[0].close()

    def _welcome(self) -> None:
        while True:
            try:
                plain, _ = self._listener.accept()
            except OSError:
                if self._listener.fileno() < 0:
                    return
                time.sleep(0.05)  # no more files, for the moment
                continue
            if self._places.acquire(timeout=HANDSHAKE_SECONDS):
                threading.Thread(target=self._greet, args=(plain,), name="greeting", daemon=True).start()
            else:
                plain.close()

    def _greet(self, plain: socket.socket) -> None:
        try:
            secured = _secured(plain, self._context, server_side=True, seconds=HANDSHAKE_SECONDS)
            try:
                frame = first_frame(secured, ANSWER_SECONDS)
                self.visits.get(Hello.of(frame).replica, self._first).put((secured, frame))
                if self._listener.fileno() < 0:
                    self._send_away()
            except BaseException:
                secured.close()
                raise
        except (OSError, Garbled):  # whoever that was
            self.num_refused += 1
            with suppress(OSError):
                plain.close()
        finally:
            self._places.release()


def listen(address: Address) -> socket.socket:
    """Raises OSError, or UnicodeError for what is no name of a host."""
    family = socket.AF_INET6 if ":" in address.host else socket.AF_INET
    return socket.create_server((address.host, address.port), family=family, backlog=64)


def _listen_soon(address: Address) -> socket.socket:
    """Raises OSError where the port is somebody else's."""
    end = time.monotonic() + _BIND_SECONDS
    while True:
        try:
            return listen(address)
        except OSError:
            if time.monotonic() > end:
                raise
            time.sleep(0.1)


def _secured(plain: socket.socket, context: ssl.SSLContext, server_side: bool, seconds: float) -> ssl.SSLSocket:
    plain.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    plain.settimeout(seconds)
    secured = context.wrap_socket(plain, server_side=server_side, do_handshake_on_connect=False)
    try:
        secured.do_handshake()
    except BaseException:
        secured.close()
        raise
    return secured


def first_frame(connection: ssl.SSLSocket, seconds: float) -> Frame:
    """Which is no packet. Raises Garbled, and OSError where it does not come in time."""
    end = time.monotonic() + seconds
    parser = parse(0, bytearray)
    wanted = next(parser)
    while not isinstance(wanted, Frame):
        view = memoryview(wanted)
        while view:
            connection.settimeout(max(end - time.monotonic(), 1e-3))
            if not (count := connection.recv_into(view)):
                raise ConnectionResetError("the other end has hung up")
            view = view[count:]
        wanted = next(parser)
    return wanted
