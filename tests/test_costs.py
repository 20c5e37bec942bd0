"""Counted FLOPs against the ones that torch counts while a model trains, and against figures of known models."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import pytest
import torch
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM

from llm_local.costs import (
    Setting,
    Shape,
    count_flops,
    count_passes,
    flops_so_far,
    head_in_layers,
    low_rank_parameters,
    setting_of,
)
from llm_local.partition import Costs, Span, make_partition

HIDDEN, INNER, VOCAB, ROWS, TOKENS = 64, 160, 512, 2, 48
SHAPE = Shape(
    hidden_size=HIDDEN,
    seq_length=TOKENS,
    layer_parameters=4 * HIDDEN * HIDDEN + 3 * HIDDEN * INNER,
    head_parameters=VOCAB * HIDDEN,
)
WHOLE = (Span(0, 8),)
LAYER = 6 * SHAPE.layer_parameters + 12 * TOKENS * HIDDEN
HEAD = 6 * SHAPE.head_parameters
# What torch counts and the formula leaves out: the products of rotary angles, forward only, H/A/2 FLOPs a token.
ROTARY = 1e-3


def halves(length: int, layers: int = 8) -> tuple[Span, ...]:
    return tuple(Span(a, a + length) for a in range(0, layers, length))


def llama(num_layers: int) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=HIDDEN,
        intermediate_size=INNER,
        num_hidden_layers=num_layers,
        num_attention_heads=4,
        num_key_value_heads=4,
        attn_implementation="eager",
        tie_word_embeddings=False,
    )
    return LlamaForCausalLM(config)


@cache
def measured(num_layers: int, frozen_head: bool = False, rows: int = ROWS, tokens: int = TOKENS) -> float:
    """FLOPs of one forward and backward pass for one token, as torch counts its matrix products."""
    model = llama(num_layers)
    if frozen_head:
        model.lm_head.weight.requires_grad_(False)
    ids = torch.arange(rows * tokens).reshape(rows, tokens) % VOCAB
    with FlopCounterMode(display=False) as counter:
        logits = model(ids, use_cache=False).logits
        F.cross_entropy(logits.flatten(0, 1), ids.flatten()).backward()
    return counter.get_total_flops() / (rows * tokens)


def test_a_layer_costs_what_torch_counts():
    assert measured(3) - measured(2) == pytest.approx(LAYER)
    assert count_flops(SHAPE, Setting((Span(0, 3),))).total == pytest.approx(measured(3), rel=ROTARY)


def test_a_head_costs_what_torch_counts():
    head = measured(2) - 2 * LAYER
    assert head == pytest.approx(HEAD, rel=ROTARY)
    assert measured(2, frozen_head=True) - 2 * LAYER == pytest.approx(HEAD * 2 / 3, rel=ROTARY)


def test_what_runs_before_the_layers_is_the_first_blocks():
    setting = Setting((Span(0, 2), Span(2, 3)))
    plain, more = (count_flops(replace(SHAPE, first_parameters=n), setting) for n in (0, 100))
    assert more.blocks == (plain.blocks[0] + 600, plain.blocks[1])
    assert more.backprop == plain.backprop + 600
    passes = count_passes(replace(SHAPE, first_parameters=100), setting)
    assert passes[0].forward + passes[0].backward == pytest.approx(more.blocks[0])


def test_attention_grows_with_the_length():
    longer = Shape(HIDDEN, 2 * TOKENS, SHAPE.layer_parameters, SHAPE.head_parameters)
    assert count_flops(longer, Setting((Span(0, 2),))).total == pytest.approx(measured(2, tokens=96), rel=ROTARY)


def test_a_second_backward_pass_costs_two_forward_passes():
    model = llama(2)
    hidden = torch.randn(ROWS, TOKENS, HIDDEN, requires_grad=True)
    angles = model.model.rotary_emb(hidden, torch.arange(TOKENS)[None])
    passed = model.model.layers[0](hidden, position_embeddings=angles)
    out = passed if isinstance(passed, torch.Tensor) else passed[0]
    out.sum().backward(retain_graph=True)
    with FlopCounterMode(display=False) as counter:
        (out * 2).sum().backward()
    assert counter.get_total_flops() / (ROWS * TOKENS) == pytest.approx(LAYER * 2 / 3)


def test_a_head_on_a_part_of_the_positions():
    """Private layers and matrix on half of the positions, as a short model of its own."""
    setting = Setting(halves(4), private_layers=(2, 0), token_fraction=0.5)
    first, last = count_flops(SHAPE, setting).blocks
    assert first - 4 * LAYER == pytest.approx(measured(2, tokens=TOKENS // 2) / 2, rel=ROTARY)
    assert last == 4 * LAYER + HEAD


def test_the_undivided_model_is_its_own_measure():
    flops = count_flops(SHAPE, Setting(WHOLE))
    assert flops.total == flops.sequential == flops.backprop == sum(flops.blocks) == 8 * LAYER + HEAD
    assert flops.overhead == flops.sequential_share == 1.0


def test_every_block_pays_for_a_head_and_the_costliest_one_is_waited_for():
    flops = count_flops(SHAPE, Setting((Span(0, 3), Span(3, 8))))
    assert flops.blocks == (3 * LAYER + HEAD, 5 * LAYER + HEAD)
    assert flops.total == 8 * LAYER + 2 * HEAD
    assert flops.sequential == 5 * LAYER + HEAD
    assert flops.overhead == pytest.approx((8 * LAYER + 2 * HEAD) / (8 * LAYER + HEAD))


def test_all_heads_but_the_last_may_be_frozen():
    free, frozen = (count_flops(SHAPE, Setting(halves(2), frozen_heads=f)) for f in (False, True))
    saved = [a - b for a, b in zip(free.blocks, frozen.blocks, strict=True)]
    assert saved == pytest.approx([HEAD / 3] * 3 + [0])


def test_private_layers_of_low_rank():
    matrices = [(HIDDEN, HIDDEN)] * 4 + [(INNER, HIDDEN), (INNER, HIDDEN), (HIDDEN, INNER)]
    assert sum(rows * columns for rows, columns in matrices) == SHAPE.layer_parameters
    few = low_rank_parameters(matrices, 8)
    assert few == 8 * (4 * 2 * HIDDEN + 3 * (HIDDEN + INNER))
    full, low = (
        count_flops(SHAPE, Setting(halves(4), private_layers=(1, 0), private_parameters=n)) for n in (None, few)
    )
    assert full.blocks[0] - low.blocks[0] == pytest.approx(6 * (SHAPE.layer_parameters - few))
    assert full.blocks[1] == low.blocks[1]


def test_overlapping_windows_pay_for_the_second_gradient():
    """Windows 0-2, 2-4, 4-6, 6-7: the last layer of every block but the top one has two gradients."""
    partition = make_partition(8, 1, Costs(1, 1), layers_per_block=3, block_stride=2)
    flops = count_flops(SHAPE, setting_of(partition, (0,)))
    second = LAYER * 2 / 3
    assert flops.blocks == pytest.approx(
        (3 * LAYER + second + HEAD, 2 * LAYER + second + HEAD, 2 * LAYER + second + HEAD, LAYER + HEAD)
    )
    assert flops.sequential == flops.blocks[0]


def test_private_layers_end_with_the_model():
    partition = make_partition(8, 1, Costs(1, 1), layers_per_block=2)
    assert setting_of(partition, (3, 2)).private_layers == (3, 2, 2, 0)
    assert setting_of(partition, (0,), frozen_heads=True) == Setting(halves(2), 0, (0, 0, 0, 0), frozen_heads=True)


def test_last_steps_of_backpropagation():
    local, mixed = (count_flops(SHAPE, Setting(halves(2), final_backprop_share=share)) for share in (0.0, 0.25))
    assert mixed.blocks == local.blocks
    assert mixed.total == pytest.approx(0.75 * local.total + 0.25 * local.backprop)
    assert mixed.sequential == pytest.approx(0.75 * local.sequential + 0.25 * local.backprop)
    only = count_flops(SHAPE, Setting(halves(2), final_backprop_share=1.0))
    assert only.overhead == only.sequential_share == 1.0


def test_flops_so_far():
    setting = Setting(halves(2), final_backprop_share=0.5)  # what the whole run has does not matter
    local = count_flops(SHAPE, Setting(halves(2)))
    assert flops_so_far(SHAPE, setting, 100, 0).total == pytest.approx(100 * local.total)
    after = flops_so_far(SHAPE, setting, 150, 50)
    assert after.total == pytest.approx(100 * local.total + 50 * local.backprop)
    assert after.sequential == pytest.approx(100 * local.sequential + 50 * local.backprop)
    assert flops_so_far(SHAPE, setting, 0, 0).total == 0


@pytest.mark.parametrize(
    ("vocab", "hidden", "layers"),
    [(50257, 768, 5.5), (50257, 1600, 2.6), (32000, 2048, 1.3), (128256, 4096, 2.6), (151936, 896, 14.1)],
    ids=["GPT-2 small", "GPT-2 XL", "h2048 V32k", "Llama-3 8B", "Qwen2.5 0.5B"],
)
def test_heads_of_known_models_in_layers(vocab, hidden, layers):
    assert head_in_layers(vocab, hidden) == pytest.approx(layers, abs=0.05)
    shape = Shape(hidden, 0, 12 * hidden * hidden, vocab * hidden)
    flops = count_flops(shape, Setting((Span(0, 1), Span(1, 2))))
    assert (flops.total - flops.backprop) / (6 * shape.layer_parameters) == pytest.approx(layers, abs=0.05)
