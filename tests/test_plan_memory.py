"""Bytes: against the ZeRO paper, against what torch saves of real layers, and against the simulation."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    PretrainedConfig,
)

from llm_local.adapters.torch_internals import TensorBytes
from llm_local.config import Config, ConfigError
from llm_local.device import DTYPES
from llm_local.ds_config import fit_bucket
from llm_local.flags import ModelArguments
from llm_local.memory import parts
from llm_local.memory.division import WHOLE, Division, Listener, Told
from llm_local.memory.engine import Zero, engine_memory
from llm_local.memory.parts import (
    alive_passes,
    block_activations,
    layer_activations,
    loss_memory,
    packet_memory,
    pipeline_parameters,
    stage_parameters,
)
from llm_local.memory.sizes import ModelSizes, read_model, read_shares
from llm_local.memory.stage import Memory
from llm_local.methods.method import local_schedules
from llm_local.model import loss
from llm_local.model.loss import LossLinear
from llm_local.model.sequence_parallel import exchange_heads
from llm_local.model.tensor_parallel import divide
from llm_local.partition import Costs, make_partition
from llm_local.plan.times import PEERS, Pipe, StageSeconds

SMALL: dict[str, Any] = {"vocab_size": 512, "num_hidden_layers": 3, "max_position_embeddings": 64}
LLAMA = LlamaConfig(
    hidden_size=64,
    intermediate_size=160,
    num_attention_heads=4,
    num_key_value_heads=2,
    tie_word_embeddings=False,
    **SMALL,
)
CONFIGS = {
    "llama": (LLAMA, 160, True),
    "gpt2": (GPT2Config(vocab_size=512, n_embd=64, n_layer=3, n_head=4, n_positions=64), 256, False),
    "gpt_neox": (GPTNeoXConfig(hidden_size=64, intermediate_size=256, num_attention_heads=4, **SMALL), 256, False),
    "mixtral": (
        MixtralConfig(
            hidden_size=64,
            intermediate_size=96,
            num_attention_heads=4,
            num_key_value_heads=2,
            num_local_experts=8,
            num_experts_per_tok=2,
            **SMALL,
        ),
        192,
        True,
    ),
}


def sizes_of(config: PretrainedConfig, folder: Path) -> ModelSizes:
    path = folder / "config.json"
    config.to_json_file(path)
    return read_model(ModelArguments(config_name=str(path)))[1]


@pytest.mark.parametrize("kind", CONFIGS)
def test_numbers_are_those_of_the_model(kind: str, tmp_path: Path):
    config, width, is_gated = CONFIGS[kind]
    sizes = sizes_of(config, tmp_path)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    assert sizes.num_parameters == sum(p.numel() for p in model.parameters())
    assert (sizes.feed_forward_width, sizes.is_gated) == (width, is_gated)
    assert (sizes.num_layers, sizes.hidden_size, sizes.vocab_size) == (3, 64, 512)
    assert sizes.is_tied == (kind == "gpt2")
    idle = 3 * 64 * 96 * 6 if kind == "mixtral" else 0
    assert sizes.active_layer_parameters == sizes.layer_parameters - idle


def test_a_thousand_layers_are_not_made(tmp_path: Path):
    deep = LlamaConfig(**{**LLAMA.to_dict(), "num_hidden_layers": 1000})
    assert sizes_of(deep, tmp_path) == replace(sizes_of(LLAMA, tmp_path), num_layers=1000)


def test_the_kernel_of_the_config_or_the_flag_says_whether_scores_are_kept(tmp_path: Path):
    path = tmp_path / "config.json"
    for of_config, flag, keeps in [("eager", None, True), ("eager", "sdpa", False), ("flash_attention_2", None, False)]:
        path.write_text(json.dumps({**LLAMA.to_dict(), "attn_implementation": of_config}))
        model = ModelArguments(config_name=str(path), attn_implementation=flag)
        assert read_model(model)[1].keeps_scores is keeps


@pytest.mark.parametrize(
    ("values", "missing"),
    [
        ({"model_type": "llama"}, "hidden_size, num_hidden_layers, vocab_size"),
        ({"model_type": "gpt2", "n_embd": 64, "vocab_size": 100}, "num_hidden_layers"),
    ],
)
def test_a_config_without_sizes_is_refused(tmp_path: Path, values: dict, missing: str):
    """Its class would take those of some published model."""
    path = tmp_path / "config.json"
    path.write_text(json.dumps(values))
    with pytest.raises(ConfigError, match=f"does not say {missing}; a plan needs the model's sizes"):
        read_model(ModelArguments(config_name=str(path)))


def test_a_model_that_cannot_be_cut_is_refused(tmp_path: Path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"model_type": "xlnet", "d_model": 64, "n_layer": 2, "n_head": 4, "vocab_size": 100}))
    with pytest.raises(ConfigError, match="cannot be cut into stages"):
        read_model(ModelArguments(config_name=str(path)))


@pytest.mark.parametrize(("zero", "each"), [(0, 16), (1, 4 + 12 / 64), (2, 2 + 14 / 64), (3, 16 / 64)])
def test_states_are_those_of_the_zero_paper(zero: int, each: float):
    """Figure 1 of the paper: 7.5B parameters on 64 devices take 120, 31.4, 16.6 and 1.9 GB."""
    made = engine_memory(7_500_000_000, "bf16", Zero(zero, bucket=0, live=0), 64)
    found = made.weights + made.optimizer + made.gradients + made.standing
    assert found == pytest.approx(7.5e9 * each)
    assert found / 1e9 == pytest.approx({0: 120, 1: 31.4, 2: 16.6, 3: 1.9}[zero], abs=0.05)


def test_full_precision_has_second_weights_under_zero_1_and_2_alone():
    optimizers = [engine_memory(100, "fp32", Zero(stage), 4).optimizer for stage in range(4)]
    assert optimizers == [800, 300, 300, 200]


def test_a_bucket_for_gradients_is_no_larger_than_they_are():
    def size(**zero: int) -> int | None:
        return fit_bucket({"zero_optimization": zero}, 1000)["zero_optimization"].get("reduce_bucket_size")

    assert [size(stage=2), size(stage=3, reduce_bucket_size=700), size(stage=0)] == [1000, 700, None]
    whole, half = (engine_memory(1000, "bf16", Zero(2, bucket=bucket), 2).buffer for bucket in (5000, 500))
    assert (whole, half) == (2000, 1000)


def _saved_bytes(num_layers: int, tokens: int) -> int:
    """What autograd keeps of a forward pass in bf16, weights left out."""
    config = LlamaConfig(**{**LLAMA.to_dict(), "num_hidden_layers": num_layers})
    model: Any = LlamaForCausalLM(config)
    model.to(torch.bfloat16).train()
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model.model(torch.zeros(1, tokens, dtype=torch.long), use_cache=False)
    return sum(t.untyped_storage().nbytes() for place, t in kept.items() if place not in weights)


def test_activations_are_what_a_llama_keeps(tmp_path: Path):
    measured = _saved_bytes(3, 64) - _saved_bytes(2, 64)
    assert layer_activations(sizes_of(LLAMA, tmp_path), 64, "bf16") == pytest.approx(measured / 64, rel=0.05)
    counted = read_model(ModelArguments(config_name=str(tmp_path / "config.json")), 64, "bf16")[1].activations
    assert counted is not None
    assert counted.kept == pytest.approx(measured, rel=0.02)


DIVISIONS = [Division(layers=2), Division(rows=2)]


def _share_of(kind: str, folder: Path, division: Division) -> ModelSizes:
    path = folder / "config.json"
    CONFIGS[kind][0].to_json_file(path)
    return read_shares(ModelArguments(config_name=str(path)), 64, "bf16", (division,))[1][0]


def _held_bytes(num_layers: int, division: Division) -> tuple[int, Told, Told]:
    """What a rank's tensors take behind a forward pass of one row, and what it has told till then, and after all."""
    model: Any = LlamaForCausalLM(LlamaConfig(**{**LLAMA.to_dict(), "num_hidden_layers": num_layers}))
    ranks, length = Listener(division.ranks), 64 // division.rows
    if division.layers > 1:
        divide((model,), ranks)
    if division.rows > 1:
        exchange_heads(model, ranks)
    model.to(torch.bfloat16).train()
    positions = torch.arange(length).expand(1, -1)
    with TensorBytes() as count:
        out = model.model(torch.zeros(1, length, dtype=torch.long), position_ids=positions, use_cache=False)[0]
        ahead, kept = ranks.told, count.now
        out.sum().backward()
    return kept, ahead, ranks.told


@pytest.mark.parametrize("division", DIVISIONS)
def test_a_rank_s_share_is_counted_as_real_layers_have_it(tmp_path: Path, division: Division):
    found = _share_of("llama", tmp_path, division)
    assert found.activations is not None
    (more, more_ahead, more_told), (less, ahead, told) = (_held_bytes(layers, division) for layers in (3, 2))
    # a fake attention kernel lays out what it returns in another order, and it is copied once more
    assert found.activations.kept == pytest.approx(more - less, abs=64 // division.rows * 64 * 2)
    assert found.ahead == more_ahead - ahead
    assert found.ahead + found.back == more_told - told
    # 64 positions of 64 numbers: sums behind both pairs of matrices, and before each of q, k, v, gate and up; or
    # of 32 positions 4 heads of 16 numbers for queries and what comes out, and 2 for keys and values
    expected = (Told(2 * 2 * 8192, 2), Told(5 * 2 * 8192, 5)) if division.layers > 1 else (Told(3 * 4096, 4),) * 2
    assert (found.ahead, found.back) == expected


@pytest.mark.parametrize("division", DIVISIONS)
def test_what_is_told_by_the_plan_alone_is_what_was_counted(tmp_path: Path, division: Division):
    """Experts cannot be counted: theirs is one sum ahead and one back, beside q, k, v and what follows attention."""
    experts = _share_of("mixtral", tmp_path, division)
    assert experts.activations is None
    dense = _share_of("llama", tmp_path, division)
    kept = experts.layer_parameters / _share_of("mixtral", tmp_path, WHOLE).layer_parameters
    if division.rows > 1:
        assert (experts.ahead, experts.back, kept) == (dense.ahead, dense.back, 1.0)
    else:
        assert (experts.ahead, experts.back.times) == (dense.ahead, 4)
        assert 0.5 < kept < 0.52, "norms and the router are whole"


@pytest.mark.parametrize("size", [2, 4])
def test_parameters_of_a_rank_are_those_that_it_has(tmp_path: Path, size: int):
    config = LlamaConfig(**{**LLAMA.to_dict(), "num_key_value_heads": 4})
    model: Any = LlamaForCausalLM(config)
    divide((model,), Listener(size))
    config.to_json_file(tmp_path / "config.json")
    given = ModelArguments(config_name=str(tmp_path / "config.json"))
    found = read_shares(given, 0, "bf16", (Division(layers=size),))[1][0]
    assert found.num_parameters == sum(p.numel() for p in model.parameters())
    assert found.head_parameters == 512 * 64 // size
    assert found.vocab_size == 512 // size


@pytest.mark.parametrize(("width", "tokens"), [(32, 512), (64, 512), (256, 128), (128, 4096)])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_loss_of_a_part_of_the_vocabulary_takes_what_it_takes(
    width: int, tokens: int, precision: str, monkeypatch: pytest.MonkeyPatch
):
    vocab, rows, ranks = 4096, 256, Listener(2)
    linear = nn.Linear(width, vocab, bias=False)
    holder = LlamaForCausalLM(LlamaConfig(**{**LLAMA.to_dict(), "vocab_size": vocab, "hidden_size": width}))
    holder.lm_head = LossLinear.of(linear)
    divide((holder,), ranks)
    matrix: Any = holder.lm_head.to(DTYPES[precision])
    states = torch.randn(tokens, width, dtype=DTYPES[precision], requires_grad=True)
    for module in (loss, parts):
        monkeypatch.setattr(module, "rows_at_a_time", lambda vocab, gpu: rows)
    with TensorBytes() as count:
        matrix(states, torch.zeros(tokens, dtype=torch.long)).backward()
    sizes = replace(SIZES, hidden_size=width, vocab_size=vocab // 2, head_parameters=vocab * width // 2)
    base = Config()
    train = replace(base.train, per_device_train_batch_size=1, bf16=precision == "bf16")
    config = replace(base, train=train, data=replace(base.data, seq_length=tokens))
    expected = sum(loss_memory(replace(sizes, division=Division(layers=2)), config, True, 0.0))
    assert expected == pytest.approx(count.peak, rel=0.1)


def test_activations_of_korthikanti():
    """Their 34·h are 18·h and 16·h between the matrices; here norms in float32 take the place of dropout masks."""
    sizes = ModelSizes(4, 100, 10, 1, 1, 1, 1, False, 400, False, 8)
    assert layer_activations(sizes, 50, "bf16") == 2400 + 1600
    assert layer_activations(sizes, 50, "bf16", keeps_scores=True) == 4000 + 5 * 8 * 50
    assert layer_activations(sizes, 50, "fp32") == 8000
    assert layer_activations(replace(sizes, division=Division(layers=2)), 50, "bf16") == 2000 + 1600


def test_checkpointing_keeps_inputs_and_one_layer():
    sizes = ModelSizes(4, 100, 10, 1, 1, 1, 1, False, 400, False, 8)
    base = Config()
    train = replace(base.train, per_device_train_batch_size=2, bf16=True)
    config = replace(base, train=train, data=replace(base.data, seq_length=50))
    norm = 100 * 8 * 100
    assert block_activations(sizes, 3, config) == (100 * 3 * 4000, norm, 100 * 2000)
    config = replace(config, train=replace(train, gradient_checkpointing=True))
    assert block_activations(sizes, 3, config) == (100 * 3 * 200, norm, 100 * 5800)


@pytest.mark.parametrize("schedule", [s for s in (*local_schedules(), *PEERS) if s != "distillation"])
@pytest.mark.parametrize(("num_stages", "micro_batches"), [(1, 1), (1, 4), (2, 2), (3, 6), (4, 8), (6, 6)])
@pytest.mark.parametrize("num_blocks", [1, 2, 3])
def test_micro_batches_alive_are_those_of_the_simulation(
    schedule: str, num_stages: int, micro_batches: int, num_blocks: int
):
    if schedule in PEERS and schedule != "interleaved" and num_blocks > 1:
        return
    pipe = Pipe(schedule, (StageSeconds((1.0,) * num_blocks, (2.0,) * num_blocks),) * num_stages, micro_batches)
    found = [alive_passes(schedule, num_stages, k, micro_batches, num_blocks) for k in range(num_stages)]
    assert tuple(found) == pipe.simulate(2).peak_alive


SIZES = ModelSizes(8, 64, 512, 1000, 1000, 500, 500, False, 160, True, 4)


def _config(head: str, **local: int) -> Config:
    base = Config()
    return replace(base, local=replace(base.local, head=head, num_stages=4, **local))


def test_each_stage_holds_its_layers_heads_and_what_it_reads():
    cut = make_partition(8, 4, Costs(1.0, 0.0))
    linear = [stage_parameters(SIZES, cut, k, _config("linear"), 1000).trained for k in range(4)]
    assert linear == [2000 + 500 + 500, 2500, 2500, 2500]
    shared = [stage_parameters(SIZES, cut, k, _config("shared"), 1000) for k in range(4)]
    assert [s.trained for s in shared] == [2500, 2000, 2000, 2500]
    assert [s.read for s in shared] == [500, 500, 500, 0]
    decoder = [stage_parameters(SIZES, cut, k, _config("decoder", head_layers=2), 1000).trained for k in range(4)]
    assert decoder == [5000, 4500, 4500, 2500]


def test_a_tied_embedding_is_held_once_by_the_first_block_alone():
    cut, tied = make_partition(8, 4, Costs(1.0, 0.0)), replace(SIZES, is_tied=True)
    assert stage_parameters(tied, cut, 0, _config("linear"), 1000).trained == 2500
    assert stage_parameters(tied, cut, 0, _config("shared"), 1000).trained == 2500
    assert [pipeline_parameters(tied, 4, k == 0, k == 1).trained for k in range(2)] == [4500, 4500]
    assert pipeline_parameters(tied, 8, True, True).trained == 8500
    assert pipeline_parameters(SIZES, 8, True, True).trained == 9000


def test_packets_are_sent_ones_and_one_received():
    base = Config()
    train = replace(base.train, bf16=True, per_device_train_batch_size=2)
    config = replace(base, train=train, data=replace(base.data, seq_length=10))
    each = 20 * (64 * 2 + 4)
    assert packet_memory(SIZES, config, has_before=True, has_behind=True) == 5 * each
    assert packet_memory(SIZES, config, has_before=False, has_behind=False) == 0


def test_memory_says_its_largest_parts_first():
    memory = Memory(2e9, 1e9, 12e9, 3.5e9, 0.01e9, 0.2e9)
    assert str(memory) == "18.7 GB (optimizer 12.0, activations 3.5, weights 2.0, gradients 1.0, packets 0.2)"
