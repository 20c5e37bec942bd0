"""Tries every model type that transformers has for a task on a tiny model of it, and writes the page:
docs/coverage.md, of another task docs/coverage_masked_lm.md and the like.

python scripts/coverage.py [--task causal-lm] [--jobs 2] [--types llama,gpt2] [--output FILE]

With --types the table is printed and written only where --output says. It takes ten minutes on two cores.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import time
from pathlib import Path

os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # tiny models are made, not fetched
os.environ["OMP_NUM_THREADS"] = "1"

DOCS = Path(__file__).parents[1] / "docs"


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", default="causal-lm", help="what the models are trained for (default causal-lm)")
    parser.add_argument("--jobs", type=int, default=2, help="types side by side, with one thread each (default 2)")
    parser.add_argument("--types", help="model types, comma-separated (default: all)")
    parser.add_argument(
        "--output", type=Path, help="the page to write (default: the task's page in docs, for all types)"
    )
    given = parser.parse_args(arguments)
    if given.jobs < 1:
        parser.error(f"--jobs {given.jobs}: give 1 or more")
    from llm_local.coverage.report import all_types, chosen_types, page, page_name, table
    from llm_local.coverage.run import examine_all
    from llm_local.registry import TASKS

    if given.task not in TASKS:
        parser.error(f"--task {given.task}: there are {', '.join(TASKS)}")
    try:
        types = chosen_types(given.types, given.task) if given.types else all_types(given.task)
    except ValueError as error:
        parser.error(str(error))
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # the processes of the types end as well
    start = time.monotonic()
    try:
        findings = examine_all(types, given.jobs, given.task)
    except KeyboardInterrupt:
        print("coverage.py: stopped, nothing is written", file=sys.stderr)
        return 130
    output = given.output or (None if given.types else DOCS / page_name(given.task))
    if output is None:
        print(table(findings))
    else:
        output.write_text(page(findings, time.monotonic() - start, given.task))
        print(output)
    return 1 if any(finding.status == "wrong" for finding in findings) else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
