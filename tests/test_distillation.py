"""Soft targets from the next block's head: the loss, the gradient, the traffic."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import TINY, Trainer, block_losses, records, weights
from documents import write_jsonl
from torch.nn import functional as F
from transformers import AutoConfig

from llm_local.config import parse
from llm_local.data.tokenizer import load_tokenizer
from llm_local.flags import ModelArguments
from llm_local.model import loss
from llm_local.model.anatomy import probe
from llm_local.model.distillation import distillation_loss, soft_targets
from llm_local.model.loss import fit_head, head_logits
from llm_local.model.slices import HeadDraw, Slice, new_slice
from llm_local.partition import Span

TOP_K = 5


def head_of(stop: int, kind: str) -> Slice:
    more: dict[str, Any] = {"head_dim": 8, "final_logit_softcapping": 5.0} if kind == "gemma2" else {}
    config = AutoConfig.for_model(kind, **{k: v for k, v in TINY.items() if k != "model_type"}, **more)
    part = new_slice(config, probe(config, ModelArguments()), Span(stop, stop), 1, drawn=HeadDraw(stop))
    fit_head(part)
    return part


@pytest.mark.parametrize("kind", ["llama", "gemma2"])
def test_loss_and_gradients_are_those_of_whole_logits(kind: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(loss, "_CHUNK_LOGITS", 16 * 4096)  # several chunks
    student, teacher = head_of(2, kind), head_of(4, kind)
    normed, ids = torch.randn(2, 24, 32, requires_grad=True), torch.zeros(2, 24, dtype=torch.int64)
    taught = torch.randn(2, 24, 32)
    ours = distillation_loss(student, normed, soft_targets(teacher, taught, TOP_K))
    ours.backward()
    gradient, matrix = normed.grad, student.model.lm_head.weight
    matrix_gradient, normed.grad, matrix.grad = matrix.grad, None, None
    with torch.no_grad():
        logits, tokens = head_logits(teacher, taught, ids).topk(TOP_K)
    wanted = F.kl_div(
        head_logits(student, normed, ids).log_softmax(-1).gather(-1, tokens), logits.softmax(-1), reduction="none"
    )
    theirs = wanted.sum() / (2 * 24)
    theirs.backward()
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(gradient, normed.grad, rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(matrix_gradient, matrix.grad, rtol=1e-4, atol=1e-7)


def test_drawn_targets_have_on_average_the_gradient_of_the_whole_distribution():
    """The likeliest tokens alone have another, however often one asks."""
    student, teacher = head_of(2, "llama"), head_of(4, "llama")
    torch.manual_seed(0)
    normed, taught = torch.randn(1, 2, 32, requires_grad=True), 20 * torch.randn(1, 2, 32)
    ids = torch.zeros(1, 2, dtype=torch.int64)
    with torch.no_grad():
        whole = head_logits(teacher, taught, ids).softmax(-1)
    (-(whole * head_logits(student, normed, ids).log_softmax(-1)).sum() / 2).backward()
    wanted, normed.grad = normed.grad, None
    assert wanted is not None

    def error(samples: bool, count: int) -> float:
        normed.grad = None
        for _ in range(count):
            distillation_loss(student, normed, soft_targets(teacher, taught, 100, samples)).backward()
        assert normed.grad is not None
        return float((normed.grad / count - wanted).norm() / wanted.norm())

    assert error(True, 200) < 0.1 < 0.5 < error(False, 1)


@pytest.mark.parametrize("kind", ["llama", "gemma2"])
def test_padding_is_no_position(kind: str, monkeypatch: pytest.MonkeyPatch):
    """Of padded rows it is the mean over the positions of the same rows without: loss and gradient."""
    monkeypatch.setattr(loss, "_CHUNK_LOGITS", 16 * 4096)  # several chunks
    student, teacher = head_of(2, kind), head_of(4, kind)
    normed, targets = torch.randn(2, 24, 32, requires_grad=True), soft_targets(teacher, torch.randn(2, 24, 32), TOP_K)
    real = (24, 9)
    mask = torch.stack([(torch.arange(24) < n).long() for n in real])
    ours = distillation_loss(student, normed, targets, mask)
    ours.backward()
    gradient, normed.grad = normed.grad, None
    assert gradient is not None
    assert not gradient[1, 9:].any()
    sums = [distillation_loss(student, normed[r, None, :n], targets[r, None, :n]) * n for r, n in enumerate(real)]
    theirs = torch.stack(sums).sum() / sum(real)
    theirs.backward()
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(gradient, normed.grad, rtol=1e-4, atol=1e-7)
    full = torch.ones_like(mask)
    assert torch.equal(distillation_loss(student, normed, targets, full), distillation_loss(student, normed, targets))


@pytest.mark.processes
def test_distilled_blocks_train_alike_anywhere_and_targets_are_counted(trainer: Trainer):
    chosen: dict[str, Any] = {"distillation_weight": 2.0, "distillation_top_k": TOP_K, "gradient_accumulation_steps": 2}
    chosen |= {"method": "greedy", "wire_dtype": "fp32"}
    one = trainer.run("one", 1, num_stages=1, **chosen)
    wanted = torch.tensor(block_losses(one, 1))
    for stages in (2, 4):
        output = trainer.run(f"on-{stages}", stages, num_stages=stages, **chosen)
        torch.testing.assert_close(torch.tensor(block_losses(output, stages)), wanted, rtol=1e-5, atol=0.0)
        packet = 80 + 2 * 32 * 2 * TOP_K * 4
        assert {r["sent_gradient_bytes"] for r in records(output, 1)} == {2 * packet}
    plain = trainer.run("plain", 1, num_stages=1, method="greedy", gradient_accumulation_steps=2)
    before, after = block_losses(plain, 1), block_losses(one, 1)
    assert before[0] == after[0]
    assert all(a != b for a, b in zip(before[2][:3], after[2][:3], strict=True)), "these have a teacher"
    sharded = trainer.run("sharded", 4, num_stages=2, **chosen, bf16=True, deepspeed="configs/ds/zero2.json")
    torch.testing.assert_close(torch.tensor(block_losses(sharded, 2)), wanted, rtol=2e-2, atol=0.0)


def documents_of(trainer: Trainer, length: int) -> str:
    """A file of documents of so many tokens, EOS included."""
    tokenizer = load_tokenizer(parse(trainer.flags("x")))
    found, words = [], []
    for word in trainer.text.read_text().split():
        words.append(word)
        tokens = len(tokenizer(" ".join(words), add_special_tokens=False)["input_ids"]) + 1
        if tokens == length:
            found.append(" ".join(words))
        words = words if tokens < length else []
    assert len(found) > 40
    return write_jsonl(trainer.folder / "documents.jsonl", found)


@pytest.mark.processes
def test_padded_rows_distil_as_the_same_rows_without_padding(trainer: Trainer):
    """Rows of 24 tokens, and the same ones in rows of 32: every loss is the same, on one stage and on two."""
    chosen: dict[str, Any] = {"distillation_weight": 2.0, "distillation_top_k": TOP_K, "method": "greedy"}
    chosen |= {"train_file": documents_of(trainer, 24), "packing": "none"}
    short = trainer.run("short", 1, num_stages=1, seq_length=24, **chosen)
    padded = trainer.run("padded", 2, num_stages=2, seq_length=32, **chosen)
    for split in ("train", "eval"):
        wanted = torch.tensor(block_losses(short, 1, split))
        torch.testing.assert_close(torch.tensor(block_losses(padded, 2, split)), wanted, rtol=1e-5, atol=0.0)
    assert [r["tokens"] for r in records(padded, 1)] == [r["tokens"] for r in records(short, 0)] == [48] * 4
    assert records(padded, 1)[0]["padding"] == pytest.approx(8 / 32)
    fitted = trainer.run("fitted", 1, num_stages=1, seq_length=32, **chosen | {"packing": "best_fit"})
    ours, theirs = torch.tensor(block_losses(fitted, 1)), torch.tensor(block_losses(short, 1))
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=0.0)


@pytest.mark.processes
def test_a_distilled_run_resumes(trainer: Trainer):
    """Tokens that are drawn are those of one stage, too."""
    chosen: dict[str, Any] = {"distillation_weight": 1.0, "num_stages": 2, "save_steps": 2, "head": "shared"}
    chosen |= {"distillation_sampling": True, "layers_per_block": 2}
    straight = trainer.run("straight", 2, **chosen)
    one = trainer.run("one", 1, **chosen | {"num_stages": 1})
    torch.testing.assert_close(
        torch.tensor(block_losses(one, 1)), torch.tensor(block_losses(straight, 2)), rtol=1e-5, atol=0.0
    )
    wanted = weights(straight / "export/exits/stage-00")
    (straight / "checkpoints/step-00000004/manifest.json").unlink()
    again = trainer.run("straight", 2, **chosen, resume_from_checkpoint="true")
    found = weights(again / "export/exits/stage-00")
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
