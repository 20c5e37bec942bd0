"""Small documents, a tokenizer trained on a small library, and data flags: what the tests of the data share."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
from transformers import AutoTokenizer

from llm_local.config import from_flat
from llm_local.data.mixture import training_sources, validation_sources
from llm_local.data.sources import load_training, load_validation
from llm_local.data.tokenizer import builtin_tokenizer_dir

SCRIPTS = Path(__file__).parent.parent / "scripts"
WORDS = ["alpha", "beta", "gamma", "delta", "epsilon", "zeta", "eta", "theta", "iota", "kappa"]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("library")
    for number in range(16):
        (folder / f"module_{number:02}.py").write_text(f"def {WORDS[number % 10]}(x):\n    return x\n" * 60)
    return AutoTokenizer.from_pretrained(builtin_tokenizer_dir(folder / "cache", folder, vocab_size=300))


@pytest.fixture
def texts():
    """Documents of different lengths, each with its own number in it."""
    return [f"document {n}: " + " ".join(WORDS[: n % 10 + 1]) for n in range(60)]


@pytest.fixture
def settings(tmp_path):
    def make(**flags):
        return from_flat({"cache_dir": str(tmp_path / "cache"), "seq_length": 16, **flags})

    return make


@pytest.fixture
def jsonl(tmp_path, texts):
    return write_jsonl(tmp_path / "train.jsonl", texts)


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], ModuleType]:
    def load(name: str) -> ModuleType:
        spec = importlib.util.spec_from_file_location(name, SCRIPTS / f"{name}.py")
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, name, module)
        spec.loader.exec_module(module)
        return module

    return load


def write_jsonl(path, texts, column="text"):
    path.write_text("".join(json.dumps({"id": n, column: text}) + "\n" for n, text in enumerate(texts)))
    return str(path)


def in_file_order(config, which):
    """Documents that one of the two sets holds, read back from its documents' text."""
    given = list(validation_sources(config).values())
    (source,) = training_sources(config)
    sets = load_training(config, source, divide=not given)
    documents = load_validation(config, given[0]) if which and given else sets[which]
    assert documents is not None
    return [row[documents.column] for row in documents.rows]
