"""Stages that are not trained: forward passes alone, and weights that stay, under every ZeRO stage."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Trainer, records, weights
from deepspeed.runtime.pipe.schedule import BackwardPass, ForwardPass, OptimizerStep, SendActivation
from pretrained import pretrained
from ranks import run_ranks
from test_memory import peak_of_saved_bytes
from test_resume import same_bits

from llm_local.checks.preflight import preflight
from llm_local.config import ConfigError, parse
from llm_local.costs import Setting, Shape, count_flops
from llm_local.methods.schedule import LocalSchedule
from llm_local.partition import Span
from llm_local.timeline.measured import read_trace
from llm_local.timeline.replay import simulated

CONFIGS = Path(__file__).parent.parent / "configs" / "ds"
FROZEN = ("model.embed_tokens.", "model.layers.0.", "model.layers.1.")


@pytest.mark.processes
@pytest.mark.parametrize(
    ("zero", "bf16", "flags"),
    [
        (0, True, {}),
        (1, False, {"head_warmup_steps": 1}),
        (2, False, {"head": "shared", "stage_layers": "2,2"}),
        (3, True, {}),
    ],
)
def test_a_frozen_stage_keeps_its_weights_and_sends_its_packets(
    trainer: Trainer, zero: int, bf16: bool, flags: dict[str, Any]
):
    """And the run resumes bit for bit; DeepSpeed has no optimizer without parameters (its issue 5071)."""
    base = pretrained(trainer)
    common: dict[str, Any] = {
        **{"config_name": None, "model_name_or_path": base, "num_stages": 2, "freeze_stages": "0"},
        **{"deepspeed": CONFIGS / f"zero{zero}.json", "bf16": bf16, "save_steps": 2, "eval_batches": 1},
        **flags,
    }
    straight = trainer.run("straight", 4, **common)
    dtype = torch.bfloat16 if bf16 else torch.float32
    before, after = weights_of(base), weights(straight / "export")
    kept = {name for name in after if torch.equal(after[name], before[name].to(dtype))}
    assert {name for name in after if name.startswith(FROZEN)} <= kept
    assert not any(name.startswith("model.layers.2.") for name in kept)
    frozen, trained = records(straight, 0), records(straight, 1)
    assert [r["grad_norm"] for r in frozen] == [0.0] * 4
    assert all(r["grad_norm"] > 0 for r in trained)
    assert [r["lr"] for r in frozen] == [r["lr"] for r in trained]
    assert all(0 < r["loss"] < 20 and r["sent_bytes"] > 0 for r in frozen)
    assert len(records(straight, 0, "eval")) == 1
    resumed = trainer.folder / "resumed"
    shutil.copytree(straight, resumed, ignore=shutil.ignore_patterns("export", "step-00000004"))
    trainer.run("resumed", 4, **common, resume_from_checkpoint="true")
    same_bits(resumed, straight)
    assert [r["loss"] for r in records(resumed, 1)] == [r["loss"] for r in trained]


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(folder / "model.safetensors")


@pytest.mark.processes
def test_a_frozen_stage_keeps_nothing_for_a_backward_pass(trainer: Trainer):
    frozen, trained = run_ranks(peak_of_saved_bytes, 2, trainer.flags("run", num_stages=2, freeze_stages="0"))
    assert frozen == 0
    assert trained > 0


@pytest.mark.processes
def test_stages_are_frozen_and_trained_on(trainer: Trainer):
    """The stage behind trains as if the loss of the frozen one counted nothing; what was trained goes on later."""
    common: dict[str, Any] = {"num_stages": 2, "save_steps": 2, "eval_batches": 0, "trace": True}
    common |= {"adam_beta1": 0}  # else moments of earlier steps move weights that have no gradient
    first = trainer.run("first", 2, max_steps=2, **common)
    checkpoint = first / "checkpoints/step-00000002"
    flags = {"frozen": {"freeze_stages": "0"}, "ignored": {"block_loss_weights": "0,1"}}
    frozen, ignored = (
        trainer.run(name, 2, max_steps=4, resume_from_checkpoint=checkpoint, **common, **more)
        for name, more in flags.items()
    )
    before, after = weights(first / "export"), weights(frozen / "export")
    kept = [name for name in after if name.startswith(FROZEN)]
    assert len(kept) == 19
    assert all(torch.equal(after[name], before[name]) for name in kept)
    for stage in (0, 1):
        assert [r["loss"] for r in records(frozen, stage)] == [r["loss"] for r in records(ignored, stage)]
    assert "1 head, frozen" in (frozen / "report.html").read_text()
    run = read_trace(frozen)
    names = {event.name for event in run.ranks[0].events if event.split == "train"}
    assert "BackwardPass" not in names
    assert "SendActivation" in names
    assert [row.stage for row in simulated(run, run.steps)] == [0, 1]
    again = trainer.run("again", 2, max_steps=6, resume_from_checkpoint=frozen / "checkpoints/step-00000004", **common)
    assert not torch.equal(weights(again / "export")[kept[0]], after[kept[0]])


def test_a_frozen_block_has_no_backward_pass():
    steps = [i for commands in LocalSchedule(2, 2, 0, 2, frozen=[1]) for i in commands]
    kinds = (ForwardPass, BackwardPass, SendActivation, OptimizerStep)
    shown = [(type(i), getattr(i, "block", None)) for i in steps if isinstance(i, kinds)]
    once = [(ForwardPass, 0), (BackwardPass, 0), (ForwardPass, 1), (SendActivation, None)]
    assert shown == [*once, *once, (OptimizerStep, None)]
    assert [i.kwargs.get("no_graph") for i in steps if isinstance(i, ForwardPass)] == [None, True] * 2


def test_a_frozen_block_costs_its_forward_pass():
    shape, halves = Shape(8, 16, 1000, 500), (Span(0, 2), Span(2, 4))
    whole = count_flops(shape, Setting(halves)).blocks
    found = count_flops(shape, Setting(halves, frozen=(0,)))
    assert found.blocks == pytest.approx((whole[0] / 3, whole[1]))
    assert found.sequential == pytest.approx(whole[1])


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"freeze_stages": "first"}, "freeze_stages='first' is not a list of stages such as 0,1"),
        ({"freeze_stages": "0,2"}, "freeze_stages='0,2' names stage 2, the last of num_stages=2 is 1"),
        ({"freeze_stages": "0,1"}, "freeze_stages='0,1' leaves no stage to train; leave one out"),
        (
            {"freeze_stages": "0", "method": "overlapping"},
            "freeze_stages='0' does not work with method=overlapping: a frozen stage has no backward pass, and takes "
            "nothing from the next one; leave one of them out",
        ),
        ({"freeze_stages": "0", "method": "backprop"}, "freeze_stages='0' does not work with method=backprop: a"),
        ({"freeze_stages": "0", "final_backprop_steps": 1}, "does not work with final_backprop_steps=1: a frozen"),
        ({"freeze_stages": "0", "distillation_weight": 1}, "does not work with distillation_weight=1.0: a frozen"),
        ({"freeze_stages": "0", "replica_sync_steps": 2}, "does not work with replica_sync_steps=2: a frozen stage"),
    ],
)
def test_what_cannot_be_frozen_is_refused(trainer: Trainer, settings: dict[str, Any], said: str):
    with pytest.raises(ConfigError) as refusal:
        preflight(parse(trainer.flags("run", num_stages=2, **settings)), 4)
    assert len(refusal.value.problems) == 1, refusal.value
    assert said in refusal.value.problems[0]


def test_what_was_never_trained_is_named(trainer: Trainer):
    setup = preflight(parse(trainer.flags("run", num_stages=2, freeze_stages="0")), 2)
    assert "freeze_stages=0: what is frozen has new weights, which nothing has trained" in setup.warnings
