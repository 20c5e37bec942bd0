"""Heads with private layers: exact, local, exported with the exit, and paid for in the balance."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TINY, Trainer, block_losses, records, weights
from transformers import AutoConfig, AutoModelForCausalLM

from llm_local.checks.preflight import preflight
from llm_local.config import ConfigError, from_flat, parse
from llm_local.model.anatomy import probe
from llm_local.model.block import Block
from llm_local.model.stage import Blueprint, build_block
from llm_local.partition import Costs, Heads, Span, make_partition

HEAD = {"head": "decoder", "head_layers": 1}


def block(index: int, head_layers: int, tmp: str | None = None) -> Block:
    """Block `index` of blocks of one layer, whose heads have head_layers private ones."""
    config = AutoConfig.for_model(**TINY)
    source = {"model_name_or_path": tmp} if tmp else {"config_name": "x.json"}
    run = from_flat({**source, "head": "decoder", "head_layers": head_layers, "layers_per_block": 1})
    partition = make_partition(4, 1, Costs(1.0, 1.0), 1, heads=Heads(layers=run.head_layers_schedule))
    return build_block(Blueprint(run, config, probe(config, run.model), partition), index).eval()


def test_private_layers_are_the_heads_and_the_stream_passes_them_by():
    plain, deep = block(1, 0), block(1, 2)
    ids, hidden = torch.arange(16).reshape(2, 8), torch.randn(2, 8, 32)
    (loss, leaving, _), (other, same, _) = plain(ids, hidden), deep(ids, hidden)
    assert torch.equal(leaving, same), "the next block receives what it received without them"
    assert loss != other
    assert not same.requires_grad
    names = [name for name, _ in deep.head.model.named_parameters()]
    assert {name.split(".")[2] for name in names if name.startswith("model.layers.")} == {"2", "3"}
    assert {"model.norm.weight", "lm_head.weight"} <= set(names)
    assert [name for name, _ in deep.body.model.named_parameters() if not name.startswith("model.layers.1.")] == []


def test_a_heads_layers_are_neither_the_next_blocks_nor_another_heads():
    name = "model.layers.2.mlp.up_proj.weight"
    parts = [block(1, 2).head, block(1, 1).head, block(0, 2).head, block(2, 0).body]
    ours, fewer, below, next_body = (part.model.get_parameter(name) for part in parts)
    assert torch.equal(ours, fewer), "a head with more layers has those of one with fewer"
    assert not torch.equal(ours, below)
    assert not torch.equal(ours, next_body)


def test_a_loss_trains_its_block_and_its_head():
    deep = block(1, 1)
    hidden = torch.randn(1, 8, 32, requires_grad=True)
    loss, _, _ = deep(torch.arange(8)[None], hidden)
    loss.backward()
    assert all(p.grad is not None for p in deep.parameters())


def test_the_model_ends_where_it_ends():
    assert block(2, 2).head.span == Span(3, 4)
    assert block(3, 2).head.span == Span(4, 4)


def test_a_pretrained_models_next_layers_are_the_first_head(tmp_path: Path):
    config = AutoConfig.for_model(**TINY)
    model = AutoModelForCausalLM.from_config(config).eval()
    model.save_pretrained(tmp_path)
    first = block(0, 3, str(tmp_path))
    ids = torch.arange(8)[None]
    with torch.no_grad():
        logits = first(ids, None, return_logits=True)[0]
        assert torch.equal(logits, model(input_ids=ids).logits)


def test_stages_are_balanced_with_their_heads_layers():
    """Two private layers for each stage but the last, which has room for none."""
    plain = make_partition(12, 3, Costs(1.0, 1.0))
    deep = make_partition(12, 3, Costs(1.0, 1.0), heads=Heads(layers=[2]))
    assert [len(plain.layers_of(k)) for k in range(3)] == [4, 4, 4]
    assert [len(deep.layers_of(k)) for k in range(3)] == [4, 3, 5], "costs 6, 5 and 5"
    by_block = make_partition(8, 2, Costs(1.0, 1.0), layers_per_block=1, heads=Heads(layers=[3]))
    assert [len(by_block.layers_of(k)) for k in range(2)] == [3, 5], "costs 15 and 19, of that 3 and 5 for matrices"


@pytest.mark.processes
@pytest.mark.parametrize("zero", [1, 3])
def test_blocks_with_private_layers_train_alike_anywhere_and_export(trainer: Trainer, zero: int):
    settings = {**HEAD, "layers_per_block": 1, "deepspeed": f"configs/ds/zero{zero}.json"}
    one = trainer.run("one", 1, num_stages=1, **settings)
    two = trainer.run("two", 2, num_stages=2, stage_layers="2,2", **settings)
    ours, theirs = torch.tensor(block_losses(two, 2)), torch.tensor(block_losses(one, 1))
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=0.0)
    exit_config = AutoConfig.from_pretrained(two / "export/exits/stage-00")
    assert exit_config.num_hidden_layers == 3, "two layers and one of the head"
    whole, early = weights(two / "export"), weights(two / "export/exits/stage-00")
    name = "model.layers.{}.mlp.up_proj.weight"
    assert torch.equal(whole[name.format(1)], early[name.format(1)])
    assert not torch.equal(whole[name.format(2)], early[name.format(2)]), "the third layer is the head's own"


@pytest.mark.processes
def test_a_head_with_private_layers_resumes_and_does_not_notice_what_is_behind(trainer: Trainer):
    settings = {**HEAD, "num_stages": 2, "stage_layers": "2,2", "save_steps": 2, "gradient_checkpointing": True}
    straight = trainer.run("straight", 2, **settings)
    wanted = weights(straight / "export/exits/stage-00")
    (straight / "checkpoints/step-00000004/manifest.json").unlink()
    again = trainer.run("straight", 2, **settings, resume_from_checkpoint="true")
    found = weights(again / "export/exits/stage-00")
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    plain = trainer.run("plain", 2, num_stages=2, stage_layers="2,2")
    assert records(plain, 0)[0]["loss"] != records(again, 0)[0]["loss"]


@pytest.mark.processes
def test_a_schedule_of_private_layers_trains_exports_and_resumes(trainer: Trainer):
    settings = {"head": "decoder", "head_layers_schedule": "2,1,0", "num_stages": 2, "save_steps": 2}
    settings |= {"layers_per_block": 1, "config_overrides": "num_hidden_layers=5", "stage_layers": "2,3"}
    straight = trainer.run("straight", 2, **settings)
    exits = [straight / "export/exits" / f"stage-{stage:02d}" for stage in (0, 1)]
    assert [AutoConfig.from_pretrained(exit).num_hidden_layers for exit in exits] == [3, 5], "2 + 1 and 5 + 0"
    wanted = weights(exits[0])
    (straight / "checkpoints/step-00000004/manifest.json").unlink()
    again = trainer.run("straight", 2, **settings, resume_from_checkpoint="true")
    found = weights(again / "export/exits/stage-00")
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


def test_refusals_that_need_the_model(trainer: Trainer):
    def problems(**flags: Any) -> list[str]:
        with pytest.raises(ConfigError) as refusal:
            preflight(parse(trainer.flags("run", head="decoder", num_stages=2, layers_per_block=1, **flags)), 2)
        return refusal.value.problems

    (problem,) = problems(head_layers_schedule="1,1,1,0,0")
    assert problem.startswith("head_layers_schedule='1,1,1,0,0' has 5 numbers, the model has 4 blocks;")
    (problem,) = problems(head_layers_schedule="1,3")
    assert problem.startswith("head_layers_schedule='1,3' gives block 1 3 private layers, the model has 2 above it;")
    (problem,) = problems(head_layers=4)
    assert problem == "head_layers=4 is more than the 3 layers above the first block; use at most 3"
    (problem,) = problems(head_layers=1, block_loss_weights="1,1,1,1,1")
    assert problem.startswith("block_loss_weights='1,1,1,1,1' has 5 numbers, the model has 4 blocks;")
