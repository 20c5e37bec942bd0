"""Runs of a day on a GPU, as a person starts them: scripts/pretrain.py, under torchrun where there are two stages.

Several run side by side. What they found is read from the metrics that they wrote, also of one that did not end well.
"""

from __future__ import annotations

import hashlib
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).parents[2]
ERROR_LINES = 12
NEEDS_GPU = "needs a GPU"  # of what a rehearsal leaves out
ON_CPU = {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}


@dataclass(frozen=True)
class Paths:
    """Where runs read and write."""

    work: Path
    text: Path
    tokenizer: Path

    def flags(self) -> dict[str, str]:
        """Those of data that all runs share."""
        named = {"train_file": self.text, "tokenizer_name": self.tokenizer, "cache_dir": self.work / "cache"}
        return {name: str(path) for name, path in named.items()}


@dataclass(frozen=True)
class Job:
    """A run by its name and flags."""

    name: str
    flags: Mapping[str, Any]
    on_cpu: bool = False

    @property
    def num_stages(self) -> int:
        return int(self.flags.get("num_stages", 1))


@dataclass(frozen=True)
class Found:
    """What a run wrote. records: of its metrics, by stage; error: its last lines where it did not end well."""

    folder: Path
    records: list[list[dict[str, Any]]] = field(default_factory=list)
    seconds: float = 0.0
    error: str = ""

    def of(self, split: str) -> list[list[dict[str, Any]]]:
        return [[each for each in stage if each["split"] == split] for stage in self.records]

    @property
    def losses(self) -> list[list[float]]:
        """Training losses by stage and step."""
        return [[each["loss"] for each in stage] for stage in self.of("train")]

    @property
    def export(self) -> str:
        """A digest of the whole model's weights; '' where none were exported."""
        files = sorted((self.folder / "export").glob("*.safetensors"))
        digest = hashlib.sha256(b"".join(hashlib.sha256(path.read_bytes()).digest() for path in files))
        return digest.hexdigest()[:16] if files else ""

    def figures(self) -> dict[str, Any]:
        """Last training loss, median seconds of a step and peak memory, by stage."""
        train = [stage for stage in self.of("train") if stage]
        found: dict[str, Any] = {"seconds": round(self.seconds, 1)}
        if train:
            found |= {
                "first_losses": [stage[0]["loss"] for stage in train],
                "last_losses": [stage[-1]["loss"] for stage in train],
                "step_seconds": [median(each["step_seconds"] for each in stage[1:] or stage) for stage in train],
                "peak_memory_bytes": [stage[-1]["peak_memory_bytes"] for stage in train],
                "sent_bytes": [stage[-1]["sent_bytes"] for stage in train],
            }
        return found | ({"error": self.error} if self.error else {})


def read_metrics(folder: Path) -> list[list[dict[str, Any]]]:
    """The records of each stage, also of a run that has not ended."""
    from llm_local.records import read_records  # what that imports may have to be installed by the first step

    return [read_records(path) for path in sorted((folder / "metrics").glob("stage-*.jsonl"))]


def command(job: Job, folder: Path, paths: Paths) -> list[str]:
    flags = {**paths.flags(), **job.flags, "output_dir": str(folder)}
    given = [part for name, value in flags.items() if value is not None for part in (f"--{name}", str(value))]
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--local_addr=127.0.0.1"]
    torchrun += [f"--nproc_per_node={job.num_stages}"]
    launcher = torchrun if job.num_stages > 1 else []
    return [sys.executable, *launcher, str(ROOT / "scripts/pretrain.py"), *given]


def surroundings() -> dict[str, str]:
    """The environment of this repository's scripts, installed or not."""
    folders = [*filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep)), str(ROOT)]
    return {**os.environ, "TORCH_CPP_LOG_LEVEL": "ERROR", "PYTHONPATH": os.pathsep.join(dict.fromkeys(folders))}


def start(job: Job, paths: Paths) -> tuple[subprocess.Popen[bytes], Path, Path]:
    """The process, the run's folder and its log."""
    folder = paths.work / "runs" / job.name
    log = folder.with_suffix(".log")
    log.parent.mkdir(parents=True, exist_ok=True)
    fresh = Job(job.name, {**job.flags, "overwrite_output_dir": "true"}, job.on_cpu)
    environment = {**surroundings(), **(ON_CPU if job.on_cpu else {})}
    with log.open("w") as file:
        process = subprocess.Popen(command(fresh, folder, paths), cwd=ROOT, env=environment, stdout=file, stderr=file)
    return process, folder, log


def train(job: Job, paths: Paths) -> Found:
    """Trains to the end."""
    begun = time.monotonic()
    process, folder, log = start(job, paths)
    status = process.wait()
    error = (last_words(log) or f"status {status}") if status else ""
    return Found(folder, read_metrics(folder), time.monotonic() - begun, error)


def last_words(log: Path) -> str:
    """The end of a log, without the launcher's account of it."""
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    end = next((n for n, line in enumerate(lines) if "ChildFailedError" in line), len(lines))
    begun = [n for n, line in enumerate(lines[:end]) if line.startswith("Traceback")]
    ours = lines[: begun[-1]] if end < len(lines) and begun else lines
    return "\n".join([line for line in ours if "torch/distributed/" not in line][-ERROR_LINES:])


def side_by_side(calls: Sequence[Callable[[], None]], most: int) -> None:
    """Calls all, so many at a time; the first one's error is raised when all are through."""
    with ThreadPoolExecutor(most) as pool:
        for each in [pool.submit(call) for call in calls]:
            each.result()


def difference(ours: Iterable[Sequence[float]], theirs: Iterable[Sequence[float]]) -> float:
    """The largest one of losses by stage and step, relative to theirs; infinite where there are others."""
    ours, theirs = list(ours), list(theirs)
    if not ours or [len(each) for each in ours] != [len(each) for each in theirs]:
        return math.inf
    return max(abs(a - b) / abs(b) for x, y in zip(ours, theirs, strict=True) for a, b in zip(x, y, strict=True))
