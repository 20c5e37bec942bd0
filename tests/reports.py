"""Folders of runs that no run has written, for reports."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from llm_local.config import Config
from llm_local.report.notes import FORMAT


def falling(step: int, stage: int) -> float:
    return 3 + 5 / math.sqrt(step) - 0.05 * stage + 0.1 * math.sin(step)


def make_run(
    folder: Path,
    stages: int = 2,
    steps: int = 200,
    loss: Callable[[int, int], float] = falling,
    every: int = 1,
    facts: bool = True,
    **flags: Any,
) -> Path:
    """A run with records of every so many steps, two validation sets, and with facts, if wanted."""
    for stage in range(stages):
        lines = []
        for step in range(every, steps + 1, every):
            lines.append(json.dumps(train_record(step, stage, loss(step, stage), stage < stages - 1)))
            if step % max(1, steps // 4) == 0:
                for split, name in (("eval", "validation"), ("eval_code", flags.get("set_name", "code"))):
                    record = {"step": step, "split": split, "stage": stage, "loss": loss(step, stage) + 0.1}
                    record |= {"block_losses": [record["loss"]], "tokens": 8192, "name": name, "perplexity": 20.0}
                    lines.append(json.dumps(record | {"bits_per_byte": 1.5}))
        path = folder / "metrics" / f"stage-{stage:02d}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("\n".join(lines) + "\n")
    flags.pop("set_name", None)
    values = Config().flat() | {"max_steps": steps, "num_stages": stages} | flags
    (folder / "run.yaml").write_text(yaml.safe_dump(values, sort_keys=False))
    if facts:
        (folder / "metrics" / "run.json").write_text(json.dumps(facts_of(stages)))
    return folder


def train_record(step: int, stage: int, loss: float, sends: bool) -> dict[str, Any]:
    return {
        "step": step,
        "split": "train",
        "stage": stage,
        "loss": loss,
        "block_losses": [loss],
        "tokens": 1024,
        "lr": 1e-3 / step,
        "grad_norm": 1 + 1 / step,
        "step_seconds": 0.3,
        "wait_seconds": 0.01 * stage,
        "sent_bytes": 786432 if sends else 0,
        "received_bytes": 0,
        "sent_gradient_bytes": 0,
        "sent_refresh_bytes": 0,
        "peak_memory_bytes": 700_000_000,
        "padding": 0.0,
    }


def facts_of(stages: int) -> dict[str, Any]:
    packed = {"packing": "concat", "room": 256, "documents": 100, "cut": 40, "rows": 900, "tokens": 230_000}
    return {
        "format": FORMAT,
        "started": 0.0,
        "model_type": "llama",
        "hidden_size": 64,
        "layer_parameters": 50_000,
        "head_parameters": 40_000,
        "has_local_heads": True,
        "stages": [
            {"blocks": [[4 * k, 4 * k + 4]], "replicas": 1, "private_layers": [0], "flops": 1e6} for k in range(stages)
        ],
        "sources": [{"name": "builtin", "weight": 1.0, "packed": packed, "extent": "", "padding": 0.0}],
        "counts": {"validation (validation)": [5, 1000]},
        "versions": {"torch": "2.13.0"},
        "warnings": [],
    }
