"""A model from parts: what each stage's job has alone becomes what one launch exports."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from conftest import Trainer

from llm_local.checkpoint.catalog import Catalog

ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.processes


def job_of(checkpoint: Path, stage: int, folder: Path, **changes: Any) -> Path:
    """The checkpoint of a job that trained one stage of the run."""
    name = f"stage-{stage:02d}"
    job = folder / name / "checkpoints" / checkpoint.name
    shutil.copytree(checkpoint / name, job / name)
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    (job / "manifest.json").write_text(json.dumps(manifest | {"stages": [stage], "run": "5eed"} | changes))
    return job


def test_a_checkpoint_of_one_stage_is_read_alone(trainer: Trainer):
    zero1 = {"deepspeed": ROOT / "configs/ds/zero1.json"}
    run = trainer.run("run", 4, num_stages=2, max_steps=1, save_steps=1, eval_batches=0, **zero1)
    whole = Catalog(run / "checkpoints/step-00000001")
    parts = [Catalog(job_of(whole.path, stage, trainer.folder / "jobs")) for stage in (0, 1)]
    assert whole.manifest.held() == [0, 1]
    assert [part.manifest.held() for part in parts] == [[0], [1]]
    assert parts[0].manifest.run == "5eed"
    assert sorted(parts[0].weights + parts[1].weights) == sorted(whole.weights)
    for part in parts:
        assert part.weights
        assert all(part.tensor(name).equal(whole.tensor(name)) for name in part.weights)
