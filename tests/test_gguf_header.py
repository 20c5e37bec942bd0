"""What a GGUF file says of its model reaches the config, and what no config can say is refused by name."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf_files import write_gguf
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from llm_local.config import Config, ConfigError, from_flat
from llm_local.model.gguf_cache import convert, weights_path
from llm_local.model.model_config import load_model_config

SHAPE = {
    "vocab_size": 320,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-4,
    "pad_token_id": 0,
}
PLAIN = {"rope.dimension_count": 8, "rope.freq_base": 10000.0}
WIDE = {"attention.key_length": 16, "attention.value_length": 16}
SHORT, LONG = [1.0, 1.1, 1.2, 1.3], [1.5, 2.0, 3.0, 4.0]
LLAMA3 = {"rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
FULL = {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6}
GEMMA3_ROPE = {"full_attention": FULL, "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0}}


def rope(**parameters: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_theta": 10000.0, **parameters}}


# architecture of the file: model type, what its config says besides SHAPE, keys of the file, further tensors
CASES: dict[str, tuple[str, str, dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    "llama-wide-heads": ("llama", "llama", {"head_dim": 16}, {**WIDE, "rope.dimension_count": 16}, {}),
    "llama-linear": (
        "llama",
        "llama",
        rope(rope_type="linear", factor=4.0),
        {**PLAIN, "rope.scaling.type": "linear", "rope.scaling.factor": 4.0, "rope.scaling.finetuned": True},
        {},
    ),
    "llama-biases": ("llama", "llama", {"attention_bias": True, "mlp_bias": True}, PLAIN, {}),
    "llama-3.1": (
        "llama",
        "llama",
        {"rope_parameters": LLAMA3 | {"original_max_position_embeddings": 8192}},
        PLAIN | {"rope.freq_base": 500000.0},
        {"rope_freqs.weight": "rope_freqs"},
    ),
    "llama-other-factors": (
        "llama",
        "llama",
        {"rope_parameters": LLAMA3 | {"original_max_position_embeddings": 32}},
        PLAIN | {"rope.freq_base": 500000.0},
        {"rope_freqs.weight": "rope_freqs"},
    ),
    "qwen2-yarn": (
        "qwen2",
        "qwen2",
        rope(rope_type="yarn", factor=4.0, original_max_position_embeddings=16, beta_fast=16.0),
        {
            "rope.freq_base": 10000.0,
            "rope.scaling.type": "yarn",
            "rope.scaling.factor": 4.0,
            "rope.scaling.original_context_length": 16,
            "rope.scaling.yarn_beta_fast": 16.0,
        },
        {},
    ),
    "qwen3": ("qwen3", "qwen3", {"head_dim": 16, **rope(rope_theta=1e6)}, {**WIDE, "rope.freq_base": 1e6}, {}),
    "phi3-factors": (
        "phi3",
        "phi3",
        {
            "original_max_position_embeddings": 16,
            "sliding_window": 12,
            **rope(rope_type="longrope", short_factor=SHORT, long_factor=LONG, original_max_position_embeddings=16),
        },
        {
            **PLAIN,
            "attention.sliding_window": 12,
            "rope.scaling.original_context_length": 16,
            "rope.scaling.attn_factor": math.sqrt(1 + math.log(4) / math.log(16)),
        },
        {"rope_factors_long.weight": LONG, "rope_factors_short.weight": SHORT},
    ),
    "phi3-partial": (
        "phi3",
        "phi3",
        {"partial_rotary_factor": 0.5},
        {"rope.dimension_count": 4, "attention.sliding_window": 0},
        {},
    ),
    "gemma2": (
        "gemma2",
        "gemma2",
        {"head_dim": 16, "query_pre_attn_scalar": 16, "attn_logit_softcapping": 5.0, "final_logit_softcapping": 3.0},
        {**WIDE, "attn_logit_softcapping": 5.0, "final_logit_softcapping": 3.0},
        {},
    ),
    "gemma3": (
        "gemma3",
        "gemma3_text",
        {
            "head_dim": 16,
            "query_pre_attn_scalar": 16,
            "sliding_window": 8,
            "num_hidden_layers": 6,
            "rope_parameters": GEMMA3_ROPE,
        },
        {
            **WIDE,
            "attention.sliding_window": 8,
            "rope.freq_base": 1e6,
            "rope.scaling.type": "linear",
            "rope.scaling.factor": 8.0,
        },
        {},
    ),
    "starcoder2": (
        "starcoder2",
        "starcoder2",
        {"norm_epsilon": 1e-3, **rope(rope_theta=1e6)},
        {"rope.freq_base": 1e6},
        {},
    ),
    "stablelm": (
        "stablelm",
        "stablelm",
        {"layer_norm_eps": 1e-3, "use_qkv_bias": True, "partial_rotary_factor": 0.5},
        {"rope.dimension_count": 4, "rope.freq_base": 10000.0, "use_parallel_residual": False},
        {},
    ),
    "gpt2": ("gpt2", "gpt2", {"n_inner": 48, "layer_norm_epsilon": 1e-3}, {}, {}),
    "qwen3moe": (
        "qwen3moe",
        "qwen3_moe",
        {
            "head_dim": 16,
            "moe_intermediate_size": 16,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "norm_topk_prob": True,
        },
        {
            **WIDE,
            "expert_count": 4,
            "expert_used_count": 2,
            "expert_feed_forward_length": 16,
            "rope.freq_base": 10000.0,
        },
        {},
    ),
}


def made(kind: str, **settings: Any) -> Any:
    """A model whose every weight matters."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **SHAPE | settings)).eval()
    for name, parameter in model.named_parameters():
        torch.nn.init.normal_(parameter, std=0.2)
        if ("norm" in name or "ln_" in name) and not kind.startswith("gemma"):
            parameter.data += 1
    return model


def rope_freqs(config: PretrainedConfig) -> torch.Tensor:
    """As Llama 3.1 is converted: what each frequency is divided by."""
    scaled, _ = ROPE_INIT_FUNCTIONS[config.rope_parameters["rope_type"]](config)
    unscaled = config.rope_parameters["rope_theta"] ** -(torch.arange(len(scaled)) / len(scaled))
    return unscaled / scaled


def run_of(folder: Path) -> Config:
    return from_flat({"model_name_or_path": str(folder), "gguf_file": "m.gguf", "cache_dir": str(folder / "cache")})


@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_the_model_is_the_one_that_the_file_was_made_of(tmp_path: Path, name: str):
    architecture, kind, settings, keys, tensors = CASES[name]
    model = made(kind, **settings)
    more = {key: rope_freqs(model.config) if value == "rope_freqs" else value for key, value in tensors.items()}
    write_gguf(tmp_path / "m.gguf", model, architecture, keys, more)
    run = run_of(tmp_path)
    config = load_model_config(run.model)
    convert(run)
    read: Any = AutoModelForCausalLM.from_pretrained(weights_path(run), config=config)
    ids = torch.arange(5, 53).reshape(2, -1)
    wanted = model(ids).logits
    assert (read.eval()(ids).logits - wanted).abs().max() <= 1e-4 * wanted.abs().max()
    if name == "llama-3.1":
        assert config.rope_parameters["rope_type"] == "llama3", "as the model had it"


@pytest.mark.parametrize(
    ("keys", "tensors", "said"),
    [
        ({"attention.scale": 0.5, "logit_scale": 0.0}, {}, "has no place for llama.attention.scale=0.5)"),
        ({"rope.dimension_count": 4, **WIDE}, {}, "has no place for llama.rope.dimension_count=4)"),
        (
            {"rope.scaling.type": "yarn", "rope.scaling.yarn_ext_factor": 2.0},
            {},
            "llama.rope.scaling.yarn_ext_factor=2.0)",
        ),
        ({"rope.scaling.type": "yarn"}, {"rope_freqs.weight": SHORT}, "has no place for llama.rope.scaling.type=yarn)"),
        ({"attention.head_count_kv": [2, 1]}, {}, "list"),
        (
            {"expert_count": 4},
            {"blk.0.attn_sinks.weight": [1.0], "blk.1.attn_sinks.weight": [1.0]},
            "has no place for blk.*.attn_sinks.weight, llama.expert_count=4)",
        ),
    ],
)
def test_what_no_config_can_say_is_named(tmp_path: Path, keys: dict[str, Any], tensors: dict[str, Any], said: str):
    settings = {"head_dim": 16} if "attention.key_length" in keys else {}
    write_gguf(tmp_path / "m.gguf", made("llama", **settings), "llama", PLAIN | keys, tensors)
    with pytest.raises(ConfigError) as refused:
        load_model_config(run_of(tmp_path).model)
    (problem,) = refused.value.problems
    assert problem.startswith(f"gguf_file={tmp_path}/m.gguf cannot be read (")
    assert said in problem
    assert "\n" not in problem


def test_a_file_without_a_tensor_of_the_model_is_refused(tmp_path: Path):
    """transformers would draw it anew."""
    write_gguf(tmp_path / "m.gguf", made("llama"), "llama", PLAIN, {"blk.1.ffn_up.weight": None})
    with pytest.raises(ConfigError, match=r"cannot be read \(lacks model\.layers\.\*\.mlp\.up_proj\.weight\)"):
        convert(run_of(tmp_path))
