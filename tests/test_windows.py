"""Heads that see a window of each row in training: the plain loss of those positions, at their share of the cost."""

from __future__ import annotations

import shutil
from typing import Any

import pytest
import torch
from conftest import TINY, Trainer, block_losses, records, weights
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig

from llm_local.config import from_flat
from llm_local.head_plan import HeadPlan
from llm_local.model.anatomy import probe
from llm_local.model.block import Block
from llm_local.model.stage import Blueprint, build_block
from llm_local.model.windows import cut, draw_window
from llm_local.partition import Costs, Heads, make_partition

SMALL = {"vocab_size": 64, "hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 4}
LLAMA = {k: v for k, v in TINY.items() if k != "model_type"} | {"vocab_size": 64}
LONG_ROPE = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 4}
LONG_ROPE |= {"original_max_position_embeddings": 8, "long_factor": [3.0, 5.0, 7.0, 9.0]}
KINDS: dict[str, dict[str, Any]] = {
    "llama": LLAMA,
    "gemma2": LLAMA | {"head_dim": 8, "sliding_window": 4},
    "gpt2": SMALL | {"bos_token_id": 1, "eos_token_id": 2},
    "bloom": {"vocab_size": 64, "hidden_size": 32, "n_head": 4, "n_layer": 4},
    "phi3": LLAMA | {"pad_token_id": 0, "rope_parameters": LONG_ROPE, "original_max_position_embeddings": 8},
}
ROWS, POSITIONS = 3, 24


def block(kind: str, index: int = 1, head_layers: int = 2) -> Block:
    config = AutoConfig.for_model(kind, **KINDS[kind])
    run = from_flat({"config_name": "x.json", "head": "decoder", "head_layers": head_layers, "layers_per_block": 1})
    partition = make_partition(4, 1, Costs(1.0, 1.0), 1, heads=Heads(layers=[head_layers]))
    return build_block(Blueprint(run, config, probe(config, run.model), partition), index).eval()


def micro_batch() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 64, (ROWS, POSITIONS), generator=generator)
    return ids, torch.randn(ROWS, POSITIONS, 32, generator=generator)


WINDOW = torch.tensor([0, 5, 14])[:, None] + torch.arange(10)


@pytest.mark.parametrize("kind", KINDS)
def test_the_loss_is_the_plain_one_of_the_windows_rows(kind: str):
    """Each window as a row of its own; only the model that scales by absolute positions is told where it starts."""
    part = block(kind)
    ids, hidden = micro_batch()
    features = part.features(ids, hidden)
    losses = []
    for row, window in enumerate(WINDOW.tolist()):
        told = {"position_ids": torch.tensor([window])} if kind == "phi3" else {}
        rows = features[row : row + 1, window[0] : window[-1] + 1]
        losses.append(part.readout(rows, ids[row : row + 1, window], **told))
    wanted = torch.stack(losses).mean()
    loss, leaving, _ = part(ids, hidden, window=WINDOW)
    torch.testing.assert_close(loss, wanted, rtol=1e-5, atol=0.0)
    assert torch.equal(leaving, features), "what goes on is whole"
    ours, theirs = (torch.autograd.grad(x, list(part.parameters()), allow_unused=True) for x in (loss, wanted))
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-3, atol=1e-6)


def test_a_window_of_all_positions_is_the_whole_row():
    part = block("llama")
    ids, hidden = micro_batch()
    whole = torch.arange(POSITIONS).expand(ROWS, POSITIONS)
    assert torch.equal(part(ids, hidden, window=whole)[0], part(ids, hidden)[0])


def test_a_model_that_reads_absolute_positions_gets_them():
    """LongRoPE switches its factors behind position 8: a window behind it is not the start of a row."""
    part = block("phi3")
    ids, hidden = micro_batch()
    with torch.no_grad():  # a new model's attention is nearly uniform, wherever it looks
        for parameter in part.head.model.get_submodule("model.layers").parameters():
            parameter.mul_(10)
    late = torch.arange(17, 23).expand(ROWS, 6)
    told = part(ids, hidden, window=late)[0]
    untold = part.readout(part.features(ids, hidden)[:, 17:23], ids[:, 17:23])
    assert abs(told.item() - untold.item()) > 1e-5


def test_labels_masks_and_positions_are_cut_alike():
    part = block("llama")
    ids, hidden = micro_batch()
    labels = ids.clone()
    labels[:, ::3] = -100
    mask = torch.ones_like(ids)
    mask[1, :7] = 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    inputs = {"labels": labels, "attention_mask": mask, "position_ids": positions}
    loss = part(ids, hidden, window=WINDOW, **inputs)[0]
    features = part.features(ids, hidden, attention_mask=mask, position_ids=positions)
    cut_alike = {name: cut(tensor, WINDOW) for name, tensor in inputs.items()}
    assert torch.equal(loss, part.readout(cut(features, WINDOW), cut(ids, WINDOW), **cut_alike))


def head_costs(part: Block, window: torch.Tensor | None) -> tuple[int, int]:
    """FLOPs of a training pass of the head, and elements of the activations that it keeps for the backward pass."""
    ids, hidden = micro_batch()
    weights = {p.untyped_storage().data_ptr() for p in part.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in weights:
            kept[tensor.untyped_storage().data_ptr()] = tensor.numel()
        return tensor

    features = part.features(ids, hidden).detach().requires_grad_()
    part.features = lambda *_args, **_inputs: features  # type: ignore[method-assign]
    with FlopCounterMode(display=False) as counter, torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        part(ids, hidden, window=window)[0].backward()
    return counter.get_total_flops(), sum(kept.values())


def test_a_window_costs_its_share():
    """Six of 24 positions: a quarter of the matrix products, and of what is kept for the backward pass."""
    whole, kept = head_costs(block("llama"), None)
    some, fewer = head_costs(block("llama"), torch.arange(6).expand(ROWS, 6))
    assert some <= 0.25 * whole
    assert fewer <= 0.3 * kept, "and what no window shrinks: the gradient of the matrix"


def test_windows_are_drawn_by_the_rows_of_the_micro_batch():
    plan = HeadPlan((1.0,), 0, 2, 0.25)
    ids = torch.zeros(ROWS, POSITIONS, dtype=torch.long)
    window = draw_window(plan, 4, 1, 0, ids)
    assert window is not None
    assert window.tolist() == [list(w) for w in plan.window(4, 1, 0, ROWS, POSITIONS) or []]
    assert draw_window(HeadPlan((1.0,), 0, 2), 4, 1, 0, ids) is None


SETTINGS = {"head": "decoder", "head_layers_schedule": "1,1,1,0", "layers_per_block": 1, "eval_steps": 2}


@pytest.mark.processes
def test_all_positions_are_the_same_bits_as_no_flag_and_fewer_are_not(trainer: Trainer):
    runs = {f: trainer.run(f"f-{f}", 1, **SETTINGS, head_token_fraction=f) for f in (None, 1.0, 0.25)}
    whole, same, some = (block_losses(run, 1) for run in runs.values())
    assert whole == same
    assert some[0][3] == whole[0][3], "the last head sees all"
    assert all(some[0][b] != whole[0][b] for b in range(3))
    first = [block_losses(run, 1, "eval")[0] for run in runs.values()]
    assert all(abs(a - b) < 0.2 for a, b in zip(first[0], first[2], strict=True)), "an evaluation is of all positions"


@pytest.mark.processes
def test_windows_do_not_depend_on_stages_replicas_or_a_resume(trainer: Trainer):
    settings = {**SETTINGS, "head_token_fraction": 0.3, "per_device_train_batch_size": 4, "save_steps": 2}
    one = trainer.run("one", 1, num_stages=1, **settings)
    two = trainer.run("two", 2, num_stages=2, **settings)
    split = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2, "deepspeed": "configs/ds/zero3.json"}
    four = trainer.run("four", 4, num_stages=2, **(settings | split))
    reference = torch.tensor(block_losses(one, 1))
    for run in (two, four):
        torch.testing.assert_close(torch.tensor(block_losses(run, 2)), reference, rtol=1e-5, atol=0.0)
    again = trainer.folder / "again"
    shutil.copytree(two, again, ignore=shutil.ignore_patterns("export", "step-00000004"))
    trainer.run("again", 2, num_stages=2, **settings, resume_from_checkpoint="true")
    mine, theirs = weights(again / "export/exits/stage-00"), weights(two / "export/exits/stage-00")
    assert all(torch.equal(mine[name], theirs[name]) for name in theirs)
    assert [r["loss"] for r in records(again, 0)] == [r["loss"] for r in records(two, 0)]
