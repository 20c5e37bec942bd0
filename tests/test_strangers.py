"""Who has not the key of a run, or has it and is none of its jobs, gets nothing, takes no room and disturbs nobody."""

from __future__ import annotations

import re
import socket
import ssl
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from random import Random

import psutil
import pytest
from channels import Ends, Sending, Stranger, ends, hello, take, until

import llm_local.jobs
from llm_local.jobs.frames import BEAT, DURABLE, FAREWELL, HELLO, PACKET, REFUSAL, TAKEN, header, with_text
from llm_local.jobs.hello import NEW, Hello, Refusal
from llm_local.jobs.key import make_key
from llm_local.jobs.ways import first_frame

__all__ = ["ends"]  # a fixture
AT_ONCE = 2.0  # seconds; the aim is one, of which a busy machine takes its share
MUCH = 50 << 20


class Link:
    """A rightful one, over which packets go all the time."""

    def __init__(self, ends: Ends):
        self.receiver = ends.receiver()
        self.port, self.key = ends.port, ends.key
        self._taken, self._stop = 0, 10_000
        self._sending = Sending(ends.sender(), 0, self._stop, pause=0.001)
        self.goes_on()
        self._memory = psutil.Process().memory_info().rss

    def goes_on(self) -> None:
        """Its packets come, over the connection that it has had."""
        take(self.receiver, self._taken, self._taken + 20)
        self._taken += 20
        assert self.receiver.num_connections == 1

    def close(self) -> None:
        self.goes_on()
        self._sending.stop()
        assert psutil.Process().memory_info().rss - self._memory < MUCH


@pytest.fixture
def link(ends: Ends) -> Iterator[Link]:
    """At the end its packets still come, and the memory has not grown."""
    link = Link(ends)
    yield link
    link.close()


def seconds_until_sent_away(stranger: Stranger) -> float:
    start = time.monotonic()
    assert stranger.is_sent_away()
    return time.monotonic() - start


@pytest.mark.parametrize(
    "said",
    [
        b"",
        b"GET / HTTP/1.1\r\nHost: stage-1\r\n\r\n",
        hello(0, wants=0).to_bytes(),
        header(PACKET, 0, 1 << 60),
        b"\x16\x03\x01\xff\xff" + bytes(1000),
        Random(0).randbytes(1 << 20),
    ],
    ids=["nothing", "http", "a hello", "a packet", "half a handshake", "a megabyte"],
)
def test_plain_tcp(link: Link, said: bytes):
    stranger = Stranger(link.port)
    try:
        stranger.say(said)
    except OSError:
        assert len(said) > 1000
    assert seconds_until_sent_away(stranger) < AT_ONCE
    link.goes_on()


def test_tls_without_a_certificate(link: Link):
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    start = time.monotonic()
    with (
        socket.create_connection(("127.0.0.1", link.port)) as plain,
        context.wrap_socket(plain) as stranger,
        pytest.raises((ssl.SSLError, ConnectionError)),
    ):
        first_frame(stranger, 10)
    assert time.monotonic() - start < AT_ONCE


class TestAnotherKey:
    """As of an older run."""

    def test_at_the_door(self, link: Link, tmp_path: Path):
        make_key(tmp_path / "other.key")
        with pytest.raises(ssl.SSLError, match="CERTIFICATE_VERIFY_FAILED"):
            Stranger(link.port, tmp_path / "other.key")
        link.goes_on()

    def test_of_who_dials(self, ends: Ends, tmp_path: Path):
        """It says why it does not come through, and the receiver takes the right one."""
        make_key(tmp_path / "other.key")
        receiver = ends.receiver()
        wrong = ends.sender(key=tmp_path / "other.key", folder="wrong log")
        until(lambda: "it has not the same key, or is no job of llm_local" in wrong.trouble, "told")
        wrong.close()
        sending = Sending(ends.sender(), 0, 5)
        take(receiver, 0, 5)
        sending.join()


def test_a_peer_that_has_the_key_and_is_of_another_run(link: Link):
    stranger = Stranger(link.port, link.key)
    stranger.say(hello(0, wants=0, run="01d", place="elsewhere").to_bytes())
    assert "stage 0 is there already" in Refusal.of(stranger.hears()).reason
    assert seconds_until_sent_away(stranger) < AT_ONCE
    link.goes_on()


@pytest.mark.processes
def test_a_port_scanner(link: Link):
    for _ in range(200):
        Stranger(link.port).close()
    link.goes_on()


@pytest.mark.processes
def test_who_drips_a_byte_now_and_then(link: Link):
    """Twenty at once, more than are greeted at a time."""
    whole = b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(500)
    strangers = [Stranger(link.port) for _ in range(20)]
    sent_away: set[int] = set()
    start = time.monotonic()
    for at in range(len(whole)):
        for number, stranger in enumerate(strangers):
            try:
                stranger.say(whole[at : at + 1])
            except OSError:
                sent_away.add(number)
        if len(sent_away) == len(strangers):
            break
        link.goes_on()
        time.sleep(0.05)
    assert len(sent_away) == len(strangers)
    assert time.monotonic() - start < 2 * AT_ONCE


def random_frame(random: Random) -> bytes:
    """Any bytes, or a frame of any kind that claims anything."""
    if random.random() < 0.3:
        return random.randbytes(random.randrange(1, 200))
    length = random.choice([0, 0, 0, 5, 1 << 20, 1 << 40, 1 << 60, random.getrandbits(64)])
    number = random.choice([0, 1, random.getrandbits(10), random.getrandbits(64)])
    return header(random.randrange(10), number, length) + random.randbytes(min(length, 5))


class TestRandomFrames:
    NUMBER = 100_000

    def test_without_a_key(self, link: Link):
        random = Random(0)
        sent = 0
        while sent < self.NUMBER:
            stranger = Stranger(link.port)
            frames = [random_frame(random) for _ in range(1000)]
            with suppress(OSError):
                stranger.say(b"".join(frames))
            assert stranger.is_sent_away()
            sent += len(frames)
        link.goes_on()

    def test_with_the_key(self, link: Link):
        """Each connection ends with the first frame that cannot be; the number is of those that were said."""
        random = Random(1)
        sent = 0
        while sent < self.NUMBER:
            stranger = Stranger(link.port, link.key)
            frames = [random_frame(random) for _ in range(1000)]
            with suppress(OSError):
                stranger.say(b"".join(frames))
            stranger.close()
            sent += len(frames)
        link.goes_on()
        until(lambda: link.receiver.num_connections == 1, "calm")

    @pytest.mark.processes
    def test_after_a_hello_that_is_right(self, ends: Ends):
        """The receiver drops whoever says them, takes none of it for a packet, and then the right one."""
        random, receiver = Random(2), ends.receiver()
        for _ in range(30):
            stranger = Stranger(ends.port, ends.key)
            stranger.say(hello(0, wants=0).to_bytes())
            assert Hello.of(stranger.hears()).stage == 1
            frames = [random_frame(random) for _ in range(100)]
            frames = [each for each in frames if not each.startswith((header(PACKET)[:5], header(REFUSAL)[:5]))]
            with suppress(OSError):
                stranger.say(b"".join(frames))
            assert stranger.is_sent_away()
            receiver.check()
        sending = Sending(ends.sender(), 0, 20)
        take(receiver, 0, 20)
        sending.join()


@pytest.mark.parametrize(
    ("said", "why"),
    [
        (header(PACKET, 0, 1 << 60), "a frame of kind 3 that claims 1,152,921,504,606,846,976 bytes"),
        (header(BEAT, 0, 1 << 60), "a frame of kind 6 that claims 1,152,921,504,606,846,976 bytes"),
        (header(PACKET, 4, 0), "packet 4, where 0 was due and there is room up to 4"),
        (
            b"".join(header(PACKET, number, 0) for number in range(5)),
            "packet 4, where 4 was due and there is room up to 4",
        ),
        (header(TAKEN, 1), "news of 1 packets, of which 0 were sent"),
        (header(DURABLE, 1 << 63), "news of 9223372036854775808 packets, of which 0 were sent"),
        (header(BEAT, 0, 2) + b"no", "text that is no JSON"),
        (header(BEAT, 0, 90_000) + b"[" * 90_000, "text that is no JSON"),
        (hello(0, wants=0).to_bytes(), "a second hello"),
        (b"GET / HTTP/1.1\r\n\r\n        ", "bytes that are no frame"),
    ],
)
def test_a_frame_that_cannot_be_ends_the_connection_and_is_told(ends: Ends, said: bytes, why: str):
    receiver = ends.receiver()
    memory = psutil.Process().memory_info().rss
    stranger = Stranger(ends.port, ends.key)
    stranger.say(hello(0, wants=0).to_bytes())
    assert stranger.hears().kind == HELLO
    stranger.say(said)
    assert seconds_until_sent_away(stranger) < AT_ONCE
    until(lambda: why in receiver.trouble, f"told: {receiver.trouble}")
    receiver.check()
    assert psutil.Process().memory_info().rss - memory < MUCH


def test_who_says_no_hello_is_heard_no_longer(ends: Ends):
    receiver = ends.receiver()
    for said in (header(TAKEN), header(PACKET), header(FAREWELL), with_text(HELLO, {"stage": 0}), b"no frame" * 9):
        stranger = Stranger(ends.port, ends.key)
        stranger.say(said)
        assert seconds_until_sent_away(stranger) < AT_ONCE
    stranger = Stranger(ends.port, ends.key)
    stranger.say(Refusal("another one", NEW).to_bytes()[:-1])
    stranger.close()
    receiver.check()
    assert not receiver.is_connected


def test_nothing_that_arrives_is_unpickled():
    sources = list(Path(llm_local.jobs.__file__).parent.glob("*.py"))
    assert len(sources) > 5
    unsafe = re.compile(r"\bpickle|marshal|shelve|torch\.load|\beval\(|\bexec\(|__import__|yaml\.")
    assert [path.name for path in sources if unsafe.search(path.read_text())] == []
