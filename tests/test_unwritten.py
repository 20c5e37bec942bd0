"""A full disk is one line that names the file, whatever a run writes."""

from __future__ import annotations

import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from conftest import Trainer
from launching import by_hand, until_step

from llm_local.config import parse
from llm_local.files import Unwritten, writing
from llm_local.launch import Launch
from llm_local.metrics import MetricsFile, Record
from llm_local.owner import claim_folder
from llm_local.run import check


@contextmanager
def full_disk() -> Iterator[None]:
    """No file can grow meanwhile."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_a_folder_and_metrics(tmp_path: Path):
    with (
        pytest.raises(Unwritten, match=r"/new/run.lock could not be written \(File too large\); make"),
        full_disk(),
    ):
        claim_folder(tmp_path / "new")
    metrics = MetricsFile(tmp_path, 0, None)
    with pytest.raises(Unwritten, match=r"metrics/stage-00.jsonl could not be written"), full_disk():
        metrics.write(Record(1, "train", 0, 1.0, [1.0], 1))


def test_an_error_of_reading_is_none_of_writing(tmp_path: Path):
    with pytest.raises(FileNotFoundError), writing(tmp_path, reads=True):
        (tmp_path / "missing").read_text()


def test_run_yaml(trainer: Trainer, tmp_path: Path):
    """A directory in its place: a write of any file may fail for another reason than want of space."""
    config = parse(trainer.flags("run", resume_from_checkpoint="auto"))
    (tmp_path / "run" / "run.yaml").mkdir(parents=True)
    with pytest.raises(Unwritten, match=r"run/run.yaml could not be written \(Is a directory\)"):
        check(config, Launch(0, 1, 0, 1, 0))


@pytest.mark.processes
def test_a_disk_that_takes_no_metrics_ends_the_run_with_one_line(trainer: Trainer, tmp_path: Path):
    with by_hand(2, trainer.flags("run", num_stages=2, max_steps=1_000_000), tmp_path) as ranks:
        until_step(2, tmp_path / "run", 2, lambda: "\n".join(rank.text for rank in ranks))
        (tmp_path / "full").symlink_to("/dev/full")
        (tmp_path / "full").replace(tmp_path / "run" / "metrics" / "stage-01.jsonl")
        codes = [rank.wait(30) for rank in ranks]
    texts = [rank.text for rank in ranks]
    assert codes == [1, 1], texts
    for text in texts:
        last = text.strip().splitlines()[-1]
        assert "metrics/stage-01.jsonl could not be written (No space left on device); make room" in last, text
        assert "Traceback" not in text
