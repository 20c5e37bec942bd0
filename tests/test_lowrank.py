"""Private layers of low rank: what they start as, what they cost, and that an exit is a plain model all the same."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TINY, Trainer, block_losses, weights
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from llm_local.checks.preflight import preflight
from llm_local.config import ConfigError, from_flat, parse
from llm_local.model.anatomy import probe
from llm_local.model.block import Block
from llm_local.model.lowrank import LowRankLinear, multiplied
from llm_local.model.stage import Blueprint, build_block
from llm_local.partition import Costs, Heads, make_partition

SETTINGS = {"head": "decoder", "head_layers": 1, "head_rank": 4, "stage_layers": "2,2"}


def matrix(rows: int, columns: int, bias: bool = False) -> nn.Linear:
    torch.manual_seed(1)
    return nn.Linear(columns, rows, bias=bias)


def block(index: int, rank: int | None, path: Path | None = None, seed: int = 42) -> Block:
    config = AutoConfig.for_model(**TINY)
    source = {"model_name_or_path": str(path)} if path else {"config_name": "x.json"}
    flags = {**source, "head": "decoder", "head_layers": 2, "head_rank": rank, "layers_per_block": 1, "seed": seed}
    run = from_flat(flags)
    partition = make_partition(4, 1, Costs(1.0, 1.0), 1, heads=Heads(layers=[2]))
    return build_block(Blueprint(run, config, probe(config, run.model), partition), index).eval()


@pytest.mark.parametrize(("rows", "columns"), [(16, 32), (32, 16), (24, 24)])
def test_the_factors_are_the_best_of_their_rank(rows: int, columns: int):
    """The truncated decomposition (Eckart and Young), or its direction with the original's norm."""
    linear = matrix(rows, columns)
    left, values, right = torch.linalg.svd(linear.weight.detach(), full_matrices=False)
    best = (left[:, :5] * values[:5]) @ right[:5]
    plain = LowRankLinear.of(linear, 5, keep_norm=False)
    torch.testing.assert_close(plain.weight, best, rtol=1e-2, atol=1e-3)
    scaled = LowRankLinear.of(linear, 5, keep_norm=True)
    torch.testing.assert_close(scaled.weight.norm(), linear.weight.norm(), rtol=1e-5, atol=0.0)
    torch.testing.assert_close(scaled.weight / scaled.weight.norm(), best / best.norm(), rtol=1e-2, atol=1e-3)
    assert {tuple(p.shape) for p in plain.parameters()} == {(5, columns), (rows, 5)}


def test_the_bias_stays_and_the_product_is_applied():
    linear = matrix(16, 32, bias=True)
    low = LowRankLinear.of(linear, 5, keep_norm=False)
    assert low.bias is not None
    assert torch.equal(low.bias, linear.bias)
    x = torch.randn(3, 7, 32)
    torch.testing.assert_close(low(x), nn.functional.linear(x, low.weight, linear.bias), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("keep_norm", [True, False])
def test_a_matrix_of_zeros_stays_zero_and_can_learn(keep_norm: bool):
    linear = matrix(16, 32)
    nn.init.zeros_(linear.weight)
    low = LowRankLinear.of(linear, 5, keep_norm)
    assert not low.weight.any()
    low(torch.randn(3, 32)).sum().backward()
    assert low.up.weight.grad is not None
    assert low.up.weight.grad.abs().sum() > 0


def test_the_private_layers_matrices_alone_are_made_smaller():
    low, full = block(0, 4), block(0, None)
    names = {name for name, module in low.head.model.named_modules() if isinstance(module, LowRankLinear)}
    matrices = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
    matrices += ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
    assert names == {f"model.layers.{layer}.{name}" for layer in (1, 2) for name in matrices}
    assert not any(isinstance(module, LowRankLinear) for module in low.body.model.modules())
    ours, theirs = (sum(p.numel() for p in b.head.model.model.layers.parameters()) for b in (low, full))
    assert ours < 0.5 * theirs
    kept = dict(full.head.model.named_parameters())
    assert all(
        torch.equal(p, kept[n]) for n, p in low.head.model.named_parameters() if ".up." not in n and ".down." not in n
    )


def test_the_same_seed_gives_the_same_factors_and_leaves_the_generator_alone():
    torch.manual_seed(5)
    state = torch.get_rng_state()
    one = block(0, 4)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(6)
    again, other = block(0, 4), block(0, 4, seed=43)
    for name, parameter in one.named_parameters():
        assert torch.equal(parameter, again.get_parameter(name)), name
    name = "head_model.model.layers.1.mlp.up_proj.down.weight"
    assert not torch.equal(one.get_parameter(name), other.get_parameter(name))


def test_a_pretrained_models_layers_are_truncated(tmp_path: Path):
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**TINY))
    model.save_pretrained(tmp_path)
    low = block(0, 15, tmp_path)
    original = model.model.layers[1].mlp.up_proj.weight
    _, values, _ = torch.linalg.svd(original.detach())
    product: Any = low.head.model.get_submodule("model.layers.1.mlp.up_proj")
    torch.testing.assert_close((product.weight - original).norm(), values[15:].norm(), rtol=1e-3, atol=0.0)


def test_an_export_has_the_product_under_the_plain_name():
    head = block(0, 4).head
    tensors = multiplied(head, {k: v.detach() for k, v in head.model.state_dict().items()})
    plain = block(0, None).head.model.state_dict()
    assert set(tensors) == set(plain)
    assert all(tensors[name].shape == plain[name].shape for name in plain)
    assert multiplied(head, {}) == {}


def problems(trainer: Trainer, **flags: Any) -> list[str]:
    with pytest.raises(ConfigError) as refusal:
        preflight(parse(trainer.flags("run", num_stages=2, **{**SETTINGS, **flags})), 2)
    return refusal.value.problems


@pytest.mark.processes
def test_refusals(trainer: Trainer):
    assert problems(trainer, head_rank=16) == [
        "head_rank=16 is not below the smaller side 16 of layer 2.self_attn.k_proj; use at most 15"
    ]
    (problem,) = problems(trainer, head="linear", head_layers=0)
    assert problem.startswith("head_rank=4 is for the private layers of a head, head=linear has none;")
    (problem,) = problems(trainer, head="shared", head_layers=0)
    assert problem == "head_rank=4: no head has private layers; set head_layers=1 or more, or leave it out"
    gpt2 = {"model_type": "gpt2", "vocab_size": 4096, "n_embd": 32, "n_layer": 4, "n_head": 4, "n_positions": 64}
    path = trainer.model(gpt2 | {"bos_token_id": 1, "eos_token_id": 2})
    assert problems(trainer, config_name=path) == [
        "head_rank=4: the layers of model type 'gpt2' have no nn.Linear to make smaller; leave it out"
    ]


@pytest.mark.processes
@pytest.mark.parametrize("zero", [1, 3])
def test_a_run_exports_plain_models_resumes_and_does_not_depend_on_the_stages(trainer: Trainer, zero: int):
    """The run itself compares each exit, loaded by transformers with no unexpected key, with the pipeline's logits."""
    settings = SETTINGS | {"layers_per_block": 2, "deepspeed": f"configs/ds/zero{zero}.json", "save_steps": 2}
    two = trainer.run("two", 4, num_stages=2, per_device_train_batch_size=1, **settings)
    one = trainer.run("one", 1, **(settings | {"stage_layers": "4"}))
    layer, attention, of_rank_4 = 9216 + 2 * 32, 12 * 32 * 32, 4 * (2 * 64 + 2 * 48 + 3 * 96)
    flops = 2 * (6 * layer + attention) + 6 * of_rank_4 + attention + 6 * 4096 * 32
    assert json.loads((two / "metrics/run.json").read_text())["stages"][0]["flops"] == flops
    losses = torch.tensor(block_losses(one, 1))
    torch.testing.assert_close(torch.tensor(block_losses(two, 2)), losses, rtol=1e-4, atol=0.0)
    exit = weights(two / "export/exits/stage-00")
    assert set(exit) == {name for name in weights(two / "export") if not name.startswith("model.layers.3.")}
    assert torch.linalg.matrix_rank(exit["model.layers.2.mlp.up_proj.weight"], rtol=1e-4) == 4
    assert torch.linalg.matrix_rank(exit["model.layers.1.mlp.up_proj.weight"], rtol=1e-4) == 32
    (two / "checkpoints/step-00000004/manifest.json").unlink()
    again = trainer.run(
        "two", 4, num_stages=2, per_device_train_batch_size=1, **settings, resume_from_checkpoint="true"
    )
    found = weights(again / "export/exits/stage-00")
    assert all(torch.equal(found[name], exit[name]) for name in exit)
