"""Writes a stage's records, and hands DeepSpeed's monitor a copy."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from llm_local.checkpoint.line import committed
from llm_local.files import Json, write_whole, writing
from llm_local.records import FOLDER, Record, read_records


def total_norm(norms: Sequence[float | torch.Tensor | None]) -> float:
    """Norm over all blocks of the stage; NaN where DeepSpeed computes none."""
    return math.sqrt(sum(float("nan") if norm is None else float(norm) ** 2 for norm in norms))


class MetricsFile:
    """Appends records; each is on disk before the next step. One that a resumed run writes again replaces the old.

    monitor: DeepSpeed's, which gets a copy. resumed_samples: what resumed_step is where DeepSpeed counts sequences.
    """

    def __init__(self, output_dir: Path, stage: int, monitor: Any, resumed_step: int = 0, resumed_samples: int = 0):
        self.path = output_dir / FOLDER / f"stage-{stage:02d}.jsonl"
        with writing(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.path.touch()
        self._monitor = monitor
        self._old = {(r["split"], r["step"]) for r in read_records(self.path)}
        csv: Any = getattr(monitor, "csv_monitor", None)
        self._csv = Path(csv.log_dir) if csv else None
        board: Any = getattr(monitor, "tb_monitor", None)
        self._copies = self._csv or (Path(board.output_path, board.job_name) if board else self.path)
        for path in self._csv.glob("*.csv") if self._csv else ():
            last = resumed_samples if path.stem.startswith("Train_Samples") else resumed_step
            _keep_rows(path, lambda step, last=last: step <= last)
            csv.filenames.append(path.stem)  # of those that have a header

    def write(self, record: Record) -> None:
        key = (record.split, record.step)
        if key in self._old:  # a finished run that is resumed evaluates again
            _write_all(self.path, [r for r in read_records(self.path) if (r["split"], r["step"]) != key])
            for path in self._csv.glob(f"{record.split}_*.csv") if self._csv else ():
                _keep_rows(path, lambda step: step != record.step)
        with writing(self.path), self.path.open("a") as file:
            file.write(json.dumps(asdict(record)) + "\n")
        if self._monitor is not None and self._monitor.enabled:
            names = ("loss", "lr", "grad_norm", "step_seconds", "wait_seconds", "perplexity", "bits_per_byte")
            names += ("accuracy", "top_5_accuracy")
            values = [(name, getattr(record, name)) for name in names]
            events = [(f"{record.split}/{name}", value, record.step) for name, value in values if value is not None]
            with writing(self._copies):
                self._monitor.write_events(events)


def keep_until(output_dir: Path, step: int) -> None:
    """Leaves the records of a run up to the step that it goes on from, of all stages that it ever had; of 0, none."""
    for path in (output_dir / FOLDER).glob("stage-*.jsonl"):
        _write_all(path, [record for record in read_records(path) if 0 < step >= record["step"]])


def _write_all(path: Path, records: Sequence[Json]) -> None:
    write_whole(path, "".join(json.dumps(record) + "\n" for record in records))


def _keep_rows(path: Path, keep: Callable[[int], bool]) -> None:
    """Leaves the rows 'step,value' of a csv file whose step is kept."""
    header, *rows = path.read_text().splitlines() or [""]
    kept = (row for row in rows if keep(int(row.partition(",")[0])))
    write_whole(path, "".join(f"{row}\n" for row in (header, *kept)))


def best_step(output_dir: Path, num_stages: int) -> int | None:
    """Of the checkpoints that are there, the step with the last stage's lowest validation loss, the first of equals;
    None where none was evaluated."""
    records = read_records(output_dir / FOLDER / f"stage-{num_stages - 1:02d}.jsonl")
    losses = {record["step"]: record["loss"] for record in records if record["split"] == "eval"}
    saved = [int(path.name.removeprefix("step-")) for path in committed(output_dir)]
    return min((step for step in saved if step in losses), key=lambda step: losses[step], default=None)
