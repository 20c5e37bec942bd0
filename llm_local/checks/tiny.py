"""Tiny models of any type: the type's own default config with its sizes made small.

    config = tiny_config("mixtral")    # six layers, 32 wide, four experts
    config = tiny_config("bert", "masked-lm")    # an encoder

Sizes are known by the names that model classes give them; parts of a config, as text and vision, are made small alike.
"""

from __future__ import annotations

import inspect
from typing import Any

from transformers import PretrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from llm_local.registry import TASKS

NUM_LAYERS = 6

# What the fields of configs that say a size are called, by the size that they get
_NAMES: tuple[tuple[Any, str], ...] = (
    (0, "pad_token_id n_shared_layers num_kv_shared_layers"),
    (
        1,
        """
        bos_token_id n_group topk_group num_groups mamba_n_groups n_groups mamba_ngroups first_k_dense_replace
        num_expert_group
        """,
    ),
    (
        2,
        """
        eos_token_id num_key_value_heads num_kv_heads kv_n_heads multi_query_group_num num_experts_per_tok
        num_experts_per_token moe_k moe_topk top_k_experts index_n_heads linear_num_key_heads
        """,
    ),
    (
        4,
        """
        num_attention_heads n_head n_heads num_heads decoder_attention_heads encoder_attention_heads num_experts
        num_local_experts n_routed_experts moe_num_experts linear_num_value_heads linear_num_heads
        """,
    ),
    (NUM_LAYERS, "num_hidden_layers n_layer n_layers num_layers decoder_layers encoder_layers"),
    (
        8,
        """
        head_dim qk_rope_head_dim qk_nope_head_dim v_head_dim kv_channels index_topk index_head_dim linear_head_dim
        linear_key_head_dim linear_value_head_dim chunk_size mamba_chunk_size mamba_d_state state_size ssm_state_size
        attention_chunk_size hidden_size_per_layer_input mamba_d_head mamba_n_heads mamba_num_heads mamba_head_dim
        rotary_dim mamba_headdim n_mamba_heads
        """,
    ),
    (6, "sliding_window attention_window_size window_size"),
    (16, "kv_lora_rank q_lora_rank image_size lora_rank"),
    (
        32,
        """
        hidden_size n_embd emb_dim dim d_model model_dim word_embed_proj_dim embedding_size attention_hidden_size
        lru_width moe_intermediate_size shared_expert_intermediate_size expert_ffn_hidden_size moe_ffn_hidden_size
        dim_model_base mamba_d_ssm
        """,
    ),
    (
        64,
        """
        intermediate_size n_inner hidden_dim ffn_dim decoder_ffn_dim encoder_ffn_dim ffn_hidden_size dim_ff
        intermediate_size_mlp entity_vocab_size
        max_position_embeddings n_positions n_ctx max_seq_len context_length
        """,
    ),
    (256, "vocab_size vocab_size_per_layer_input src_vocab_size tgt_vocab_size decoder_vocab_size"),
)
SIZES: dict[str, Any] = {name: size for size, names in _NAMES for name in names.split()}
OF_IMAGES = {"image_size": 64, "patch_size": 4, "window_size": 2}
NOISE = ("dropout", "pdrop", "layerdrop", "jitter", "drop_path")
NEEDED = ("num_key_value_heads", "n_routed_experts", "num_experts_per_tok")  # though None is their default
_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
# What the sizes alone do not say: lists with an entry a layer, and sizes that follow from each other.
OVERRIDES: dict[str, dict[str, Any]] = {
    "blt": {"encoder_hash_byte_group_vocab": 64},
    "cohere_compass_text": {"rope_parameters": {"full_attention": _ROPE, "sliding_attention": _ROPE}},
    "dbrx": {"attn_config": {"rope_theta": 10000.0, "kv_n_heads": 2, "clip_qkv": 8.0, "model_type": ""}},
    "dots1": {"n_shared_experts": 1},
    "dots3_note_text": {"per_layer_config": {}, "head_dim": 16},
    "esm": {"vocab_size": 256, "pad_token_id": 0, "mask_token_id": 3},
    "esmc": {"num_key_value_heads": 4},
    "falcon_h1": {"mamba_d_ssm": 64, "mamba_n_heads": 8, "mamba_d_head": 8},
    "gemma3n_text": {
        "intermediate_size": [64] * 6,
        "activation_sparsity_pattern": [0.0] * 6,
        "num_kv_shared_layers": 0,
    },
    "gpt_neo": {"attention_types": [[["global", "local"], 3]]},
    "hunyuan_v1_dense": {"head_dim": 8, "rope_parameters": _ROPE},
    "hunyuan_v1_moe": {"head_dim": 8, "rope_parameters": _ROPE},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 3},
    "mamba2": {"num_heads": 8, "head_dim": 8},
    "ministral": {"head_dim": 8, "rope_parameters": _ROPE},
    "neomme": {"head_dim": 16},
    "perceiver": {"d_latents": 32, "num_latents": 8, "num_self_attends_per_block": 6},
    "qwen4_exp_text": {
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 8,
        "indexer_budget": 8,
        "indexer_compress_ratio": 2,
        "ngram_vocab_size_base": 64,
    },
    "reformer": {"axial_pos_embds": False, "local_attn_chunk_length": 4, "lsh_attn_chunk_length": 4},
    "rembert": {"input_embedding_size": 32, "output_embedding_size": 32},
    "roc_bert": {
        "pronunciation_vocab_size": 16,
        "shape_vocab_size": 16,
        "pronunciation_embed_dim": 8,
        "shape_embed_dim": 8,
    },
    "xmod": {"default_language": "en_XX"},
    "zamba": {"attention_hidden_size": 64, "attention_head_dim": 16, "attn_layer_period": 3, "attn_layer_offset": 1},
    "zamba2": {
        "attention_hidden_size": 64,
        "attention_head_dim": 16,
        "num_query_groups": 4,
        "layers_block_type": ["mamba", "hybrid"] * 3,
        "hybrid_layer_ids": [1, 3, 5],
    },
    "zaya": {"num_experts_per_tok": 1},
}
_LEVELS = {"depths": [1, 1, NUM_LAYERS, 1], "hidden_sizes": [16, 32, 40, 64]}  # widths change on the way
_DOUBLED = {**_LEVELS, "embed_dim": 16, "hidden_sizes": [32, 64, 128, 128]}
_WINDOWS = {"depths": _LEVELS["depths"], "embed_dim": 16, "num_heads": [1, 2, 4, 8]}
OVERRIDES |= {kind: _LEVELS for kind in ("convnext", "convnextv2", "poolformer", "pvt", "pvt_v2", "segformer")}
OVERRIDES |= {kind: _WINDOWS | {"num_layers": 4, "num_hidden_layers": 4} for kind in ("swin", "swinv2", "donut-swin")}
OVERRIDES |= {"focalnet": _DOUBLED, "hiera": _WINDOWS | {"image_size": [64, 64]}}
OVERRIDES["dots3_note"] = {"text_config": OVERRIDES["dots3_note_text"]}
OVERRIDES["gemma3n"] = {"text_config": OVERRIDES["gemma3n_text"]}
OVERRIDES["qwen4_exp"] = {"text_config": OVERRIDES["qwen4_exp_text"]}


def tiny_config(model_type: str, task: str = "causal-lm") -> PretrainedConfig:
    """A config of the type with six tiny layers and no randomness, a decoder where the task's models write."""
    sizes = SIZES | {"is_decoder": TASKS[task].generates} | (OF_IMAGES if TASKS[task].reads_images else {})
    return _shrunk(CONFIG_MAPPING[model_type], OVERRIDES.get(model_type, {}), sizes)


def _shrunk(kind: type[PretrainedConfig], over: dict[str, Any], sizes: dict[str, Any]) -> PretrainedConfig:
    default = kind()
    values = default.to_dict()
    names = set(values) | set(inspect.signature(kind.__init__).parameters)
    chosen: dict[str, Any] = {}
    for name in sorted(names):
        value = values.get(name)
        if name in (kind.attribute_map or {}):
            continue
        if any(word in name for word in NOISE) and isinstance(value, float):
            chosen[name] = 0.0
        elif name == "num_key_value_heads" and "qk_rope_head_dim" in names:
            chosen[name] = SIZES["num_attention_heads"]  # latent attention has no groups
        elif name in sizes and not (value is None and name not in NEEDED) and not isinstance(value, (list, dict)):
            chosen[name] = sizes[name]
    parts: Any = kind.sub_configs or {}
    for name in parts:
        inner = getattr(default, name, None)
        if isinstance(inner, PretrainedConfig):
            chosen[name] = _shrunk(type(inner), over.get(name, {}), sizes)
    chosen |= {k: v for k, v in over.items() if k not in parts}
    return kind(**chosen)
