"""Tries every causal language model type that transformers has on a tiny model of it, and writes docs/coverage.md.

python scripts/coverage.py [--jobs 2] [--types llama,gpt2] [--output FILE]

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

PAGE = Path(__file__).parents[1] / "docs" / "coverage.md"


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=2, help="types side by side, with one thread each (default 2)")
    parser.add_argument("--types", help="model types, comma-separated (default: all)")
    parser.add_argument("--output", type=Path, help="the page to write (default: docs/coverage.md, for all types)")
    given = parser.parse_args(arguments)
    if given.jobs < 1:
        parser.error(f"--jobs {given.jobs}: give 1 or more")
    from llm_local.coverage.report import all_types, chosen_types, page, table
    from llm_local.coverage.run import examine_all

    try:
        types = chosen_types(given.types) if given.types else all_types()
    except ValueError as error:
        parser.error(str(error))
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # the processes of the types end as well
    start = time.monotonic()
    try:
        findings = examine_all(types, given.jobs)
    except KeyboardInterrupt:
        print("coverage.py: stopped, nothing is written", file=sys.stderr)
        return 130
    output = given.output or (None if given.types else PAGE)
    if output is None:
        print(table(findings))
    else:
        output.write_text(page(findings, time.monotonic() - start))
        print(output)
    return 1 if any(finding.status == "wrong" for finding in findings) else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
