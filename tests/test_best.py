"""load_best_model_at_end: what is exported is the checkpoint with the lowest validation loss, which is kept."""

import re
from pathlib import Path

import pytest
import torch
from conftest import records, weights

from llm_local.metrics import best_step
from llm_local.offline_export import export_checkpoint

pytestmark = pytest.mark.processes
ROOT = Path(__file__).parents[1]
# one row again and again: the validation loss falls, and rises
OVERFITS = {
    "max_train_samples": 1,
    "learning_rate": 0.02,
    "lr_scheduler_type": "constant",
    "max_steps": 12,
    "eval_steps": 1,
    "save_steps": 2,
    "save_total_limit": 1,
    "load_best_model_at_end": True,
}


def losses(output: Path, stage: int) -> dict[int, float]:
    """The validation loss after each step that a checkpoint is written after."""
    found = {record["step"]: record["loss"] for record in records(output, stage, "eval")}
    return {step: loss for step, loss in found.items() if step % 2 == 0}


@pytest.mark.parametrize(
    ("ranks", "flags"),
    [
        (2, {"num_stages": 2}),
        (2, {"num_stages": 2, "head": "shared", "head_refresh_steps": 2, "bf16": True}),
        (2, {"num_stages": 1, "layers_per_block": 2, "deepspeed": ROOT / "configs/ds/zero3.json"}),
        (2, {"num_stages": 2, "method": "backprop"}),
    ],
    ids=["stages", "shared head in bf16", "ZeRO-3", "backprop"],
)
def test_the_best_checkpoint_is_exported_and_kept(trainer, ranks: int, flags: dict):
    output = trainer.run("best", ranks, **OVERFITS, **flags)
    found = losses(output, flags["num_stages"] - 1)
    best = min(found, key=lambda step: found[step])
    assert best < 12, "or there is nothing to see"
    kept = sorted(path.name for path in (output / "checkpoints").glob("step-*"))
    assert kept == [f"step-{best:08d}", "step-00000012"]
    export_checkpoint(output / "checkpoints" / kept[0], output / "again", None, "auto")
    theirs, ours = weights(output / "again"), weights(output / "export")
    assert theirs.keys() == ours.keys()
    assert all(torch.equal(theirs[name], tensor) for name, tensor in ours.items())
    card = (output / "export" / "README.md").read_text()
    assert f"| steps | {best} |" in card
    assert f"{found[best]:.4f}" in card
    if "num_stages" in flags and flags["num_stages"] > 1 and "method" not in flags:
        assert f"{losses(output, 0)[best]:.4f}" in card


def test_a_resumed_run_finds_the_best_of_the_life_before(trainer):
    flags = {**OVERFITS, "num_stages": 2, "save_total_limit": 2}
    output = trainer.run("resumed", 2, **{**flags, "max_steps": 10})
    found = losses(output, 1)
    best = min(found, key=lambda step: found[step])
    trainer.run("resumed", 2, **{**flags, "max_steps": 12}, resume_from_checkpoint="true")
    assert best_step(output, 2) == best < 10
    card = (output / "export" / "README.md").read_text()
    assert f"| steps | {best} |" in card
    assert re.search(rf"stage 1 .*\| {found[best]:.4f} \|", card)
