"""A stage behind that is away skips steps where the log of the one before has no room (--on_full_log skip)."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest
from conftest import Trainer, records
from launching import until
from lives import SECONDS, Lives
from test_stages_alone import LONG, status, until_saved

from llm_local.files import Unwritten
from llm_local.jobs.fullness import Fullness
from llm_local.jobs.packet_log import PacketLog


class TestFullness:
    def test_what_was_left_out_once_is_left_out_by_the_next_life(self, tmp_path: Path):
        log, path = PacketLog(tmp_path / "log", 10_000, 0), tmp_path / "skipped"
        first = Fullness({0: log}, path)
        log.append(b"x" * 5000)
        assert [first.is_full(1, size) for size in (100, 9000)] == [False, True]
        first.remember(1)
        first.remember(1)
        log.trim(1)
        assert [Fullness({0: log}, path).is_full(number, 100) for number in (1, 2)] == [True, False]

    def test_one_full_log_of_several_is_enough(self, tmp_path: Path):
        logs = {peer: PacketLog(tmp_path / f"{peer}", 10_000, 0) for peer in (0, 2)}
        logs[2].append(b"x" * 9900)
        assert Fullness(logs, tmp_path / "skipped").is_full(0, 1000)

    def test_a_full_disk_is_named(self, tmp_path: Path):
        fullness = Fullness({0: PacketLog(tmp_path / "log", 10, 0)}, tmp_path / "no" / "skipped")
        with pytest.raises(Unwritten, match="skipped could not be written"):
            fullness.remember(1)


@pytest.mark.processes
def test_the_others_go_on_while_it_is_stopped(trainer: Trainer):
    """What it trains before is what it would have trained; it says how much it missed, and evaluates at the end."""
    settings: dict[str, Any] = {"num_stages": 2, **LONG, "max_steps": 150, "gradient_accumulation_steps": 1}
    settings |= {"stage_replicas": "1,2", "per_device_train_batch_size": 2, "eval_batches": 2, "logging_steps": 1}
    one = trainer.run("one", 3, **settings)
    flags = trainer.flags("jobs", **settings, on_full_log="skip", log_memory_gb=0.0004, log_disk_gb=0)
    folders = [trainer.folder / "jobs" / f"stage-{stage:02d}" for stage in range(2)]
    with Lives(flags, trainer.folder / "logs") as up:
        until_saved(folders[1], up)
        pid = status(folders[1], 1)["pid"]
        os.kill(pid, signal.SIGSTOP)
        until(lambda: status(folders[0], 0).get("step", 0) > 140, SECONDS, lambda: up.text)
        os.kill(pid, signal.SIGCONT)
        os.kill(pid, signal.SIGKILL)
        up.ends_well()
    skipped = status(folders[1], 1)["skipped_steps"]
    assert skipped > 0
    assert [each["step"] for each in records(folders[0], 0)] == list(range(1, 151))
    ours, theirs = records(folders[1], 1), {each["step"]: each for each in records(one, 1)}
    steps = [each["step"] for each in ours]
    assert len(set(steps)) == len(steps) == 150 - skipped
    gap = next((k for k, step in enumerate(steps) if step != k + 1), len(steps))
    assert all(each["loss"] == theirs[each["step"]]["loss"] for each in ours[:gap])
    assert all(each["lr"] == theirs[each["step"]]["lr"] for each in ours)
    assert records(folders[1], 1, "eval")[-1]["step"] == 150
    assert (
        f"| steps | 150, of which stage 1 skipped {skipped} |" in (trainer.folder / "jobs/export/README.md").read_text()
    )
    assert "stage 1 skips steps (--on_full_log skip)" in up.text
