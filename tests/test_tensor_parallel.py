"""Layers divided between the ranks of a replica: the same losses, gradients, checkpoints and exports as on one rank."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TINY, Trainer, block_losses, records, weights
from transformers import AutoConfig

from llm_local.checks.preflight import preflight
from llm_local.checks.tensor_trial import ThreadRanks, division_problems, gradients_differ, in_threads, relative
from llm_local.checks.tiny import tiny_config
from llm_local.config import ConfigError, from_flat, parse
from llm_local.model.anatomy import probe
from llm_local.model.block import Block
from llm_local.model.stage import Blueprint, build_blocks
from llm_local.model.tensor_cut import TensorCut
from llm_local.model.tensor_parallel import part_of, plan_problems
from llm_local.partition import Costs, make_partition
from llm_local.place import Place
from llm_local.problems import value_problems
from llm_local.replicas import replica_problems
from llm_local.tensor_problems import tensor_problems

DS = Path(__file__).parent.parent / "configs" / "ds"


class TestCut:
    @pytest.mark.parametrize(("dim", "pieces"), [(0, 1), (1, 1), (2, 1), (1, 2)])
    def test_parts_are_the_whole(self, dim: int, pieces: int):
        whole = torch.arange(8 * 12 * 4).view(8, 12, 4)
        cuts = [TensorCut((8, 12, 4), dim, rank, 2, pieces) for rank in range(2)]
        parts = [cut.part(whole) for cut in cuts]
        assert torch.equal(cuts[0].whole([part.view(-1) for part in parts]), whole)
        assert {part.numel() for part in parts} == {whole.numel() // 2}

    def test_each_piece_is_cut(self):
        cuts = [TensorCut((8,), 0, rank, 2, 2) for rank in range(2)]
        assert [cut.part(torch.arange(8)).tolist() for cut in cuts] == [[0, 1, 4, 5], [2, 3, 6, 7]]


def test_ranks_of_a_replica_are_neighbours():
    places = [Place(rank, (2, 1), tensor_ranks=2) for rank in range(6)]
    found = [(p.stage, p.replica, p.tensor_rank) for p in places]
    assert found == [(0, 0, 0), (0, 0, 1), (0, 1, 0), (0, 1, 1), (1, 0, 0), (1, 0, 1)]
    assert [p.is_recorder for p in places] == [True, False, False, False, True, False]
    assert [p.rank_of(1, 0) for p in places] == [4] * 6
    assert {p.world_size for p in places} == {6}


HEADS = {"num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 8}
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2, "router_aux_loss_coef": 0.1, "output_router_logits": True}
TYPES: dict[str, dict[str, Any]] = {
    "llama": HEADS | {"attention_bias": True, "mlp_bias": True},
    "qwen3": HEADS | {"tie_word_embeddings": True},
    "gemma3_text": HEADS | {"tie_word_embeddings": True, "final_logit_softcapping": 30.0, "query_pre_attn_scalar": 8},
    "mixtral": HEADS | EXPERTS,
    "phi3": {"num_attention_heads": 4, "num_key_value_heads": 4, "pad_token_id": 0},
}


def blocks_of(kind: str, ranks: Any = None) -> list[Block]:
    values = {**TINY, **TYPES[kind], "model_type": kind, "vocab_size": 96, "num_hidden_layers": 2}
    config = AutoConfig.for_model(**values)
    run = from_flat({"config_name": "x.json", "layers_per_block": 1, "head_layers": 1, "head": "decoder"})
    anatomy, partition = probe(config, run.model), make_partition(2, 1, Costs(1.0, 1.0), 1)
    blocks = build_blocks(Blueprint(run, config, anatomy, partition), 0, ranks=ranks)
    generator = torch.Generator().manual_seed(0)
    if ranks is None:  # no bias is 0, no norm is 1
        with torch.no_grad():
            for parameter in (p for block in blocks for p in block.parameters()):
                parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator))
    return blocks


def train(block: Block, hidden: torch.Tensor | None) -> list[torch.Tensor]:
    """Logits, loss and output, with gradients in the block."""
    ids = torch.randint(0, 96, (2, 16), generator=torch.Generator().manual_seed(1))
    inputs = {"position_ids": torch.arange(16).expand(2, -1)}
    with torch.no_grad():
        logits, _, _ = block.eval()(ids, hidden, return_logits=True, **inputs)
    loss, leaving, _ = block.train()(ids, hidden, **inputs)
    loss.backward()
    return [logits, loss, leaving]


def difference(kind: str, blocks: list[Block], found: list[list[torch.Tensor]], ranks: ThreadRanks) -> float:
    """Of a thread's part of the blocks from the whole ones, in what they return and in their gradients."""
    hidden, differences = None, []
    for block, whole, wanted in zip(blocks_of(kind, ranks), blocks, found, strict=True):
        theirs = dict(whole.named_parameters())
        assert any(part_of(parameter) is not None for parameter in block.parameters())
        for name, parameter in block.named_parameters():
            part = part_of(parameter)
            parameter.data = theirs[name].data.clone() if part is None else part.cut.part(theirs[name].data)
        ours = train(block, hidden)
        hidden = ours[-1]
        differences += [relative(*pair) for pair in zip(ours, wanted, strict=True)]
        differences.append(gradients_differ(block, whole))
    return max(differences)


@pytest.mark.parametrize("kind", TYPES)
def test_losses_and_gradients_are_those_of_one_rank(kind: str):
    """Of layers, private layers and heads; in parts of matrices, tied ones, experts, and where the plan gathers."""
    blocks, found, hidden = blocks_of(kind), [], None
    for block in blocks:
        found.append(train(block, hidden))
        hidden = found[-1][-1]
    for size in (2, 4):
        assert in_threads(partial(difference, kind, blocks, found), size) < 1e-5


FOUR = {"config_overrides": "num_key_value_heads=4,tie_word_embeddings=true", "head": "linear"}
COMMON: dict[str, Any] = {"max_steps": 10, "save_steps": 5, "max_grad_norm": 0.1, "eval_batches": 1, **FOUR}


def close(ours: list[list[float]], theirs: list[list[float]]) -> None:
    torch.testing.assert_close(torch.tensor(ours), torch.tensor(theirs), rtol=1e-5, atol=0.0)


@pytest.mark.processes
def test_runs_are_those_of_one_rank(trainer: Trainer):
    """Two stages of two ranks, one of four, two replicas of two under ZeRO-2; and each goes on as the other."""
    two = COMMON | {"num_stages": 2, "per_device_train_batch_size": 4}
    one = trainer.run("one", 2, **two)
    runs = {"two": trainer.run("two", 4, **two, tensor_parallel_size=2)}
    alone = COMMON | {"num_stages": 1, "layers_per_block": 2, "per_device_train_batch_size": 4}
    runs["four"] = trainer.run("four", 4, **alone, tensor_parallel_size=4, deepspeed=DS / "zero1.json")
    dealt = alone | {"per_device_train_batch_size": 2}
    zero2 = {"tensor_parallel_size": 2, "deepspeed": DS / "zero2.json"}
    runs["dealt"] = trainer.run("dealt", 4, **dealt, **zero2)
    wanted, exported = block_losses(one, 2), weights(one / "export")
    for name, run in runs.items():
        close(block_losses(run, 2 if name == "two" else 1), wanted)
        for key, tensor in weights(run / "export").items():
            torch.testing.assert_close(tensor, exported[key], rtol=0.0, atol=2e-5)
    for stage in range(2):
        ours, theirs = records(runs["two"], stage), records(one, stage)
        close([[r["grad_norm"] for r in ours]], [[r["grad_norm"] for r in theirs]])
        for name in ("sent_bytes", "received_bytes", "tokens"):
            assert [r[name] for r in ours] == [r[name] for r in theirs], "a position crosses a boundary once"
    assert "deepspeed --num_gpus 4 scripts/pretrain.py" in (runs["two"] / "export/README.md").read_text()
    resume = {"resume_from_checkpoint": runs["dealt"] / "checkpoints/step-00000005", "deepspeed": DS / "zero3.json"}
    close(block_losses(trainer.run("whole", 2, **dealt, **resume), 1), wanted[5:])
    resume = {"resume_from_checkpoint": one / "checkpoints/step-00000005"}
    close(block_losses(trainer.run("again", 4, **dealt, **zero2, **resume), 1), wanted[5:])


@pytest.mark.processes
@pytest.mark.parametrize(
    "flags",
    [{"method": "overlapping", "layers_per_block": 2, "block_stride": 1}, {"distillation_weight": 0.5}],
    ids=["overlapping", "distillation"],
)
def test_what_comes_back_is_the_same(trainer: Trainer, flags: dict[str, Any]):
    """Gradients and soft targets, which cross a boundary once, too; the last steps are backpropagation's."""
    common = {"num_stages": 2, "max_steps": 4, "eval_batches": 0, **flags}
    common |= {"final_backprop_steps": 2} if "method" not in flags else {}
    one, two = (trainer.run(str(size), 2 * size, **common, tensor_parallel_size=size) for size in (1, 2))
    close(block_losses(two, 2), block_losses(one, 2))
    for stage in range(2):
        for name in ("sent_bytes", "sent_gradient_bytes"):
            assert [r[name] for r in records(two, stage)] == [r[name] for r in records(one, stage)]


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        (
            "deepseek_v2",
            "divides model.layers.*.self_attn.kv_a_proj_with_mqa (Linear) by 'mla_kv_a_proj', which is not",
        ),
        ("doge", "model type 'doge' does not run divided by its plan (RuntimeError: The size of tensor a"),
        ("sarvam_moe", "model type 'sarvam_moe' divided by its plan is another model (logits or gradients differ by"),
    ],
)
def test_a_plan_that_does_not_hold_is_refused(kind: str, said: str):
    """It is tried on a small model; these are of transformers' own types."""
    run, config = from_flat({"config_name": "x.json", "tensor_parallel_size": 2}), tiny_config(kind)
    anatomy = probe(config, run.model)
    (problem,) = plan_problems(config, anatomy, 2) or division_problems(run, config, anatomy)
    assert said in problem


ASKED = {"ACCELERATE_USE_PARALLELISM_CONFIG": "true"}


@pytest.mark.parametrize(
    ("ranks", "flags", "said"),
    [
        (3, {}, "3 ranks cannot be divided into replicas of tensor_parallel_size=2 ranks; start a multiple of 2"),
        (2, {"num_stages": 2}, "2 stages of equal size with tensor_parallel_size=2; start a multiple of 4"),
        (4, {"num_stages": 2, "stage_replicas": "2,1"}, "with tensor_parallel_size=2 are 6 ranks, 4 were started"),
        (4, {"num_stages": 2, "method": "backprop"}, "DeepSpeed's pipeline (method=backprop on several stages) divide"),
        (4, {"replica_sync_steps": 2}, "replicas that train apart (replica_sync_steps=2) are of one rank"),
        (2, {"num_stages": 2, "stage": 0}, "jobs do not divide layers yet; leave out stage=0"),
        (2, {"head": "shared"}, "the matrix of head=shared travels whole; use head=linear or decoder"),
        (2, {"head": "decoder", "head_layers": 1, "head_rank": 4}, "the matrices of head_rank=4 have no plan"),
        (2, {"lora_rank": 4}, "the matrices of lora_rank=4 have no plan; leave it out"),
        (4, {"num_stages": 2, "freeze_stages": "0"}, "stages that are not trained (freeze_stages=0) have not"),
        (2, {"deepspeed": DS / "zero3.json"}, "ZeRO stage 3 gathers parameters over all ranks of a stage; use 0, 1"),
        (2, {"deepspeed": DS / "zero2_offload.json"}, "offload has not been tried with it"),
        (2, {"bf16": True}, "DeepSpeed's bf16 without ZeRO clips by a norm that misses parts of matrices; use ZeRO st"),
        (2, {"fp16": True}, "fp16 has not been tried with it; use bf16"),
        (2, {"torch_compile": True}, "compiled layers have not been tried with it"),
        (2, {"trace": True}, "a trace has one file for a replica"),
        (2, {"json": {"optimizer": {"type": "Muon"}}}, "optimizer.type=Muon may look at whole matrices"),
        (2, {"json": {"tensor_parallel": {"autotp_size": 4}}}, "tensor_parallel.autotp_size=4, the run has "
            "tensor_parallel_size=2; give --tensor_parallel_size 4, or remove it there"),
        (2, {"json": {"tensor_parallel": {"autotp_size": 2, "tp_grain_size": 8}}}, "tensor_parallel.tp_grain_size do"),
        (2, {"environ": ASKED}, "parallelism_config_tp_size=1, the run has 2: give --tensor_parallel_size 1, or"),
        (2, {"environ": ASKED | {"PARALLELISM_CONFIG_TP_SIZE": "2", "PARALLELISM_CONFIG_CP_SIZE": "2"}},
            "parallelism_config_cp_size=2, the run has 1: remove it there"),
        (1, {"tensor_parallel_size": 0}, "tensor_parallel_size=0 must be greater than 0"),
    ],
)  # fmt: skip
def test_flags_are_refused(
    trainer: Trainer, monkeypatch: pytest.MonkeyPatch, ranks: int, flags: dict[str, Any], said: str
):
    given = {"tensor_parallel_size": 2} | flags
    for name, value in given.pop("environ", {}).items():
        monkeypatch.setenv(name, value)
    if "json" in given:
        given["deepspeed"] = trainer.folder / "ds.json"
        given["deepspeed"].write_text(json.dumps(given.pop("json")))
    config = parse(trainer.flags("run", **given))
    found = [*value_problems(config), *replica_problems(config, ranks), *tensor_problems(config)]
    assert any(said in problem for problem in found), found


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ({"tensor_parallel_size": 4}, "tensor_parallel_size=4 does not divide num_key_value_heads=2 of model type "
            "'llama'; use one of 1, 2"),
        ({"config_overrides": "vocab_size=4097"}, "does not divide vocab_size=4097 of"),
        ({"config_overrides": "intermediate_size=63"}, "does not divide the 63 outputs of model.layers.*.mlp.gate"),
        ({"config_overrides": "attention_dropout=0.1"}, "attention_dropout=0.1 would draw the same masks for"),
        ({"config_name": None, "model_type": "gpt2"}, "model type 'gpt2' has no plan in transformers (tp_plan)"),
    ],
)  # fmt: skip
def test_models_are_refused(trainer: Trainer, flags: dict[str, Any], said: str):
    """Beside whatever else is wrong."""
    with pytest.raises(ConfigError) as refusal:
        preflight(parse(trainer.flags("run", **{"tensor_parallel_size": 2, "head": "shared"} | flags)), 4)
    assert any(said in problem for problem in refusal.value.problems), refusal.value.problems
    assert any("the matrix of head=shared travels whole" in problem for problem in refusal.value.problems)


def test_what_others_say_of_it_may_be_the_same(trainer: Trainer, monkeypatch: pytest.MonkeyPatch):
    path = trainer.folder / "ds.json"
    path.write_text(json.dumps({"tensor_parallel": {"autotp_size": 2}, "zero_optimization": {"stage": 1}}))
    for name, value in (ASKED | {"PARALLELISM_CONFIG_TP_SIZE": "2"}).items():
        monkeypatch.setenv(name, value)
    config = parse(trainer.flags("run", tensor_parallel_size=2, deepspeed=path))
    assert preflight(config, 2).config.local.tensor_parallel_size == 2
