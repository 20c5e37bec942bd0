"""The driver of a day on a GPU: steps one after the other, each in processes of its own and within a time limit.

Only Python's own library is imported here: what the steps need may have to be installed by the first of them.

    DIR/day.jsonl     a line for each step that ended: step, status, seconds, figures, error
    DIR/day.txt       the same as a table
    DIR/logs.tgz      logs and metrics; WORK (DIR/work) has them, runs and caches
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tarfile
import time
import uuid
from collections.abc import Collection, Iterable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from llm_local.bench.gpu_bundle import PYTHON, BundleError, check_bundle, make_bundle
from llm_local.bench.gpu_runs import NEEDS_GPU, ON_CPU, ROOT

OK, FAILED, OVER, NO_TIME = "ok", "failed", "over its limit", "no time"
DONE = (OK, NEEDS_GPU)  # not run again
LEAST_SECONDS = 5.0  # with less left a step is not begun
SLOWER = 4  # times the limits of a rehearsal, which two cores may have to do
ERROR_CHARACTERS = 1500
MARK = "LLM_LOCAL_GPU_DAY"


@dataclass(frozen=True)
class Step:
    """limit: seconds on a GPU. makes: what it leaves in WORK for the others, if that is all it is for."""

    name: str
    limit: float
    says: str
    makes: str | None = None


STEPS = (
    Step("install", 60, "wheels of the bundle into WORK/site", makes="site"),
    Step("facts", 40, "devices, versions, imports, the rate of a plain product of matrices"),
    Step("data", 40, "text, tokenizer and tokens", makes="data.json"),
    Step("fp32", 60, "two stages on one device, against losses of a CPU"),
    Step("zero", 90, "bf16 with ZeRO 0 to 3 and both offloads: resumed bit for bit, exported"),
    Step("variants", 70, "fp16, overlapping, shared head, int8 on the wire, compiled layers"),
    Step("tests", 90, "pytest -m gpu"),
    Step("mfu", 120, "share of the peak that a stage of 350M reaches, and where its time goes"),
    Step("passes", 80, "passes of a stage for the simulator; chunks beside backpropagation in one process"),
    Step("study", 200, "43M: backpropagation, 2 blocks, 4 blocks with a shared head, on the same tokens"),
)
NAMES = tuple(step.name for step in STEPS)


@dataclass(frozen=True)
class Line:
    """What became of a step. figures: what it found, also where it failed half way."""

    step: str
    status: str
    seconds: float = 0.0
    figures: dict[str, Any] = field(default_factory=dict)
    error: str = ""
    rehearsal: bool = False


def read_lines(path: Path) -> dict[str, Line]:
    """The newest line of each step. Raises ValueError where the file is another one's."""
    found = {}
    for text in path.read_text().splitlines():
        try:
            line = Line(**json.loads(text))
        except (ValueError, TypeError) as error:
            raise ValueError(f"{path} is not of gpu_day.py ({error}); give another one") from error
        found[line.step] = line
    return found


@dataclass(frozen=True)
class Day:
    """Folders and settings. end: on time.monotonic()."""

    output: Path
    work: Path
    bundle: Path | None
    is_rehearsal: bool
    end: float
    limits: dict[str, float]

    @property
    def file(self) -> Path:
        return self.output / "day.jsonl"

    def limit(self, step: Step) -> float:
        return self.limits.get(step.name, step.limit * (SLOWER if self.is_rehearsal else 1))

    def lacks(self, step: Step) -> bool:
        """Whether the others would miss what this step makes."""
        return step.makes is not None and not self.skips(step) and not (self.work / step.makes).exists()

    def skips(self, step: Step) -> bool:
        return step.name == "install" and self.bundle is None

    def environment(self, mark: str) -> dict[str, str]:
        """Of a step's processes."""
        folders = [self.work / "site", ROOT, os.environ.get("PYTHONPATH", "")]
        ours = {
            "PYTHONPATH": os.pathsep.join(str(folder) for folder in folders if str(folder) != "."),
            "PYTHONUNBUFFERED": "1",
            "HF_HUB_OFFLINE": "1",
            "TOKENIZERS_PARALLELISM": "false",
            "TORCH_CPP_LOG_LEVEL": "ERROR",
            "TORCHINDUCTOR_COMPILE_THREADS": "4",  # of each process, and several compile at a time
            "GLOO_SOCKET_IFNAME": "lo",  # the host's own name may lead nowhere
            "NCCL_SOCKET_IFNAME": "lo",
            "OMP_NUM_THREADS": "1" if self.is_rehearsal else "2",
            MARK: mark,
        }
        if self.is_rehearsal:
            ours |= ON_CPU
        return {**os.environ, **ours}


def run(day: Day, steps: Sequence[Step], again: Collection[str]) -> dict[str, Line]:
    """Runs what is not done, writes a line for each, and returns the newest lines of all. again: done ones, too."""
    before = read_lines(day.file) if day.file.exists() else {}
    for step in steps:
        done = step.name in before and before[step.name].status in DONE
        if done and step.name not in again and not day.lacks(step):
            print(f"{step.name}: done before", flush=True)
            continue
        left = day.end - time.monotonic()
        if day.skips(step):
            line = Line(step.name, OK, figures={"installed": "nothing: no bundle was given"})
        elif left < LEAST_SECONDS:
            line = Line(step.name, NO_TIME, error=f"{max(0.0, left):.0f} s were left of --minutes")
        else:
            print(f"{step.name}: {step.says} ...", flush=True)
            line = run_step(day, step, min(day.limit(step), left))
        line = replace(line, rehearsal=day.is_rehearsal)
        with day.file.open("a") as file:
            file.write(json.dumps(asdict(line)) + "\n")
        before[step.name] = line
        print(f"{step.name}: {line.status} after {line.seconds:.1f} s{_last(line.error)}", flush=True)
    return before


def run_step(day: Day, step: Step, limit: float) -> Line:
    """The step in a process group of its own, of which nothing is left afterwards."""
    folder, mark, start = day.work / "steps", uuid.uuid4().hex, time.monotonic()
    folder.mkdir(parents=True, exist_ok=True)
    result, log = folder / f"{step.name}.json", folder / f"{step.name}.log"
    result.unlink(missing_ok=True)
    told = {"work": str(day.work), "bundle": str(day.bundle or ""), "rehearse": day.is_rehearsal, "result": str(result)}
    command = [sys.executable, "-m", "llm_local.bench.gpu_steps", step.name, json.dumps(told)]
    with log.open("w") as file:
        process = subprocess.Popen(
            command, cwd=ROOT, env=day.environment(mark), stdout=file, stderr=file, start_new_session=True
        )
    try:
        status: int | None = process.wait(limit)
    except subprocess.TimeoutExpired:
        status = None
    finally:
        end_all(process, mark)
    found = json.loads(result.read_text()) if result.exists() else {}
    problems = found.get("problems", [])
    error = "\n".join(problems) or ("" if status == 0 else log.read_text(errors="replace").strip())
    name = found.get("status") or (OK if status == 0 and not problems else FAILED)
    if status is None:
        name, error = OVER, f"not done within {limit:g} s\n{error}"
    return Line(step.name, name, time.monotonic() - start, found.get("figures", {}), error[-ERROR_CHARACTERS:])


def end_all(process: subprocess.Popen[bytes], mark: str) -> None:
    """Kills the group, and whoever of the step has made a group of its own, as launchers' ranks do."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    needle = f"{MARK}={mark}".encode()
    for path in Path("/proc").glob("[0-9]*/environ"):
        with suppress(OSError):
            if needle in path.read_bytes().split(b"\0"):
                os.kill(int(path.parent.name), signal.SIGKILL)
    process.wait()


def _last(error: str) -> str:
    lines = error.strip().splitlines()
    return f": {lines[-1][:160]}" if lines else ""


def table(lines: Iterable[Line]) -> str:
    """Step, status, seconds, and an error's last line."""
    rows = [("step", "status", "seconds", "")]
    rows += [(each.step, each.status, f"{each.seconds:.1f}", _last(each.error)[2:]) for each in lines]
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    cells = ([cell.ljust(width) for cell, width in zip(row, widths, strict=False)] + [row[3]] for row in rows)
    return "\n".join("  ".join(row).rstrip() for row in cells)


def pack(day: Day) -> None:
    """Logs and metrics of all that ran, as one file."""
    with tarfile.open(day.output / "logs.tgz", "w:gz") as archive:
        for path in sorted([*day.work.rglob("*.log"), *day.work.rglob("metrics/*.jsonl")]):
            archive.add(path, path.relative_to(day.work))


def main(arguments: list[str]) -> int:
    given = _arguments(arguments)
    try:
        if given.make_bundle is not None:
            text = given.text and given.text.absolute()
            print(make_bundle(given.make_bundle.absolute(), text, given.megabytes, given.python))
            return 0
        day = _day(given)
    except (BundleError, ValueError) as error:
        print(f"gpu_day.py: {error}", file=sys.stderr)
        return 2
    steps = [step for step in STEPS if given.only is None or step.name in given.only or day.lacks(step)]
    try:
        lines = run(day, steps, given.only or ())
    except KeyboardInterrupt:
        print("gpu_day.py: stopped; the same command goes on", file=sys.stderr)
        return 130
    ordered = [lines[name] for name in NAMES if name in lines]
    (day.output / "day.txt").write_text(f"{table(ordered)}\n")
    pack(day)
    print(f"\n{table(ordered)}\n\n{day.file}; scripts/gpu_report.py makes a page of it")
    return 0 if all(lines[step.name].status in DONE for step in steps) else 1


def _arguments(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="gpu_day.py", description=f"Steps, in this order: {', '.join(NAMES)}. What is done is not done again."
    )
    parser.add_argument("--output", type=Path, help="folder of day.jsonl and day.txt")
    parser.add_argument("--work", type=Path, help="folder of all that is large (default: OUTPUT/work)")
    parser.add_argument("--bundle", type=Path, help="what --make_bundle has made")
    parser.add_argument("--only", nargs="+", metavar="STEP", help="these steps, also where they are done")
    parser.add_argument("--minutes", type=float, default=9.5, help="for all steps together (default 9.5)")
    parser.add_argument("--limit", nargs="+", default=[], metavar="STEP=SECONDS", help="another limit of a step")
    parser.add_argument("--rehearse", action="store_true", help="on the CPU, with tiny sizes")
    parser.add_argument(
        "--make_bundle", type=Path, metavar="FOLDER", help="collect what a machine without network needs"
    )
    parser.add_argument("--text", type=Path, help="text for the bundle (default: Python's own sources)")
    parser.add_argument("--megabytes", type=float, default=18, help="of that text (default 18)")
    parser.add_argument("--python", default=PYTHON, help=f"version there, for the wheels (default {PYTHON})")
    given = parser.parse_args(arguments)
    if (given.output is None) == (given.make_bundle is None):
        parser.error("give --output FOLDER for a day, or --make_bundle FOLDER before it")
    if given.minutes <= 0 or given.megabytes <= 0:
        parser.error(f"--minutes {given.minutes:g} --megabytes {given.megabytes:g}: give numbers above 0")
    return given


def _day(given: argparse.Namespace) -> Day:
    """Raises ValueError for what cannot be, before anything is written."""
    limits = {name: float(seconds) for name, _, seconds in (text.partition("=") for text in given.limit)}
    if unknown := sorted({*limits, *(given.only or ())} - {*NAMES}):
        raise ValueError(f"there is no step {', '.join(unknown)}; choose of {', '.join(NAMES)}")
    if given.bundle is not None:
        check_bundle(given.bundle)
    output, file = given.output.absolute(), given.output / "day.jsonl"
    if output.exists() and not output.is_dir():
        raise ValueError(f"--output {given.output} is a file; give a folder")
    if file.exists():
        others = [line.step for line in read_lines(file).values() if line.rehearsal != given.rehearse]
        if others:
            kind = "a day on a GPU" if given.rehearse else "a rehearsal"
            raise ValueError(f"--output {given.output} is of {kind}; give another folder, or remove it")
    elif output.exists() and any(output.iterdir()):
        raise ValueError(f"--output {given.output} holds other files and no day.jsonl; give another folder")
    output.mkdir(parents=True, exist_ok=True)
    work = (given.work or output / "work").absolute()
    work.mkdir(parents=True, exist_ok=True)
    bundle = given.bundle.absolute() if given.bundle else None
    return Day(output, work, bundle, given.rehearse, time.monotonic() + given.minutes * 60, limits)
