"""Starts whole runs as a person does, through a launcher or rank by rank, and watches their processes."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
from conftest import records
from ranks import context, free_port

ROOT = Path(__file__).parent.parent
BIN = Path(sys.executable).parent
SCRIPT = str(ROOT / "scripts" / "pretrain.py")
MARK = "LLM_LOCAL_TEST_RUN"
START_SECONDS = 120.0  # for imports and the first step on a busy machine


def deepspeed(num_ranks: int) -> list[str]:
    return [str(BIN / "deepspeed"), "--num_gpus", str(num_ranks), "--master_port", str(free_port())]


def torchrun(num_ranks: int) -> list[str]:
    return [str(BIN / "torchrun"), "--nproc_per_node", str(num_ranks), "--master_port", str(free_port())]


def accelerate(config: str) -> list[str]:
    port = ["--main_process_port", str(free_port())]
    return [str(BIN / "accelerate"), "launch", "--config_file", str(ROOT / "configs/accelerate" / config), *port]


def mpirun(num_ranks: int) -> list[str]:
    """Open MPI's; skips the test where there is none."""
    if not shutil.which("mpirun"):
        pytest.skip("mpirun is not installed (Debian: openmpi-bin)")
    root = ["--allow-run-as-root"] if os.geteuid() == 0 else []
    port = ["-x", f"MASTER_PORT={free_port()}"]
    return ["mpirun", "-n", str(num_ranks), "--oversubscribe", *root, *port, sys.executable]


def srun(num_tasks: int) -> list[str]:
    """Skips the test where no Slurm answers."""
    if not shutil.which("srun") or subprocess.run(["srun", "--immediate=10", "true"], capture_output=True).returncode:
        pytest.skip("no Slurm that starts tasks here (Debian: slurm-wlm)")
    return ["srun", "-n", str(num_tasks), "--overcommit", sys.executable]


@dataclass
class Job:
    """A launcher and the ranks below it. Ranks are found by a mark in their environment, orphans included."""

    process: subprocess.Popen[bytes]
    mark: str
    log: Path

    @property
    def text(self) -> str:
        return self.log.read_text(errors="replace")

    def processes(self) -> list[psutil.Process]:
        """Every living process of the job."""
        return [p for p in psutil.process_iter() if _environ(p).get(MARK) == self.mark]

    def ranks(self) -> dict[int, psutil.Process]:
        """The living ranks."""
        found = {}
        for process in self.processes():
            try:
                if SCRIPT in process.cmdline() and "RANK" in _environ(process):
                    found[int(_environ(process)["RANK"])] = process
            except psutil.Error:
                continue
        return {rank: p for rank, p in found.items() if is_alive(p)}

    def wait(self, seconds: float) -> int:
        """The launcher's exit code."""
        return self.process.wait(seconds)


def _environ(process: psutil.Process) -> dict[str, str]:
    try:
        return process.environ()
    except psutil.Error:
        return {}


def is_alive(process: psutil.Process) -> bool:
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


@contextmanager
def job(launcher: list[str], flags: list[str], folder: Path, name: str = "log", **more: str) -> Iterator[Job]:
    """Starts a run, with `more` in its environment; when the block ends, so does everything that it started."""
    log, mark = folder / f"{name}.txt", uuid.uuid4().hex
    environ = {key: value for key, value in os.environ.items() if key != "RANK"}
    environ |= {MARK: mark, "OMP_NUM_THREADS": "1", **more}
    with log.open("wb") as out:
        process = subprocess.Popen(
            [*launcher, SCRIPT, *flags], stdout=out, stderr=out, cwd=ROOT, env=environ, start_new_session=True
        )
    started = Job(process, mark, log)
    try:
        yield started
    finally:
        for left in started.processes():
            left.kill()
        process.kill()
        process.wait()


class Rank:
    """A rank that no launcher looks after: a process of its own, in a folder of its own, with RANK and the rest, and
    `more`, in its environment."""

    def __init__(
        self, rank: int, world_size: int, port: int, flags: list[str], log: Path, folder: Path = ROOT, **more: str
    ):
        environ = {
            "RANK": str(rank),
            "WORLD_SIZE": str(world_size),
            "LOCAL_RANK": str(rank),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "OMP_NUM_THREADS": "1",
            **more,
        }
        self.log = log
        self.process = context().Process(target=_main, args=(environ, flags, str(log), folder), daemon=True)
        self.process.start()
        self.pid: int = self.process.pid

    def send(self, number: signal.Signals) -> None:
        os.kill(self.pid, number)

    def wait(self, seconds: float) -> int | None:
        """The exit code; None if the process has not ended by then."""
        self.process.join(seconds)
        return self.process.exitcode

    @property
    def text(self) -> str:
        return self.log.read_text(errors="replace")


def _main(environ: dict[str, str], flags: list[str], log: str, folder: Path) -> None:
    os.environ.update(environ)
    os.chdir(folder)
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    import torch

    from llm_local.train import main

    torch.set_num_threads(1)  # the variable came after the import

    sys.exit(main(flags))


@contextmanager
def by_hand(num_ranks: int, flags: list[str], folder: Path, port: int | None = None) -> Iterator[list[Rank]]:
    """Starts the ranks of a run one by one; when the block ends, they do."""
    port = port or free_port()
    with ending([Rank(n, num_ranks, port, flags, folder / f"rank-{n}.txt") for n in range(num_ranks)]) as ranks:
        yield ranks


@contextmanager
def ending(ranks: list[Rank]) -> Iterator[list[Rank]]:
    """When the block ends, the ranks do."""
    try:
        yield ranks
    finally:
        for rank in ranks:
            rank.process.kill()
            rank.process.join()


def until(condition: Callable[[], bool], seconds: float, what: Callable[[], str]) -> None:
    """Returns once the condition holds; fails with what() if it does not in time."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"not within {seconds} s: {what()}"
        time.sleep(0.1)


def until_step(step: int, output: Path, num_stages: int, text: Callable[[], str]) -> None:
    """Returns once every stage has logged the step."""

    def reached() -> bool:
        files = [output / "metrics" / f"stage-{k:02d}.jsonl" for k in range(num_stages)]
        return all(file.exists() and len(file.read_text().splitlines()) > step for file in files)

    until(reached, START_SECONDS, lambda: f"step {step}; the log says:\n{text()}")


def losses(output: Path, num_stages: int) -> list[list[float]]:
    """The training losses of each stage, by step."""
    return [[record["loss"] for record in records(output, k)] for k in range(num_stages)]


def runs_with_transformers_alone(command: str, *arguments: str) -> None:
    """Runs a command of llm-local in a fresh interpreter, which must not have imported what trains."""
    code = (
        f"import sys; from llm_local.commands import {command}\n"
        f"assert {command}.main({[*arguments]!r}) == 0\n"
        "assert not {'deepspeed', 'datasets', 'llm_local.train'} & {*sys.modules}\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert result.returncode == 0, result.stderr
