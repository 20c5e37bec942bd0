"""A receiving job that goes back to before what it had saved: the sending one goes back with it."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from ranks import free_port

from llm_local.jobs.channel import Channel
from llm_local.jobs.hello import Hello, Terms
from llm_local.jobs.key import make_key, tls
from llm_local.jobs.packet_log import PacketLog
from llm_local.jobs.side import Limits
from llm_local.jobs.ways import Address, Dial, Door
from llm_local.peer import LostPeer

MINE = Hello(0, 0, "here", 1, {"seed": 7}, run="5eed", wants=0)


@pytest.mark.parametrize(
    ("other", "log_begins", "is_too_early"),
    [
        (Hello(1, 0, "there", 1, {"seed": 7}, run="5eed", wants=4), 5, True),
        (Hello(1, 0, "there", 1, {"seed": 7}, run="5eed", wants=5), 5, False),
        (Hello(1, 0, "there", 1, {"seed": 7}, run="5eed"), 5, False),
        (Hello(1, 0, "there", 1, {"seed": 8}, run="5eed", wants=4), 5, False),
        (Hello(1, 0, "there", 1, {"seed": 7}, run="else", wants=4), 5, False),
    ],
)
def test_only_for_one_that_belongs_to_the_run(other: Hello, log_begins: int, is_too_early: bool):
    assert Terms(MINE, 1, (0,), log_begins).is_too_early(other) == is_too_early


def fails(channel: Channel) -> None:
    """Waits for it."""
    while True:
        channel.check()
        time.sleep(0.05)


def test_the_sender_ends_and_its_next_life_makes_the_packets_again(tmp_path: Path):
    key, address = tmp_path / "run.key", Address("127.0.0.1", free_port())
    make_key(key)
    log = PacketLog(tmp_path / "log", 1 << 20, None)
    for number in range(10):
        log.append(bytes([number]))
    log.trim(8)

    def channel(mine: Hello, other: int, way: Dial | Door, log: PacketLog | None, first: int) -> Channel:
        return Channel(way, Terms(mine, other, (0,)), log, first, Limits(1 << 20))

    sender = channel(MINE, 1, Dial(address, tls(key, server=False)), log, 0)

    def goes_back(number: int) -> bool:
        log.go_back(number)
        return True

    sender.goes_back = goes_back
    there = Hello(1, 0, "there", 2, {"seed": 7}, run="5eed", window=4)
    receiver = channel(there, 0, Door(address, tls(key, server=True)).visits[0], None, 4)
    try:
        sender.start()
        receiver.start()
        with pytest.raises(LostPeer, match="stage 1 has gone back to packet 4; this stage goes back, too, and makes"):
            fails(sender)
    finally:
        sender.close()
        receiver.close()
    assert PacketLog(tmp_path / "log", 0, None).durable == 4
