"""What the tests share: a text file, a tiny model, and a way to train it on real ranks."""

from __future__ import annotations

import inspect
import json
import os
import string
import textwrap
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import imports  # isort: skip
import pytest
import torch
from ranks import run_ranks

from llm_local.registry import TASKS

pytest_plugins = ["documents", "planning"]
torch.set_num_threads(1)  # two that share a core with others wait for each other most of the time

TINY = {
    "model_type": "llama",
    "vocab_size": 4096,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
TINY_BERT = {
    "model_type": "bert",
    "vocab_size": 4160,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
    "tie_word_embeddings": False,
}
TINY_VIT = {
    "model_type": "vit",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "image_size": 8,
    "patch_size": 2,
    "num_channels": 3,
}
MODELS = {"causal-lm": TINY, "masked-lm": TINY_BERT, "image-classification": TINY_VIT}  # by task

VERSIONS = ("torch", "deepspeed", "transformers", "datasets", "accelerate", "sentencepiece", "safetensors", "numpy")


def pytest_report_header() -> str:
    return ", ".join(f"{name} {version(name)}" for name in VERSIONS)


def _train(arguments: list[str]) -> int:
    from llm_local.train import main

    return main(arguments)


class Trainer:
    """Trains tiny models in folders of their own, on text or on digits, and reads what they wrote.

    tokens: that a model sees of a row; integers: that travel of one beside its hidden states.
    """

    def __init__(self, folder: Path, cache: Path, task: str = "causal-lm"):
        self.folder = folder
        self.cache = cache
        self.task = task
        self.text = folder / "text.txt"
        self.text.write_text((inspect.getsource(textwrap) + inspect.getsource(string)) * 2)
        self.config = self.model(MODELS[task])
        self.reads_images = TASKS[task].reads_images
        self.tokens = 17 if self.reads_images else 32
        self.integers = 1 if self.reads_images else 64 if TASKS[task].sends_labels else 32

    def model(self, config: dict[str, Any]) -> Path:
        path = self.folder / f"{config['model_type']}.json"
        path.write_text(json.dumps(config))
        return path

    def flags(self, name: str, **settings: Any) -> list[str]:
        defaults = {
            "task": self.task,
            "config_name": self.config,
            **({"dataset_name": "digits"} if self.reads_images else {"train_file": self.text, "seq_length": 32}),
            "cache_dir": self.cache,
            "output_dir": self.folder / name,
            "per_device_train_batch_size": 2,
            "max_steps": 4,
            "learning_rate": 3e-3,
            "logging_steps": 1,
            "eval_batches": 2,
            "link_timeout_seconds": 60,
            "ddp_timeout": 60,
        }
        merged = {**defaults, **settings}
        return [part for key, value in merged.items() if value is not None for part in (f"--{key}", str(value))]

    def run(self, name: str, ranks: int, **settings: Any) -> Path:
        """Trains on so many ranks and returns the output folder; fails unless every rank says 0."""
        assert run_ranks(_train, ranks, self.flags(name, **settings)) == [0] * ranks
        return self.folder / name


@pytest.hookimpl(tryfirst=True)
def pytest_runtestloop() -> None:
    imports.are_done()


@pytest.fixture(autouse=True)
def _no_rank_is_left() -> Iterator[None]:
    """A run in this process says which rank it is, and a later test's processes would believe it."""
    yield
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        os.environ.pop(name, None)


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def trainer(request: pytest.FixtureRequest, tmp_path: Path, cache: Path) -> Trainer:
    """Of causal-lm, unless a test asks for another task."""
    return Trainer(tmp_path, cache, getattr(request, "param", "causal-lm"))


def records(output: Path, stage: int, split: str = "train") -> list[dict[str, Any]]:
    lines = (output / "metrics" / f"stage-{stage:02d}.jsonl").read_text().splitlines()
    return [record for record in map(json.loads, lines) if record["split"] == split]


def block_losses(output: Path, num_stages: int, split: str = "train") -> list[list[float]]:
    """Losses of all blocks of the model, in order, one list a step."""
    stages = [[r["block_losses"] for r in records(output, k, split)] for k in range(num_stages)]
    return [[loss for blocks in step for loss in blocks] for step in zip(*stages, strict=True)]


def weights(folder: Path) -> dict[str, Any]:
    """All tensors of an exported model."""
    from safetensors.torch import load_file

    return {k: v for shard in sorted(folder.glob("model-*.safetensors")) for k, v in load_file(shard).items()}
