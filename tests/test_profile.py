"""Stages balanced by what layers and head take on this machine."""

from __future__ import annotations

from typing import Any

import pytest
import yaml
from conftest import TINY, Trainer, records
from transformers import AutoConfig

from llm_local.checks.profile import layer_kinds, measure_costs
from llm_local.checks.tiny import tiny_config
from llm_local.config import Config, from_flat
from llm_local.model.anatomy import probe
from llm_local.partition import Costs, Heads, Span, make_partition


def parts(model_config: Any, **flags: Any) -> tuple[Config, Any, Any]:
    config = from_flat({"config_name": "x.json", "seq_length": 16, "per_device_train_batch_size": 2, **flags})
    return config, model_config, probe(model_config, config.model)


def test_layers_of_one_kind_are_known():
    kinds = layer_kinds(*parts(AutoConfig.for_model(**TINY)))
    assert len(kinds) == TINY["num_hidden_layers"]
    assert len(set(kinds)) == 1


def test_layers_that_differ_in_a_number_or_in_shape_are_of_two_kinds():
    sliding = AutoConfig.for_model(
        **TINY
        | {"model_type": "qwen2", "layer_types": ["full_attention", "sliding_attention"] * 2}
        | {"sliding_window": 8, "use_sliding_window": True}
    )
    assert len(set(layer_kinds(*parts(sliding)))) == 2
    experts = AutoConfig.for_model(
        **TINY
        | {
            "model_type": "qwen3_moe",
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 16,
            "mlp_only_layers": [0],
        }
    )
    kinds = layer_kinds(*parts(experts))
    assert kinds[0] != kinds[1] == kinds[2] == kinds[3]


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "jamba"])
def test_each_layer_and_the_head_take_time(model_type: str):
    config, model_config, anatomy = parts(tiny_config(model_type))
    costs = measure_costs(config, model_config, anatomy)
    assert len(costs.layers) == anatomy.num_layers
    assert min(costs.layers) > 0
    assert costs.head > 0
    assert costs.layer == pytest.approx(sum(costs.layers) / anatomy.num_layers)
    kinds = layer_kinds(config, model_config, anatomy)
    assert len(set(costs.layers)) == len(set(kinds))


def test_a_costly_layer_has_a_stage_to_itself():
    costs = Costs(2.0, 0.1, (1.0, 1.0, 1.0, 5.0))
    assert make_partition(4, 2, costs).blocks == (Span(0, 3), Span(3, 4))
    assert make_partition(4, 2, Costs(2.0, 0.1)).blocks == (Span(0, 2), Span(2, 4))


def test_private_layers_cost_what_they_are_copies_of():
    """Of the first block, ending before the costly layer, they are as costly as that."""
    costs = Costs(2.0, 0.0, (1.0, 1.0, 10.0, 1.0))
    cut = make_partition(4, 2, costs, layers_per_block=1, heads=Heads(layers=(1, 0, 0, 0)))
    assert cut.stages == (Span(0, 2), Span(2, 4))


@pytest.mark.processes
def test_a_run_writes_down_what_it_has_found(trainer: Trainer):
    output = trainer.run("run", 2, num_stages=2, partition="profile", max_steps=2)
    flags = yaml.safe_load((output / "run.yaml").read_text())
    layers = [int(count) for count in flags["stage_layers"].split(",")]
    assert sum(layers) == TINY["num_hidden_layers"]
    again = trainer.run(
        "again", 2, **{k: v for k, v in flags.items() if k in ("num_stages", "partition", "stage_layers")}, max_steps=2
    )
    assert [r["loss"] for r in records(again, 1)] == [r["loss"] for r in records(output, 1)]
