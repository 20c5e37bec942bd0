"""A launcher that starts a run again: it goes on from what it saved, and replaces nothing."""

from __future__ import annotations

from pathlib import Path

import pytest
from conftest import Trainer, records
from launching import START_SECONDS, job, torchrun, until

from llm_local.checkpoint.line import AUTO, after_restart, committed, find_checkpoint
from llm_local.checks.output_folder import open_output
from llm_local.checks.preflight import preflight
from llm_local.config import parse


def fake_run(folder: Path, step: int) -> Path:
    """As much of a run as is looked at before its checkpoint is read."""
    (folder / f"checkpoints/step-{step:08d}").mkdir(parents=True)
    (folder / f"checkpoints/step-{step:08d}/manifest.json").write_text("{}")
    (folder / "run.yaml").write_text("seed: 1\n")
    return folder


@pytest.mark.processes
def test_torchrun_starts_a_run_again_that_lost_a_rank(trainer: Trainer):
    """It replaces an older run, loses a rank after a checkpoint, and equals the run that never stopped."""
    settings = {"num_stages": 2, "max_steps": 100, "save_steps": 10, "eval_batches": 1}
    straight = trainer.run("straight", 2, **settings, resume_from_checkpoint=AUTO)
    output = fake_run(trainer.folder / "run", 500)
    flags = trainer.flags("run", **settings, overwrite_output_dir=True)
    with job([*torchrun(2), "--max_restarts", "1"], flags, trainer.folder) as run:
        second = output / "checkpoints/step-00000020"
        until(second.exists, START_SECONDS, lambda: run.text)
        run.ranks()[1].kill()
        assert run.wait(START_SECONDS) == 0, run.text
    assert run.text.count(f"llm_local: goes on after {output}/checkpoints/step-") == 1, run.text
    for stage in (0, 1):
        for split in ("train", "eval"):
            ours, theirs = records(output, stage, split), records(straight, stage, split)
            assert [(r["step"], r["loss"]) for r in ours] == [(r["step"], r["loss"]) for r in theirs]


@pytest.mark.parametrize("saved", [False, True])
@pytest.mark.parametrize("wanted", [None, "false", "true", AUTO, "elsewhere/step-00000004"])
def test_a_restart_goes_on_from_what_the_run_saved_or_begins_as_it_did(tmp_path: Path, wanted: str | None, saved: bool):
    if saved:
        fake_run(tmp_path, 2)
    flags = ["--output_dir", str(tmp_path), "--overwrite_output_dir", "true"]
    config = after_restart(parse([*flags, *(["--resume_from_checkpoint", wanted] if wanted else [])]))
    assert not config.train.overwrite_output_dir
    if "elsewhere" in (wanted or "") and not saved:
        assert config.train.resume_from_checkpoint == wanted
    else:
        assert find_checkpoint(config) == (committed(tmp_path)[0] if saved else None)


def test_a_restart_that_never_opened_the_folder_leaves_what_is_in_it(trainer: Trainer):
    """Killed while rank 0 prepared the data: the checkpoints there are another run's."""
    folder = fake_run(trainer.folder / "run", 2)
    config = parse(trainer.flags("run", overwrite_output_dir=True))
    (said,) = open_output(preflight(config, 1), is_restart=True)
    assert said.startswith(f"step-00000002 set aside in {folder}/checkpoints/abandoned-1: ")
    assert (folder / "checkpoints/abandoned-1/step-00000002/manifest.json").exists()
    assert committed(folder) == []
