"""The evaluation harness reads an export as it is: lm_eval on a task of two local rows, offline."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import Trainer
from transformers import AutoModelForCausalLM, AutoTokenizer

pytestmark = [
    pytest.mark.processes,
    pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="needs pip install -e .[eval]"),
]
ROWS = [
    {"text": "import", "choices": ["re", "zebra"], "label": 0},
    {"text": "def wrap(self,", "choices": ["text):", "moon"], "label": 1},
]


def task(folder: Path) -> None:
    """A task named local_choice, of which lm_eval is told by --include_path."""
    rows = folder / "rows.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    described = {
        "task": "local_choice",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(rows)}},
        "output_type": "multiple_choice",
        "test_split": "test",
        "doc_to_text": "{{text}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "label",
        "metric_list": [{"metric": "acc"}],
    }
    (folder / "local_choice.yaml").write_text(yaml.safe_dump(described))


@torch.no_grad()
def log_likelihood(model: Any, tokenizer: Any, text: str, continuation: str) -> float:
    """Of the continuation after the text, by plain transformers."""
    ids = tokenizer(text + continuation, return_tensors="pt", add_special_tokens=False).input_ids
    known = len(tokenizer(text, add_special_tokens=False).input_ids)
    log_probabilities = model(input_ids=ids).logits[0, known - 1 : -1].log_softmax(-1)
    return float(log_probabilities.gather(1, ids[0, known:, None]).sum())


def test_lm_eval_scores_an_export(trainer: Trainer, tmp_path: Path):
    export = trainer.run("run", 2, num_stages=2) / "export"
    folder, results = tmp_path / "task", tmp_path / "results"
    folder.mkdir()
    task(folder)
    flags = ["--model", "hf", "--model_args", f"pretrained={export},dtype=float32", "--device", "cpu"]
    flags += ["--tasks", "local_choice", "--include_path", str(folder), "--output_path", str(results), "--log_samples"]
    offline = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "home"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "lm_eval", *flags], env=os.environ | offline, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    (found,) = results.rglob("samples_local_choice_*.jsonl")
    model, tokenizer = AutoModelForCausalLM.from_pretrained(export).eval(), AutoTokenizer.from_pretrained(export)
    right = 0
    for sample, row in zip(map(json.loads, found.read_text().splitlines()), ROWS, strict=True):
        theirs = [float(answer[0][0]) for answer in sample["resps"]]
        ours = [log_likelihood(model, tokenizer, row["text"], f" {choice}") for choice in row["choices"]]
        assert theirs == pytest.approx(ours, rel=1e-4)
        right += ours.index(max(ours)) == row["label"]
    (summary,) = results.rglob("results_*.json")
    assert json.loads(summary.read_text())["results"]["local_choice"]["acc,none"] == pytest.approx(right / len(ROWS))
