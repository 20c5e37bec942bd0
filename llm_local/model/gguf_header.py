"""All that a GGUF file says of its model: in the config, or refused by name.

transformers reads the keys and tensors that it knows and passes over the others, which makes another model of the file.
What it passes over and a config can say is said here; anything else is a problem.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PretrainedConfig
from transformers.initialization import no_init_weights
from transformers.integrations.gguf import GGUF_CONFIG_ARCHS, get_gguf_config, read_gguf_metadata
from transformers.modeling_gguf_pytorch_utils import TENSOR_PROCESSORS, TensorProcessor, get_gguf_hf_weights_map
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

EPSILONS = ("rms_norm_eps", "layer_norm_epsilon", "layer_norm_eps", "norm_eps", "norm_epsilon")
SAYS = {  # keys of an architecture, and the attributes of configs that say the same
    "vocab_size": ("vocab_size",),
    "context_length": ("max_position_embeddings",),
    "block_count": ("num_hidden_layers",),
    "embedding_length": ("hidden_size",),
    "feed_forward_length": ("intermediate_size", "n_inner", "ffn_hidden_size"),
    "attention.head_count": ("num_attention_heads",),
    "attention.head_count_kv": ("num_key_value_heads", "num_kv_heads"),
    "attention.key_length": ("head_dim",),
    "attention.layer_norm_rms_epsilon": EPSILONS,
    "attention.layer_norm_epsilon": EPSILONS,
    "attention.sliding_window": ("sliding_window",),
    "attn_logit_softcapping": ("attn_logit_softcapping",),
    "final_logit_softcapping": ("final_logit_softcapping",),
    "use_parallel_residual": ("use_parallel_residual",),
    "expert_count": ("num_local_experts", "num_experts"),
    "expert_used_count": ("num_experts_per_tok",),
    "expert_feed_forward_length": ("moe_intermediate_size", "intermediate_size"),
    "expert_shared_feed_forward_length": ("shared_expert_intermediate_size",),
    "expert_weights_norm": ("norm_topk_prob",),
    "ssm.conv_kernel": ("conv_kernel",),
    "ssm.state_size": ("state_size",),
    "ssm.time_step_rank": ("time_step_rank",),
    "ssm.inner_size": ("intermediate_size",),
}
SAYS_NOTHING = ("tensor_data_layout", "rope.scaling.finetuned")
BIASES = {"attn_q.bias": "attention_bias", "attn_output.bias": "attention_bias", "ffn_up.bias": "mlp_bias"}
FACTORS = ("rope_freqs.weight", "rope_factors_short.weight", "rope_factors_long.weight")
LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}  # as released
LARGE = {"gemma2": 46, "gemma3": 62}  # layers of the models whose attention is scaled by the mean width of a head


def complete_config(config: PretrainedConfig, path: Path) -> PretrainedConfig:
    """The config with all that the file says. Raises ValueError with the keys and tensors that no config can say."""
    metadata, names = read_gguf_metadata(str(path))
    header = _Header(config, path, str(metadata["general.architecture"]), metadata, names)
    unsaid = header.complete()
    unsaid += header.unread_tensors()
    if unsaid:
        raise ValueError(f"transformers has no place for {named(unsaid)}")
    return config


def named(names: Iterable[str]) -> str:
    """All of the names, those of one kind in all layers once."""
    return ", ".join(sorted({re.sub(r"(^blk|layers)\.\d+\.", r"\1.*.", name) for name in names}))


class _Header:
    def __init__(self, config: Any, path: Path, architecture: str, metadata: dict[str, Any], names: tuple[str, ...]):
        self.config, self.path, self.architecture, self.names = config, path, architecture, names
        self.is_read_whole = architecture in GGUF_CONFIG_ARCHS  # by a reader that makes a config of its own
        read = _Reads(metadata)
        if self.is_read_whole:
            get_gguf_config(read, names)
        prefix = f"{architecture}."
        keys = {
            k.removeprefix(prefix): v for k, v in metadata.items() if k.startswith(prefix) and k not in read.keys_read
        }
        self.keys = {k: v for k, v in keys.items() if k not in SAYS_NOTHING}
        self.known = {field.name for field in fields(config)} | set(config.attribute_map)

    def complete(self) -> list[str]:
        """Sets what the file says; returns the keys, with their values, that the config has no place for."""
        unsaid = [self._named(key) for key in self.keys if not key.startswith("rope.") and not self._say(key)]
        for suffix, flag in BIASES.items():
            if flag in self.known and any(name.endswith(suffix) for name in self.names):
                setattr(self.config, flag, True)
        if self.architecture in LARGE:
            is_large = self.config.num_hidden_layers == LARGE[self.architecture]
            mean = self.config.hidden_size // self.config.num_attention_heads
            self.config.query_pre_attn_scalar = mean if is_large else self.config.head_dim
        return unsaid + self._say_rope()

    def _named(self, key: str) -> str:
        return f"{self.architecture}.{key}={self.keys[key]}"

    def _say(self, key: str) -> bool:
        value = self.keys[key]
        if isinstance(value, list) and len(set(value)) == 1:  # one for each layer
            value = value[0]
        attributes = SAYS.get(key, ())
        attribute = next((name for name in attributes if name in self.known), None)
        config = self.config
        if attribute == "sliding_window":
            value = value or None
            if value and "sliding_attention" not in (getattr(config, "layer_types", None) or ["sliding_attention"]):
                return False  # no layer would have it
        if attribute is not None:
            setattr(config, attribute, value)
            return True
        follows = {  # where a class has no attribute for it
            "attention.key_length": config.hidden_size // getattr(config, "num_attention_heads", 1),
            "attention.value_length": self._head_dim(),
            "attention.head_count_kv": getattr(config, "num_attention_heads", None),
            "feed_forward_length": 4 * config.hidden_size,
            "context_length": value,  # nothing in the model is as long
            "attention.causal": True,
        }
        derived = [getattr(config, name, None) for name in attributes]
        return not value or value in (follows.get(key), *derived)

    def _head_dim(self) -> int:
        config = self.config
        return getattr(config, "head_dim", None) or config.hidden_size // getattr(config, "num_attention_heads", 1)

    def _say_rope(self) -> list[str]:
        """Of rotary positions."""
        keys = {key.removeprefix("rope."): value for key, value in self.keys.items() if key.startswith("rope.")}
        parameters = getattr(self.config, "rope_parameters", None)
        if parameters is None:
            return [self._named(f"rope.{key}") for key in keys]
        rope = parameters.get("full_attention", parameters)
        rope["rope_theta"] = keys.pop("freq_base", rope["rope_theta"])
        if "sliding_attention" in parameters:
            local = parameters["sliding_attention"]
            local["rope_theta"] = keys.pop("freq_base_swa", local["rope_theta"])
        part = keys.get("dimension_count", self._head_dim()) / self._head_dim()
        if "partial_rotary_factor" in rope and not self.is_read_whole:
            rope["partial_rotary_factor"] = part
        if rope.get("partial_rotary_factor", 1.0) == part:
            keys.pop("dimension_count", None)
        self._scale(rope, keys)
        return [self._named(f"rope.{key}") for key in keys]

    def _scale(self, rope: dict[str, Any], keys: dict[str, Any]) -> None:
        """Puts the scaling of frequencies into `rope`, and takes out of the keys what it says."""
        lengths = {"original_max_position_embeddings": self.config.max_position_embeddings}
        if "scaling.original_context_length" in keys:
            lengths = {"original_max_position_embeddings": keys.pop("scaling.original_context_length")}
        factor = keys.pop("scaling.factor", keys.pop("scale_linear", 0.0))
        kind = keys.pop("scaling.type", "linear")
        for name in ("attn_factor", "yarn_attn_factor", "yarn_ext_factor"):
            if keys.get(f"scaling.{name}") == 1.0:
                del keys[f"scaling.{name}"]
        factors = [self._values(name) for name in FACTORS if name in self.names]
        if factors and kind in ("linear", "longrope") and factor in (0.0, 1.0):
            if len(factors) == 1 and _is_llama3(self.config, rope, factors[0]):
                return
            rope |= {"rope_type": "longrope", "short_factor": factors[0], "long_factor": factors[-1], **lengths}
            if attention := keys.pop("scaling.attn_factor", 1.0 if len(factors) == 1 else None):
                rope["attention_factor"] = attention
            if "original_max_position_embeddings" in self.known:
                self.config.original_max_position_embeddings = lengths["original_max_position_embeddings"]
        elif kind == "yarn" and not factors:
            names = [name for name in ("beta_fast", "beta_slow") if f"scaling.yarn_{name}" in keys]
            ramp = {name: keys.pop(f"scaling.yarn_{name}") for name in names}
            rope |= {"rope_type": "yarn", "factor": factor, **lengths, **ramp}
        elif kind == "linear" and not factors:
            rope |= {"rope_type": "linear", "factor": factor} if factor not in (0.0, 1.0) else {}
        elif kind != "none":
            keys["scaling.type"] = kind

    def _values(self, name: str) -> list[float]:
        from gguf import GGUFReader, dequantize

        tensor = next(each for each in GGUFReader(self.path).tensors if each.name == name)
        return dequantize(tensor.data, tensor.tensor_type).tolist()

    def unread_tensors(self) -> list[str]:
        """Those that become no parameter of the model."""
        if self.is_read_whole:
            return []  # what is left over is known when it is loaded
        config = copy.deepcopy(self.config)
        config.pad_token_id = 0  # one outside the vocabulary is another's to refuse
        with torch.device("meta"), no_init_weights():
            model = AutoModelForCausalLM.from_config(config)
        processor = TENSOR_PROCESSORS.get(self.architecture, TensorProcessor)(config=self.config.to_dict())
        read = {*get_gguf_hf_weights_map(model, processor), *FACTORS}  # of experts without their suffix
        return [name for name in self.names if name not in read and name.removesuffix(".weight") not in read]


class _Reads(dict[str, Any]):
    """Metadata that keeps which of its keys were read."""

    def __init__(self, metadata: dict[str, Any]):
        super().__init__(metadata)
        self.keys_read: set[str] = set()

    def __getitem__(self, key: str) -> Any:
        self.keys_read.add(key)
        return super().__getitem__(key)

    def get(self, key: str, default: Any = None) -> Any:
        self.keys_read.add(key)
        return super().get(key, default)


def _is_llama3(config: PretrainedConfig, rope: dict[str, Any], factors: list[float]) -> bool:
    """Whether these are the factors of Llama 3.1 and later; if so, `rope` says it."""
    plain = dict(rope)
    rope |= {"rope_type": "linear", "factor": 1.0}
    unscaled, _ = ROPE_INIT_FUNCTIONS["linear"](config)
    rope |= {"rope_type": "llama3", "factor": max(factors), **LLAMA3}
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config)
    if len(factors) == len(scaled) and torch.allclose(scaled, unscaled / torch.tensor(factors), rtol=1e-4):
        return True
    rope.clear()
    rope |= plain
    return False
