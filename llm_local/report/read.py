"""A run's folder, read for people to look at: OUTPUT of a launch, of all jobs of a run, or of one job."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from llm_local.files import Json
from llm_local.job_status import read_status
from llm_local.jobs.positions import STATUS
from llm_local.records import FOLDER
from llm_local.report.notes import FORMAT, facts_path, read_samples

_NEEDED = {"step": int, "split": str, "stage": int, "loss": (int, float)}


@dataclass
class RunData:
    """All that a run has left so far.

    name: what tells it from the other runs of a page. flags: those of run.yaml. facts: of report/facts.py, {} where
    there are none. stages: records by stage, in order. status: of jobs. faults: what could not be read, a line each.
    written: when the records of a stage were, seconds since 1970.
    """

    folder: Path
    name: str
    flags: Json = field(default_factory=dict)
    facts: Json = field(default_factory=dict)
    stages: dict[int, list[Json]] = field(default_factory=dict)
    status: list[Json] = field(default_factory=list)
    samples: list[Json] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)
    written: dict[int, float] = field(default_factory=dict)


class RunReader:
    """Reads a run again and again; of metrics only what came since. Raises ValueError for a folder that holds no run,
    and for metrics that no version of this library wrote."""

    def __init__(self, folder: Path, name: str | None = None):
        self._run = RunData(folder, name or str(folder))
        self._read: dict[Path, tuple[int, int]] = {}  # bytes and lines

    def read(self) -> RunData:
        run = self._run
        run.faults = []
        parts = _parts(run.folder)
        for part in parts:
            for path in sorted((part / FOLDER).glob("stage-*.jsonl")):
                self._read_metrics(path)
        run.flags = next((flags for part in parts if (flags := _flags(part, run.faults))), {})
        found = [facts for part in parts if (facts := _facts(part, run.faults))]
        run.facts = next((facts for facts in found if facts["sources"]), found[0] if found else {})
        run.status = read_status(run.folder if any(run.folder.glob(f"stage-*/{STATUS}")) else run.folder.parent)
        run.status = run.status if any((part / STATUS).exists() for part in parts) else []
        run.samples = [each for part in parts for each in read_samples(part)]
        if not any(run.stages.values()) and not run.flags:
            raise ValueError(f"{run.folder} has no metrics/stage-*.jsonl with a record; name the --output_dir of a run")
        run.stages = dict(sorted(run.stages.items()))
        return run

    def _read_metrics(self, path: Path) -> None:
        start, number = self._read.get(path, (0, 0))
        found = path.stat()
        self._run.written[_stage_of(path)] = found.st_mtime
        if found.st_size < start:  # it was begun anew
            start, number = 0, 0
        if not start:
            self._run.stages.pop(_stage_of(path), None)
        with path.open("rb") as file:
            file.seek(start)
            data = file.read()
        whole, _, rest = data.rpartition(b"\n")
        lines = whole.split(b"\n") if whole else []
        records = _records(path, number, lines, self._run.faults)
        number += len(lines)
        if rest:
            self._run.faults.append(f"{path}, line {number + 1}, is half written; left out")
        self._read[path] = (start + len(data) - len(rest), number)
        for record in records:
            self._run.stages.setdefault(record["stage"], []).append(record)


def _stage_of(path: Path) -> int:
    text = path.stem.removeprefix("stage-")
    return int(text) if text.isdecimal() else -1


def _parts(folder: Path) -> list[Path]:
    """The folders that hold metrics: the run's own, or those of its jobs."""
    jobs = sorted(path.parent for path in folder.glob(f"stage-*/{FOLDER}"))
    return jobs if jobs and not (folder / FOLDER).is_dir() else [folder]


def _records(path: Path, number: int, lines: list[bytes], faults: list[str]) -> list[Json]:
    """Those of the lines behind the one of this number."""
    try:  # in one piece: many times as fast, and names of fields are one string each
        records = json.loads(b"[" + b",".join(lines) + b"]")
    except ValueError:
        records = [_loaded(path, at, line, faults) for at, line in enumerate(lines, number + 1)]
    for at, record in enumerate(records, number + 1):
        if record is not None:
            _check(path, at, record)
    return [record for record in records if record is not None]


def _loaded(path: Path, number: int, line: bytes, faults: list[str]) -> Any:
    try:
        return json.loads(line)
    except ValueError:
        faults.append(f"{path}, line {number}, is damaged; left out")
        return None


def _check(path: Path, number: int, record: Any) -> None:
    wrong = [n for n, kind in _NEEDED.items() if not (isinstance(record, dict) and isinstance(record.get(n), kind))]
    if wrong:
        raise ValueError(
            f"{path}, line {number}, is no record of this version ({', '.join(wrong)}); "
            "read it with the version of llm_local that wrote it"
        )


def _flags(part: Path, faults: list[str]) -> Json:
    path = part / "run.yaml"
    if not path.exists():
        return {}
    try:
        flags = yaml.safe_load(path.read_text())
    except (yaml.YAMLError, UnicodeDecodeError):
        flags = None
    if not isinstance(flags, dict):
        faults.append(f"{path} is damaged; the configuration is left out")
        return {}
    return flags


def _facts(part: Path, faults: list[str]) -> Json:
    path = facts_path(part)
    if not path.exists():
        return {}
    try:
        facts = json.loads(path.read_text())
        version = facts["format"]
    except (ValueError, KeyError, TypeError):
        faults.append(f"{path} is damaged; cut, data and versions are left out")
        return {}
    if version != FORMAT:
        faults.append(f"{path} is of format {version}, not {FORMAT}; cut, data and versions are left out")
        return {}
    return facts


def read_runs(folders: list[Path]) -> list[RunData]:
    """Each run by the shortest end of its path that no other one has. Raises ValueError naming the folder."""
    return [RunReader(folder, name).read() for folder, name in zip(folders, short_names(folders), strict=True)]


def short_names(folders: list[Path]) -> list[str]:
    """'quickstart'; 'a/run' and 'b/run' where two end alike."""
    parts = [folder.absolute().parts for folder in folders]
    for count in range(1, max(map(len, parts)) + 1):
        names = ["/".join(each[-count:]) for each in parts]
        if len(set(names)) == len(names):
            return names
    return [f"{'/'.join(each[-1:])} ({number})" for number, each in enumerate(parts, 1)]
