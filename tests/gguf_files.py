"""GGUF files of Hugging Face models, with llama.cpp's names and layouts and a small tokenizer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers.pre_tokenizers import ByteLevel  # pyright: ignore[reportAttributeAccessIssue]
from transformers import PretrainedConfig, PreTrainedModel

gguf: Any = pytest.importorskip("gguf")
Array = np.ndarray[Any, Any]


def write_gguf(
    path: Path,
    model: PreTrainedModel,
    architecture: str,
    keys: Mapping[str, Any],
    tensors: Mapping[str, Any] | None = None,
    quantized: str = "no such part",
) -> None:
    """Writes the model and a tokenizer of single bytes.

    keys: of the architecture, besides the sizes that every file has. tensors: further ones, or None for one that is
    left out. quantized: a part of the names of parameters that are stored in 8 bits.
    """
    config = model.config
    writer = gguf.GGUFWriter(path, architecture)
    for key, value in (_sizes(config) | dict(keys)).items():
        add = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
        add.get(type(value), writer.add_array)(f"{architecture}.{key}", value)
    _add_tokenizer(writer, config.vocab_size)
    enum = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    names = gguf.get_tensor_name_map(enum, config.num_hidden_layers)
    found: dict[str, Array | None] = {}
    kinds = {}
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        for part, array in _parts(name, tensor.float().numpy()):
            named = names.get_name(part, try_suffixes=(".weight", ".bias"))
            assert named, f"llama.cpp has no name for {part}"
            found[named] = _layout(architecture, config, named, array)
            kinds[named] = gguf.GGMLQuantizationType.Q8_0 if quantized in name else None
    for name, array in (found | dict(tensors or {})).items():
        if array is not None:
            kind, values = kinds.get(name), np.ascontiguousarray(array, dtype=np.float32)
            writer.add_tensor(name, gguf.quants.quantize(values, kind) if kind else values, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _sizes(config: Any) -> dict[str, Any]:
    names = {
        "block_count": ("num_hidden_layers",),
        "context_length": ("max_position_embeddings",),
        "embedding_length": ("hidden_size",),
        "feed_forward_length": ("intermediate_size", "n_inner"),
        "attention.head_count": ("num_attention_heads",),
        "attention.head_count_kv": ("num_key_value_heads",),
        "attention.layer_norm_rms_epsilon": ("rms_norm_eps",),
        "attention.layer_norm_epsilon": ("layer_norm_epsilon", "layer_norm_eps", "norm_eps", "norm_epsilon"),
        "vocab_size": ("vocab_size",),
    }
    known = {field.name for field in fields(config)} | set(config.attribute_map)
    found = {key: [getattr(config, name) for name in among if name in known] for key, among in names.items()}
    return {key: values[0] for key, values in found.items() if values}


def _add_tokenizer(writer: Any, size: int) -> None:
    tokens = ["<|endoftext|>", "<s>", "</s>", *sorted(ByteLevel.alphabet()), "th"]
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens + [f"<{index}>" for index in range(len(tokens), size)])
    writer.add_token_merges(["t h"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(0)


def _parts(name: str, array: Array) -> list[tuple[str, Array]]:
    """Fused experts in the two that llama.cpp keeps."""
    stem = name.removesuffix("gate_up_proj")
    if stem != name and ".experts." in name:
        return [
            (f"{stem}{part}.weight", half)
            for part, half in zip(("gate_proj", "up_proj"), np.split(array, 2, 1), strict=True)
        ]
    return [(f"{name}.weight" if ".experts." in name else name, array)]


def _layout(architecture: str, config: PretrainedConfig, name: str, array: Array) -> Array:
    """The array as llama.cpp stores it."""
    if architecture == "llama" and (".attn_q." in name or ".attn_k." in name):
        heads = config.num_attention_heads if ".attn_q." in name else config.num_key_value_heads
        return array.reshape(heads, 2, -1, *array.shape[1:]).swapaxes(1, 2).reshape(array.shape)
    if architecture.startswith(("gemma", "nemotron")) and name.endswith("norm.weight"):
        return array + 1
    if architecture == "gpt2" and name.startswith("blk.") and name.endswith(".weight") and array.ndim == 2:
        return array.T
    return array
