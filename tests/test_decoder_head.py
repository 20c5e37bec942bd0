"""Heads with private layers: exact, local, exported with the exit, and paid for in the balance."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conftest import TINY, Trainer, block_losses, records, weights
from transformers import AutoConfig, AutoModelForCausalLM

from llm_local.anatomy import probe
from llm_local.config import ModelArguments
from llm_local.partition import Costs, Span, make_partition
from llm_local.slices import Slice, load_slice, new_slice

HEAD = {"head": "decoder", "head_layers": 1}


def make(span: Span, head_layers: int) -> Slice:
    config = AutoConfig.for_model(**TINY)
    part = new_slice(config, probe(config, ModelArguments()), span, 1, head_layers)
    part.model.eval()
    return part


def test_private_layers_are_the_heads_and_the_stream_passes_them_by():
    plain, deep = make(Span(1, 2), 0), make(Span(1, 2), 2)
    ids, hidden = torch.arange(16).reshape(2, 8), torch.randn(2, 8, 32)
    (leaving, normed), (same, other) = plain(hidden, input_ids=ids), deep(hidden, input_ids=ids)
    assert torch.equal(leaving, same), "the next block receives what it received without them"
    assert not torch.equal(normed, other)
    assert deep.head_names == ("model.layers.2", "model.layers.3", "model.norm", "lm_head")
    next_block = make(Span(2, 3), 0).model.get_parameter("model.layers.2.mlp.up_proj.weight")
    assert not torch.equal(deep.model.get_parameter("model.layers.2.mlp.up_proj.weight"), next_block)


def test_the_model_ends_where_it_ends():
    assert len(make(Span(2, 3), 2).private) == 1
    assert len(make(Span(2, 4), 2).private) == 0


def test_a_pretrained_models_next_layers_are_the_first_head(tmp_path: Path):
    config = AutoConfig.for_model(**TINY)
    model = AutoModelForCausalLM.from_config(config).eval()
    model.save_pretrained(tmp_path)
    part = load_slice(str(tmp_path), config, probe(config, ModelArguments()), Span(0, 3), 1)
    part.model.eval()
    ids = torch.arange(8)[None]
    with torch.no_grad():
        assert torch.equal(part.model(input_ids=ids).logits, model(input_ids=ids).logits)


def test_stages_are_balanced_with_their_heads_layers():
    """Two private layers for each stage but the last, which has room for none."""
    plain = make_partition(12, 3, Costs(1.0, 1.0))
    deep = make_partition(12, 3, Costs(1.0, 1.0), head_layers=2)
    assert [len(plain.layers_of(k)) for k in range(3)] == [4, 4, 4]
    assert [len(deep.layers_of(k)) for k in range(3)] == [4, 3, 5], "costs 6, 5 and 5"
    by_block = make_partition(8, 2, Costs(1.0, 1.0), layers_per_block=1, head_layers=3)
    assert [len(by_block.layers_of(k)) for k in range(2)] == [3, 5], "costs 12 and 14"


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
