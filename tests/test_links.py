"""Links between two real processes: what arrives, how far a sender runs ahead, what it counts."""

from __future__ import annotations

import os
import time
from typing import Any

import pytest
import torch
from ranks import run_ranks

from llm_local.links import Receiver, Sender, transport
from llm_local.packet import EVAL, TRAIN, Packet
from llm_local.watchdog import Watchdog
from llm_local.world import Launch, Place, World, connect, open_store


def meet(seconds: float = 20.0) -> World:
    """Two stages of one rank each."""
    launch = Launch.from_environment(os.environ)
    store = open_store(launch, "test", 60.0)
    place = Place.of(launch.rank, launch.world_size, launch.world_size)
    return connect(launch, place, store, Watchdog(launch.rank), 60.0, seconds)


def packet(step: int, **parts: Any) -> Packet:
    ids = torch.arange(12).reshape(2, 6) + step
    return Packet(TRAIN, step, 0, input_ids=ids, hidden=torch.full((2, 6, 4), step + 0.1), **parts)


def exchange() -> Any:
    world = meet()
    mask = torch.tensor([[1] * 6, [0] * 6])
    if world.place.stage == 0:
        sender = Sender(world, 1, "bf16", 2)
        sender.send(packet(1, attention_mask=mask, labels=mask - 100))
        sender.send(Packet(EVAL, 1, 3, input_ids=torch.zeros(1, 2, dtype=torch.int64), hidden=torch.ones(1, 2, 4)))
        sender.close(1)
        return sender.bytes
    receiver = Receiver(world, world.place.stage - 1)
    first, second = receiver.receive(TRAIN, 1, 0), receiver.receive(EVAL, 1, 3)
    receiver.close(1)
    assert first.hidden is not None
    assert first.hidden.dtype == torch.bfloat16
    assert torch.equal(first.hidden, packet(1).hidden.bfloat16())
    assert torch.equal(first.input_ids, packet(1).input_ids)
    assert torch.equal(first.attention_mask, mask)
    assert torch.equal(first.labels, mask - 100)
    assert first.position_ids is None
    assert second.input_ids.shape == (1, 2)
    return receiver.bytes


@pytest.mark.processes
def test_packets_arrive_as_they_were_sent():
    sent, received = run_ranks(exchange, 2)
    header = 80
    assert sent == (header + 3 * 12 * 4 + 2 * 6 * 4 * 2) + (header + 2 * 4 + 2 * 4 * 2) + header
    assert received == sent - header, "the goodbye carries nothing"


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
    receiver = Receiver(world, world.place.stage - 1)
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


@pytest.mark.parametrize(
    ("device", "mine", "theirs", "wanted"),
    [
        ("cpu", "a/cpu", "a/cpu", "gloo"),
        ("cuda:0", "a/cuda:0", "a/cuda:1", "nccl"),
        ("cuda:0", "a/cuda:0", "b/cuda:0", "nccl"),
        ("cuda:0", "a/cuda:0", "a/cuda:0", "gloo"),
    ],
)
def test_hidden_states_take_nccl_between_two_gpus_and_gloo_elsewhere(device: str, mine: str, theirs: str, wanted: str):
    assert transport(torch.device(device), mine, theirs) == wanted
