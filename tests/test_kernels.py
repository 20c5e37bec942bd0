"""Windows of attention, its kernels, checkpointing and dropout over the cut: the undivided model's bits."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TINY
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from llm_local.checks.weight_problems import weight_problems
from llm_local.config import from_flat
from llm_local.model.anatomy import probe
from llm_local.model.model_config import load_model_config
from llm_local.model.slices import Slice
from llm_local.model.stage import build_slice
from llm_local.partition import Span

LLAMA = {k: v for k, v in TINY.items() if k != "model_type"} | {"vocab_size": 64, "tie_word_embeddings": False}
WINDOWS = {"head_dim": 8, "sliding_window": 4}
KINDS: dict[str, dict[str, Any]] = {
    "gemma3_text": LLAMA | WINDOWS | {"sliding_window_pattern": 2},
    "mistral": LLAMA | WINDOWS,
    "gpt_oss": LLAMA | WINDOWS | {"num_local_experts": 4, "num_experts_per_tok": 2},
    "llama": LLAMA | {"attention_dropout": 0.5},
    "gpt2": {
        **{"vocab_size": 64, "n_embd": 32, "n_head": 4, "n_layer": 4, "n_positions": 32, "bos_token_id": 1},
        **{"embd_pdrop": 0.3, "attn_pdrop": 0.3, "resid_pdrop": 0.3},
    },
}


def make_slices(kind: str, cuts: tuple[int, ...], **settings: Any) -> list[Slice]:
    config = AutoConfig.for_model(kind, **KINDS[kind])
    run = from_flat({"config_name": "x", **settings})
    anatomy = probe(config, run.model)
    spans = [Span(a, b) for a, b in pairwise(cuts)]
    parts = [build_slice(run, config, anatomy, span, has_head=span.stop == 4) for span in spans]
    for part in parts:
        with torch.no_grad():
            for parameter in part.model.get_submodule(anatomy.layers).parameters():
                parameter.mul_(3)  # attention of a new model is nearly uniform, wherever it may look
        part.model.train()
    return parts


@pytest.mark.parametrize(("flag", "used"), [(None, "eager"), ("sdpa", "sdpa")])
@pytest.mark.parametrize("pretrained", [False, True])
def test_the_flag_wins_over_the_kernel_of_the_config(tmp_path: Path, flag: str | None, used: str, pretrained: bool):
    AutoModelForCausalLM.from_config(AutoConfig.for_model(**TINY)).save_pretrained(tmp_path)
    run = from_flat({"model_name_or_path" if pretrained else "config_name": str(tmp_path), "attn_implementation": flag})
    kernel = "eager" if flag is None else "flash_attention_2"  # which a CPU does not have
    (tmp_path / "config.json").write_text(json.dumps(TINY | {"attn_implementation": kernel}))
    config = load_model_config(run.model)
    part = build_slice(run, config, probe(config, run.model), Span(3, 4), has_head=True)
    assert part.model.config._attn_implementation == used
    assert weight_problems(run, config) == ([], ())


def run_all(parts: list[Slice]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The last slice's output and every layer's gradients, with the same dropout at each call."""
    torch.manual_seed(0)
    ids = torch.randint(3, 64, (2, 16))
    hidden, normed = None, torch.empty(0)
    for part in parts:
        hidden, normed = part(hidden, input_ids=ids)
    normed.square().sum().backward()
    modules: list[nn.Module] = [part.model for part in parts]
    named = [pair for module in modules for pair in module.named_parameters()]
    return normed.detach(), {name: p.grad for name, p in named if p.grad is not None}


def assert_same(ours: list[Slice], theirs: list[Slice]) -> None:
    (output, gradients), (wanted, wanted_gradients) = run_all(ours), run_all(theirs)
    assert torch.equal(output, wanted)
    assert set(gradients) == set(wanted_gradients)
    assert all(torch.equal(gradients[name], wanted_gradients[name]) for name in gradients)


@pytest.mark.processes
@pytest.mark.parametrize(
    ("kind", "kernel"),
    [
        ("gemma3_text", "sdpa"),
        ("gemma3_text", "eager"),
        ("mistral", "sdpa"),
        ("mistral", "eager"),
        ("gpt_oss", "eager"),
    ],
)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_windows_shorter_than_the_row_in_any_kernel(kind: str, kernel: str, checkpointing: bool):
    whole = make_slices(kind, (0, 4), attn_implementation=kernel)
    parts = make_slices(kind, (0, 1, 3, 4), attn_implementation=kernel, gradient_checkpointing=checkpointing)
    assert whole[0].model.config._attn_implementation == kernel
    assert_same(parts, whole)
    whole[0].model.config.sliding_window = 64  # the masks' own; a window that covers the row is another model
    assert not torch.equal(run_all(parts)[0], run_all(whole)[0])


@pytest.mark.parametrize("checkpointing", [False, True])
def test_dropout_inside_layers_is_drawn_as_in_the_undivided_model(checkpointing: bool):
    whole = make_slices("llama", (0, 4))
    assert_same(make_slices("llama", (0, 1, 3, 4), gradient_checkpointing=checkpointing), whole)
    dropped = run_all(whole)[0]
    whole[0].model.eval()
    assert not torch.equal(run_all(whole)[0], dropped)


def test_layers_that_are_computed_again_draw_the_same_dropout():
    """Where the embedding has dropout, too, a slice draws it on zeros: its own numbers, but the same ones each time."""
    cuts = (0, 2, 4)
    assert_same(make_slices("gpt2", cuts, gradient_checkpointing=True), make_slices("gpt2", cuts))
