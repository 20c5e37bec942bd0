"""The design's invariants over real processes: locality, placement, ZeRO, one way."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from conftest import MODELS, Trainer, block_losses, records, weights

pytestmark = pytest.mark.processes
of_each_task = pytest.mark.parametrize("trainer", MODELS, indirect=True)
CONFIGS = Path(__file__).parent.parent / "configs" / "ds"


def close(ours: list[list[float]], theirs: list[list[float]], rtol: float) -> None:
    torch.testing.assert_close(torch.tensor(ours), torch.tensor(theirs), rtol=rtol, atol=0.0)


@of_each_task
def test_a_stage_does_not_notice_the_stages_behind_it(trainer: Trainer):
    """Locality: the first two layers and their head train to the same bits with and without two more behind."""
    whole = trainer.run("whole", 2, num_stages=2)
    alone = trainer.run("alone", 1, config_overrides="num_hidden_layers=2")
    mine, theirs = weights(whole / "export/exits/stage-00"), weights(alone / "export")
    assert set(mine) == set(theirs)
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)
    assert [r["loss"] for r in records(whole, 0)] == [r["loss"] for r in records(alone, 0)]


@of_each_task
def test_the_same_blocks_train_alike_on_any_number_of_stages(trainer: Trainer):
    """Placement: four blocks on 1, 2 and 4 stages, clipping and gradient accumulation included."""
    settings = {"layers_per_block": 1, "gradient_accumulation_steps": 2, "max_grad_norm": 0.5, "eval_steps": 2}
    outputs = {n: trainer.run(f"on-{n}", n, num_stages=n, **settings) for n in (1, 2, 4)}
    reference = block_losses(outputs[1], 1)
    assert len(reference) == 4
    assert all(len(step) == 4 for step in reference)
    for stages in (2, 4):
        close(block_losses(outputs[stages], stages), reference, 1e-5)
        close(block_losses(outputs[stages], stages, "eval"), block_losses(outputs[1], 1, "eval"), 1e-5)
    assert max(r["grad_norm"] for r in records(outputs[4], 0)) > 0.5, "the clipping was not put to the test"


def test_greedy_is_chunked_with_blocks_of_one_layer(trainer: Trainer):
    greedy = trainer.run("greedy", 2, num_stages=2, method="greedy")
    chunked = trainer.run("chunked", 2, num_stages=2, method="chunked", layers_per_block=1)
    assert block_losses(greedy, 2) == block_losses(chunked, 2)


@of_each_task
def test_replicas_share_the_same_global_batch(trainer: Trainer):
    """Placement: one replica with 8 rows a step, or two with 4, or two with two micro-batches of 2."""
    one = trainer.run("one", 2, num_stages=2, per_device_train_batch_size=8)
    two = trainer.run("two", 4, num_stages=2, per_device_train_batch_size=4)
    close(block_losses(two, 2), block_losses(one, 2), 1e-5)
    close(block_losses(two, 2, "eval"), block_losses(one, 2, "eval"), 1e-5)
    more = trainer.run("more", 4, num_stages=2, per_device_train_batch_size=2, gradient_accumulation_steps=2)
    close(block_losses(more, 2), block_losses(one, 2), 1e-5)
    assert records(one, 1)[0]["tokens"] == records(two, 1)[0]["tokens"] == 8 * trainer.tokens
    assert records(one, 0)[0]["sent_bytes"] == records(two, 0)[0]["sent_bytes"] - 80


@of_each_task
def test_zero_stages_agree(trainer: Trainer):
    """ZeRO 0 to 3, of text also with offload, train alike inside a stage (fp32)."""
    paths = sorted(CONFIGS.glob("*.json" if trainer.task == "causal-lm" else "zero?.json"))
    outputs = {path.stem: trainer.run(path.stem, 2, deepspeed=path) for path in paths}
    assert {"zero0", "zero1", "zero2", "zero3"} <= set(outputs)
    for output in outputs.values():
        close(block_losses(output, 1), block_losses(outputs["zero1"], 1), 1e-4)
        assert records(output, 0)[-1]["grad_norm"] == pytest.approx(records(outputs["zero1"], 0)[-1]["grad_norm"], 1e-3)


def test_zero_stages_agree_in_bf16(trainer: Trainer):
    settings = {"num_stages": 2, "bf16": True}
    outputs = {n: trainer.run(f"zero{n}", 4, deepspeed=CONFIGS / f"zero{n}.json", **settings) for n in range(4)}
    for output in outputs.values():
        close(block_losses(output, 2), block_losses(outputs[1], 2), 5e-3)
        config = json.loads((output / "export/config.json").read_text())
        assert config["dtype"] == "bfloat16"
        assert {t.dtype for t in weights(output / "export").values()} == {torch.bfloat16}


@of_each_task
def test_nothing_goes_backward_and_what_goes_forward_is_counted(trainer: Trainer):
    """One way: a header, ids or labels or both, and the hidden states go forward; the last stage sends nothing."""
    output = trainer.run("way", 3, num_stages=3, wire_dtype="bf16", per_device_train_batch_size=2)
    packet = 10 * 8 + 2 * trainer.integers * 4 + 2 * trainer.tokens * 32 * 2
    for stage, sent in ((0, packet), (1, packet), (2, 0)):
        assert [record["sent_bytes"] for record in records(output, stage)] == [sent] * 4
    assert [record["received_bytes"] for record in records(output, 2)] == [packet] * 4
    assert all(record["received_bytes"] == 0 for record in records(output, 0))


@of_each_task
def test_backprop_is_the_unsliced_model(trainer: Trainer):
    """Stock PipelineEngine over the slices trains as one process does over one block: the same model, undivided."""
    settings = {"gradient_accumulation_steps": 2, "eval_steps": 2, "max_grad_norm": 0.5}
    pipeline = trainer.run("pipeline", 2, num_stages=2, method="backprop", **settings)
    undivided = trainer.run("undivided", 1, **settings)
    for stage in (0, 1):
        close([[r["loss"]] for r in records(pipeline, stage)], block_losses(undivided, 1), 1e-5)
    close([[r["loss"]] for r in records(pipeline, 1, "eval")], block_losses(undivided, 1, "eval"), 1e-5)
    mine, theirs = weights(pipeline / "export"), weights(undivided / "export")
    assert set(mine) == set(theirs)
    for name in mine:
        torch.testing.assert_close(mine[name], theirs[name], rtol=1e-3, atol=1e-4)
