"""The last steps of a run by backpropagation through the same blocks, on any number of stages."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import TINY, Trainer, block_losses, records, weights

pytestmark = pytest.mark.processes


def test_global_steps_are_backpropagation(trainer: Trainer):
    """All steps global, without clipping: the last loss and the weights are those of the undivided model."""
    chosen: dict[str, Any] = {"max_grad_norm": 0, "gradient_accumulation_steps": 3, "eval_steps": 2}
    whole = trainer.run("whole", 1, method="backprop", num_stages=1, **chosen)
    wanted = [r["loss"] for r in records(whole, 0)]
    for stages in (1, 2, 4):
        output = trainer.run(
            f"on-{stages}", stages, num_stages=stages, method="greedy", final_backprop_steps=4, **chosen
        )
        assert [r["loss"] for r in records(output, stages - 1)] == pytest.approx(wanted, rel=1e-5)
        assert [r["loss"] for r in records(output, stages - 1, "eval")] == pytest.approx(
            [r["loss"] for r in records(whole, 0, "eval")], rel=1e-5
        )
        mine, theirs = weights(output / "export"), weights(whole / "export")
        for name in mine:
            torch.testing.assert_close(mine[name], theirs[name], rtol=1e-3, atol=1e-4)


def test_only_the_last_steps_are_global_and_heads_go_on_training(trainer: Trainer):
    """Before, nothing differs; then gradients come back over the boundary, and every exit still learns."""
    chosen: dict[str, Any] = {"num_stages": 2, "max_steps": 6, "learning_rate": 1e-2}
    local = trainer.run("local", 2, **chosen)
    mixed = trainer.run("mixed", 2, **chosen, final_backprop_steps=2)
    before, after = block_losses(local, 2), block_losses(mixed, 2)
    assert before[:5] == after[:5], "the first global step still starts from the local weights"
    assert before[5] != after[5]
    gradient = 80 + 2 * 32 * TINY["hidden_size"] * 4
    assert [r["sent_gradient_bytes"] for r in records(mixed, 1)] == [0] * 4 + [gradient] * 2
    assert records(mixed, 0)[-1]["loss"] < records(mixed, 0)[-2]["loss"], "stage 0's own exit"


def test_zero_stages_agree_on_global_steps(trainer: Trainer):
    chosen: dict[str, Any] = {"num_stages": 2, "final_backprop_steps": 3, "gradient_accumulation_steps": 2}
    plain = trainer.run("plain", 2, **chosen, per_device_train_batch_size=4)
    wanted = torch.tensor(block_losses(plain, 2))
    for zero in range(4):
        sharded = trainer.run(f"zero{zero}", 4, **chosen, deepspeed=f"configs/ds/zero{zero}.json")
        found = torch.tensor(block_losses(sharded, 2))
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=0.0, msg=f"ZeRO-{zero}")


def test_overlapping_blocks_finish_globally(trainer: Trainer):
    chosen: dict[str, Any] = {"method": "overlapping", "layers_per_block": 2, "block_stride": 1}
    chosen |= {
        "final_backprop_steps": 2,
        "gradient_accumulation_steps": 2,
        "bf16": True,
        "gradient_checkpointing": True,
    }
    one = torch.tensor(block_losses(trainer.run("one", 1, num_stages=1, **chosen), 1))
    three = torch.tensor(block_losses(trainer.run("three", 3, num_stages=3, **chosen), 3))
    torch.testing.assert_close(three, one, rtol=1e-2, atol=0.0)


@pytest.mark.parametrize("saved", [2, 3])
def test_a_run_resumes_before_and_inside_its_global_steps(trainer: Trainer, saved: int):
    chosen: dict[str, Any] = {"num_stages": 2, "final_backprop_steps": 2, "save_steps": 1}
    straight = trainer.run("straight", 2, **chosen)
    wanted = weights(straight / "export")
    for step in range(saved + 1, 5):
        (straight / f"checkpoints/step-{step:08d}/manifest.json").unlink()
    found = weights(trainer.run("straight", 2, **chosen, resume_from_checkpoint="true") / "export")
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
