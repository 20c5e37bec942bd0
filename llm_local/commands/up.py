"""Trains a run's stages as jobs of their own on this machine: llm-local up CONFIG.yaml --num_stages 3 [--name ...]

Each stage is a launch under torchrun's agent, which starts its ranks again when one dies; a launcher that dies is
started again, too. The other stages go on meanwhile. All flags are those of llm-local pretrain. At the end the stages'
parts become one model, in OUTPUT/export.
"""

from __future__ import annotations

import argparse
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from llm_local.ancestors import on_death_of_parent
from llm_local.config import Config, ConfigError, Parser, parse, refused
from llm_local.files import Unwritten, ends_with_a_line, writing
from llm_local.job_status import read_status
from llm_local.jobs.key import key_problems, make_key
from llm_local.problems import static_problems
from llm_local.program import program
from llm_local.replicas import replicas_of
from llm_local.start import REFUSED_FILE

NAME = program(__file__)
RESTARTS = 100
LOOK_SECONDS = 0.2
NEWS_SECONDS = 10.0
STOP_SECONDS = 60.0


@dataclass
class Job:
    """The launcher of one stage. starts: how many times it was started."""

    stage: int
    command: list[str]
    process: subprocess.Popen[str]
    starts: int = 1
    is_done: bool = False


@dataclass
class Plan:
    """What is to be started: the commands by stage."""

    config: Config
    commands: list[list[str]]
    environment: dict[str, str] = field(default_factory=dict)


def planned(arguments: list[str]) -> Plan:
    """Raises ConfigError for flags that no run takes, before any process starts; makes the key if none is given."""
    parser = Parser(
        prog=NAME, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument(
        "--nproc_per_node", type=int, default=1, help="ranks of each stage, its replicas (1, or --stage_replicas)"
    )
    parser.add_argument("--max_restarts", type=int, default=RESTARTS, help=f"of a stage ({RESTARTS})")
    given, flags = parser.parse_known_args(arguments)
    config = parse(flags)
    stages = config.local.num_stages
    replicas = replicas_of(config, given.nproc_per_node * max(1, stages))
    folder = Path(config.train.output_dir)
    key = Path(config.local.run_key_file or folder / "run.key")
    ports = _free_ports(replicas[1:])
    commands, problems = [], []
    for stage in range(stages):
        own = ["--stage", str(stage), "--run_key_file", str(key)]
        own += ["--receive_on", f"127.0.0.1:{ports[stage - 1]}"] if stage else []
        own += ["--send_to", f"127.0.0.1:{ports[stage]}"] if stage < stages - 1 else []
        if config.train.resume_from_checkpoint is None:
            own += ["--resume_from_checkpoint", "auto"]
        problems += static_problems(parse([*flags, *own]), replicas[stage], fp16_supported=True, bf16_supported=True)
        launcher = ["--standalone", "--local_addr", "127.0.0.1", "--nproc_per_node", str(replicas[stage])]
        launcher += ["--max_restarts", str(given.max_restarts)]
        commands.append(
            [sys.executable, "-m", "torch.distributed.run", *launcher, "-m", "llm_local.cli", "pretrain", *flags, *own]
        )
    if problems:
        raise ConfigError(list(dict.fromkeys(problems)))
    with writing(key):
        key.parent.mkdir(parents=True, exist_ok=True)
        if config.local.run_key_file is None and not key.exists():
            make_key(key)
    if problems := key_problems(key):
        raise ConfigError(problems)
    threads = max(1, len(os.sched_getaffinity(0)) // sum(replicas))
    return Plan(config, commands, {"OMP_NUM_THREADS": str(threads)} | os.environ)


def _free_ports(counts: Sequence[int]) -> list[int]:
    """The first of as many ports as there are replicas, for each stage that receives."""
    found: list[int] = []
    while len(found) < len(counts):
        with ExitStack() as taken:
            first = taken.enter_context(socket.create_server(("127.0.0.1", 0))).getsockname()[1]
            try:
                for port in range(first + 1, first + max(counts)):
                    taken.enter_context(socket.create_server(("127.0.0.1", port)))
            except (OSError, OverflowError):
                continue
        if all(abs(first - other) >= max(counts) for other in found):
            found.append(first)
    return found


@ends_with_a_line(Unwritten)
def main(arguments: list[str]) -> int:
    try:
        plan = planned(arguments)
    except ConfigError as error:
        return refused(NAME, error)
    stopped: list[int] = []
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, lambda number, _: stopped.append(number))
    refusal = Path(plan.config.train.output_dir) / ".refused"
    refusal.unlink(missing_ok=True)
    plan.environment[REFUSED_FILE] = str(refusal.absolute())
    jobs = [_start(stage, command, plan.environment) for stage, command in enumerate(plan.commands)]
    status = _look_after(jobs, plan, refusal, stopped)
    refusal.unlink(missing_ok=True)
    return status if status else _assemble(plan.config)


def _look_after(jobs: list[Job], plan: Plan, refusal: Path, stopped: list[int]) -> int:
    news = _News(Path(plan.config.train.output_dir))
    while not all(job.is_done for job in jobs):
        time.sleep(LOOK_SECONDS)
        if stopped or refusal.exists():
            number = stopped[0] if stopped else signal.SIGTERM
            _stop(jobs, number)
            return 128 + number if stopped else 2
        for job in jobs:
            code = job.process.poll()
            if code is None or job.is_done:
                continue
            if code == 0:
                job.is_done = True
            elif job.starts > RESTARTS:
                _stop(jobs, signal.SIGTERM)
                print(f"{NAME}: stage {job.stage} has ended {job.starts} times; nothing more is tried", file=sys.stderr)
                return 1
            else:
                news.say(f"the launcher of stage {job.stage} is gone (status {code}) and starts again")
                again = _without_overwrite(job.command)
                jobs[job.stage] = _start(job.stage, again, plan.environment, job.starts + 1)
        news.look()
    return 0


def _without_overwrite(command: list[str]) -> list[str]:
    """The command of a later life, which replaces nothing."""
    return [*command, "--overwrite_output_dir", "false", "--resume_from_checkpoint", "auto"]


def _start(stage: int, command: list[str], environment: dict[str, str], starts: int = 1) -> Job:
    process = subprocess.Popen(
        command,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,  # Ctrl-C reaches this process alone, which passes it on
        preexec_fn=_end_with_parent,
    )
    assert process.stdout is not None
    threading.Thread(target=_repeat, args=(stage, process.stdout), daemon=True).start()
    return Job(stage, command, process, starts)


def _end_with_parent() -> None:
    on_death_of_parent(signal.SIGTERM)


def _repeat(stage: int, lines: IO[str]) -> None:
    for line in lines:
        if line.strip():
            print(f"stage {stage} | {line}", end="", file=sys.stderr, flush=True)


def _stop(jobs: list[Job], number: int) -> None:
    """Passes the signal on; who does not end by it is killed."""
    for job in jobs:
        if job.process.poll() is None:
            job.process.send_signal(signal.SIGINT if number == signal.SIGINT else signal.SIGTERM)
    end = time.monotonic() + STOP_SECONDS
    for job in jobs:
        try:
            job.process.wait(max(0.0, end - time.monotonic()))
        except subprocess.TimeoutExpired:
            os.killpg(job.process.pid, signal.SIGKILL)


class _News:
    """Which stage is in which life and how far behind the first one, when a life begins and every so often."""

    def __init__(self, folder: Path):
        self._folder = folder
        self._lives: dict[int, int] = {}
        self._last = time.monotonic()

    def say(self, text: str) -> None:
        print(f"llm_local: {text}", file=sys.stderr, flush=True)

    def look(self) -> None:
        stages = read_status(self._folder)
        lives = {each["stage"]: each["life"] for each in stages}
        again = any(life > self._lives.get(stage, life) for stage, life in lives.items())
        if again or time.monotonic() - self._last > NEWS_SECONDS:
            self._last = time.monotonic()
            if stages:
                self.say("; ".join(_line(each, stages[0]["step"]) for each in stages))
        self._lives = lives


def _line(stage: dict[str, Any], first: int) -> str:
    """'stage 1 at step 90, 10 behind, life 2'."""
    behind = first - stage["step"]
    text = f"stage {stage['stage']} at step {stage['step']}" + (f", {behind} behind" if behind > 0 else "")
    return (
        text
        + (f", life {stage['life']}" if stage["life"] > 1 else "")
        + (f" ({stage['error']})" if stage["error"] else "")
    )


def _assemble(config: Config) -> int:
    from llm_local.commands.assemble import main as assemble
    from llm_local.commands.report import main as report

    folder = Path(config.train.output_dir)
    parts = [str(folder / f"stage-{stage:02d}") for stage in range(config.local.num_stages)]
    status = assemble([*parts, str(folder / "export")])
    return status or report([str(folder)])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
