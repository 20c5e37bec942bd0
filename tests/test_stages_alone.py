"""Stages in launches of their own: one is killed and comes back, the others go on, and the losses are one launch's."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TINY, Trainer, records, weights
from launching import BIN, ROOT, until
from lives import SECONDS, Lives
from ranks import free_port
from transformers import AutoModelForCausalLM, AutoModelForImageClassification

from llm_local.commands.assemble import main as assemble
from llm_local.commands.key import main as make_key

pytestmark = pytest.mark.processes
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "PATH": f"{BIN}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}
LONG = {"max_steps": 120, "save_steps": 10, "eval_steps": 20, "save_total_limit": 2}


class Launch:
    """A command in the background; when the block ends, it and its descendants do."""

    def __init__(self, command: list[str], log: Path):
        self.log, self.command = log, command
        with log.open("wb") as out:
            self.process = subprocess.Popen(
                command, stdout=out, stderr=out, cwd=ROOT, env=os.environ | ENVIRONMENT, start_new_session=True
            )

    @property
    def text(self) -> str:
        return self.log.read_text(errors="replace")

    def __enter__(self) -> Launch:
        return self

    def __exit__(self, *_: Any) -> None:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            try:
                self.process.wait(30)
            except subprocess.TimeoutExpired:
                os.killpg(self.process.pid, signal.SIGKILL)

    def ends_well(self) -> None:
        until(lambda: self.process.poll() is not None, SECONDS, lambda: self.text)
        assert self.process.returncode == 0, self.text


def status(folder: Path, stage: int) -> dict[str, Any]:
    """What a stage says of itself; nothing before it does."""
    try:
        return json.loads((folder / "status.json").read_text())[str(stage)]
    except (OSError, ValueError):
        return {}


def until_saved(folder: Path, launch: Launch | Lives) -> None:
    """The stage has a checkpoint, and is not at its end."""
    saved = folder / "checkpoints"
    until(lambda: any(saved.glob("*/manifest.json")), SECONDS, lambda: f"a checkpoint; the log says:\n{launch.text}")


def kill_rank(folder: Path, stage: int) -> None:
    os.kill(status(folder, stage)["pid"], signal.SIGKILL)


def trained(folder: Path, stage: int) -> list[tuple[Any, ...]]:
    """All that a stage measured, in order."""
    return [
        (split, each["step"], each["loss"], each["block_losses"])
        for split in ("train", "eval")
        for each in records(folder, stage, split)
    ]


def same_model(one: Path, other: Path, loader: Any = AutoModelForCausalLM) -> None:
    ours, theirs = weights(one), weights(other)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    found = loader.from_pretrained(one, output_loading_info=True)
    assert not any(found[1].values())


def test_the_middle_one_is_killed_under_llm_local_up(trainer: Trainer):
    trainer.model(TINY | {"num_hidden_layers": 6})
    settings = {"num_stages": 3, **LONG}
    one = trainer.run("one", 3, **settings)
    folder = trainer.folder / "jobs"
    flags = trainer.flags("jobs", **settings)
    with Launch([sys.executable, "-m", "llm_local.cli", "up", *flags], trainer.folder / "up.txt") as up:
        folders = [folder / f"stage-{stage:02d}" for stage in range(3)]
        until_saved(folders[1], up)
        until(lambda: all(status(folders[stage], stage) for stage in range(3)), SECONDS, lambda: "all say so")
        pids = [status(folders[stage], stage)["pid"] for stage in range(3)]
        os.kill(pids[1], signal.SIGKILL)
        up.ends_well()
    lives = [status(folders[stage], stage) for stage in range(3)]
    assert [each["life"] for each in lives] == [1, 2, 1]
    assert [each["pid"] == pid for each, pid in zip(lives, pids, strict=True)] == [True, False, True]
    for stage in range(3):
        assert trained(folders[stage], stage) == trained(one, stage)
    same_model(folder / "export", one / "export")
    assert "## Validation loss" in (folder / "export" / "README.md").read_text()


@pytest.mark.parametrize("trainer", ["image-classification"], indirect=True)
def test_images_are_seen_by_the_first_alone(trainer: Trainer):
    """Labels are in the log, and at the end the first stage's part has the image that all exits are compared with."""
    settings = {"num_stages": 2, "max_steps": 6, "save_steps": 3, "eval_steps": 3}
    one = trainer.run("one", 2, **settings)
    folder, flags = trainer.folder / "jobs", trainer.flags("jobs", **settings)
    with Lives(flags, trainer.folder / "logs") as up:
        up.ends_well()
    for stage in range(2):
        assert trained(folder / f"stage-{stage:02d}", stage) == trained(one, stage)
    same_model(folder / "export", one / "export", AutoModelForImageClassification)
    assert up.text.count("loads with no missing or unexpected key, logits equal the pipeline's") == 2
    assert "| exit | loss | accuracy | top 5 accuracy |" in (folder / "export/README.md").read_text()


def test_replicas_that_meet_rarely_come_back_as_they_were(trainer: Trainer):
    settings = {"num_stages": 2, **LONG, "replica_sync_steps": 8}
    one = trainer.run("one", 4, **settings)
    folder = trainer.folder / "jobs"
    flags = [*trainer.flags("jobs", **settings), "--nproc_per_node", "2"]
    with Lives(flags, trainer.folder / "logs") as up:
        until_saved(folder / "stage-00", up)
        kill_rank(folder / "stage-00", 0)
        up.ends_well()
    assert [status(folder / f"stage-{stage:02d}", stage)["life"] for stage in range(2)] == [2, 1]
    for stage in range(2):
        assert trained(folder / f"stage-{stage:02d}", stage) == trained(one, stage)
    same_model(folder / "export", one / "export")


def test_a_torn_log_is_made_again_though_few_checkpoints_are_kept(trainer: Trainer):
    """The next stage is stopped meanwhile: it has saved once, what it wants is older than two checkpoints."""
    settings = {"num_stages": 2, **LONG, "max_steps": 80}
    one = trainer.run("one", 2, **settings)
    flags = trainer.flags("jobs", **settings)
    folders = [trainer.folder / "jobs" / f"stage-{stage:02d}" for stage in range(2)]
    with Lives(flags, trainer.folder / "logs") as up:
        until_saved(folders[1], up)
        stopped = status(folders[1], 1)["pid"]
        os.kill(stopped, signal.SIGSTOP)
        until(lambda: status(folders[0], 0).get("step", 0) >= 55, SECONDS, lambda: up.text)
        kill_rank(folders[0], 0)
        for path in folders[0].glob("log/*/*.packets"):
            os.truncate(path, 0)
        until(lambda: status(folders[0], 0).get("life") == 2, SECONDS, lambda: up.text)
        os.kill(stopped, signal.SIGCONT)
        up.ends_well()
    assert "the log lacks packets from before step-" in up.text
    assert [status(folders[stage], stage)["life"] for stage in range(2)] == [2, 1]
    for stage in range(2):
        assert trained(folders[stage], stage) == trained(one, stage)


def test_two_under_torchrun_as_the_example_has_it(trainer: Trainer):
    """The first is killed; matrices of a shared head go back to it."""
    settings = {"num_stages": 2, **LONG, "head": "shared", "head_refresh_steps": 3}
    one = trainer.run("one", 2, **settings)
    key, port = trainer.folder / "run.key", free_port()
    assert make_key([str(key)]) == 0
    script = str(ROOT / "configs" / "jobs" / "torchrun.sh")
    folders, launches = [], []
    for stage, link in enumerate((["--send_to", f"localhost:{port}"], ["--receive_on", f"127.0.0.1:{port}"])):
        folders.append(trainer.folder / "jobs" / f"stage-{stage:02d}")
        flags = trainer.flags("jobs", **settings, stage=stage, run_key_file=key)
        launches.append(Launch([script, *flags, *link], trainer.folder / f"stage-{stage}.txt"))
    with launches[0], launches[1]:
        until_saved(folders[0], launches[0])
        pid = status(folders[1], 1)["pid"]
        kill_rank(folders[0], 0)
        for launch in launches:
            launch.ends_well()
    assert [status(folders[stage], stage)["life"] for stage in range(2)] == [2, 1]
    assert status(folders[1], 1)["pid"] == pid
    again = Launch(launches[1].command, trainer.folder / "again.txt")  # its neighbour is gone, and it needs none
    again.ends_well()
    assert f"stage 1 has come to its end before: {folders[1] / 'export'}" in again.text
    for stage in range(2):
        assert trained(folders[stage], stage) == trained(one, stage)
    parts = [str(folder / "export") for folder in folders]
    assert assemble([*parts, str(trainer.folder / "model")]) == 0
    same_model(trainer.folder / "model", one / "export")
