"""The model that the planner's tests plan for."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

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
