"""Trains the quickstart model, a small Llama, in stages on this machine: llm-local quickstart [--name value ...]

Reads the sources of Python's own library; the results are in runs/quickstart, or in --output_dir. All flags are those
of llm-local pretrain; each stage is a process, and --nproc_per_node starts more of them, for replicas of the stages.
"""

from __future__ import annotations

import argparse
import os
import sys
from typing import Any

import yaml

from llm_local.commands.configs import CONFIGS
from llm_local.config import ConfigError, Parser, parse, refused
from llm_local.problems import static_problems
from llm_local.program import program

NAME = program(__file__)
RUN = CONFIGS / "quickstart.yaml"


def shipped(values: dict[str, Any]) -> list[str]:
    """Flags for the values that name a file of configs/: where it lies in the package."""
    found = {name: CONFIGS.parent / str(value) for name, value in values.items() if str(value).startswith("configs/")}
    return [text for name, path in found.items() for text in (f"--{name}", str(path))]


def command(arguments: list[str]) -> list[str]:
    """What starts the ranks: torch's launcher, which is there wherever torch is, and finds a free port.

    Raises ConfigError for flags that no run takes, before any process starts.
    """
    parser = Parser(
        prog=NAME, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--nproc_per_node", type=int, help="processes to start (the number of stages)")
    given, rest = parser.parse_known_args(arguments)
    flags = [str(RUN), *shipped(yaml.safe_load(RUN.read_text())), *rest]
    config = parse(flags)
    if config.train.output_dir == parse([str(RUN)]).train.output_dir and not config.train.resume_from_checkpoint:
        flags.append("--overwrite_output_dir")  # this folder is the quickstart's own
    ranks = config.local.num_stages if given.nproc_per_node is None else given.nproc_per_node
    if problems := static_problems(config, ranks, fp16_supported=True, bf16_supported=True):
        raise ConfigError(problems)
    launcher = ["torch.distributed.run", "--standalone", "--local_addr", "127.0.0.1", "--nproc_per_node", str(ranks)]
    return [sys.executable, "-m", *launcher, "-m", "llm_local.cli", "pretrain", *flags]


def main(arguments: list[str]) -> int:
    try:
        started = command(arguments)
    except ConfigError as error:
        return refused(NAME, error)
    ranks = int(started[started.index("--nproc_per_node") + 1])
    threads = max(1, len(os.sched_getaffinity(0)) // ranks)
    # this process becomes the launcher, which a signal then reaches as it would one that was started by hand
    os.execve(sys.executable, started, {"OMP_NUM_THREADS": str(threads)} | os.environ)
