"""Makes a page of one run, or of several side by side, that any browser shows: RUN/report.html.

llm-local report runs/quickstart [runs/other ...] [--output report.html]

A run is the output folder of a launch, of all jobs of a run, or of one job; it may be going on. Each run
writes its page at its end by itself.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

os.environ["DS_ACCELERATOR"] = "cpu"  # nothing here runs on a GPU

from llm_local.files import Unwritten, ends_with_a_line
from llm_local.program import program
from llm_local.report.library import NoCharts
from llm_local.report.page import REPORT, write_report

NAME = program(__file__)


@ends_with_a_line(Unwritten, NoCharts)
def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog=NAME, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="+", type=Path, help="output folders of runs")
    parser.add_argument("--output", type=Path, help=f"page to write; default: {REPORT} of the first run")
    given = parser.parse_args(arguments)
    output = given.output or given.runs[0] / REPORT
    try:
        faults = write_report(given.runs, output)
    except (ValueError, OSError) as error:
        print(f"{NAME}: {error}", file=sys.stderr)
        return 2
    for fault in faults:
        print(f"{NAME}: {fault}", file=sys.stderr)
    print(f"report: {output}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
