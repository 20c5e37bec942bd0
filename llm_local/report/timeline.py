"""The last steps of a traced run as bars, for a page."""

from __future__ import annotations

from dataclasses import dataclass

from llm_local.report.read import RunData
from llm_local.timeline.measured import Row, StageTime, measured, read_trace, stage_times
from llm_local.trace import FOLDER

MOST_BYTES = 30 * 10**6  # a longer trace takes too long to read
MOST_BARS = 3000
STEPS = 6


@dataclass(frozen=True)
class Stripe:
    """kind: as timeline/measured.py has it; left and width in percent of the whole. about: in words."""

    kind: str
    left: float
    width: float
    about: str


@dataclass(frozen=True)
class Timeline:
    """Rows by name. times: of all steps but the first. said: what there is instead."""

    rows: list[tuple[str, list[Stripe]]]
    times: list[StageTime]
    title: str = ""
    said: str = ""


def timeline_of(run: RunData) -> Timeline | None:
    """None of a run without a trace."""
    paths = list((run.folder / FOLDER).glob("stage-*.jsonl"))
    if not paths:
        return None
    if (size := sum(path.stat().st_size for path in paths)) > MOST_BYTES:
        return Timeline([], [], said=f"the trace has {size / 1e6:,.0f} MB; llm-local timeline draws it")
    try:
        trace = read_trace(run.folder)
    except ValueError as error:
        return Timeline([], [], said=str(error))
    times = stage_times(measured(trace, trace.steps[1:] or trace.steps))
    for count in range(STEPS, 0, -1):
        steps = trace.steps[-count:]
        rows = measured(trace, steps)
        if sum(len(row.bars) for row in rows) <= MOST_BARS:
            named = f"steps {steps[0]:,} to {steps[-1]:,}" if count > 1 else f"step {steps[0]:,}"
            return Timeline(_drawn(rows), times, named)
    return Timeline([], times, said="a step has too many instructions to draw here; llm-local timeline draws them")


def _drawn(rows: list[Row]) -> list[tuple[str, list[Stripe]]]:
    start = min(span[0] for row in rows for span in row.steps.values())
    whole = max(span[1] for row in rows for span in row.steps.values()) - start
    several = len({row.replica for row in rows}) > 1
    drawn = []
    for row in rows:
        stripes = [
            Stripe(
                bar.kind.replace(" ", "-"),
                round(100 * (bar.start - start) / whole, 3),
                round(100 * (bar.end - bar.start) / whole, 3),
                f"{bar.kind}, step {bar.step}, {1e3 * (bar.end - bar.start):.1f} ms",
            )
            for bar in row.bars
            if start <= bar.start and bar.end - start <= whole
        ]
        drawn.append((f"stage {row.stage}" + (f", replica {row.replica}" if several else ""), stripes))
    return drawn
