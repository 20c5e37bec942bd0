"""Shows what the jobs of a run do, as far as is known here: llm-local status RUN.yaml [--json]

RUN is a configuration file, or the output folder of the run. Of other machines' jobs it knows what neighbours told.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

from llm_local.config import Config, ConfigError, refused
from llm_local.job_status import read_status
from llm_local.program import command_parser, program

NAME = program(__file__)
COLUMNS = ("stage", "state", "life", "step", "behind", "tokens/s", "log", "seen", "host", "last error")


def main(arguments: list[str]) -> int:
    parser = command_parser(NAME, __doc__)
    parser.add_argument("run", type=Path, help="configuration file, or output folder")
    parser.add_argument("--json", action="store_true", help="the same as JSON, a list of stages")
    given = parser.parse_args(arguments)
    try:
        folder = given.run if given.run.is_dir() else Path(Config.load(given.run).train.output_dir)
        stages = read_status(folder)
        if not stages:
            raise ConfigError([f"{folder} has no stage-*/status.json; name the output_dir of jobs of this machine"])
    except ConfigError as error:
        return refused(NAME, error)
    if given.json:
        print(json.dumps(stages, indent=1))
        return 0
    rows = [COLUMNS, *(_row(stages, each, time.time()) for each in stages)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(COLUMNS))]
    for row in rows:
        print("  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip())
    return 0


def _row(stages: list[dict[str, Any]], stage: dict[str, Any], now: float) -> tuple[str, ...]:
    first = stages[0]["step"] if stages[0]["stage"] == 0 else None
    return (
        str(stage["stage"]),
        stage["state"],
        str(stage["life"]),
        f"{stage['step']}/{stage['max_steps']}"
        + (f", {skipped} skipped" if (skipped := stage["skipped_steps"]) else ""),
        "" if first is None else str(first - stage["step"]),
        f"{stage['tokens_per_second']:,.0f}",
        f"{stage['log_bytes'] / 1e6:,.1f} MB",
        f"{max(0.0, now - stage['time']):.0f} s ago",
        str(stage["host"]),
        stage["error"],
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
