"""What a link or the store says of a peer that is lost, silent, or talks about something else."""

from __future__ import annotations

import os
import time
from contextlib import suppress
from datetime import timedelta
from typing import Any

import pytest
import torch
from ranks import free_port, run_ranks

from llm_local.ancestors import launcher_pids
from llm_local.launch import Launch
from llm_local.links.ends import LinkError, Receiver, Sender
from llm_local.links.packet import EVAL, TRAIN, Packet
from llm_local.links.transports import Nccl
from llm_local.peer import LostPeer
from llm_local.place import Place
from llm_local.rendezvous import open_store
from llm_local.watchdog import Watchdog
from llm_local.world import World, connect

IDS = torch.zeros(1, 4, dtype=torch.int64)
SECONDS = 1.5


def meet() -> World:
    """Two stages of one rank each, whose links wait for SECONDS."""
    launch = Launch.from_environment(os.environ)
    store = open_store(launch, "test", 60.0)
    return connect(launch, Place(launch.rank, (1, 1)), store, Watchdog(launch.rank), 60.0, SECONDS)


def error_of(world: World, call: Any, *args: Any) -> str:
    """The message of the LinkError that the call ends in, with the peer's process number as PID."""
    try:
        call(*args)
    except LinkError as error:
        return str(error).replace(f"pid {world.peers[1 - world.place.rank].pid}", "pid PID")
    raise AssertionError("no LinkError")


def send_wrong(what: str) -> str:
    """Stage 0 sends something else than the packet of step 1 that stage 1 waits for."""
    world = meet()
    if not world.place.is_first_stage:
        receiver = Receiver(world, 0, 1)
        said = error_of(world, receiver.receive, TRAIN, 1, 0)
        world.publish("seen", "1")
        return said
    sender = Sender(world, 1, "fp32", 1)
    packets = {"step": Packet(TRAIN, 2, 0, IDS), "index": Packet(TRAIN, 1, 3, IDS), "kind": Packet(EVAL, 1, 0, IDS)}
    if what == "header":
        sender.control.send(torch.zeros(80, dtype=torch.uint8), 0).wait()
    elif what == "end":
        sender.close(1)
    else:
        sender.send(packets[what])
    world.fetch("seen", 30.0, "stage 1 to see it")
    return ""


STAGE_0 = "link 0→1, replica 0: stage 0, replica 0 (rank 0, pid PID, link 0→1)"


@pytest.mark.processes
@pytest.mark.parametrize(
    ("what", "said"),
    [
        ("step", "sent train micro-batch 0 of step 2, expected was train micro-batch 0 of step 1"),
        ("index", "sent train micro-batch 3 of step 1, expected was train micro-batch 0 of step 1"),
        ("kind", "sent eval micro-batch 0 of step 1, expected was train micro-batch 0 of step 1"),
        ("end", "sent end micro-batch 0 of step 1, expected was train micro-batch 0 of step 1"),
        ("header", "sent no packet header; do both run the same version?"),
    ],
)
def test_a_packet_that_was_not_expected(what: str, said: str):
    assert run_ranks(send_wrong, 2, what)[1] == f"{STAGE_0} {said}"


def send_nothing() -> str:
    world = meet()
    if world.place.is_first_stage:
        sender = Sender(world, 1, "fp32", 1)
        world.fetch("seen", 30.0, "stage 1 to give up")
        return f"{sender.bytes} bytes"
    said = error_of(world, Receiver(world, 0, 1).receive, TRAIN, 1, 0)
    world.publish("seen", "1")
    return said


def send_three(sender: Sender) -> None:
    """One packet waits to be used, one to be asked for; the third one finds no room."""
    for step in range(1, 4):
        sender.send(Packet(TRAIN, step, 0, IDS))


def ask_for_nothing() -> str:
    world = meet()
    if world.place.is_first_stage:
        said = error_of(world, send_three, Sender(world, 1, "fp32", 1))
        world.publish("seen", "1")
        return said
    receiver = Receiver(world, 0, 1)
    with suppress(LostPeer):  # stage 0 serves the store, and may be gone before it answers
        world.fetch("seen", 30.0, "stage 0 to give up")
    return f"{receiver.bytes} bytes"


def never_link() -> str:
    """Stage 1 makes its end of the link, stage 0 does not."""
    world = meet()
    if world.place.is_first_stage:
        world.fetch("seen", 30.0, "stage 1 to give up")
        return ""
    said = error_of(world, Receiver, world, 0, 1)
    world.publish("seen", "1")
    return said


@pytest.mark.processes
@pytest.mark.parametrize(
    ("play", "victim", "peer"), [(send_nothing, 1, 0), (ask_for_nothing, 0, 1), (never_link, 1, 0)]
)
def test_a_silent_peer_is_named_with_the_seconds(play: Any, victim: int, peer: int):
    silent = f"stage {peer}, replica 0 (rank {peer}, pid PID, link 0→1)"
    said = f"link 0→1, replica 0: waited 1.5 s for {silent} (--link_timeout_seconds 1.5)"
    assert run_ranks(play, 2)[victim] == said


def lose_the_sender() -> str:
    world = meet()
    if world.place.is_first_stage:
        Sender(world, 1, "fp32", 1)
        return ""  # and its process ends
    return error_of(world, Receiver(world, 0, 1).receive, TRAIN, 1, 0)


def send_forever(sender: Sender) -> None:
    while True:
        sender.send(Packet(TRAIN, 1, 0, IDS))
        time.sleep(0.01)


def lose_the_receiver(max_in_flight: int) -> str:
    world = meet()
    if world.place.is_first_stage:
        return error_of(world, send_forever, Sender(world, 1, "fp32", max_in_flight))
    Receiver(world, 0, 1)
    return ""


@pytest.mark.processes
@pytest.mark.parametrize(
    ("play", "args", "victim", "peer"),
    [(lose_the_sender, (), 1, 0), (lose_the_receiver, (1,), 0, 1), (lose_the_receiver, (2,), 0, 1)],
    ids=["the sender", "the receiver, noticed by a wait", "the receiver, noticed by a send"],
)
def test_a_lost_peer_is_named(play: Any, args: tuple, victim: int, peer: int):
    said = run_ranks(play, 2, *args)[victim]
    assert said == f"link 0→1, replica 0: lost stage {peer}, replica 0 (rank {peer}, pid PID, link 0→1)"


class Endless:
    """Work that never completes."""

    def is_completed(self) -> bool:
        return False


def test_a_gpus_link_gives_up_in_time():
    link = Nccl.__new__(Nccl)
    with pytest.raises(RuntimeError, match="Timed out waiting 50ms"):
        link.finish(Endless(), timedelta(seconds=0.05))


def test_an_error_of_the_own_device_is_not_blamed_on_the_peer():
    """As a device without memory, which shows where a packet is copied."""
    sender = Sender.__new__(Sender)
    with pytest.raises(torch.OutOfMemoryError, match="CUDA out of memory"):
        sender.error(torch.OutOfMemoryError("CUDA out of memory"))


def wait_in_vain() -> list[str]:
    world = meet()
    said = []
    for call, args in ((world.fetch, ("never", 1.0)), (world.everybody, (f"alone/{world.place.rank}", 1.0))):
        with pytest.raises(LostPeer) as error:
            call(*args, "stage 1 to sing")
        said.append(str(error.value))
    if world.place.rank == 0:  # it serves the store, so it leaves last
        world.fetch("goodbye", 30.0, "rank 1")
    else:
        world.publish("goodbye", "1")
    return said


def meet_nobody() -> str:
    os.environ.update(RANK="1", WORLD_SIZE="2", MASTER_PORT=str(free_port()))
    launch = Launch.from_environment(os.environ)
    with pytest.raises(LostPeer) as error:
        open_store(launch, "test", 1.0)
    return str(error.value).splitlines()[0].replace(os.environ["MASTER_PORT"], "PORT")


@pytest.mark.processes
def test_waiting_in_vain_says_for_what():
    assert run_ranks(wait_in_vain, 2) == [["waited 1 s for stage 1 to sing"] * 2] * 2
    (said,) = run_ranks(meet_nobody, 1)
    assert said.startswith("no rendezvous with rank 0 at 127.0.0.1:PORT within 1 s: ")


def test_only_a_launcher_takes_its_ranks_with_it(monkeypatch: pytest.MonkeyPatch):
    """Ranks that were started by hand may outlive the shell that they came from."""
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    assert launcher_pids() == []
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")
    assert launcher_pids() == [None if os.getppid() == 1 else os.getppid()]  # None: adopted by the init process
