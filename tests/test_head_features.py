"""Heads that also read what entered their block: a learned share of it, and no gradient to where it came from."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from conftest import TINY, Trainer, block_losses, records, weights
from transformers import AutoConfig

from llm_local.block_engine import parameter_groups
from llm_local.checks.preflight import preflight
from llm_local.config import from_flat, parse
from llm_local.model.anatomy import probe
from llm_local.model.block import Block
from llm_local.model.loss import head_loss
from llm_local.model.stage import Blueprint, build_block
from llm_local.partition import Costs, make_partition

FLAGS = {"config_name": "x.json", "layers_per_block": 1, "head_features": True, "weight_decay": 0.1}


def block(index: int, **flags: object) -> Block:
    config = AutoConfig.for_model(**TINY)
    run = from_flat(FLAGS | flags)
    partition = make_partition(4, 1, Costs(1.0, 1.0), 1)
    return build_block(Blueprint(run, config, probe(config, run.model), partition), index).eval()


def micro_batch() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 4096, (2, 8), generator=generator), torch.randn(2, 8, 32, generator=generator)


def test_blocks_between_the_first_and_the_last_have_the_feature():
    """So the first exit reads its layers alone, and the whole model is one of its class."""
    assert [block(index).feature_scale is not None for index in range(4)] == [False, True, True, False]
    assert block(1, head_features=False).feature_scale is None


def test_at_first_it_changes_nothing_but_learns():
    ids, hidden = micro_batch()
    mixed = block(1)
    assert mixed.feature_scale is not None
    loss = mixed(ids, hidden)[0]
    assert torch.equal(loss, block(1, head_features=False)(ids, hidden)[0])
    loss.backward()
    assert mixed.feature_scale.grad is not None
    assert mixed.feature_scale.grad.abs() > 0


def test_the_gradients_are_those_of_plain_autograd_and_nothing_flows_below():
    """An earlier block in one graph with this one: its gradient is what it has without the feature."""
    ids, below = micro_batch()
    mixed = block(1)
    scale = mixed.feature_scale
    assert scale is not None
    with torch.no_grad():
        scale.fill_(0.7)
    parameters = [p for p in mixed.parameters() if p is not scale]
    entering = below.clone().requires_grad_()
    loss, leaving, features = mixed(ids, entering)
    ours = torch.autograd.grad(loss, [*parameters, scale, entering], allow_unused=True)
    entering = below.clone().requires_grad_()
    alpha = torch.tensor(0.7, requires_grad=True)
    through = mixed.body(entering, input_ids=ids)[0]
    reference = head_loss(mixed.head, mixed.normed(through + alpha * below, ids), ids, None)
    theirs = torch.autograd.grad(reference, [*parameters, alpha, entering], allow_unused=True)
    torch.testing.assert_close(loss, reference, rtol=1e-6, atol=0.0)
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine.squeeze(), other.squeeze(), rtol=1e-4, atol=1e-8)
    assert torch.equal(leaving, through.detach()), "the next block receives what it received without the feature"
    assert torch.equal(features, through)


def test_a_window_and_the_logits_see_the_same_mixture():
    ids, hidden = micro_batch()
    mixed = block(2)
    assert mixed.feature_scale is not None
    with torch.no_grad():
        mixed.feature_scale.fill_(0.7)
    logits = mixed(ids, hidden, return_logits=True)[0]
    plain = torch.nn.functional.cross_entropy(logits[:, :-1].reshape(-1, 4096), ids[:, 1:].reshape(-1))
    torch.testing.assert_close(mixed(ids, hidden)[0], plain, rtol=1e-5, atol=0.0)
    half = torch.arange(2, 6).expand(2, 4)
    some = torch.nn.functional.cross_entropy(logits[:, 2:5].reshape(-1, 4096), ids[:, 3:6].reshape(-1))
    torch.testing.assert_close(mixed(ids, hidden, window=half)[0], some, rtol=1e-5, atol=0.0)


def test_the_scale_is_not_decayed():
    mixed = block(1)
    decayed, spared = parameter_groups(from_flat(FLAGS), mixed)
    assert (decayed["weight_decay"], spared["weight_decay"]) == (0.1, 0.0)
    assert any(p is mixed.feature_scale for p in spared["params"])


@pytest.mark.processes
@pytest.mark.parametrize("zero", [0, 3])
def test_a_run_trains_alike_anywhere_and_exports_the_whole_model_alone(trainer: Trainer, zero: int):
    settings = {"layers_per_block": 1, "head_features": True, "deepspeed": f"configs/ds/zero{zero}.json"}
    settings |= {"save_steps": 2, "eval_steps": 2}
    two = trainer.run("two", 2, num_stages=2, **settings)
    one = trainer.run("one", 1, num_stages=1, **settings)
    for split in ("train", "eval"):
        ours, theirs = (torch.tensor(block_losses(run, n, split)) for run, n in ((two, 2), (one, 1)))
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=0.0)
    assert not (two / "export/exits").exists()
    assert json.loads((two / "export/config.json").read_text())["num_hidden_layers"] == 4
    plain = block_losses(trainer.run("plain", 2, num_stages=2, **settings | {"head_features": False}), 2)
    changed = [a != b for a, b in zip(block_losses(two, 2)[-1], plain[-1], strict=True)]
    assert changed[:3] == [False, True, True], "the first block's head has no feature"
    whole = weights(two / "export")
    (two / "checkpoints/step-00000004/manifest.json").unlink()
    again = trainer.run("two", 2, num_stages=2, **settings, resume_from_checkpoint="true")
    assert all(torch.equal(whole[name], tensor) for name, tensor in weights(again / "export").items())
    assert records(again, 0)[-1]["step"] == 4


def test_a_run_says_beforehand_that_there_will_be_no_exits(trainer: Trainer, tmp_path: Path):
    (warning,) = preflight(parse(trainer.flags("run", head_features=True)), 1).warnings
    assert warning.startswith("head_features: heads read more than the layers below, so that no exit is exported")
