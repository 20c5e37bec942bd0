"""A packet log keeps what was sent until it is trimmed, through memory, disk, restarts and damage."""

from __future__ import annotations

import re
import resource
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from random import Random
from threading import Event, Thread
from time import sleep

import pytest

from llm_local.files import Unwritten
from llm_local.jobs.packet_log import DamagedLog, PacketLog, bytes_of
from llm_local.jobs.segment import record_bytes

PACKET = 100
RECORD = record_bytes(PACKET)
IN_SEGMENT = 4  # packets


def packet(number: int) -> bytes:
    return Random(number).randbytes(PACKET)


def log_in(folder: Path, memory_packets: int = 2, disk_packets: int | None = None) -> PacketLog:
    disk_bytes = None if disk_packets is None else disk_packets * RECORD
    return PacketLog(folder, memory_packets * RECORD, disk_bytes, segment_bytes=IN_SEGMENT * RECORD)


def fill(log: PacketLog, stop: int) -> None:
    for number in range(log.next, stop):
        whole = packet(number)
        assert log.append(whole[:7], memoryview(whole)[7:]) == number


def content(log: PacketLog, number: int) -> bytes:
    return b"".join(log.read(number))


def kept(log: PacketLog) -> list[int]:
    """Numbers of the packets that are read as they were appended."""
    found = []
    for number in range(log.durable, log.next):
        try:
            assert content(log, number) == packet(number)
            found.append(number)
        except DamagedLog:
            pass
    assert all(log.covers(number, number + 1) == (number in found) for number in range(log.next + 3))
    return found


def segments(log: PacketLog) -> list[Path]:
    return sorted(log.folder.glob("*.packets"))


@pytest.fixture
def twelve(tmp_path: Path) -> list[Path]:
    """The three segments that a life of a sender left, each of four packets."""
    log = log_in(tmp_path)
    fill(log, 12)
    log.persist(12)
    assert [int(path.stem) for path in segments(log)] == [0, 4, 8]
    return segments(log)


@contextmanager
def files_end_at(num_bytes: int) -> Iterator[None]:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


class TestOneLife:
    def test_packets_are_read_as_they_were_appended(self, tmp_path: Path):
        log = log_in(tmp_path)
        assert (log.first, log.next, log.num_bytes, log.covers(0, 0), log.covers(0, 1)) == (0, 0, 0, True, False)
        fill(log, 13)
        assert kept(log) == [*range(13)]
        assert (log.first, log.next, log.num_bytes) == (0, 13, 13 * RECORD)
        assert (log.num_bytes_in_memory, log.num_bytes_on_disk) == (2 * RECORD, 11 * RECORD)
        assert log.covers(0, 13)

    def test_buffers_of_any_kind_and_none(self, tmp_path: Path):
        log = PacketLog(tmp_path, 0, None)
        numbers = memoryview(bytes(range(24))).cast("I")
        log.append(numbers, bytearray(b"ab"), b"")
        log.append()
        log.append(b"last")
        assert [content(log, n) for n in range(3)] == [bytes(range(24)) + b"ab", b"", b"last"]

    def test_memory_is_bounded(self, tmp_path: Path):
        log = log_in(tmp_path, memory_packets=3)
        for number in range(10):
            fill(log, number + 1)
            assert log.num_bytes_in_memory == min(number + 1, 3) * RECORD
        log.append(bytes(10 * PACKET))  # itself above the bound
        assert log.num_bytes_in_memory == record_bytes(10 * PACKET)
        fill(log, 12)
        assert log.num_bytes_in_memory == RECORD

    def test_trimmed_packets_go_and_so_do_their_files(self, tmp_path: Path):
        log = log_in(tmp_path)
        fill(log, 12)
        log.trim(5)
        assert (log.first, log.durable, log.num_bytes) == (5, 5, 7 * RECORD)
        assert [int(path.stem) for path in segments(log)] == [4, 8]
        with pytest.raises(AssertionError, match="packet 4 is not kept"):
            log.read(4)
        assert not log.covers(4, 6)
        log.trim(3)  # old news
        assert kept(log) == [*range(5, 12)]
        log.trim(12)
        assert (log.first, log.num_bytes, log.num_bytes_in_memory, segments(log)) == (12, 0, 0, [])
        fill(log, 20)
        assert kept(log) == [*range(12, 20)]

    def test_an_empty_log_has_room_for_anything(self, tmp_path: Path):
        log = log_in(tmp_path, memory_packets=1, disk_packets=1)
        assert log.has_room(10 * PACKET)
        log.append(bytes(10 * PACKET))
        assert not log.has_room(0)
        log.trim(1)
        assert log.has_room(10 * PACKET)

    def test_room_is_that_of_memory_and_disk(self, tmp_path: Path):
        log = log_in(tmp_path, memory_packets=2, disk_packets=6)
        for number in range(8):
            assert log.has_room(PACKET)
            fill(log, number + 1)
            log.persist(number)
        assert not log.has_room(PACKET)
        assert not log.wait_for_room(PACKET, 0.01)
        log.trim(1)
        assert log.has_room(PACKET)
        assert not log.has_room(PACKET + 1)

    def test_a_log_as_large_as_needed_is_full_with_so_many_packets(self, tmp_path: Path):
        needed = bytes_of(3 * (5 + 1) + 2, PACKET)
        log = PacketLog(tmp_path, 4 * RECORD, needed - 4 * RECORD)
        fill(log, 3 * (5 + 1) + 1)
        assert log.has_room(PACKET)
        fill(log, 3 * (5 + 1) + 2)
        assert not log.has_room(PACKET)

    def test_room_wakes_the_one_that_waits(self, tmp_path: Path):
        log = log_in(tmp_path, disk_packets=2)
        fill(log, 4)
        with ThreadPoolExecutor() as pool:
            waiting = pool.submit(log.wait_for_room, PACKET, 60)
            assert not waiting.done()
            log.trim(1)
            assert waiting.result()
            fill(log, 5)
            waiting = pool.submit(log.wait_for_room, PACKET, 60)
            log.close()
            assert not waiting.result()


class TestLives:
    def test_what_was_persisted_is_there_again(self, tmp_path: Path):
        log = log_in(tmp_path, memory_packets=20)
        fill(log, 11)
        log.persist(7)
        again = log_in(tmp_path)
        assert (again.first, again.next, again.num_bytes) == (0, 7, 7 * RECORD)
        again.start_at(7)
        fill(again, 15)
        assert kept(again) == [*range(15)]

    @pytest.mark.parametrize("number", [0, 3, 4, 9, 12])
    def test_packets_from_the_start_on_are_made_again(self, twelve: list[Path], number: int):
        log = log_in(twelve[0].parent)
        log.start_at(number)
        assert (log.next, log.num_bytes) == (number, number * RECORD)
        assert log_in(twelve[0].parent).next == number
        fill(log, 14)
        assert kept(log) == [*range(14)]
        log.persist(14)
        assert kept(log_in(twelve[0].parent)) == [*range(14)]

    def test_a_start_within_a_life(self, tmp_path: Path):
        log = log_in(tmp_path, memory_packets=5)
        fill(log, 12)
        log.start_at(9)
        assert (log.next, log.num_bytes, log.num_bytes_in_memory) == (9, 9 * RECORD, 2 * RECORD)
        fill(log, 12)
        log.persist(12)
        assert kept(log) == kept(log_in(tmp_path)) == [*range(12)]

    def test_what_was_durable_is_remembered(self, tmp_path: Path):
        log = log_in(tmp_path)
        fill(log, 12)
        log.persist(12)
        log.trim(6)
        again = log_in(tmp_path)
        assert (again.durable, again.first, again.next, again.num_bytes) == (6, 6, 12, 6 * RECORD)
        again.trim(12)
        assert (log_in(tmp_path).durable, log_in(tmp_path).next) == (12, 12)

    def test_a_receiver_ahead_of_the_sender(self, tmp_path: Path):
        """What it has learned from already is made again, and not kept once it has said so."""
        log = log_in(tmp_path)
        fill(log, 6)
        log.persist(6)
        log.trim(6)
        again = log_in(tmp_path)
        again.start_at(2)
        assert (again.first, again.next, again.durable) == (2, 2, 2)
        fill(again, 3)
        again.trim(6)
        fill(again, 5)
        assert (again.first, again.num_bytes, again.covers(2, 5)) == (5, 0, False)
        again.trim(8)
        fill(again, 10)
        assert (again.first, kept(again)) == (8, [8, 9])

    def test_a_receiver_that_has_gone_back(self, tmp_path: Path):
        """What was trimmed is missing for a sender at 10, who has to make it again from where it was at 3."""
        log = log_in(tmp_path)
        fill(log, 10)
        log.persist(10)
        log.trim(8)
        log.go_back(4)
        again = log_in(tmp_path)
        assert (again.durable, again.covers(again.durable, 10)) == (4, False)
        again.start_at(3)
        fill(again, 10)
        assert (again.first, kept(again)) == (3, [*range(3, 10)])
        again.trim(4)  # as the receiver says when it comes
        assert (again.first, kept(again)) == (4, [*range(4, 10)])

    def test_a_log_that_was_lost(self, tmp_path: Path):
        log = log_in(tmp_path)
        log.start_at(9)
        fill(log, 11)
        assert (log.first, kept(log)) == (9, [9, 10])
        with pytest.raises(DamagedLog, match=f"^{re.escape(str(tmp_path))} does not have packet 8 as it was sent; "):
            log.read(8)

    @pytest.mark.parametrize("name", ["", "five"])
    def test_unreadable_news_of_the_receiver(self, twelve: list[Path], name: str):
        (mark,) = twelve[0].parent.glob("*.durable")
        mark.rename(mark.with_name(f"{name}.durable"))
        assert kept(log_in(twelve[0].parent)) == [*range(12)]

    def test_a_folder_that_cannot_be(self, tmp_path: Path):
        (tmp_path / "file").touch()
        with pytest.raises(Unwritten, match=r"/file/log could not be written \(Not a directory\)"):
            log_in(tmp_path / "file" / "log")


class TestDamage:
    def gone(self, folder: Path, where: Path, lost: range) -> None:
        """Exactly those packets are lost, each with a message that names that file; the log can be gone on with."""
        log = log_in(folder)
        log.start_at(12)
        for number in lost:
            with pytest.raises(DamagedLog) as caught:
                content(log, number)
            assert str(caught.value) == (
                f"{where} does not have packet {number} as it was sent; restore what was there, or resume the job that "
                "sends from an earlier checkpoint, from which it makes that packet again"
            )
        fill(log, 14)
        left = [number for number in range(14) if number not in lost]
        assert kept(log) == left
        assert not log.covers(lost.start - 1, lost.start + 1)
        assert not log.covers(lost.stop - 1, lost.stop + 1)
        assert log.covers(0, lost.start)
        assert log.covers(lost.stop, 14)
        log.persist(14)
        assert kept(log_in(folder)) == left

    @pytest.mark.parametrize("segment", [0, 1, 2])
    @pytest.mark.parametrize("num_bytes", [0, 10, RECORD - 1, 2 * RECORD + 30])
    def test_a_file_that_is_cut_off(self, twelve: list[Path], segment: int, num_bytes: int):
        whole = twelve[segment].read_bytes()
        twelve[segment].write_bytes(whole[:num_bytes])
        start = segment * IN_SEGMENT
        where = twelve[segment] if num_bytes else twelve[segment].parent
        self.gone(twelve[segment].parent, where, range(start + num_bytes // RECORD, start + IN_SEGMENT))

    @pytest.mark.parametrize(
        ("at", "num_lost"), [(0, 3), (5, 1), (9, 3), (15, 3), (16, 3), (22, 3), (24, 1), (RECORD - 1, 1)]
    )
    def test_a_flipped_bit(self, twelve: list[Path], at: int, num_lost: int):
        """In magic, checksum, number, length or content of a record; where its end is not known, it takes the rest."""
        whole = bytearray(twelve[1].read_bytes())
        whole[RECORD + at] ^= 1
        twelve[1].write_bytes(whole)
        self.gone(twelve[1].parent, twelve[1], range(5, 5 + num_lost))

    def test_a_missing_file(self, twelve: list[Path]):
        twelve[1].unlink()
        self.gone(twelve[1].parent, twelve[1].parent, range(4, 8))

    def test_a_file_that_goes_meanwhile(self, twelve: list[Path]):
        log = log_in(twelve[0].parent)
        twelve[1].unlink()
        assert kept(log) == [0, 1, 2, 3, 8, 9, 10, 11]
        with pytest.raises(DamagedLog, match=re.escape(twelve[1].name)):
            log.read(5)

    def test_damage_in_the_file_that_is_appended_to(self, tmp_path: Path):
        log = log_in(tmp_path, memory_packets=1)
        fill(log, 4)
        segments(log)[0].write_bytes(b"nothing")
        assert kept(log) == [3]
        fill(log, 9)
        assert kept(log) == [*range(3, 9)]

    def test_files_of_others_are_let_alone(self, tmp_path: Path):
        (tmp_path / "notes.packets").write_text("mine")
        log = log_in(tmp_path)
        fill(log, 12)
        log.trim(12)
        log.start_at(0)
        assert [path.name for path in segments(log)] == ["notes.packets"]


class TestAFullDisk:
    def test_is_named_and_loses_nothing(self, tmp_path: Path):
        log = log_in(tmp_path)
        fill(log, 7)
        tail = segments(log)[-1]
        with files_end_at(tail.stat().st_size + 30), pytest.raises(Unwritten) as caught:
            log.append(packet(7))
        assert str(caught.value) == (
            f"{tail} could not be written (File too large); make room there or change its permissions, and start again"
        )
        assert tail.stat().st_size == RECORD
        assert (log.next, kept(log)) == (7, [*range(7)])
        with files_end_at(0), pytest.raises(Unwritten, match=re.escape(tail.name)):
            log.persist(7)
        fill(log, 13)
        log.persist(13)
        assert kept(log) == kept(log_in(tmp_path)) == [*range(13)]

    def test_at_a_files_first_packet(self, tmp_path: Path):
        log = log_in(tmp_path)
        fill(log, 2)
        with files_end_at(30), pytest.raises(Unwritten, match=r"/000000000000.packets could not be written"):
            log.append(packet(2))
        assert (log.first, kept(log)) == (0, [0, 1])
        fill(log, 5)
        assert kept(log) == [*range(5)]

    def test_trimming_needs_no_room(self, tmp_path: Path):
        """And the next life does not look for what is gone, as a checkpoint of the sender then would do for nothing."""
        log = log_in(tmp_path)
        fill(log, 10)
        log.persist(10)
        with files_end_at(0):
            log.trim(8)
        assert (log.durable, [int(path.stem) for path in segments(log)]) == (8, [8])
        again = log_in(tmp_path)
        assert (again.durable, kept(again)) == (8, [8, 9])
        fill(log, 12)
        assert kept(log) == [*range(8, 12)]


@pytest.mark.processes
def test_threads(tmp_path: Path):
    """One appends 10,000 packets, one reads each, and trims, one persists, and the bounds hold."""
    num_packets = 10_000
    log = PacketLog(tmp_path, 50 * RECORD, 300 * RECORD, segment_bytes=20 * RECORD)
    most: list[int] = []
    appended = Event()

    def append() -> None:
        for number in range(num_packets):
            assert log.wait_for_room(PACKET, 60)
            assert log.append(packet(number)) == number
            most.append(log.num_bytes_in_memory)
        appended.set()

    def read_and_trim() -> None:
        random = Random(0)
        done = 0
        while done < num_packets:
            if (stop := log.next) > done:
                back = random.randrange(log.durable, done + 1)  # as after a reconnection
                for number in (back, *range(done, stop)):
                    assert content(log, number) == packet(number)
                done = stop
            if done > log.durable + 150:
                log.trim(done - random.randrange(100))
            sleep(0.0005)
        log.trim(num_packets)

    def persist() -> None:
        for number in count():
            if appended.is_set() and log.num_bytes == 0:
                return
            log.persist(log.next - number % 3)
            sleep(0.0005)

    with ThreadPoolExecutor() as pool:
        for future in [pool.submit(work) for work in (append, read_and_trim, persist)]:
            future.result()
    assert max(most) <= 50 * RECORD
    assert (log.first, log.next, log.num_bytes) == (num_packets, num_packets, 0)


KILLED = """
from sys import argv
from pathlib import Path
from random import Random
from llm_local.jobs.packet_log import PacketLog
log = PacketLog(Path(argv[1]), 2000, None, 5000)
log.start_at(int(argv[2]))
while True:
    for _ in range(30):
        log.append(Random(log.next).randbytes(100))
    log.persist(log.next)
    print(log.next, flush=True)
"""


@pytest.mark.processes
def test_senders_that_are_killed(tmp_path: Path):
    """Whenever it happens, all that was persisted is there, and the next life goes on from it."""
    persisted = 0
    for lines in (1, 3, 20):
        command = [sys.executable, "-c", KILLED, str(tmp_path), str(persisted)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as sender:
            assert sender.stdout
            for _ in range(lines):
                persisted = int(sender.stdout.readline())
            sender.kill()
        log = log_in(tmp_path)
        assert log.next >= persisted
        assert kept(log) == [*range(log.next)]


def test_a_checkpoint_in_the_midst_of_appending(tmp_path: Path):
    """All that was kept below the checkpoint is on disk when persist returns, while others go on."""
    log = PacketLog(tmp_path, 500 * RECORD, None, segment_bytes=50 * RECORD)
    fill(log, 400)
    appending = Thread(target=fill, args=(log, 3000))
    appending.start()
    while appending.is_alive():
        number = log.next
        log.persist(number)
        assert log_in(tmp_path).next >= number
    appending.join()
    log.persist(3000)
    assert kept(log_in(tmp_path)) == [*range(3000)]
