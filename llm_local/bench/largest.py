"""The largest model of a family that devices of some size can train, by what a start expects that a rank needs."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping
from typing import Any

from llm_local.bench.cases import ROOT, table
from llm_local.config import from_flat
from llm_local.cut import plan_partition
from llm_local.memory.sizes import read_model
from llm_local.memory.stage import run_memory
from llm_local.model.model_config import load_model_config

DEVICES = (8, 24, 80)  # GB
HEAD = 128  # numbers of an attention head; a model of n heads has n layers
FEWEST, MOST = 8, 128  # heads

BACKPROP, LOCAL = {"method": "backprop"}, {"method": "chunked", "head": "linear"}
# replicas, and flags
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "1 device, or each of DiLoCo's": (1, {**BACKPROP, "num_stages": 1}),
    "2 devices, ZeRO-1 data parallel": (2, {**BACKPROP, "num_stages": 1, "deepspeed": f"{ROOT}/configs/ds/zero1.json"}),
    "2 devices, ZeRO-3 data parallel": (2, {**BACKPROP, "num_stages": 1, "deepspeed": f"{ROOT}/configs/ds/zero3.json"}),
    "2 devices, 1F1B": (1, {**BACKPROP, "num_stages": 2}),
    "2 devices, delayed": (1, {"method": "delayed", "num_stages": 2}),
    "2 devices, local, linear heads": (1, {**LOCAL, "num_stages": 2}),
    "8 devices, 1F1B": (1, {**BACKPROP, "num_stages": 8}),
    "8 devices, local, linear heads": (1, {**LOCAL, "num_stages": 8}),
}
SIZES = """
## Where a replica no longer fits

Data parallelism and DiLoCo need a device that holds a whole model: in bf16 with AdamW 16 to 20 bytes a parameter, 2 of
the weight, 2 to 6 of its gradient, 12 of the optimizer's. ZeRO-1 divides these 12 among replicas, ZeRO-3 everything,
at the price of traffic in each pass; DiLoCo keeps 8 more in host memory. A stage holds its own layers alone. Billions
of parameters of the largest Llama, with a layer for each of its heads of 128 numbers, that fits by what a start
expects: rows of 2048 tokens, one a micro-batch and 8 a step, activations of a layer made again.
"""


def family(heads: int) -> str:
    """Overrides that make a Llama of a config: as many layers as heads, so width 4,096 has 32."""
    sizes = {"hidden_size": HEAD * heads, "intermediate_size": 344 * heads, "num_hidden_layers": heads}
    sizes |= {"num_attention_heads": heads, "num_key_value_heads": heads, "vocab_size": 32768}
    return ",".join(f"{name}={value}" for name, value in sizes.items())


def needs(flags: dict[str, Any], ranks: int, heads: int, device_bytes: float) -> tuple[float, int]:
    """Bytes of the device that needs most, and the model's parameters."""
    config = from_flat({**flags, "config_overrides": family(heads)})
    anatomy, sizes = read_model(config.model, config.data.seq_length, config.precision)
    partition = plan_partition(config, anatomy)
    memory = run_memory(config, load_model_config(config.model), sizes, partition, ranks, device_bytes)
    return max(each.total for each in memory), sizes.num_parameters


def largest(flags: dict[str, Any], ranks: int, device_bytes: float) -> int:
    """Parameters of the largest model of the family that fits, 0 if none does."""
    sizes = range(FEWEST, MOST + 1)
    fit = bisect_left(sizes, True, key=lambda heads: needs(flags, ranks, heads, device_bytes)[0] > device_bytes)
    return needs(flags, ranks, sizes[fit - 1], device_bytes)[1] if fit else 0


def sizes() -> dict[str, dict[str, int]]:
    """Parameters of the largest model, by layout and GB of a device."""
    shared = {"config_name": f"{ROOT}/configs/studies/long.json", "seq_length": 2048, "bf16": True}
    shared |= {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 8, "gradient_checkpointing": True}
    return {
        name: {str(size): largest({**shared, **flags}, flags["num_stages"] * replicas, size * 1e9) for size in DEVICES}
        for name, (replicas, flags) in LAYOUTS.items()
    }


def sizes_table(found: Mapping[str, Mapping[str, float]]) -> str:
    """What `sizes` found, with what it is."""
    rows = [[name, *(f"{each[str(size)] / 1e9:.2f}" for size in DEVICES)] for name, each in found.items()]
    return f"{SIZES}\n{table(['', *(f'{size} GB' for size in DEVICES)], rows)}\n"
