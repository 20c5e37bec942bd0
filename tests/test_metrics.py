"""What a person and a file are told of the steps: each record once, and the last line of a terminal too."""

from __future__ import annotations

import io
import sys
from pathlib import Path
from typing import Any

import pytest

from llm_local.metrics import MetricsFile, keep_until
from llm_local.place import Place
from llm_local.progress import Progress
from llm_local.records import Record, read_records


def record(step: int, split: str = "train", loss: float = 1.0) -> Record:
    return Record(step, split, stage=0, loss=loss, block_losses=[loss], tokens=1)


def test_a_record_that_a_resumed_run_writes_again_replaces_the_old_one(tmp_path: Path):
    first = MetricsFile(tmp_path, 0, None)
    for one in (record(1), record(2), record(2, "eval"), record(3)):
        first.write(one)
    MetricsFile(tmp_path, 1, None).write(record(3))  # of a stage that the resumed run has no more
    keep_until(tmp_path, 2)
    again = MetricsFile(tmp_path, 0, None)
    assert not read_records(tmp_path / "metrics/stage-01.jsonl")
    assert [(r["step"], r["split"]) for r in read_records(again.path)] == [(1, "train"), (2, "train"), (2, "eval")]
    again.write(record(2, "eval", loss=7.0))
    found = [(r["step"], r["split"], r["loss"]) for r in read_records(again.path)]
    assert found == [(1, "train", 1.0), (2, "train", 1.0), (2, "eval", 7.0)]
    keep_until(tmp_path, 0)
    assert not read_records(again.path), "a new run has none"


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class Store(dict[str, str]):
    """As much of a world as a progress bar needs."""

    place = Place(0, (1, 1))
    publish = dict.__setitem__
    peek = dict.get


@pytest.mark.parametrize("told", ["before the bar closes", "after the bar closes"])
def test_the_last_step_is_shown_on_a_terminal(monkeypatch: pytest.MonkeyPatch, told: str):
    monkeypatch.setattr(sys, "stderr", Terminal())
    world: Any = Store()
    progress = Progress(world, max_steps=1, first_step=0)
    progress.publish("train", 1, [3.5])
    progress.step(0.5, tokens=10)
    if told == "before the bar closes":
        world["train/1/1"] = "3.25"
    progress.close()
    world["train/1/1"] = "3.25"
    progress.show()
    assert "3.500 3.250" in sys.stderr.getvalue().replace("\r", "\n").splitlines()[-1]
