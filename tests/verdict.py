"""What the fault campaign says of a run at its end: losses and model beside those of the run without faults."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from safetensors.torch import load_file

from tests.jobs import Stage, environment

TOLERANCE = 1e-5


@dataclass
class Losses:
    """Records of all stages, of training and validation. close: within TOLERANCE where ZeRO has changed."""

    lost_steps: int = 0
    steps_twice: int = 0
    differing_losses: int = 0
    exact_losses: int = 0
    close_losses: int = 0


def compare(stages: Sequence[Stage], reference: Path, exact_until: Sequence[int]) -> Losses:
    """exact_until: the last step of each stage whose losses must be the same to the bit."""
    found = Losses()
    for stage, bound in zip(stages, exact_until, strict=True):
        ours = read_records(stage.metrics)
        theirs = read_records(reference / f"metrics/stage-{stage.number:02d}.jsonl")
        found.lost_steps += len(theirs.keys() - ours.keys())
        found.steps_twice += sum(len(records) > 1 for records in ours.values())
        for key in theirs.keys() & ours.keys():
            mine, other = ((r[-1]["loss"], *r[-1]["block_losses"]) for r in (ours[key], theirs[key]))
            if mine == other:
                found.exact_losses += 1
            elif key[1] > bound and all(abs(a - b) <= TOLERANCE * abs(b) for a, b in zip(mine, other, strict=True)):
                found.close_losses += 1
            else:
                found.differing_losses += 1
    return found


def read_records(path: Path) -> dict[tuple[str, int], list[dict[str, Any]]]:
    """All records of a metrics file, by split and step."""
    found: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for line in path.read_text().splitlines():
        record = json.loads(line)
        found.setdefault((record["split"], record["step"]), []).append(record)
    return found


def compare_models(stages: Sequence[Stage], reference: Path, made: Path, is_loose: bool) -> str:
    """What is wrong with the model assembled of the stages' parts; '' if it has the reference's tensors."""
    command = [sys.executable, "-m", "llm_local.cli", "assemble", *(str(stage.output) for stage in stages), str(made)]
    told = subprocess.run(command, env=environment(), capture_output=True, text=True)
    if told.returncode != 0:
        return f"assemble: {told.stderr.strip()}"
    ours, theirs = _tensors(made), _tensors(reference / "export")
    if not ours or ours.keys() != theirs.keys():
        return "the assembled model has other tensors"
    for name, values in ours.items():
        if not values.equal(theirs[name]) and not (is_loose and values.allclose(theirs[name], rtol=1e-3, atol=1e-4)):
            return f"{name} of the assembled model differs"
    return ""


def _tensors(export: Path) -> dict[str, Any]:
    return {name: value for path in export.glob("model-*.safetensors") for name, value in load_file(path).items()}


def spread(values: Sequence[float | None]) -> dict[str, float]:
    known = [value for value in values if value is not None]
    return {"median": round(median(known), 2), "worst": max(known), "of": len(known)} if known else {}
