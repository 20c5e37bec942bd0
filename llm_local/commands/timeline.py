"""What each stage of a traced run did when: bubble and link wait in numbers, and a picture beside the simulated one.

llm-local timeline runs/quickstart [--steps 5-8] [--output timeline.svg]
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

os.environ["DS_ACCELERATOR"] = "cpu"  # nothing here runs on a GPU

from llm_local.files import Unwritten, ends_with_a_line, writing
from llm_local.program import command_parser, program
from llm_local.timeline.chrome_trace import write_chrome_trace
from llm_local.timeline.measured import measured, read_trace, stage_times, table
from llm_local.timeline.picture import Panel, draw_timeline

NAME = program(__file__)

DRAWN_STEPS, DRAWN_BARS = 3, 80
FORMATS = (".png", ".svg", ".pdf")


def show(run: Path, steps: str | None, output: Path) -> None:
    """Prints the table and draws the steps. Raises ValueError for a trace or steps that will not do."""
    if output.suffix not in FORMATS:
        raise ValueError(f"--output {output}: end the name in one of {', '.join(FORMATS)}")
    trace = read_trace(run)
    from llm_local.timeline.replay import simulated  # only now, as it imports DeepSpeed

    counted = trace.select(steps) if steps else trace.steps[1:] or trace.steps  # the first step fills the pipe
    bars = len(measured(trace, counted[-1:])[0].bars)
    drawn = counted if steps else counted[-min(DRAWN_STEPS, max(1, DRAWN_BARS // bars)) :]
    real, ideal = (stage_times(rows(trace, counted)) for rows in (measured, simulated))
    header, error = trace.ranks[0].header, max(rank.error_seconds for rank in trace.ranks)
    named = f"{header.method}, {header.num_stages} stages x {header.num_replicas} replicas"
    print(f"{run}: {named}, {_text(counted)}; clocks agree to {1000 * error:.3f} ms")
    print(table(real, ideal))
    if not (trace.folder / "trace.json").exists():  # of a run that did not come to its end
        write_chrome_trace(trace)
    panels = [Panel("measured", measured(trace, drawn)), Panel("simulated, mean durations", simulated(trace, drawn))]
    with writing(output):
        draw_timeline(panels, f"{run.name}: {named}, {_text(drawn)}", output)
    print(f"picture: {output}; for ui.perfetto.dev: {trace.folder / 'trace.json'}")


def _text(steps: list[int]) -> str:
    return f"steps {steps[0]}-{steps[-1]}" if len(steps) > 1 else f"step {steps[0]}"


@ends_with_a_line(Unwritten)
def main(arguments: list[str]) -> int:
    parser = command_parser(NAME, __doc__)
    parser.add_argument("run", type=Path, help="output folder of a run with --trace true")
    parser.add_argument("--steps", help=f"as 5-8; default: count all but the first, draw the last 1 to {DRAWN_STEPS}")
    parser.add_argument("--output", type=Path, help="picture to write, .png, .svg or .pdf; default: trace/timeline.png")
    given = parser.parse_args(arguments)
    try:
        show(given.run, given.steps, given.output or given.run / "trace" / "timeline.png")
    except (ValueError, OSError) as error:
        print(f"{NAME}: {error}", file=sys.stderr)
        return 2
    return 0
