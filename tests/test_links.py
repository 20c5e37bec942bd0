"""Links between two real processes: what arrives, how far a sender runs ahead, what it counts."""

from __future__ import annotations

import os
import time
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from ranks import run_ranks

from llm_local.device import DeviceName, identity
from llm_local.in_flight import packets_asked_for, packets_pending
from llm_local.launch import Launch
from llm_local.links.ends import Receiver, Sender
from llm_local.links.packet import EVAL, TRAIN, Packet
from llm_local.links.transports import transport
from llm_local.place import Place
from llm_local.rendezvous import open_store
from llm_local.watchdog import Watchdog
from llm_local.world import World, connect


def meet(seconds: float = 20.0) -> World:
    """Two stages of one rank each."""
    launch = Launch.from_environment(os.environ)
    store = open_store(launch, "test", 60.0)
    place = Place(launch.rank, (1,) * launch.world_size)
    return connect(launch, place, store, Watchdog(launch.rank), 60.0, seconds)


def packet(step: int, **parts: Any) -> Packet:
    ids = torch.arange(12).reshape(2, 6) + step
    return Packet(TRAIN, step, 0, input_ids=ids, hidden=torch.full((2, 6, 4), step + 0.1), **parts)


def larger(step: int) -> Packet:
    """Without token ids, as a gradient is, and of more bytes than the packets before it."""
    return Packet(TRAIN, step, 1, hidden=torch.full((3, 5, 7), step / 8))


def exchange() -> Any:
    world = meet()
    mask = torch.tensor([[1] * 6, [0] * 6])
    if world.place.stage == 0:
        sender = Sender(world, 1, "bf16", 2)
        sender.send(packet(1, attention_mask=mask, labels=mask - 100))
        empty = torch.zeros(1, 2, dtype=torch.int64)
        sender.send(Packet(EVAL, 1, 3, input_ids=empty, hidden=torch.ones(1, 2, 4), weight=1 / 3))
        sender.send(larger(1))
        sender.send(packet(2))
        sender.send(larger(2))
        sender.close(2)
        return sender.bytes
    receiver = Receiver(world, 0, 2)
    first, second = receiver.receive(TRAIN, 1, 0), receiver.receive(EVAL, 1, 3)
    third, fourth, fifth = (receiver.receive(TRAIN, *at) for at in ((1, 1), (2, 0), (2, 1)))
    receiver.close(2)
    assert first.hidden is not None
    assert first.hidden.dtype == torch.bfloat16
    assert torch.equal(first.hidden, packet(1).hidden.bfloat16())
    assert torch.equal(first.input_ids, packet(1).input_ids)
    assert torch.equal(first.attention_mask, mask)
    assert torch.equal(first.labels, mask - 100)
    assert (first.weight, second.weight) == (1.0, 1 / 3)
    assert first.position_ids is None
    assert second.input_ids.shape == (1, 2)
    assert torch.equal(third.hidden, larger(1).hidden.bfloat16())
    assert third.input_ids is None
    assert torch.equal(fourth.hidden, packet(2).hidden.bfloat16())
    assert torch.equal(fourth.input_ids, packet(2).input_ids)
    assert torch.equal(fifth.hidden, larger(2).hidden.bfloat16())
    return receiver.bytes


@pytest.mark.processes
def test_packets_arrive_as_they_were_sent():
    sent, received = run_ranks(exchange, 2)
    header = 80
    assert received == (
        (header + 3 * 12 * 4 + 2 * 6 * 4 * 2)
        + (header + 2 * 4 + 2 * 4 * 2)
        + 2 * (header + 3 * 5 * 7 * 2)
        + (header + 12 * 4 + 2 * 6 * 4 * 2)
    )
    assert sent == received + header, "the goodbye carries nothing"


MAX_IN_FLIGHT = 3


def run_ahead() -> int:
    """Stage 0 sends as fast as it may; stage 1 takes nothing until it has seen how far that was."""
    world = meet()
    if world.place.stage == 0:
        sender = Sender(world, 1, "fp32", MAX_IN_FLIGHT)
        for step in range(1, 11):
            sender.send(packet(step))
            world.publish(f"sent/{step}", "1")
        sender.close(10)
        return 0
    receiver = Receiver(world, 0, MAX_IN_FLIGHT)
    ahead = MAX_IN_FLIGHT + 1  # and the packet that the receiver holds ready
    world.fetch(f"sent/{ahead}", 20.0, "stage 0 to run ahead")
    time.sleep(1.0)
    assert world.peek(f"sent/{ahead + 1}") is None, "stage 0 ran further than max_packets_in_flight"
    for step in range(1, 11):
        receiver.receive(TRAIN, step, 0)
    receiver.close(10)
    return ahead


@pytest.mark.processes
def test_a_stage_runs_ahead_by_the_packets_in_flight_and_no_further():
    """No waiting on later stages: stage 1 does nothing and stage 0 goes on, up to the bound."""
    assert run_ranks(run_ahead, 2) == [0, MAX_IN_FLIGHT + 1]


def leave_at_once() -> bool:
    """Stage 1 takes a packet and then computes for long, as it were; stage 0 must not wait for it to be rid of more."""
    world = meet()
    ahead = packets_asked_for(MAX_IN_FLIGHT)
    if world.place.stage == 0:
        sender = Sender(world, 1, "fp32", MAX_IN_FLIGHT)
        sender.send(packet(1))
        world.fetch("taken", 20.0, "stage 1 to take a packet")
        for step in range(2, 2 + ahead):
            sender.send(packet(step))
        sender._bound(0)  # all of it has left
        world.publish("left", "1")
        sender.close(1 + ahead)
        return True
    receiver = Receiver(world, 0, MAX_IN_FLIGHT)
    receiver.receive(TRAIN, 1, 0)
    world.publish("taken", "1")
    world.fetch("left", 20.0, "stage 0 to be rid of its packets")
    for step in range(2, 2 + ahead):
        receiver.receive(TRAIN, step, 0)
    receiver.close(1 + ahead)
    return ahead > 1


@pytest.mark.processes
def test_packets_are_asked_for_before_they_are_sent():
    """A link's latency holds nobody up: gloo sends only what the other side has asked for."""
    assert run_ranks(leave_at_once, 2) == [True, True]


@pytest.mark.parametrize("max_in_flight", [1, 2, 3, 4, 9])
def test_the_packets_in_flight_are_those_of_both_sides(max_in_flight: int):
    held = packets_pending(max_in_flight), packets_asked_for(max_in_flight)
    assert min(held) >= 1
    assert sum(held) == max_in_flight + 1


@pytest.mark.parametrize(
    ("mine", "theirs", "wanted"),
    [
        # host and pid namespace, device, what the driver says, RDMA
        (("a", "cpu", None, True), ("a", "cpu", None, True), "gloo"),
        (("a", "cuda:0", "GPU-1", False), ("a", "cuda:0", "GPU-2", False), "nccl"),  # each rank sees its own GPU only
        (("a", "cuda:0", "GPU-1", True), ("b", "cuda:0", "GPU-1", True), "gloo"),  # containers that were given one GPU
        (("a", "cuda:0", "GPU-1", True), ("b", "cuda:0", "GPU-2", True), "nccl"),
        (("a", "cuda:0", "GPU-1", True), ("b", "cuda:0", "GPU-2", False), "gloo"),
        (("a", "cuda:0", "GPU-1", False), ("a", "cuda:1", "GPU-1", False), "gloo"),
        (("a", "cuda:0", "GPU-1", True), ("b", "cpu", None, True), "gloo"),
        (("a", "cuda:0", None, False), ("a", "cuda:1", None, False), "nccl"),
        (("a", "cuda:0", None, True), ("b", "cuda:0", None, True), "nccl"),
        (("a", "cuda:0", None, False), ("a", "cuda:0", None, False), "gloo"),
    ],
)
def test_nccl_is_for_two_gpus_of_one_host_or_with_rdma(mine: tuple, theirs: tuple, wanted: str):
    def name(machine: str, device: str, uuid: str | None, has_rdma: bool) -> DeviceName:
        properties = SimpleNamespace(name="GPU", **({} if uuid is None else {"uuid": uuid}))
        known = torch.device(device)
        return DeviceName(known.type, identity(known, properties, machine), machine, has_rdma)

    assert transport(name(*mine), name(*theirs)) == wanted
    assert identity(torch.device("cpu"), None, "a") == "a/cpu"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_the_driver_gives_a_gpu_a_number():
    assert str(torch.cuda.get_device_properties(0).uuid) in DeviceName.of(torch.device("cuda", 0)).identity
