"""The first faults of the campaign: python -m tests.campaign has more of them, and longer ones."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.mark.processes
@pytest.mark.timeout(600)
def test_ten_faults_change_no_loss_and_end_no_other_stage(tmp_path: Path):
    """Each kind once, with links away for 3 s at most; what differs is printed. Ranks are forks of torchrun's agent:
    imports would be most of the time."""
    command = [sys.executable, "-m", "tests.campaign", "--kills", "10", "--steps", "200", "--head", "shared"]
    command += ["--longest", "3", "--soon", "0.8"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "CAMPAIGN_FORKS": "1"}
    told = subprocess.run(
        [*command, "--output", str(tmp_path / "campaign")], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert told.returncode == 0, told.stdout + told.stderr
    found = json.loads((tmp_path / "campaign/campaign.json").read_text())
    assert found["faults"] == 10
    assert (found["lost_steps"], found["steps_twice"], found["differing_losses"], found["hangs"]) == (0, 0, 0, 0)
    assert found["wrong"] == []
    assert found["same_model"]
