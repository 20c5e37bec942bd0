"""Links and schedules over work that is queued and transfers that are done later, as a GPU has them."""

from __future__ import annotations

import os
from typing import Any

import pytest
import test_link_errors
import test_links
import torch
from conftest import Trainer, records, weights
from fake_gpu import FAILS_AFTER, FakeNccl, pretend, pretending
from ranks import run_ranks

from llm_local import device

pytestmark = pytest.mark.processes


@pytest.mark.parametrize("play", [test_links.exchange, test_links.run_ahead])
def test_packets_are_those_of_a_cpu(play: Any):
    on_gpu = run_ranks(pretending, 2, play)
    assert on_gpu == run_ranks(play, 2)


@pytest.mark.parametrize(
    ("play", "args", "victim", "said"),
    [
        (test_link_errors.send_nothing, (), 1, "waited 1.5 s for stage 0"),
        (test_link_errors.ask_for_nothing, (), 0, "waited 1.5 s for stage 1"),
        (test_link_errors.send_wrong, ("step",), 1, "stage 0, replica 0 (rank 0, pid PID, link 0→1) sent train"),
        (test_link_errors.lose_the_sender, (), 1, "lost stage 0"),
        (test_link_errors.lose_the_receiver, (2,), 0, "lost stage 1"),
    ],
)
def test_errors_are_those_of_a_cpu(play: Any, args: tuple, victim: int, said: str):
    assert said in run_ranks(pretending, 2, play, *args)[victim]


def fail_after(transfers: int, victim: int) -> Any:
    pretend()
    if os.environ["RANK"] == str(victim):
        os.environ[FAILS_AFTER] = str(transfers)
    world = test_link_errors.meet()
    if world.place.is_first_stage:
        sender = test_link_errors.Sender(world, 1, "fp32", 1)
        if victim == 0:
            return test_link_errors.error_of(world, send_hidden, sender)
        send_hidden(sender, 3)
        world.fetch("seen", 30.0, "stage 1 to see it")
        return ""
    receiver = test_link_errors.Receiver(world, 0, 1)
    receiver.receive(test_links.TRAIN, 1, 0)
    if victim == 0:
        return ""
    said = test_link_errors.error_of(world, receiver.receive, test_links.TRAIN, 2, 0)
    world.publish("seen", "1")
    return said


def send_hidden(sender: Any, steps: int = 10) -> None:
    for step in range(1, 1 + steps):
        sender.send(test_links.packet(step))


@pytest.mark.parametrize("victim", [0, 1])
def test_a_transfer_that_has_failed_is_not_taken_for_one_that_is_done(victim: int):
    """NCCL calls both completed."""
    said = run_ranks(fail_after, 2, 1, victim)[victim]
    assert said.startswith(f"link 0→1, replica 0: lost stage {1 - victim}, replica 0")


def train(arguments: list[str]) -> tuple[int, int]:
    """The exit code, and the communicators that are open at the end."""
    from llm_local.train import main

    pretend()
    device.identity = lambda *_: f"GPU of process {os.getpid()}"  # one each, as replicas need
    return main(arguments), FakeNccl.open


RUNS = {
    "chunked": (2, {"num_stages": 2, "layers_per_block": 1}),
    "replicas, shared head": (
        4,
        {"num_stages": 2, "head": "shared", "head_refresh_steps": 2, "gradient_accumulation_steps": 2, "max_steps": 6},
    ),
    "unequal replicas": (3, {"num_stages": 2, "stage_replicas": "2,1"}),
    "int8": (2, {"num_stages": 2, "wire_dtype": "int8"}),
    "overlapping": (2, {"num_stages": 2, "method": "overlapping", "layers_per_block": 2, "block_stride": 1}),
    "distillation": (2, {"num_stages": 2, "distillation_weight": 0.5}),
    "final backpropagation": (2, {"num_stages": 2, "final_backprop_steps": 2}),
}


@pytest.mark.parametrize("name", RUNS)
def test_a_run_is_that_of_a_cpu(trainer: Trainer, name: str):
    ranks, flags = RUNS[name]
    plain = trainer.run("cpu", ranks, **flags)
    assert run_ranks(train, ranks, trainer.flags("gpu", **flags)) == [(0, 0)] * ranks
    queued = trainer.folder / "gpu"
    for stage in range(2):
        for mine, theirs in zip(records(plain, stage), records(queued, stage), strict=True):
            for field in ("block_losses", "grad_norm", "sent_bytes", "received_bytes", "sent_gradient_bytes", "tokens"):
                assert mine[field] == theirs[field]
            assert 0 <= theirs["wait_seconds"] <= theirs["step_seconds"]
    expected, got = weights(plain / "export"), weights(queued / "export")
    assert all(torch.equal(tensor, got[name]) for name, tensor in expected.items())
