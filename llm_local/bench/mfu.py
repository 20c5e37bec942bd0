"""Model FLOPs of a step, and the model of 350M that a stage's share of the peak is measured with."""

from __future__ import annotations

from typing import Any

from llm_local.config import from_flat
from llm_local.model.anatomy import probe
from llm_local.model.model_config import load_model_config
from llm_local.partition import estimate_costs

LARGE = {
    "hidden_size": 1024,
    "intermediate_size": 2816,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "vocab_size": 32768,
}
TINY = {**LARGE, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4, "vocab_size": 4096}
TINY |= {"num_attention_heads": 2, "num_key_value_heads": 2}


def flops_a_step(case: dict[str, Any]) -> float:
    """6 a parameter and token and 12·T·H for attention, the head included, recomputation not."""
    config = from_flat(case)
    anatomy = probe(load_model_config(config.model), config.model)
    sizes = (anatomy.active_layer_parameters, anatomy.head_parameters, anatomy.hidden_size, config.data.seq_length)
    costs = estimate_costs(*sizes)
    tokens = config.train.per_device_train_batch_size * config.data.seq_length
    return tokens * (anatomy.num_layers * costs.layer + costs.head)
