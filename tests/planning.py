"""The model that the planner's tests plan for."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from llm_local.config import Config
from llm_local.memory.sizes import read_model
from llm_local.plan.layouts import Planner
from llm_local.plan.machine import Machine

# wide enough that a head is 1/8 of the eight layers
MODEL = {
    "model_type": "llama",
    "vocab_size": 12 * 1024,
    "hidden_size": 1024,
    "intermediate_size": 2816,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": False,
}


@pytest.fixture
def model(tmp_path: Path) -> Path:
    path = tmp_path / "model.json"
    path.write_text(json.dumps(MODEL))
    return path


def planner_of(model: Path, machine: Machine, rows: int) -> Planner:
    """In bf16, at 1024 positions, of so many rows on each device."""
    base = Config()
    config = replace(
        base,
        model=replace(base.model, config_name=str(model)),
        data=replace(base.data, seq_length=1024),
        train=replace(base.train, bf16=True, per_device_train_batch_size=rows),
    )
    return Planner(*read_model(config.model, 1024, "bf16"), machine, config, rows=machine.devices * rows)
