"""Rows divided between the ranks of a replica: the same losses, gradients, checkpoints and exports as of whole rows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TINY, Trainer, block_losses, records, weights
from transformers import AutoConfig, AutoModelForCausalLM

from llm_local.bench.saved_bytes import saved_bytes
from llm_local.checks.preflight import preflight
from llm_local.checks.sequence_trial import dealing_problems
from llm_local.checks.tensor_trial import ThreadRanks, in_threads, relative
from llm_local.checks.tiny import tiny_config
from llm_local.config import ConfigError, from_flat, parse
from llm_local.links.packet import TRAIN, Packet
from llm_local.model.anatomy import probe
from llm_local.model.sequence_parallel import completed, exchange_heads, own_part, position_problems
from llm_local.model.stage import Blueprint, build_blocks
from llm_local.partition import Costs, make_partition
from llm_local.place import Place
from llm_local.problems import value_problems
from llm_local.replicas import replica_problems
from llm_local.sequence_problems import sequence_problems
from llm_local.tensor_problems import tensor_problems

DS = Path(__file__).parent.parent / "configs" / "ds"


def test_ranks_of_a_replica_are_neighbours():
    places = [Place(rank, (2, 1), sequence_ranks=2) for rank in range(6)]
    found = [(p.stage, p.replica, p.sequence_rank, p.data_rank) for p in places]
    assert found == [(0, 0, 0, 0), (0, 0, 1, 1), (0, 1, 0, 2), (0, 1, 1, 3), (1, 0, 0, 0), (1, 0, 1, 1)]
    assert [p.is_recorder for p in places] == [True, False, False, False, True, False]
    assert [p.peer_of(1, 0) for p in places] == [4, 5] * 3
    assert {p.world_size for p in places} == {6}


def test_parts_of_rows_know_what_is_behind_them():
    """Labels go on over the border, positions are those of whole rows, and shares are by scored positions."""
    labels = torch.tensor([[5, 6, 7, 8], [9, 3, -100, -100]])
    whole = Packet(TRAIN, 1, 0, input_ids=labels.clamp(min=0), attention_mask=(labels > 0).long(), labels=labels)
    found: dict[int, tuple[Packet, torch.Tensor]] = {}

    def deal(ranks: ThreadRanks) -> float:
        found[ranks.rank] = completed(own_part(whole, ranks), ranks, torch.device("cpu"))
        return 0.0

    in_threads(deal, 2)
    packets, shares = zip(*(found[rank] for rank in range(2)), strict=True)
    assert [p.labels.tolist() for p in packets] == [[[5, 6, 7], [9, 3, -100]], [[7, 8, -100], [-100, -100, -100]]]
    assert [p.position_ids[1].tolist() for p in packets] == [[0, 1], [2, 3]]
    torch.testing.assert_close(torch.stack(shares), torch.tensor([1.5, 0.5]))


def close(ours: Any, theirs: Any, limit: float = 1e-5) -> None:
    torch.testing.assert_close(torch.tensor(ours), torch.tensor(theirs), rtol=limit, atol=0.0)


def same_run(ours: Path, theirs: Path, num_stages: int, limit: float = 1e-5) -> None:
    """Losses, norms of gradients, tokens, and the exported model."""
    for split in ("train", "eval"):
        close(block_losses(ours, num_stages, split), block_losses(theirs, num_stages, split), limit)
    for stage in range(num_stages):
        mine, wanted = records(ours, stage), records(theirs, stage)
        close([r["grad_norm"] for r in mine], [r["grad_norm"] for r in wanted], limit)
        for name in ("tokens", "padding"):
            assert [r[name] for r in mine] == [r[name] for r in wanted]
    exported = weights(theirs / "export")
    for name, tensor in weights(ours / "export").items():
        assert relative(tensor.float(), exported[name].float()) < limit, name


# a larger epsilon than Adam's own: by that, rounding of gradients that are almost 0 is steps of full size
COMMON: dict[str, Any] = {"max_steps": 10, "max_grad_norm": 0.1, "eval_batches": 1, "adam_epsilon": 1e-5}
TWO = COMMON | {"num_stages": 2}
HEADERS = 80  # bytes of a packet that are not its positions


@pytest.mark.processes
def test_padded_rows_go_on_as_whole_ones_and_back(trainer: Trainer):
    """Two stages of two ranks, micro-batches in which one rank has fewer scored positions than the other."""
    documents = trainer.folder / "documents.jsonl"
    lines = trainer.text.read_text().splitlines()
    documents.write_text("".join(f"{json.dumps({'text': line})}\n" for line in lines if len(line) > 20))
    flags = TWO | {"train_file": documents, "packing": "none", "gradient_accumulation_steps": 2}
    flags |= {"head": "decoder", "head_layers": 1, "save_steps": 5}
    one = trainer.run("one", 2, **flags)
    parts = flags | {"sequence_parallel_size": 2, "deepspeed": DS / "zero2.json"}
    two = trainer.run("two", 4, **parts)
    same_run(two, one, 2)
    assert records(one, 0)[0]["padding"] > 0.1
    for ours, theirs in zip(records(two, 0), records(one, 0), strict=True):
        assert ours["sent_bytes"] - 2 * 2 * HEADERS == theirs["sent_bytes"] - 2 * HEADERS, "a position crosses once"
    assert "deepspeed --num_gpus 4 scripts/pretrain.py" in (two / "export/README.md").read_text()
    checkpoints = [run / "checkpoints/step-00000005" for run in (one, two)]
    again = trainer.run("again", 4, **parts, resume_from_checkpoint=checkpoints[0])
    whole = trainer.run("whole", 2, **flags, resume_from_checkpoint=checkpoints[1])
    for run in (again, whole):
        close(block_losses(run, 2), block_losses(one, 2)[5:])


GPT2 = {"model_type": "gpt2", "n_embd": 32, "n_head": 4, "n_layer": 4, "n_positions": 64, "vocab_size": 4096}
GPT2 |= {"attn_pdrop": 0.0, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "bos_token_id": 1, "eos_token_id": 2}
WINDOWS = ["sliding_attention", "full_attention"] * 2
MODELS: dict[str, dict[str, Any]] = {
    "llama": TINY,
    "gpt2": GPT2,
    "qwen3": TINY | {"model_type": "qwen3", "head_dim": 8},
    "gemma3_text": TINY | {"model_type": "gemma3_text", "head_dim": 8, "sliding_window": 8, "layer_types": WINDOWS},
}


HEADS = {"head": "decoder", "head_layers": 1, "head_rank": 4, "head_features": True, "layers_per_block": 1}
HEADS |= {"head_warmup_steps": 3}


@pytest.mark.processes
@pytest.mark.parametrize(
    ("kind", "flags"),
    [
        ("llama", {"deepspeed": DS / "zero3.json", "gradient_checkpointing": True}),
        ("gpt2", {"deepspeed": DS / "zero1.json", "method": "greedy"}),
        ("qwen3", {}),
        ("gemma3_text", {"stage_replicas": "2,1"}),
        ("llama", {"method": "overlapping", "layers_per_block": 2, "block_stride": 1}),
        ("llama", {"final_backprop_steps": 5, "deepspeed": DS / "zero2.json"}),
        ("llama", {"method": "delayed", "delay_correction": True, "gradient_accumulation_steps": 2}),
        ("llama", {"head": "shared", "layers_per_block": 1, "head_refresh_steps": 2}),
        ("llama", HEADS | {"freeze_stages": "0"}),
        ("llama", {"bf16": True, "deepspeed": DS / "zero1.json"}),
    ],
    ids=["zero3", "zero1", "zero0", "dealt", "overlapping", "finally", "delayed", "shared", "heads", "bf16"],
)
def test_runs_are_those_of_whole_rows(trainer: Trainer, kind: str, flags: dict[str, Any]):
    """Types with rotary, learned and windowed positions, under each ZeRO stage; and what goes back over a boundary."""
    flags = TWO | {"config_name": trainer.model(MODELS[kind])} | flags
    ranks = 3 if "stage_replicas" in flags else 2
    one, two = (trainer.run(str(size), ranks * size, **flags, sequence_parallel_size=size) for size in (1, 2))
    same_run(two, one, 2, limit=5e-3 if "bf16" in flags else 1e-5)


@pytest.mark.processes
def test_four_ranks_are_a_replica(trainer: Trainer):
    """All layers are one block, of backpropagation."""
    flags = COMMON | {"method": "backprop", "config_overrides": "num_key_value_heads=4"}
    same_run(trainer.run("four", 4, **flags, sequence_parallel_size=4), trainer.run("one", 1, **flags), 1)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "qwen3", "gemma3_text", "opt", "deepseek_v3"])
def test_a_type_passes_its_trial(kind: str):
    """Learned positions, rotary ones, windows, latent keys."""
    assert found_of(kind) == []


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("roberta", "model type 'roberta' is another model on parts of rows (logits or gradients differ by"),
        ("bloom", "model type 'bloom' is another model on parts of rows (logits or gradients differ by"),
        ("gemma2", "does not run on parts of rows (ValueError: `sdpa` attention does not support `softcap`"),
        ("mamba", "does not run on parts of rows (ValueError: a small one has no heads to divide: [None, None]); use"),
    ],
)
def test_a_type_fails_its_trial(kind: str, said: str):
    (problem,) = found_of(kind)
    assert said in problem


def test_a_mask_of_a_part_of_a_row_is_refused():
    config = AutoConfig.for_model(**TINY)

    def attend(ranks: ThreadRanks) -> float:
        model = AutoModelForCausalLM.from_config(config)
        exchange_heads(model, ranks)
        model(torch.ones(1, 6, dtype=torch.int64), attention_mask=torch.ones(1, 1, 6, 6, dtype=torch.bool))
        return 0.0

    with pytest.raises(ValueError, match="its class makes masks of its own"):
        in_threads(attend, 2)


def found_of(kind: str) -> list[str]:
    run, config = from_flat({"config_name": "x.json", "sequence_parallel_size": 2}), tiny_config(kind)
    return dealing_problems(run, config, probe(config, run.model))


ASKED = {"ACCELERATE_USE_PARALLELISM_CONFIG": "true"}


@pytest.mark.parametrize(
    ("ranks", "flags", "said"),
    [
        (3, {}, "3 ranks cannot be divided into replicas of sequence_parallel_size=2 ranks; start a multiple of 2"),
        (2, {"num_stages": 2}, "2 stages of equal size with sequence_parallel_size=2; start a multiple of 4"),
        (2, {"seq_length": 33}, "seq_length=33 is no multiple of it; use 34, or another number of ranks"),
        (4, {"tensor_parallel_size": 2}, "divide rows or layers; leave out one of it and tensor_parallel_size=2"),
        (4, {"num_stages": 2, "method": "backprop"}, "DeepSpeed's pipeline (method=backprop on several stages) divide"),
        (2, {"task": "masked-lm"}, "task=masked-lm is of rows that cannot be divided yet; use causal-lm"),
        (2, {"num_stages": 2, "stage": 0}, "jobs do not divide rows yet; leave out stage=0"),
        (2, {"head_token_fraction": 0.5}, "the windows of head_token_fraction=0.5 are of whole rows; leave it out"),
        (2, {"document_mask": True}, "no rank sees where the documents of whole rows begin; leave out document_mask"),
        (2, {"trace": True}, "a trace has one file for a replica"),
        (2, {"distillation_weight": 0.5}, "distillation_weight=0.5 has not been tried with it; leave it out"),
        (2, {"lora_rank": 4}, "lora_rank=4 has not been tried with it"),
        (4, {"replica_sync_steps": 2}, "replica_sync_steps=2 has not been tried with it"),
        (2, {"fp16": True}, "fp16=True has not been tried with it"),
        (2, {"torch_compile": True}, "torch_compile=True has not been tried with it"),
        (2, {"json": 4}, "sequence_parallel_size=4, the run has 2; give --sequence_parallel_size 4, or remove"),
        (2, {"json": "two"}, "sequence_parallel_size=two, the run has 2; name it, or remove it there"),
        (2, {"environ": ASKED}, "parallelism_config_sp_size=1, the run has 2: give --sequence_parallel_size 1, or"),
        (1, {"sequence_parallel_size": 0}, "sequence_parallel_size=0 must be greater than 0"),
    ],
)  # fmt: skip
def test_flags_are_refused(
    trainer: Trainer, monkeypatch: pytest.MonkeyPatch, ranks: int, flags: dict[str, Any], said: str
):
    given = {"sequence_parallel_size": 2} | flags
    for name, value in given.pop("environ", {}).items():
        monkeypatch.setenv(name, value)
    if "json" in given:
        given["deepspeed"] = trainer.folder / "ds.json"
        given["deepspeed"].write_text(json.dumps({"sequence_parallel_size": given.pop("json")}))
    config = parse(trainer.flags("run", **given))
    found = [*value_problems(config), *replica_problems(config, ranks), *sequence_problems(config)]
    found += tensor_problems(config)
    assert any(said in problem for problem in found), found


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ({"sequence_parallel_size": 4}, "sequence_parallel_size=4 does not divide num_key_value_heads=2 of model type "
            "'llama'; use one of 1, 2"),
        ({"attn_implementation": "eager"}, "with attn_implementation=eager: heads are exchanged around sdpa alone"),
        ({"config_overrides": "attention_dropout=0.1"}, "attention_dropout=0.1 would draw the same masks for different "
            "positions of a row; set attention_dropout=0.0"),
        ({"config_overrides": 'rope_parameters={"rope_type":"dynamic","rope_theta":1e4,"factor":2.0}'},
            "rope_type=dynamic of model type 'llama' looks at a row's length, which no rank sees; use 1, or another"),
    ],
)  # fmt: skip
def test_models_are_refused(trainer: Trainer, flags: dict[str, Any], said: str):
    with pytest.raises(ConfigError) as refusal:
        preflight(parse(trainer.flags("run", **{"sequence_parallel_size": 2} | flags)), 4)
    assert any(said in problem for problem in refusal.value.problems), refusal.value.problems


@pytest.mark.parametrize(
    ("kind", "values", "said"),
    [
        ("mixtral", {"output_router_logits": True}, "output_router_logits=true asks for a loss of whole rows"),
        ("minimax_m3_vl_text", {}, "model type 'minimax_m3_vl_text' chooses index_topk_blocks of the keys that a rank"),
        ("llama4_text", {"attn_temperature_tuning": True}, "attn_temperature_tuning of model type 'llama4_text'"),
    ],
)
def test_what_a_trial_would_not_show_is_refused(kind: str, values: dict[str, Any], said: str):
    config = tiny_config(kind)
    for name, value in values.items():
        setattr(config, name, value)
    assert any(said in problem for problem in position_problems(config, None, 2))


def test_deepspeed_may_say_the_same(trainer: Trainer):
    path = trainer.folder / "ds.json"
    settings = {"sequence_parallel_size": 2, "train_batch_size": 4, "zero_optimization": {"stage": 1}}
    path.write_text(json.dumps(settings))
    config = parse(trainer.flags("run", sequence_parallel_size=2, deepspeed=path))
    assert preflight(config, 4).config.local.sequence_parallel_size == 2


def graph_bytes(length: int, ranks: ThreadRanks | None = None) -> int:
    """That a block of two layers holds for its backward pass, of a row of so many tokens or of a rank's part of it."""
    sizes = {"num_key_value_heads": 4, "num_hidden_layers": 2, "max_position_embeddings": length}
    config, run = AutoConfig.for_model(**TINY | sizes), from_flat({"config_name": "x.json"})
    partition = make_partition(2, 1, Costs(1.0, 1.0), 2)
    (block,) = build_blocks(Blueprint(run, config, probe(config, run.model), partition), 0, sequence=ranks)
    packet = Packet(TRAIN, 1, 0, input_ids=torch.arange(length).view(1, -1) % 4096)
    if ranks is not None:
        packet, _ = completed(own_part(packet, ranks), ranks, torch.device("cpu"))
    with saved_bytes() as saved:
        loss, *_ = block(**packet.inputs())
        found = saved.now
        loss.backward()
    return found


def test_four_ranks_hold_a_quarter_each():
    """Of all that grows with a row; the gradient of the output matrix does not."""
    whole = graph_bytes(1024)
    most = in_threads(lambda ranks: float(graph_bytes(1024, ranks)), 4)
    assert most < 0.35 * whole


def test_a_rank_is_expected_to_need_half_and_what_it_exchanges(trainer: Trainer):
    flags = {"seq_length": 64, "per_device_train_batch_size": 64}
    whole, parts = (
        preflight(parse(trainer.flags("run", **flags, sequence_parallel_size=size)), size).memory[0] for size in (1, 2)
    )
    assert 0.5 <= parts.activations / whole.activations < 0.56
