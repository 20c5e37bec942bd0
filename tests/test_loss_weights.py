"""Weights of the blocks' losses: a factor of the gradient, and of nothing that is measured."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from conftest import Trainer, block_losses, records, weights

pytestmark = pytest.mark.processes
RATE = 0.5


@pytest.fixture
def plain(tmp_path: Path) -> dict[str, object]:
    """Settings of one step of plain gradient descent: what it changes is the gradient."""
    path = tmp_path / "sgd.json"
    path.write_text(json.dumps({"optimizer": {"type": "SGD", "params": {"lr": RATE}}}))
    settings = {"deepspeed": path, "learning_rate": RATE, "lr_scheduler_type": "constant", "max_steps": 1}
    return settings | {"max_grad_norm": 0, "eval_batches": 0}


def test_a_weight_is_a_factor_of_the_gradient_and_not_of_the_loss(trainer: Trainer):
    settings = {"num_stages": 2, "gradient_accumulation_steps": 2, "max_steps": 1}
    settings |= {"deepspeed": "configs/ds/zero3.json"}
    one, other = (trainer.run(str(w), 2, **settings, block_loss_weights=w) for w in (None, "0.5,3"))
    assert block_losses(one, 2) == block_losses(other, 2)
    assert block_losses(one, 2, "eval") != block_losses(other, 2, "eval")
    for stage, factor in enumerate((0.5, 3.0)):
        ours, theirs = (records(run, stage)[0]["grad_norm"] for run in (other, one))
        assert ours == pytest.approx(factor * theirs, rel=1e-5)


def test_adam_does_not_notice_a_constant_factor(trainer: Trainer):
    """Without clipping, and with no epsilon: the step's direction and length are those of the unweighted loss."""
    settings = {"num_stages": 1, "layers_per_block": 2, "max_grad_norm": 0, "adam_epsilon": 1e-30, "max_steps": 3}
    one, other = (trainer.run(str(w), 1, **settings, block_loss_weights=w) for w in ("1", "4,0.25"))
    assert block_losses(one, 1) == block_losses(other, 1), "powers of two move no bit"


def test_where_two_losses_meet_each_has_its_weight(trainer: Trainer, plain: dict):
    """Overlapping windows of layers 0-2 and 2-3: the gradient of layer 2 is the weighted sum of both losses'."""
    settings = {"method": "overlapping", "layers_per_block": 3, "block_stride": 2, "num_stages": 2, **plain}

    def trained(text: str) -> dict[str, torch.Tensor]:
        return weights(trainer.run(text.replace(",", "-"), 2, **settings, block_loss_weights=text) / "export")

    first, second, both, weighted = (trained(text) for text in ("1,0", "0,1", "1,1", "2,3"))
    moved = set()
    for name in both:
        start = first[name] + second[name] - both[name]  # gradients add up
        ours, above = first[name] - start, second[name] - start
        torch.testing.assert_close(weighted[name], start + 2 * ours + 3 * above, rtol=1e-4, atol=1e-6)
        moved |= {(name.partition("layers.")[2][:1], k) for k, d in enumerate((ours, above)) if d.abs().max() > 1e-5}
    assert {("2", 0), ("2", 1), ("0", 0), ("3", 1)} <= moved
    assert ("0", 1) not in moved
