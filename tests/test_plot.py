"""The picture of a run's losses."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.processes
SCRIPT = Path(__file__).parent.parent / "scripts" / "plot.py"


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(SCRIPT), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


def test_losses_of_two_runs_become_a_picture(tmp_path: Path):
    for name in ("one", "two"):
        (tmp_path / name / "metrics").mkdir(parents=True)
        for stage in (0, 1):
            records = [{"step": n, "split": "train", "loss": 5.0 - n / 10 - stage} for n in range(1, 20)]
            records.append({"step": 19, "split": "eval", "loss": 3.5 - stage})
            lines = "".join(json.dumps(record) + "\n" for record in records)
            (tmp_path / name / "metrics" / f"stage-{stage:02d}.jsonl").write_text(lines)
    result = run(tmp_path / "one", tmp_path / "two")
    assert result.returncode == 0, result.stderr
    picture = tmp_path / "one" / "metrics" / "loss.png"
    assert str(picture) in result.stdout
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_a_folder_without_metrics_is_named(tmp_path: Path):
    result = run(tmp_path)
    assert result.returncode == 2
    assert (
        result.stderr
        == f"plot.py: {tmp_path} has no metrics/stage-*.jsonl with a record; name the --output_dir of a run\n"
    )
