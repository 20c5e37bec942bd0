"""output_router_logits: each block's loss has the router loss of its own layers, as the model class computes it."""

from __future__ import annotations

import re
from itertools import pairwise
from typing import Any

import pytest
import torch
from conftest import TINY, Trainer, block_losses
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from llm_local.checks.preflight import preflight
from llm_local.checks.trial import router_problems
from llm_local.config import ConfigError, from_flat, parse
from llm_local.methods.schedule import Forward
from llm_local.model.anatomy import probe
from llm_local.model.block import Block
from llm_local.model.stage import Blueprint, build_block
from llm_local.partition import Partition, Span

LLAMA = {k: v for k, v in TINY.items() if k != "model_type"} | {"vocab_size": 64}
EXPERTS = {"num_experts_per_tok": 2, "router_aux_loss_coef": 0.5, "output_router_logits": True}
KINDS: dict[str, dict[str, Any]] = {
    "mixtral": LLAMA | EXPERTS | {"num_local_experts": 4},
    "qwen3_moe": LLAMA
    | EXPERTS
    | {"num_experts": 4, "moe_intermediate_size": 32, "head_dim": 8, "mlp_only_layers": [0]},
    "gpt_oss": LLAMA | EXPERTS | {"num_local_experts": 4, "head_dim": 8},
}


def make_blocks(kind: str, cuts: tuple[int, ...], **settings: Any) -> list[Block]:
    config = AutoConfig.for_model(kind, **KINDS[kind])
    run = from_flat({"config_name": "x", **settings})
    spans = tuple(Span(a, b) for a, b in pairwise(cuts))
    partition = Partition(spans, tuple(Span(k, k + 1) for k in range(len(spans))))
    anatomy = probe(config, run.model)
    return [build_block(Blueprint(run, config, anatomy, partition), k) for k in range(len(spans))]


def micro_batch() -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.randint(3, 64, (2, 16), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, 11:] = 0
    return ids, mask


def router_part(block: Block, *inputs: Any, **more: Any) -> torch.Tensor:
    """What the block's training loss has beside the language model's."""
    return block.train()(*inputs, **more)[0] - block.eval()(*inputs, **more)[0]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("is_padded", [False, True])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_one_block_has_the_loss_of_the_class(kind: str, is_padded: bool, checkpointing: bool):
    (block,) = make_blocks(kind, (0, 4), gradient_checkpointing=checkpointing)
    whole = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **KINDS[kind]))
    state = block.body.model.state_dict() | block.head.model.state_dict()
    assert not whole.load_state_dict(state, strict=False).missing_keys
    ids, mask = micro_batch()
    inputs = {"labels": ids.masked_fill(mask == 0, -100), "attention_mask": mask} if is_padded else {"labels": ids}
    theirs = whole.train()(input_ids=ids, use_cache=False, **inputs)
    ours = block.train()(ids, None, **inputs)[0]
    assert theirs.aux_loss > 0.5
    torch.testing.assert_close(ours, theirs.loss, rtol=1e-6, atol=0.0)
    torch.testing.assert_close(block.eval()(ids, None, **inputs)[0], theirs.loss - 0.5 * theirs.aux_loss)
    ours.backward()
    theirs.loss.backward()
    wanted = dict(whole.named_parameters())
    for part in (block.body.model, block.head.model):
        for name, parameter in part.named_parameters():
            torch.testing.assert_close(parameter.grad, wanted[name].grad, rtol=1e-4, atol=1e-6, msg=name)


def test_each_block_has_that_of_its_own_layers():
    first, second = make_blocks("mixtral", (0, 1, 4))
    ids, _ = micro_batch()
    hidden = first.eval()(ids, None)[1]
    said: list[torch.Tensor] = []
    for layer in second.body.model.model.layers[1:]:
        layer.mlp.gate.register_forward_hook(lambda _module, _args, output: said.append(output[0]))
    second.train()(ids, hidden)
    layers: Any = tuple(said)
    wanted = 0.5 * torch.as_tensor(load_balancing_loss_func(layers, 4, 2))
    assert len(said) == 3
    torch.testing.assert_close(router_part(second, ids, hidden), wanted, rtol=1e-4, atol=1e-6)


def test_a_block_without_experts_adds_nothing():
    dense, _ = make_blocks("qwen3_moe", (0, 1, 4))
    ids, _ = micro_batch()
    assert router_part(dense, ids, None) == 0.0


def test_private_layers_have_one_of_their_own_and_of_the_positions_that_they_see():
    first, _ = make_blocks("mixtral", (0, 1, 4), head="decoder", head_layers=2)
    (plain, _) = make_blocks("mixtral", (0, 1, 4))
    ids, mask = micro_batch()
    window = torch.tensor([[2], [5]]) + torch.arange(8)
    body = router_part(plain, ids, None, attention_mask=mask)
    both = router_part(first, ids, None, attention_mask=mask)
    some = router_part(first, ids, None, attention_mask=mask, window=window)
    assert both > body + 0.3
    assert some > body + 0.3
    assert both != some
    gates = [layer.mlp.gate.weight for layer in first.head.model.model.layers[1:3]]
    loss = first.train()(ids, None, meaning=Forward(detach_head=True))[0]
    body_gate = first.body.model.model.layers[0].mlp.gate.weight
    assert all(g.abs().sum() > 0 for g in torch.autograd.grad(loss, [*gates, body_gate]))
    waiting = first(ids, None, meaning=Forward(detach_head=True, body_waits=True))[0]
    found = torch.autograd.grad(waiting, [*gates, body_gate], allow_unused=True)
    assert found[-1] is None, "a body that waits for its head has no gradient"
    assert all(g.abs().sum() > 0 for g in found[:-1])


MOE = TINY | {"model_type": "mixtral", "num_local_experts": 4, "router_aux_loss_coef": 0.1}


@pytest.mark.processes
def test_stages_and_global_steps_train_alike(trainer: Trainer):
    """An override asks for it; evaluation stays the language model's loss."""
    settings = {"config_name": trainer.model(MOE), "layers_per_block": 1, "final_backprop_steps": 2, "eval_steps": 4}
    asked = settings | {"config_overrides": "output_router_logits=true"}
    one, two = (trainer.run(f"on-{n}", n, num_stages=n, **asked) for n in (1, 2))
    torch.testing.assert_close(
        torch.tensor(block_losses(two, 2)), torch.tensor(block_losses(one, 1)), rtol=1e-5, atol=0.0
    )
    plain = trainer.run("plain", 1, **settings)
    added = torch.tensor(block_losses(one, 1)[0]) - torch.tensor(block_losses(plain, 1)[0])
    assert (added > 0.15).all(), "a coefficient of 0.1 times two experts a token, at least"
    evaluated = torch.tensor(block_losses(one, 1, "eval")) - torch.tensor(block_losses(plain, 1, "eval"))
    assert evaluated.abs().max() < 0.1


@pytest.mark.processes
def test_overlapping_blocks_train_alike_on_stages_and_with_zero(trainer: Trainer):
    settings = {"config_name": trainer.model(MOE | {"output_router_logits": True}), "method": "overlapping"}
    one = trainer.run("one", 1, **settings)
    two = trainer.run("two", 2, num_stages=2, deepspeed="configs/ds/zero2.json", **settings)
    torch.testing.assert_close(
        torch.tensor(block_losses(two, 2)), torch.tensor(block_losses(one, 1)), rtol=1e-5, atol=0.0
    )


@pytest.mark.processes
def test_zero_3_has_the_same_losses(trainer: Trainer):
    settings = {"config_name": trainer.model(MOE | {"output_router_logits": True}), "layers_per_block": 2}
    one = trainer.run("one", 1, per_device_train_batch_size=4, **settings)
    sharded = trainer.run("sharded", 2, deepspeed="configs/ds/zero3.json", **settings)
    # a replica balances its own rows, so that its loss is near the one of all rows and not equal to it
    torch.testing.assert_close(
        torch.tensor(block_losses(sharded, 1)), torch.tensor(block_losses(one, 1)), rtol=1e-2, atol=0.0
    )


@pytest.mark.processes
def test_an_exit_without_experts_asks_for_none(trainer: Trainer):
    """Its class fails where router losses are asked for and no layer has a router; the whole model has some."""
    dense_first = KINDS["qwen3_moe"] | {"model_type": "qwen3_moe", "mlp_only_layers": [0, 1], "vocab_size": 4096}
    export = trainer.run("run", 2, num_stages=2, max_steps=1, config_name=trainer.model(dense_first)) / "export"
    asked = [AutoConfig.from_pretrained(f).output_router_logits for f in (export, export / "exits/stage-00")]
    assert asked == [True, False]


@pytest.mark.processes
@pytest.mark.parametrize(
    ("kind", "flags", "line"),
    [
        (
            "llama4_text",
            {},
            "model type 'llama4_text' (adds no router loss to its own; set it to false|has no router loss)",
        ),
        ("llama", {}, "model type 'llama' has no router loss"),
        (
            "mixtral",
            {"method": "backprop", "num_stages": 2},
            "with method=backprop on several stages the router loss is one number of all their layers",
        ),
        (
            "mixtral",
            {"method": "overlapping", "final_backprop_steps": 2},
            "does not go with final_backprop_steps and method=overlapping; use method=chunked",
        ),
        ("mixtral", {"method": "overlapping"}, None),
        ("mixtral", {"method": "backprop"}, None),
        ("deepseek_v3", {}, "model type 'deepseek_v3' (adds|has) no router loss"),
    ],
)
def test_what_cannot_be_balanced_is_refused(kind: str, flags: dict[str, Any], line: str | None):
    config = AutoConfig.for_model(kind)
    run = from_flat({"config_name": "x", **flags})
    problems = router_problems(run, config, probe(config, run.model))
    assert len(problems) == (0 if line is None else 1)
    assert line is None or re.search(line, problems[0])
    assert line is None or problems[0].startswith("output_router_logits=true")


def test_the_start_says_so(trainer: Trainer):
    settings = {"config_name": trainer.model(MOE), "method": "backprop", "num_stages": 2}
    flags = trainer.flags("refused", **settings, config_overrides="output_router_logits=true")
    with pytest.raises(ConfigError, match="output_router_logits=true: with method=backprop on several stages"):
        preflight(parse(flags), 2)
