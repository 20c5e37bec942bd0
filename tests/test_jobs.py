"""What jobs say to each other, and what they find wrong with each other: without a network."""

from __future__ import annotations

import re
from contextlib import suppress
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from channels import HELLO
from cryptography import x509

from llm_local.files import Unwritten
from llm_local.job import address_of
from llm_local.jobs.ends import LogReceiver, from_buffer, to_buffers
from llm_local.jobs.frames import (
    BEAT,
    DURABLE,
    PACKET,
    REFUSAL,
    TAKEN,
    Frame,
    Garbled,
    header,
    parse,
    with_text,
)
from llm_local.jobs.hello import SAVED, Hello, Refusal, Terms, difference
from llm_local.jobs.key import key_problems, make_key
from llm_local.jobs.ways import Address
from llm_local.links.packet import CHECK, END, EVAL, KINDS, REFRESH, TRAIN, Packet
from llm_local.links.wire import CODES
from llm_local.peer import LostPeer

MOST = 1000


def frames(data: bytes, room: Any = bytearray) -> list[Frame]:
    """What the bytes are parsed to."""
    found, parser = [], parse(MOST, room)
    wanted = next(parser)
    while True:
        if isinstance(wanted, Frame):
            found.append(wanted)
        elif len(data) < len(wanted):
            return found
        else:
            wanted[:], data = data[: len(wanted)], data[len(wanted) :]
        wanted = next(parser)


class TestFrames:
    def test_are_read_as_they_were_written(self):
        data = (
            with_text(BEAT, {"step": 3}) + header(PACKET, 7, 4) + b"abcd" + header(PACKET, 8) + header(TAKEN, 1 << 60)
        )
        one, two, three, four = frames(data + header(DURABLE, 5)[:-1])
        assert one.content == {"step": 3}
        assert (two.kind, two.number, bytes(two.body)) == (PACKET, 7, b"abcd")
        assert (three.number, bytes(three.body)) == (8, b"")
        assert (four.kind, four.number) == (TAKEN, 1 << 60)

    @pytest.mark.parametrize(
        ("data", "said"),
        [
            (b"GET / HTTP/1.1\r\nHost: stage-1\r\n\r\n", "bytes that are no frame"),
            (header(10), "a frame of unknown kind 10"),
            (header(0), "a frame of unknown kind 0"),
            (
                header(PACKET, 0, 1 << 60),
                "kind 3 that claims 1,152,921,504,606,846,976 bytes, at most 1,000 make sense",
            ),
            (header(PACKET, 0, MOST + 1), "claims 1,001 bytes"),
            (header(BEAT, 0, (1 << 20) + 1), "claims 1,048,577 bytes"),
            (header(TAKEN, 0, 1), "claims 1 bytes, at most 0 make sense"),
        ],
    )
    def test_of_another_kind_are_refused_before_there_is_room_for_them(self, data: bytes, said: str):
        rooms: list[int] = []
        with pytest.raises(Garbled, match=re.escape(said)):
            frames(data, rooms.append)
        assert rooms == []

    @pytest.mark.parametrize(
        ("text", "said"),
        [
            (b"\xff", "text that is no JSON"),
            (b"{", "text that is no JSON"),
            (b"[" * 100_000, "text that is no JSON"),
            (b"[]", "text that is no JSON object"),
        ],
    )
    def test_text_that_is_none(self, text: bytes, said: str):
        with pytest.raises(Garbled, match=said):
            _ = Frame(BEAT, 0, text).content

    def test_random_bytes(self):
        random = Random(0)
        for _ in range(20_000):
            data = random.randbytes(random.randrange(200))
            if random.random() < 0.9:  # the right magic
                data = header(random.randrange(12), random.getrandbits(64), random.choice([0, 3, 1 << 63])) + data
            with suppress(Garbled):
                assert all(isinstance(each, Frame) for each in frames(data))


def hello_as(**changes: Any) -> Hello:
    return replace(HELLO, wants=0, **changes)


class TestHello:
    def test_is_read_as_it_was_written(self):
        full = hello_as(facts={"eval_sets": []}, taken=0, window=4, finished=True)
        (frame,) = parse_text(full.to_bytes())
        assert Hello.of(frame) == full
        (frame,) = parse_text(Refusal("not you", SAVED).to_bytes())
        assert Refusal.of(frame) == Refusal("not you", SAVED)
        assert Refusal.of(Frame(REFUSAL, 0, b"{}")) == Refusal("", 0)

    def test_of_something_else(self):
        with pytest.raises(Garbled, match="a frame where a hello was due"):
            Hello.of(Frame(BEAT, 0, b"{}"))
        with pytest.raises(Garbled, match="a hello of another version"):
            Hello.of(Frame(1, 0, b'{"stage": 1}'))

    @pytest.mark.parametrize("counts", [{"taken": 1}, {"durable": 5}, {"taken": -1}, {"wants": None, "durable": 1}])
    def test_that_contradicts_itself(self, counts: dict[str, Any]):
        (frame,) = parse_text(replace(hello_as(), **counts).to_bytes())
        with pytest.raises(Garbled, match="a hello that has more packets than it has got"):
            Hello.of(frame)


def parse_text(data: bytes) -> list[Frame]:
    return frames(data)


class TestTerms:
    """Of stage 1, which waits for stage 0."""

    def objection(self, log_begins: int = 0, **changes: Any) -> str:
        mine = replace(HELLO, stage=1, replica=1, fingerprint={"learning_rate": 0.1, "model": {"layers": 4, "d": 8}})
        return Terms(mine, 0, (1, 3), log_begins).objection(replace(mine, **{"stage": 0, "wants": 3, **changes}))

    def test_none(self):
        assert self.objection(3) == self.objection(run=None) == self.objection(9, wants=None) == ""

    @pytest.mark.parametrize("other", [{"stage": 2}, {"stage": 1}, {"replica": 0}])
    def test_another_stage_or_replica(self, other: dict[str, int]):
        place = {"stage": 0, "replica": 1} | other
        assert self.objection(**other) == (
            "stage 1, replica 1 waits for stage 0 here, "
            f"not for stage {place['stage']}, replica {place['replica']} (here)"
        )

    @pytest.mark.parametrize(
        ("fingerprint", "said"),
        [
            (
                {"learning_rate": 0.2, "model": {"layers": 5, "d": 8}},
                "learning_rate differs: 0.2 in stage 0, 0.1 in st",
            ),
            (
                {"learning_rate": 0.1, "model": {"layers": 5, "d": 9}},
                "model.layers differs: 5 in stage 0, 4 in stage 1;",
            ),
            (
                {"learning_rate": 0.1, "model": {"layers": 4}},
                "model.d differs: None in stage 0, 8 in stage 1; start bo",
            ),
            (
                {"learning_rate": 0.1, "model": {"layers": 4, "d": 8}, "x": 1},
                "x differs: 1 in stage 0, None in stage 1",
            ),
            ({}, "learning_rate differs: None in stage 0, 0.1 in stage 1; start both alike"),
        ],
    )
    def test_the_first_difference_is_named_with_both_values(self, fingerprint: dict[str, Any], said: str):
        assert self.objection(fingerprint=fingerprint).startswith(said)

    def test_another_run(self):
        assert self.objection(run="0123456789") == (
            "stage 0 is of another run (01234567, stage 1 of 5eed); name the output_dir of this one, or begin anew "
            "with --overwrite_output_dir"
        )

    def test_packets_that_are_gone(self):
        assert self.objection(4) == (
            "stage 0 goes on from packet 3, and stage 1 has none before 4, which a checkpoint of stage 0 held; go on "
            "from its newest one, or start all stages from one step (--resume_from_checkpoint)"
        )

    def test_nothing_differs(self):
        assert difference({"a": {"b": 1}}, {"a": {"b": 1}}) is None


class TestAddress:
    @pytest.mark.parametrize(
        ("text", "host", "port"),
        [("siteB:7001", "siteB", 7001), (" 10.0.0.1:1 ", "10.0.0.1", 1), ("[::1]:65535", "::1", 65535)],
    )
    def test_of_a_text(self, text: str, host: str, port: int):
        assert Address.of(text) == Address(host, port)

    @pytest.mark.parametrize("text", ["", "siteB", ":7001", "siteB:", "siteB:x", "siteB:0", "siteB:65536", "siteB:-1"])
    def test_of_none(self, text: str):
        with pytest.raises(ValueError, match="is no HOST:PORT"):
            Address.of(text)

    @pytest.mark.parametrize(
        ("hosts", "replicas", "found"),
        [
            ("a:10", 3, ["a:10", "a:11", "a:12"]),
            ("a:10,b:20", 4, ["a:10", "a:11", "b:20", "b:21"]),
            ("a:10,b:20", 3, ["a:10", "a:11", "b:20"]),
            ("a:10,b:20,c:30", 2, ["a:10", "b:20"]),
        ],
    )
    def test_of_each_replica(self, hosts: str, replicas: int, found: list[str]):
        assert [str(address_of(hosts, replica, replicas)) for replica in range(replicas)] == found


class TestKey:
    def test_is_for_its_owner_alone_and_of_no_time_or_place(self, tmp_path: Path):
        """A clock that is off by years finds it valid."""
        path = tmp_path / "run.key"
        make_key(path)
        assert path.stat().st_mode & 0o777 == 0o600
        assert key_problems(path) == []
        certificate = x509.load_pem_x509_certificate(path.read_bytes())
        assert certificate.not_valid_before_utc.replace(tzinfo=None) <= datetime(1970, 1, 2)
        assert certificate.not_valid_after_utc.replace(tzinfo=None) >= datetime(9999, 1, 1)

    def test_replaces_none(self, tmp_path: Path):
        path = tmp_path / "run.key"
        path.write_text("precious")
        with pytest.raises(
            FileExistsError, match="exists; other jobs may use that key: name another file, or remove it"
        ):
            make_key(path)
        assert path.read_text() == "precious"
        with pytest.raises(Unwritten, match=r"no/run\.key could not be written"):
            make_key(tmp_path / "no" / "run.key")

    @pytest.mark.parametrize("mode", [0o644, 0o640, 0o602])
    def test_that_others_can_read(self, tmp_path: Path, mode: int):
        path = tmp_path / "run.key"
        make_key(path)
        path.chmod(mode)
        assert key_problems(path) == [
            f"run_key_file={path} can be read by others (mode {mode:o}); chmod 600 it, or make a new one"
        ]

    def test_that_is_none(self, tmp_path: Path):
        path = tmp_path / "run.key"
        assert key_problems(path) == [
            f"run_key_file={path} cannot be read (No such file or directory); make it with llm-local key, once for all "
            "jobs"
        ]
        path.touch(0o600)
        make_key(tmp_path / "other.key")
        whole = (tmp_path / "other.key").read_text()
        for text in ("", "secret", whole[: whole.index("-----BEGIN CERT")], whole[whole.index("-----BEGIN CERT") :]):
            path.write_text(text)
            assert key_problems(path) == [
                f"run_key_file={path} is no key of llm-local key; copy the file that the other jobs have"
            ]


INTEGERS = torch.arange(6).view(2, 3)


def packets() -> list[Packet]:
    hidden = torch.randn(2, 3, 16, generator=torch.Generator().manual_seed(0))
    return [
        Packet(TRAIN, 5, 1, input_ids=INTEGERS, hidden=hidden, weight=0.25),
        Packet(EVAL, 5, 0, input_ids=INTEGERS, labels=INTEGERS + 1, attention_mask=INTEGERS % 2, position_ids=INTEGERS),
        Packet(CHECK, 0, 0, input_ids=INTEGERS, hidden=hidden.bfloat16()),
        Packet(REFRESH, 7, 0, hidden=hidden[:1]),
        Packet(END, 9, 0),
    ]


def received(packet: Packet, wire_dtype: str = "fp32") -> torch.Tensor:
    buffers, _ = to_buffers(packet, wire_dtype)
    return torch.cat([torch.from_numpy(buffer) for buffer in buffers])


class Behind:
    """A channel on which one packet has come."""

    name, taken = "link 0→1", 1

    def __init__(self, packet: torch.Tensor):
        self._packet = packet

    def take(self) -> torch.Tensor:
        return self._packet


class TestPackets:
    @pytest.mark.parametrize("wire_dtype", CODES)
    @pytest.mark.parametrize("packet", packets(), ids=lambda packet: KINDS[packet.kind])
    def test_are_read_as_they_were_sent(self, packet: Packet, wire_dtype: str):
        found, num_bytes = from_buffer(received(packet, wire_dtype))
        assert num_bytes == to_buffers(packet, wire_dtype)[1]
        assert (found.title, found.weight) == (packet.title, packet.weight)
        assert found.integer_parts().keys() == packet.integer_parts().keys()
        assert all(torch.equal(part, packet.integer_parts()[name]) for name, part in found.integer_parts().items())
        assert (found.hidden is None) == (packet.hidden is None)
        if packet.hidden is not None and found.hidden is not None:
            is_exact = wire_dtype == "fp32" or packet.kind == CHECK
            digits = 0.0 if is_exact else 0.3 if wire_dtype == "int4" else 0.03
            assert torch.allclose(found.hidden.float(), packet.hidden.float(), atol=digits)

    def test_that_are_none(self):
        whole = received(packets()[0])
        for some in (
            whole[:0],
            whole[:50],
            whole[:79],
            whole[:100],
            whole[:-1],
            torch.cat([whole, whole]),
            whole.flip(0),
        ):
            with pytest.raises(ValueError, match=r"no packet|unpack|another size"):
                from_buffer(some)

    @pytest.mark.processes
    def test_any_damage_to_a_header_is_no_other_error(self):
        random = Random(1)
        for _ in range(5000):
            damaged = received(packets()[random.randrange(5)], random.choice(CODES))
            at = 8 * random.randrange(10)
            number = random.choice([-1, 6, 1 << 62, -(1 << 63), random.getrandbits(63), random.randrange(9)])
            damaged[at : at + 8] = torch.tensor([number]).view(torch.uint8)
            with suppress(ValueError):
                assert from_buffer(damaged)[0].title

    def test_another_one_than_expected(self):
        receiver: Any = LogReceiver(Behind(received(packets()[0])))  # type: ignore
        with pytest.raises(LostPeer, match=r"^link 0→1: there came train micro-batch 1 of step 5, expected was train "):
            receiver.receive(TRAIN, 5, 2)

    def test_of_another_version(self):
        receiver = LogReceiver(Behind(torch.zeros(300, dtype=torch.uint8)))  # type: ignore
        with pytest.raises(LostPeer, match=r"^link 0→1: no packet header has come; do both jobs run the same version"):
            receiver.take()
