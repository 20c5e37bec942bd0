"""When a run records, evaluates and saves: every so many steps, every share of all steps, or not at all."""

import json
from pathlib import Path

import pytest
from conftest import records

pytestmark = pytest.mark.processes


def steps(output: Path) -> tuple[list[int], list[int], list[int]]:
    """Of the training records, of the evaluations, and of the checkpoints."""
    saved = sorted(int(path.name.removeprefix("step-")) for path in (output / "checkpoints").glob("step-*"))
    return [r["step"] for r in records(output, 0)], [r["step"] for r in records(output, 0, "eval")], saved


def test_shares_of_all_steps_and_a_warm_up(trainer):
    flags = {"logging_steps": 0.25, "logging_first_step": "false", "eval_strategy": "steps", "eval_steps": 0.5}
    output = trainer.run("shares", 1, max_steps=8, save_strategy="steps", save_steps=0.3, warmup_ratio=0.5, **flags)
    assert steps(output) == ([2, 4, 6, 8], [4, 8], [3, 6, 8])
    # four steps up from 0 and four down again; step 2 is the one behind the first
    rates = [record["lr"] for record in records(output, 0)]
    assert rates == pytest.approx([3e-3 * share for share in (0.25, 0.75, 0.75, 0.25)])
    assert json.loads((output / "checkpoints/step-00000008/manifest.json").read_text())["flags"]["warmup_ratio"] == 0.5


def test_none_of_it(trainer):
    never = {"logging_strategy": "no", "eval_strategy": "no", "save_strategy": "no", "logging_first_step": "false"}
    output = trainer.run("never", 1, eval_steps=1, save_steps=1, **never)
    assert steps(output) == ([4], [4], [])
