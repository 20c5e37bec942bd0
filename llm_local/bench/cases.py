"""Starts the ranks of a benchmark, several systems in turns, and makes tables of what they measured.

Machines are shared and their speed drifts, so that systems are compared by the runs of one round, A B A B, and a figure
is the median of the rounds' ratios, with the smallest and the largest.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

import torch

from llm_local.bench.figures import page_of
from llm_local.config import Config
from llm_local.data.tokenizer import builtin_tokenizer_dir
from llm_local.device import describe_device

ROOT = Path(__file__).parents[2]
PACKAGES = ("torch", "deepspeed", "transformers")
METHODS = {"local": "chunked", "deepspeed": "backprop"}  # --method of the systems that pretrain.py starts
SECONDS = 900  # longest time of one case


class BenchmarkError(RuntimeError):
    """A case that did not end well; the message has its last words."""


@dataclass(frozen=True)
class Case:
    """One start of some ranks. name: of the system, or whatever is compared."""

    name: str
    ranks: int
    measure: str
    system: str
    flags: dict[str, Any]
    steps: int = 10
    rounds: int = 1


@dataclass(frozen=True)
class Spread:
    """A figure over the rounds."""

    median: float
    low: float
    high: float

    @staticmethod
    def of(values: Iterable[float]) -> Spread:
        found = sorted(values)
        return Spread(median(found), found[0], found[-1])

    def text(self, digits: int = 2) -> str:
        return f"{self.median:.{digits}f} ({self.low:.{digits}f}–{self.high:.{digits}f})"


def torchrun(ranks: int) -> list[str]:
    here = ["--standalone", "--local_addr=127.0.0.1"]  # the host's own name may lead nowhere
    return [sys.executable, "-m", "torch.distributed.run", *here, f"--nproc_per_node={ranks}"]


def environment() -> dict[str, str]:
    """Variables of what a benchmark starts: without a device a rank has a core."""
    found = {"TORCH_CPP_LOG_LEVEL": "ERROR", "PYTHONPATH": str(ROOT), **os.environ}
    return found if torch.accelerator.is_available() else {"OMP_NUM_THREADS": "1", **found, "DS_ACCELERATOR": "cpu"}


def run_case(case: Case, launchers: Sequence[Sequence[str]] = ()) -> list[dict[str, Any]]:
    """What each rank measured, in order. launchers: one a host; by default torchrun on this one. Raises
    BenchmarkError."""
    with tempfile.TemporaryDirectory(prefix="llm_local-bench-") as folder:
        flags = {"output_dir": f"{folder}/run", "num_stages": case.ranks, **case.flags}
        told = {"measure": case.measure, "system": case.system, "steps": case.steps, "rounds": case.rounds}
        worker = ["-m", "llm_local.bench.worker", json.dumps({**told, "flags": flags, "results": folder})]
        commands = [[*launcher, *worker] for launcher in launchers or [torchrun(case.ranks)]]
        logs = [Path(folder, f"host-{number}.log") for number in range(len(commands))]
        _run_all(case.name, commands, logs)
        results = [Path(folder, f"rank-{rank}.json") for rank in range(case.ranks)]
        if not all(result.exists() for result in results):
            raise BenchmarkError(f"{case.name} failed:\n" + "\n".join(_last_words(log.read_text()) for log in logs))
        return [json.loads(result.read_text()) for result in results]


def _run_all(name: str, commands: list[list[str]], logs: list[Path]) -> None:
    variables = environment()
    end, processes = time.monotonic() + SECONDS, []
    try:
        for command, log in zip(commands, logs, strict=True):
            with log.open("w") as file:
                processes.append(subprocess.Popen(command, env=variables, cwd=ROOT, stdout=file, stderr=file))
        for process in processes:
            process.wait(end - time.monotonic())
    except subprocess.TimeoutExpired as error:
        raise BenchmarkError(f"{name}: not done after {SECONDS} s") from error
    finally:
        for process in processes:
            if process.poll() is None:
                process.terminate()


def _last_words(log: str) -> str:
    """What the ranks said, without the launcher's account of it."""
    lines = [line for line in log.splitlines() if "torch/distributed" not in line]
    ends = [n for n, line in enumerate(lines) if "_run_module_as_main" in line]
    return "\n".join(lines[: ends[-1] - 1 if len(ends) > 1 else None][-30:])


def bench_model(**overrides: Any) -> dict[str, Any]:
    """Flags of the model that is measured: Llama-shaped, its head 14 % of half of it."""
    folder = builtin_tokenizer_dir(Config().cache_dir, vocab_size=2048)
    changes = ",".join(f"{name}={value}" for name, value in overrides.items())
    flags = {"config_name": str(ROOT / "configs/bench/model.json"), "tokenizer_name": str(folder)}
    return {**flags, "config_overrides": changes} if changes else flags


def in_turns(
    cases: Sequence[Case], repeats: int, launchers: Sequence[Sequence[str]] = ()
) -> dict[str, list[list[dict[str, Any]]]]:
    """By the case's name what the ranks measured in each of the rounds; a round runs every case once."""
    found: dict[str, list[list[dict[str, Any]]]] = {case.name: [] for case in cases}
    for number in range(repeats):
        for case in cases:
            print(f"round {number + 1} of {repeats}: {case.name}", file=sys.stderr, flush=True)
            found[case.name].append(run_case(case, launchers))
    return found


def ratios(ours: Sequence[float], theirs: Sequence[float]) -> Spread:
    """Ours over theirs, round by round."""
    return Spread.of(a / b for a, b in zip(ours, theirs, strict=True))


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])


def machine() -> str:
    """What the figures were measured on, without names."""
    versions = ", ".join(f"{name} {version(name)}" for name in PACKAGES)
    return f"{describe_device()}, Python {platform.python_version()}, {versions}"


def arguments_of(description: str | None, repeats: int, steps: int) -> argparse.ArgumentParser:
    """The flags that every benchmark has."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=positive, default=repeats, help=f"rounds (default {repeats})")
    parser.add_argument("--steps", type=positive, default=steps, help=f"measured steps of a run (default {steps})")
    parser.add_argument("--output", type=Path, default=ROOT / "docs/bench", help="folder of the result")
    return parser


def positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text}: give 1 or more")
    return int(text)


def write(output: Path, name: str, text: str, data: dict[str, Any]) -> None:
    """OUTPUT/name.md and name.html for people, name.json for programs."""
    output.mkdir(parents=True, exist_ok=True)
    (output / f"{name}.json").write_text(json.dumps({"machine": machine(), **data}, indent=1) + "\n")
    made = f"Made by `python scripts/bench_{name}.py` on {machine()}."
    (output / f"{name}.md").write_text(f"# {name.replace('_', ' ').capitalize()}\n\n{text.strip()}\n\n{made}\n")
    (output / f"{name}.html").write_text(page_of(output / f"{name}.md"))
    print(text)
    print(f"\n{output / name}.md, .json, .html", file=sys.stderr)
