"""Runs on a GPU; stages may share it. With REHEARSE=1 in the environment they run on the CPU, to try the tests."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Trainer, block_losses, records, weights
from deepspeed.accelerator import cuda_accelerator, real_accelerator
from launching import START_SECONDS, job, torchrun
from ranks import run_ranks
from test_links import meet

from llm_local.links.ends import Receiver, Sender
from llm_local.links.packet import TRAIN, Packet

DEVICE = "cpu" if "REHEARSE" in os.environ else "cuda"
CONFIGS = Path(__file__).parent.parent / "configs" / "ds"
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.processes,
    pytest.mark.skipif(DEVICE == "cuda" and not torch.cuda.is_available(), reason="no GPU"),
]


def train(trainer: Trainer, name: str, ranks: int, accelerator: str = DEVICE, **settings: Any) -> Path:
    """The output folder of a run under torchrun."""
    flags = trainer.flags(name, **{"overwrite_output_dir": name != "resumed", **settings})
    with job(torchrun(ranks), flags, trainer.folder, name, DS_ACCELERATOR=accelerator) as started:
        assert started.wait(START_SECONDS + 60) == 0, started.text
    return trainer.folder / name


@pytest.mark.parametrize("method", ["chunked", "overlapping"])
def test_losses_are_those_of_a_cpu(trainer: Trainer, method: str):
    cut = {"layers_per_block": 2, "block_stride": 1} if method == "overlapping" else {}
    on_cpu, on_gpu = (train(trainer, a, 2, a, num_stages=2, method=method, **cut) for a in ("cpu", DEVICE))
    for mine, theirs in zip(block_losses(on_cpu, 2), block_losses(on_gpu, 2), strict=True):
        assert mine == pytest.approx(theirs, abs=1e-4)
    for stage in range(2):
        for record in records(on_gpu, stage):
            assert 0 <= record["wait_seconds"] <= record["step_seconds"]


@pytest.mark.parametrize("zero", ["zero0", "zero1", "zero2", "zero3", "zero2_offload", "zero3_offload"])
def test_resume_equals_never_having_stopped(trainer: Trainer, zero: str):
    flags: dict[str, Any] = {"num_stages": 1, "bf16": True, "deepspeed": CONFIGS / f"{zero}.json", "save_steps": 3}
    straight = train(trainer, "straight", 1, max_steps=6, **flags)
    resumed = trainer.folder / "resumed"
    shutil.copytree(straight, resumed, ignore=shutil.ignore_patterns("export", "step-00000006"))
    train(trainer, "resumed", 1, max_steps=6, resume_from_checkpoint="true", **flags)
    mine, theirs = weights(straight / "export"), weights(resumed / "export")
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in mine.items())


@pytest.mark.skipif(DEVICE == "cpu", reason="a CPU does not train in fp16")
def test_fp16_trains(trainer: Trainer):
    first, *_, last = block_losses(train(trainer, "fp16", 1, num_stages=1, fp16=True, max_steps=20), 1)
    assert last[0] < first[0] - 0.1


def send_while_busy() -> list[list[float]]:
    """What arrives of packets whose numbers are still being computed when they are handed over."""
    if DEVICE == "cuda":
        real_accelerator.set_accelerator(cuda_accelerator.CUDA_Accelerator())
    world, found, steps = meet(), [], 20
    if world.place.is_first_stage:
        sender, ids = Sender(world, 1, "fp32", 3), torch.zeros(64, 256, dtype=torch.int64)
        for step in range(1, steps + 1):
            hidden = torch.zeros(64, 256, 256, device=world.device)
            for _ in range(50):
                hidden = hidden + step
            sender.send(Packet(TRAIN, step, 0, input_ids=ids, hidden=hidden))
            del hidden
        sender.close(steps)
        return []
    receiver = Receiver(world, 0, 3)
    for step in range(1, steps + 1):
        hidden = receiver.receive(TRAIN, step, 0).hidden
        assert hidden is not None
        assert hidden.device == world.device
        found.append(torch.stack(hidden.aminmax()))
        scratch = [torch.full_like(hidden, -1.0) for _ in range(3)]  # takes what was freed too early
        del hidden, scratch
    receiver.close(steps)
    return [each.tolist() for each in found]


def test_packets_leave_when_they_are_ready():
    assert run_ranks(send_while_busy, 2)[1] == [[50.0 * step] * 2 for step in range(1, 21)]


@pytest.mark.skipif(DEVICE == "cuda" and torch.cuda.device_count() < 2, reason="one GPU")
def test_replicas_on_two_gpus(trainer: Trainer):
    one, two = train(trainer, "one", 1, num_stages=1, gradient_accumulation_steps=2), train(trainer, "two", 2)
    for mine, theirs in zip(block_losses(one, 1), block_losses(two, 1), strict=True):
        assert mine == pytest.approx(theirs, abs=1e-4)
