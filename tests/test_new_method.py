"""A method and two heads that this file alone knows train, export and are refused like those of the library."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Trainer, records, weights
from deepspeed.runtime.pipe.schedule import PipeInstruction
from ranks import run_ranks
from torch import nn

import llm_local as ll
from llm_local.checkpoint.manifest import read_manifest
from llm_local.config import parse
from llm_local.flags import LocalArguments
from llm_local.methods.method import Method, local_methods, register_method
from llm_local.methods.schedule import Schedule
from llm_local.model.heads.head import Head, register_head
from llm_local.model.heads.shared import installed, matrix_name
from llm_local.model.slices import Slice
from llm_local.plan.times import Pipe, StageSeconds, predict
from llm_local.problems import static_problems
from llm_local.study.points import expand_grid

pytestmark = pytest.mark.processes


class AlternatingSchedule(Schedule):
    """One step in which every second micro-batch, from the first one on, trains the heads alone."""

    name = "alternating"

    def steps(self) -> Iterator[list[PipeInstruction]]:
        for micro_batch in range(self.micro_batches):
            commands = [self.enter(0)]
            for block in range(self.num_blocks):
                alone = micro_batch % 2 == 0 and not self.is_last(block)
                commands += [*self.forward(0, block, detach_head=alone), self.backward(0, block)]
            yield commands + self.end(micro_batch)


class Alternating(Method):
    own_schedule = AlternatingSchedule

    def problems(self, local: LocalArguments) -> list[str]:
        short = local.layers_per_block == 1
        return super().problems(local) + (["method=alternating is for blocks of 2 layers or more"] if short else [])


class Projection(nn.Module):
    """A fixed random rotation."""

    def __init__(self, width: int):
        super().__init__()
        made = torch.randn(width, width, generator=torch.Generator().manual_seed(0))
        self.register_buffer("rotation", torch.linalg.qr(made).Q.contiguous())

    def forward(self, normed: torch.Tensor) -> torch.Tensor:
        rotation: Any = self.rotation
        return normed @ rotation.to(normed.dtype)


class Projected(Head):
    """A linear head behind the rotation, which an exit has in its output matrix."""

    takes_private_layers = False

    def transform(self, head: Slice) -> nn.Module:
        return Projection(head.anatomy.hidden_size)

    def folded(self, head: Slice, transform: nn.Module | None) -> dict[str, torch.Tensor]:
        assert isinstance(transform, Projection)
        rotation: Any = transform.rotation
        return {matrix_name(head): installed(head).detach().cpu() @ rotation.cpu().T}


class Squashed(Head):
    exit_problem = "its head squashes what the output matrix reads"

    def transform(self, head: Slice) -> nn.Module:
        return nn.Tanh()


def _register() -> None:
    register_method("alternating", Alternating())
    register_head("projected", Projected())
    register_head("squashed", Squashed())


def _train(arguments: list[str]) -> None:
    _register()
    with ll.prepare(parse(arguments)) as run:
        run.train()
        run.export()


def train(trainer: Trainer, name: str, **settings: Any) -> Path:
    """On two stages of which the first has two layers."""
    common = {"num_stages": 2, "gradient_accumulation_steps": 2, "method": "alternating", "head": "projected"}
    run_ranks(_train, 2, trainer.flags(name, **{**common, **settings}))
    return trainer.folder / name


def test_they_train_two_stages_and_the_loss_falls(trainer: Trainer):
    output = train(trainer, "new", max_steps=12, learning_rate=1e-2, save_steps=6)
    for stage in (0, 1):
        losses = [record["loss"] for record in records(output, stage)]
        assert losses[-1] < losses[0] - 0.1
    assert (output / "export/exits/stage-00").is_dir(), "the exit is no model of its own"
    resumed = train(trainer, "resumed", max_steps=12, learning_rate=1e-2, resume_from_checkpoint=output / STEP)
    for stage in (0, 1):
        assert [r["loss"] for r in records(resumed, stage)] == [r["loss"] for r in records(output, stage)][6:]
    with pytest.raises(ll.ConfigError, match="trained with method=alternating, which is unknown; register it first"):
        read_manifest(output / STEP).config()


STEP = "checkpoints/step-00000006"


def test_a_stage_does_not_notice_the_stages_behind_it(trainer: Trainer):
    """Locality: the first stage trains to the same bits whatever stands behind it."""
    outputs = [
        train(trainer, name, stage_layers=layers, config_overrides=f"num_hidden_layers={count}")
        for name, layers, count in (("two", "2,2", 4), ("one", "2,1", 3))
    ]
    mine, theirs = (weights(output / "export/exits/stage-00") for output in outputs)
    assert set(mine) == set(theirs)
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)
    plain = train(trainer, "plain", method="chunked", stage_layers="2,2")
    losses = [[record["loss"] for record in records(output, 0)] for output in (*outputs, plain)]
    assert losses[0] == losses[1]
    assert losses[0] != losses[2], "the schedule is chunked's"
    assert [r["sent_gradient_bytes"] for r in records(outputs[0], 1)] == [0] * 4


def test_an_exit_that_is_no_model_is_left_out_and_the_whole_model_is_not(
    trainer: Trainer, capfd: pytest.CaptureFixture[str]
):
    output = train(trainer, "squashed", head="squashed")
    assert (output / "export/config.json").is_file()
    assert not (output / "export/exits/stage-00").exists()
    assert "no exit stage-00, as it is no model of its own: its head squashes what" in capfd.readouterr().err


def _look(flags: list[str]) -> dict[str, Any]:
    """What the checks, the planner and a study make of them."""
    _register()
    grid = {"method": ["alternating"], "head": ["projected"], "blocks": [2]}
    stages = [StageSeconds((1.0,), (2.0,))] * 2
    return {
        "methods": local_methods(),
        "problems": static_problems(parse(flags), 2, fp16_supported=True, bf16_supported=True),
        "seconds": predict(Pipe("alternating", stages, 4)).step_seconds,
        "grid": expand_grid(grid, 4),
    }


def test_checks_planner_and_study_know_them(trainer: Trainer):
    flags = {"num_stages": 2, "method": "alternating", "head": "projected", "layers_per_block": 1, "head_layers": 1}
    (found,) = run_ranks(_look, 1, trainer.flags("run", **flags))
    assert found["methods"] == ["alternating", "chunked", "greedy", "overlapping"]
    assert found["problems"] == [
        "method=alternating is for blocks of 2 layers or more",
        "head=projected has no private layers, head_layers is 1; use head=decoder",
    ]
    assert found["seconds"] == pytest.approx(12)
    named, problems = found["grid"]
    assert problems == []
    wanted = {"method": "alternating", "head": "projected", "head_layers": 0, "layers_per_block": 2}
    assert named == [("alternating-2-projected", wanted)]
