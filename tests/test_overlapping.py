"""Overlapping blocks: a shared layer gets the gradients of both its windows, and of nothing further away."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TINY, Trainer, block_losses, records, weights

from llm_local.config import Config, parse
from llm_local.cut import plan_partition
from llm_local.data.sets import prepare
from llm_local.data.tokenizer import load_tokenizer
from llm_local.model.anatomy import probe
from llm_local.model.model_config import load_model_config
from llm_local.model.slices import new_slice
from llm_local.model.stage import Blueprint, build_blocks
from llm_local.partition import Span

LAYERS = 5
RATE = 0.5
WINDOWS = {  # layers of a window, stride: the layers of each window
    (2, 1): [(0, 2), (1, 3), (2, 4), (3, 5)],
    (3, 2): [(0, 3), (2, 5)],
    (4, 2): [(0, 4), (2, 5)],
}


@pytest.fixture
def sgd(tmp_path: Path) -> Path:
    """Plain gradient descent: what a step changes is the gradient."""
    path = tmp_path / "sgd.json"
    path.write_text(json.dumps({"optimizer": {"type": "SGD", "params": {"lr": RATE}}}))
    return path


def settings(sgd: Path | None, window: tuple[int, int], **more: Any) -> dict[str, Any]:
    layers, stride = window
    chosen = {"method": "overlapping", "layers_per_block": layers, "block_stride": stride, "max_grad_norm": 0}
    plain = {"deepspeed": sgd, "max_steps": 1, "lr_scheduler_type": "constant", "learning_rate": RATE} if sgd else {}
    return {**chosen, **plain, "config_overrides": f"num_hidden_layers={LAYERS}", **more}


def reference(config: Config) -> dict[str, list[torch.Tensor]]:
    """Gradients of each layer's parameters by autograd, one for each window that it lies in, the lowest first.

    Every window is a model of its own with copies of the weights, on hidden states without a graph.
    """
    model_config = load_model_config(config.model)
    anatomy = probe(model_config, config.model)
    blocks = build_blocks(Blueprint(config, model_config, anatomy, plan_partition(config, anatomy)), 0)
    train, _ = prepare(config, load_tokenizer(config))
    ids = train.batch(0, config.train.per_device_train_batch_size)
    seed = config.train.seed
    layers = [new_slice(model_config, anatomy, Span(i, i + 1), seed, has_head=False) for i in range(LAYERS)]
    hidden: list[Any] = [None]
    with torch.no_grad():
        for layer in layers:
            hidden.append(layer(hidden[-1], input_ids=ids)[0])
    found: dict[str, list[torch.Tensor]] = {}
    window = (config.method.block_layers(config.local), config.method.window_stride(config.local))
    for (start, stop), block in zip(WINDOWS[window], blocks, strict=True):  # pyright: ignore[reportArgumentType]
        part = new_slice(model_config, anatomy, Span(start, stop), seed, has_head=False)
        block.readout(part(hidden[start], input_ids=ids)[0], ids).backward()
        for name, parameter in part.model.named_parameters():
            found.setdefault(name, []).append(parameter.grad)  # pyright: ignore[reportArgumentType]
    return found


def start_of(config: Config) -> dict[str, torch.Tensor]:
    model_config = load_model_config(config.model)
    part = new_slice(model_config, probe(model_config, config.model), Span(0, LAYERS), config.train.seed)
    return {name: parameter.detach() for name, parameter in part.model.named_parameters()}


@pytest.mark.processes
@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("num_stages", [1, 2])
def test_layers_get_the_gradients_of_their_windows(
    trainer: Trainer, sgd: Path, window: tuple[int, int], num_stages: int
):
    chosen = settings(sgd, window)
    output = trainer.run("run", num_stages, num_stages=num_stages, **chosen)
    config = parse(trainer.flags("reference", num_stages=1, **chosen))
    wanted, before, after = reference(config), start_of(config), weights(output / "export")
    twice = 0
    for name, gradients in wanted.items():
        if "norm" in name:
            continue
        change = (before[name] - after[name]) / RATE
        torch.testing.assert_close(change, sum(gradients), rtol=1e-3, atol=2e-6)  # pyright: ignore[reportArgumentType]
        layer = name.partition(".layers.")[2].partition(".")[0]
        inside = 1 if not layer else sum(a <= int(layer) < b for a, b in WINDOWS[window])
        assert len(gradients) == inside
        if inside == 2:
            twice += 1
            assert not torch.allclose(change, gradients[0], rtol=1e-3, atol=2e-6), "the window below alone"
            assert not torch.allclose(change, gradients[1], rtol=1e-3, atol=2e-6), "the window above alone"
    assert twice > 0


@pytest.mark.processes
def test_windows_train_alike_on_any_number_of_stages_and_replicas(trainer: Trainer):
    chosen = settings(None, (2, 1), gradient_accumulation_steps=3, max_grad_norm=0.5, eval_steps=2)
    one = trainer.run("one", 1, num_stages=1, **chosen)
    reference = torch.tensor(block_losses(one, 1))
    assert reference.shape == (4, 4)
    for name, stages, ranks, rows in (("two", 2, 2, 2), ("four", 4, 4, 2), ("replicas", 2, 4, 1)):
        output = trainer.run(name, ranks, num_stages=stages, **chosen, per_device_train_batch_size=rows)
        ours = torch.tensor(block_losses(output, stages))
        torch.testing.assert_close(ours, reference, rtol=1e-5, atol=0.0)
    chunked = trainer.run(
        "chunked", 1, num_stages=1, **{**chosen, "method": "greedy", "layers_per_block": None, "block_stride": None}
    )
    assert block_losses(chunked, 1)[-1][-1] != block_losses(one, 1)[-1][-1]


@pytest.mark.processes
def test_zero_stages_agree_on_windows(trainer: Trainer):
    chosen = settings(None, (3, 2), gradient_accumulation_steps=2, max_grad_norm=0.5)
    outputs = [
        trainer.run(f"zero{n}", 4, num_stages=2, deepspeed=f"configs/ds/zero{n}.json", **chosen) for n in range(3)
    ]
    losses = [torch.tensor(block_losses(output, 2)) for output in outputs]
    for found in losses[1:]:
        torch.testing.assert_close(found, losses[0], rtol=1e-4, atol=0.0)
    norms = [[r["grad_norm"] for r in records(output, 0)] for output in outputs]
    for found in norms[1:]:
        assert found == pytest.approx(norms[0], rel=1e-3)


@pytest.mark.processes
def test_checkpointed_activations_and_bf16_train_the_same_windows(trainer: Trainer):
    chosen = settings(None, (3, 2), num_stages=2, gradient_accumulation_steps=2)
    plain = torch.tensor(block_losses(trainer.run("plain", 2, **chosen), 2))
    again = torch.tensor(block_losses(trainer.run("again", 2, **chosen, gradient_checkpointing=True), 2))
    torch.testing.assert_close(again, plain, rtol=1e-5, atol=0.0)
    half = torch.tensor(block_losses(trainer.run("half", 2, **chosen, bf16=True), 2))
    torch.testing.assert_close(half, plain, rtol=1e-2, atol=0.0)


@pytest.mark.processes
def test_one_hop_of_gradient_is_sent_and_counted(trainer: Trainer):
    """A header and the gradient of the hidden states, to the stage before and no further."""
    output = trainer.run("hop", 3, **settings(None, (2, 1), num_stages=3, wire_dtype="bf16"))
    packet = 10 * 8 + 2 * 32 * TINY["hidden_size"] * 2
    for stage, sent in ((0, 0), (1, packet), (2, packet)):
        assert [record["sent_gradient_bytes"] for record in records(output, stage)] == [sent] * 4
    chunked = trainer.run("none", 2, num_stages=2)
    assert {record["sent_gradient_bytes"] for stage in (0, 1) for record in records(chunked, stage)} == {0}


@pytest.mark.processes
def test_windows_resume_bit_for_bit(trainer: Trainer):
    chosen = settings(None, (2, 1), num_stages=2, save_steps=2)
    straight = trainer.run("straight", 2, **chosen)
    wanted = weights(straight / "export")
    (straight / "checkpoints/step-00000004/manifest.json").unlink()
    found = weights(trainer.run("straight", 2, **chosen, resume_from_checkpoint="true") / "export")
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
