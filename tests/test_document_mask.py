"""--document_mask: packed documents train as if each had a row of its own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TINY, Trainer, block_losses, records
from torch.nn import functional as F
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from llm_local.checks.preflight import preflight
from llm_local.checks.trial import document_problems
from llm_local.config import ConfigError, from_flat, parse
from llm_local.model.anatomy import probe
from llm_local.model.block import Block
from llm_local.model.document_mask import DocumentMask
from llm_local.model.stage import Blueprint, build_block
from llm_local.partition import Partition, Span

EOS, VOCABULARY = 2, 64
LENGTHS = ((7, 1, 12), (13, 7))
LLAMA = {k: v for k, v in TINY.items() if k != "model_type"} | {"vocab_size": VOCABULARY, "num_hidden_layers": 3}
KINDS: dict[str, dict[str, Any]] = {
    "llama": LLAMA,
    "llama-eager": LLAMA,
    "mistral": LLAMA | {"sliding_window": 4},
    "gemma3_text": LLAMA | {"head_dim": 8, "sliding_window": 4, "sliding_window_pattern": 2},
    "gemma3_text-eager": LLAMA | {"head_dim": 8, "sliding_window": 4, "sliding_window_pattern": 2},
    "gpt_oss": LLAMA | {"head_dim": 8, "sliding_window": 4, "num_local_experts": 4, "num_experts_per_tok": 2},
    "mixtral": LLAMA | {"num_local_experts": 4, "sliding_window": 4},
    "gpt2": {"vocab_size": VOCABULARY, "n_embd": 32, "n_head": 4, "n_layer": 3, "n_positions": 32, "bos_token_id": 1},
    "opt": {
        **{"vocab_size": VOCABULARY, "hidden_size": 32, "ffn_dim": 64, "num_hidden_layers": 3, "dropout": 0.0},
        **{"num_attention_heads": 4, "word_embed_proj_dim": 16, "max_position_embeddings": 32},
    },
    "falcon": {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4},
    "mpt": {"vocab_size": VOCABULARY, "d_model": 32, "n_heads": 4, "n_layers": 3, "expansion_ratio": 2},
}
ONE, THREE = (Span(0, 3),), tuple(Span(k, k + 1) for k in range(3))


def make_blocks(name: str, spans: tuple[Span, ...], masked: bool = True, **settings: Any) -> list[Block]:
    """The model's blocks with weights that depend on the layer alone and make attention look somewhere."""
    kind, _, kernel = name.partition("-")
    config = AutoConfig.for_model(kind, **{"eos_token_id": EOS, "tie_word_embeddings": False, **KINDS[name]})
    run = from_flat({"config_name": "x", "attn_implementation": kernel or None, **settings})
    partition = Partition(spans, tuple(Span(k, k + 1) for k in range(len(spans))))
    documents = DocumentMask(EOS) if masked else None
    anatomy = probe(config, run.model)
    blocks = [build_block(Blueprint(run, config, anatomy, partition, documents), k).eval() for k in range(len(spans))]
    with torch.no_grad():
        for parameter in (p for block in blocks for p in block.parameters()):
            parameter.mul_(3)
    return blocks


def whole_model(block: Block) -> PreTrainedModel:
    """The model that one block of all layers is, as plain transformers has it."""
    config = block.body.model.config
    model = AutoModelForCausalLM.from_config(config, attn_implementation=config._attn_implementation).eval()
    state = block.body.model.state_dict() | block.head.model.state_dict()
    assert not model.load_state_dict(state, strict=False).missing_keys
    return model


def packed(seed: int = 0) -> torch.Tensor:
    ids = torch.randint(3, VOCABULARY, (2, 20), generator=torch.Generator().manual_seed(seed))
    for row, document in documents_of(ids):
        ids[row, document[-1]] = EOS
    return ids


def documents_of(ids: torch.Tensor) -> list[tuple[int, torch.Tensor]]:
    """(row, positions in it) of each document."""
    positions = torch.arange(ids.shape[1])
    return [(row, p) for row, lengths in enumerate(LENGTHS) for p in positions.split(list(lengths))]


def summed_loss(logits: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(logits[:-1].float(), ids[1:], reduction="sum")


def chain(blocks: list[Block], ids: torch.Tensor) -> torch.Tensor:
    hidden = None
    for block in blocks:
        hidden = block.features(ids, hidden)
    assert hidden is not None
    return hidden


def test_positions_restart_behind_eos_and_the_first_token_is_no_label():
    ids = torch.tensor([[5, 6, 2, 2, 7, 8, 9], [2, 5, 5, 5, 5, 5, 2]])
    mask = DocumentMask(end=2)
    assert mask.positions(ids).tolist() == [[0, 1, 2, 0, 0, 1, 2], [0, 0, 1, 2, 3, 4, 5]]
    assert mask.labels(ids).tolist() == [[-100, 6, 2, -100, -100, 8, 9], [-100, -100, 5, 5, 5, 5, 2]]
    given = torch.tensor([[0, 1, -100, 3, 4, 5, 6], [0, 1, 2, 3, 4, 5, 6]])
    assert mask.labels(ids, given)[0].tolist() == [-100, 1, -100, -100, -100, 5, 6]


@pytest.mark.parametrize("name", KINDS)
def test_a_packed_row_trains_as_its_documents_do(name: str):
    """Loss and gradients are those of the documents one by one, weighted by their tokens, in plain transformers."""
    (block,) = make_blocks(name, ONE)
    model, ids = whole_model(block), packed()
    logits = [model(input_ids=ids[row, p][None], use_cache=False).logits[0] for row, p in documents_of(ids)]
    sums = [summed_loss(out, ids[row, p]) for out, (row, p) in zip(logits, documents_of(ids), strict=True)]
    wanted = torch.stack(sums).sum() / sum(len(p) - 1 for _, p in documents_of(ids))
    loss = block(ids, None)[0]
    torch.testing.assert_close(loss, wanted, rtol=1e-5, atol=0.0)
    (unmasked,) = make_blocks(name, ONE, masked=False)
    assert (unmasked(ids, None)[0] - loss).abs() > 1e-3, "documents would make no difference here"
    wanted.backward()
    loss.backward()
    theirs = dict(model.named_parameters())
    for part in (block.body.model, block.head.model):
        for key, parameter in part.named_parameters():
            if parameter.grad is not None:
                torch.testing.assert_close(parameter.grad, theirs[key].grad, rtol=1e-3, atol=1e-5, msg=key)


@pytest.mark.parametrize("name", KINDS)
def test_another_first_document_changes_nothing_in_the_second(name: str):
    blocks, ids = make_blocks(name, THREE), packed()
    other = ids.clone()
    other[:, : LENGTHS[0][0] - 1] = packed(seed=1)[:, : LENGTHS[0][0] - 1]
    before, after = chain(blocks, ids), chain(blocks, other)
    first, rest = slice(0, LENGTHS[0][0]), slice(LENGTHS[0][0], None)
    assert not torch.allclose(before[0, first], after[0, first], atol=1e-2)
    if name in ("gpt_oss", "mixtral"):  # experts compute their tokens together
        torch.testing.assert_close(before[0, rest], after[0, rest], rtol=1e-5, atol=1e-5)
    else:
        assert torch.equal(before[0, rest], after[0, rest])


@pytest.mark.parametrize("name", KINDS)
def test_stages_are_the_undivided_model(name: str):
    ids = packed()
    assert torch.equal(chain(make_blocks(name, THREE), ids), chain(make_blocks(name, ONE), ids))


def parts_of(ids: torch.Tensor, window: torch.Tensor) -> list[tuple[int, torch.Tensor]]:
    """The pieces of documents that lie in each row's window."""
    return [(row, p[torch.isin(p, window[row])]) for row, p in documents_of(ids)]


@pytest.mark.parametrize("name", ["llama", "gpt_oss", "mpt"])
@pytest.mark.parametrize("is_cut", [False, True])
def test_private_layers_and_windows_of_heads_see_the_same_documents(name: str, is_cut: bool):
    settings = {"head": "decoder", "head_layers": 2}
    masked, plain = (make_blocks(name, THREE, flag, **settings)[0] for flag in (True, False))
    ids = packed()
    features = masked.features(ids, None)
    starts = torch.tensor([[4], [2]]) if is_cut else torch.zeros(2, 1, dtype=torch.int64)
    window = starts + torch.arange(14 if is_cut else 20)
    pieces = [(row, p) for row, p in parts_of(ids, window) if len(p) > 1]
    sums = [plain.readout(features[row : row + 1, p], ids[row, p][None]) * (len(p) - 1) for row, p in pieces]
    wanted = torch.stack(sums).sum() / sum(len(p) - 1 for _, p in pieces)
    loss = masked(ids, None, window=window if is_cut else None)[0]
    torch.testing.assert_close(loss, wanted, rtol=1e-5, atol=0.0)


def test_logits_are_those_of_the_plain_model_that_is_exported():
    (block,) = make_blocks("gpt_oss", ONE)
    ids = packed()
    assert torch.equal(block(ids, None, return_logits=True)[0], whole_model(block)(input_ids=ids).logits)


def problems_of(kind: str, settings: dict[str, Any], **flags: Any) -> list[str]:
    config = AutoConfig.for_model(kind, **settings)
    run = from_flat({"config_name": "x", "document_mask": True, **flags})
    return document_problems(run, config, probe(config, run.model))


@pytest.mark.parametrize(
    ("kind", "settings", "reason"),
    [
        ("bloom", {"hidden_size": 32, "n_layer": 2, "n_head": 4}, r"does not take masks of documents \(ValueError: "),
        ("mamba", {"hidden_size": 32, "num_hidden_layers": 2}, r"does not take masks of documents \((Type|Key)Error: "),
        ("qwen3_next", {"num_hidden_layers": 4}, r"and attn_implementation=sdpa a document is read together with"),
        (
            "jamba",
            {"num_hidden_layers": 8},
            r"and attn_implementation=sdpa a document is read together with the one bef",
        ),
    ],
)
def test_a_type_that_would_leak_is_refused_with_the_repair(kind: str, settings: dict[str, Any], reason: str):
    (line,) = problems_of(kind, settings)
    assert "leave document_mask out" in line
    with pytest.raises(ConfigError, match=rf"document_mask: (with )?model type '{kind}' {reason}"):
        raise ConfigError([line])


@pytest.mark.processes
@pytest.mark.parametrize("kind", ["gpt_oss", "llama", "phi3", "deepseek_v3"])
def test_a_model_is_tried_in_small_whatever_its_size(kind: str):
    """The default configs have 4 to 700 billion parameters."""
    factors = {"short_factor": [1.0] * 48, "long_factor": [2.0] * 48, "rope_type": "longrope", "rope_theta": 1e4}
    assert problems_of(kind, {"rope_parameters": factors} if kind == "phi3" else {}) == []


def test_the_start_refuses_before_it_touches_the_folder(trainer: Trainer):
    model = trainer.model({"model_type": "bloom", "vocab_size": 4096, "hidden_size": 32, "n_layer": 4, "n_head": 4})
    flags = trainer.flags("refused", config_name=model, document_mask=True)
    with pytest.raises(ConfigError, match=r"document_mask: model type 'bloom' does not take masks"):
        preflight(parse(flags), 1)
    assert not (trainer.folder / "refused").exists()


def short_documents(trainer: Trainer) -> Path:
    lines = [line for line in trainer.text.read_text().splitlines() if line.strip()]
    path = trainer.folder / "documents.jsonl"
    path.write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    return path


@pytest.mark.processes
def test_the_same_blocks_train_alike_on_any_number_of_stages(trainer: Trainer):
    """And with private layers and windows, overlapping, and the last steps global; nothing more crosses a link."""
    data = {"train_file": short_documents(trainer), "document_mask": True, "eval_steps": 2}
    heads = {"head": "decoder", "head_layers_schedule": "1,1,1,0", "head_token_fraction": 0.5}
    local = data | heads | {"layers_per_block": 1, "final_backprop_steps": 1}
    runs = [trainer.run(f"on-{n}", n, num_stages=n, **local) for n in (1, 2)]
    splits = [
        [torch.tensor(block_losses(run, n + 1, split)) for n, run in enumerate(runs)] for split in ("train", "eval")
    ]
    for one, two in splits:
        torch.testing.assert_close(two, one, rtol=1e-5, atol=0.0)
    assert records(runs[1], 0)[0]["sent_bytes"] == 80 + 2 * 32 * 4 + 2 * 32 * TINY["hidden_size"] * 4
    unmasked = trainer.run("unmasked", 1, **local | {"document_mask": False})
    assert abs(block_losses(unmasked, 1)[0][0] - block_losses(runs[0], 1)[0][0]) > 1e-4
    windows = data | {"method": "overlapping", "layers_per_block": 2}
    ours, theirs = (block_losses(trainer.run(f"w-{n}", n, num_stages=n, **windows), n) for n in (2, 1))
    torch.testing.assert_close(torch.tensor(ours), torch.tensor(theirs), rtol=1e-5, atol=0.0)


@pytest.mark.processes
def test_backprop_over_stages_is_the_undivided_model(trainer: Trainer):
    settings = {"train_file": short_documents(trainer), "document_mask": True, "eval_steps": 2}
    pipeline = trainer.run("pipeline", 2, num_stages=2, method="backprop", **settings)
    undivided = trainer.run("undivided", 1, **settings)
    for split in ("train", "eval"):
        ours = torch.tensor([[r["loss"]] for r in records(pipeline, 1, split)])
        torch.testing.assert_close(ours, torch.tensor(block_losses(undivided, 1, split)), rtol=1e-5, atol=0.0)
