"""Rows of unequal length: padding masks, positions and ignored labels on their way through slices, heads and links."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
from conftest import TINY
from ranks import run_ranks
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from llm_local.config import from_flat
from llm_local.launch import Launch
from llm_local.links.ends import Receiver, Sender
from llm_local.links.packet import TRAIN, Packet
from llm_local.model.anatomy import probe
from llm_local.model.block import Block
from llm_local.model.stage import Blueprint, build_block
from llm_local.partition import Partition, Span
from llm_local.place import Place
from llm_local.rendezvous import open_store
from llm_local.watchdog import Watchdog
from llm_local.world import connect

LLAMA = {k: v for k, v in TINY.items() if k != "model_type"} | {"vocab_size": 64, "num_hidden_layers": 3}
SIZES: dict[str, Any] = {"vocab_size": 64, "hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 3}
KINDS: dict[str, dict[str, Any]] = {
    "llama": LLAMA,
    "llama-eager": LLAMA,
    "gemma3_text": LLAMA | {"head_dim": 8, "sliding_window": 4, "sliding_window_pattern": 2},
    "gpt_oss": LLAMA | {"head_dim": 8, "sliding_window": 4, "num_local_experts": 4, "num_experts_per_tok": 2},
    "gpt2": SIZES | {"n_positions": 32, "bos_token_id": 1, "eos_token_id": 2},
    "opt": SIZES | {"ffn_dim": 64, "word_embed_proj_dim": 16, "max_position_embeddings": 32},
    "bloom": {"vocab_size": 64, "hidden_size": 32, "n_layer": 3, "n_head": 4},
    "falcon": SIZES,
    "qwen3_next": LLAMA | {"head_dim": 8, "layer_types": ["linear_attention", "full_attention", "linear_attention"]},
}
PAD, TOKENS, REAL = 0, 12, (12, 7)
WITH_POSITIONS = ("llama", "llama-eager", "gemma3_text", "gpt_oss", "gpt2", "opt", "qwen3_next")


def make(name: str, **settings: Any) -> tuple[list[Block], PreTrainedModel]:
    """The model in three blocks, and as transformers has it, with the same weights."""
    kind, _, kernel = name.partition("-")
    config = AutoConfig.for_model(kind, **{"tie_word_embeddings": False, **KINDS[name]})
    run = from_flat({"config_name": "x", "attn_implementation": kernel or None, **settings})
    anatomy, spans = probe(config, run.model), tuple(Span(k, k + 1) for k in range(3))
    blocks = [build_block(Blueprint(run, config, anatomy, Partition(spans, spans)), k).eval() for k in range(3)]
    state: dict[str, torch.Tensor] = {}
    for block in blocks:
        with torch.no_grad():
            for parameter in block.body.model.parameters():
                parameter.mul_(3)
        state |= block.body.model.state_dict()
    state |= blocks[-1].head.model.state_dict()
    whole = AutoModelForCausalLM.from_config(config, attn_implementation=kernel or None).eval()
    assert not whole.load_state_dict(state, strict=False).missing_keys
    return blocks, whole


def padded(side: str, has_positions: bool) -> dict[str, torch.Tensor]:
    """A batch as a tokenizer pads it, with labels of -100 and the positions of generate()."""
    ids = torch.randint(3, 64, (2, TOKENS), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    for row, real in enumerate(REAL):
        mask[row, real:] = 0
    mask = mask.flip(1) if side == "left" else mask
    batch = {"input_ids": ids.masked_fill(mask == 0, PAD), "attention_mask": mask}
    batch["labels"] = ids.masked_fill(mask == 0, -100)
    return batch | ({"position_ids": (mask.cumsum(1) - 1).clamp(min=0)} if has_positions else {})


@pytest.mark.processes
@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_rows_have_the_undivided_models_logits(name: str, side: str):
    blocks, whole = make(name)
    batch = padded(side, name in WITH_POSITIONS)
    hidden = None
    for block in blocks[:-1]:
        hidden = block(hidden=hidden, **batch)[1]
    logits = blocks[-1](hidden=hidden, return_logits=True, **batch)[0]
    theirs = whole(**batch, use_cache=False)
    real = batch["attention_mask"] == 1
    assert torch.equal(logits[real], theirs.logits[real])
    loss = blocks[-1](hidden=hidden, **batch)[0]
    torch.testing.assert_close(loss, theirs.loss, rtol=1e-5, atol=0.0)


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_padded_row_is_what_it_is_alone(side: str):
    """Through a head with private layers, too: what is in the padding makes no difference."""
    (first, *_), _ = make("llama", head="decoder", head_layers=2)
    batch = padded(side, has_positions=True)
    real = batch["attention_mask"][1] == 1
    alone = first(batch["input_ids"][1:, real], None, return_logits=True)[0]
    together = first(hidden=None, return_logits=True, **batch)[0]
    torch.testing.assert_close(together[1:, real], alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["llama", "opt", "gpt_oss"])
def test_the_loss_is_the_mean_over_the_real_tokens(name: str):
    (first, *_), _ = make(name, head="decoder", head_layers=2)
    batch = padded("right", has_positions=True)
    rows = [batch["input_ids"][row : row + 1, :real] for row, real in enumerate(REAL)]
    sums = [first(row, None)[0].item() * (row.shape[1] - 1) for row in rows]
    assert first(hidden=None, **batch)[0].item() == pytest.approx(sum(sums) / (sum(REAL) - 2), rel=1e-5)


def stages() -> Any:
    """Stage 0 sends what its block makes of a padded batch; stage 1 compares with the undivided model."""
    launch = Launch.from_environment(os.environ)
    place = Place(launch.rank, (1,) * launch.world_size)
    world = connect(launch, place, open_store(launch, "test", 60.0), Watchdog(launch.rank), 60.0, 20.0)
    blocks, whole = make("opt")
    batch = padded("left", has_positions=True)
    if place.stage == 0:
        hidden = blocks[1](hidden=blocks[0](hidden=None, **batch)[1], **batch)[1]
        sender = Sender(world, 1, "fp32", 2)
        sender.send(Packet(TRAIN, 1, 0, hidden=hidden, **batch))
        sender.close(1)
        return True
    receiver = Receiver(world, 0, 2)
    packet = receiver.receive(TRAIN, 1, 0)
    receiver.close(1)
    logits = blocks[2](hidden=packet.hidden, return_logits=True, **packet.integer_parts())[0]
    real = batch["attention_mask"] == 1
    return torch.equal(logits[real], whole(**batch, use_cache=False).logits[real])


@pytest.mark.processes
def test_a_link_carries_all_that_a_padded_batch_needs():
    assert run_ranks(stages, 2) == [True, True]
