"""What a run does at this moment, stage by stage, for who watches it: pure functions of what it has written."""

from __future__ import annotations

import time
from collections.abc import Sequence
from statistics import median

from llm_local.report.charts import TRAIN, of_split
from llm_local.report.read import RunData
from llm_local.report.tables import NONE, Table, named

RECENT = 20  # records that say how fast a stage is
STALE_SECONDS = 120.0


def now_of(runs: Sequence[RunData], now: float) -> Table:
    """A row for each stage: how far it is, how far behind the first one, when it ends. now: seconds since 1970.

    Of jobs as they tell it, and of a launch by its records.
    """
    rows = [
        (named(runs, run, stage), *cells)
        for run in runs
        for stage, cells in (_jobs(run, now) or _stages(run, now)).items()
    ]
    jobs = any(run.status for run in runs)
    columns = ("", "state", "life", "step", "behind", "tokens a second", "ends", "last heard of", "log", "last error")
    kept = [n for n in range(len(columns)) if jobs or columns[n] not in ("life", "log", "last error")]
    return Table("now", "Now", tuple(columns[n] for n in kept), [tuple(row[n] for n in kept) for row in rows], (), 99)


def _jobs(run: RunData, now: float) -> dict[int, tuple[str, ...]]:
    first = run.status[0]["step"] if run.status and run.status[0]["stage"] == 0 else None
    found = {}
    for job in run.status:
        rate = _step_seconds(run, job["stage"])
        silent = now - job["time"]
        is_away = silent > STALE_SECONDS and job["state"] != "finished"
        found[job["stage"]] = (
            "away" if is_away else job["state"],
            str(job["life"]),
            f"{job['step']:,} of {job['max_steps']:,}",
            NONE if first is None else f"{first - job['step']:,}",
            f"{job['tokens_per_second']:,.0f}",
            NONE if is_away else ends(job["step"], job["max_steps"], rate, now),
            f"{ago(silent)} ago",
            f"{job['log_bytes'] / 1e6:,.1f} MB",
            job["error"],
        )
    return found


def _stages(run: RunData, now: float) -> dict[int, tuple[str, ...]]:
    most = run.flags.get("max_steps")
    steps = {stage: max((r["step"] for r in records), default=0) for stage, records in run.stages.items()}
    found = {}
    for stage, step in steps.items():
        seconds, silent = _step_seconds(run, stage), now - run.written.get(stage, now)
        is_done = isinstance(most, int) and step >= most
        is_away = silent > STALE_SECONDS + 20 * (seconds or 0.0) and not is_done
        tokens = next((r.get("tokens") for r in reversed(run.stages[stage]) if r["split"] == TRAIN), None)
        found[stage] = (
            "trained" if is_done else "silent" if is_away else "training",
            "",
            f"{step:,}" + (f" of {most:,}" if isinstance(most, int) else ""),
            f"{max(steps.values()) - step:,}",
            f"{tokens / seconds:,.0f}" if tokens and seconds else NONE,
            ends(step, most, seconds, now - silent) if isinstance(most, int) and not is_away else NONE,
            f"{ago(silent)} ago",
            "",
            "",
        )
    return found


def _step_seconds(run: RunData, stage: int) -> float | None:
    records = of_split(run.stages.get(stage, [])[-2 * RECENT :], TRAIN)[-RECENT:]
    times = [r["step_seconds"] for r in records if r.get("step_seconds")]
    return median(times) if times else None


def ends(step: int, most: int, seconds: float | None, now: float) -> str:
    """'in 5 min, at 14:05', at so many seconds a step; a dash where that is not known, or past."""
    if seconds is None or step >= most:
        return NONE
    left = (most - step) * seconds
    form = "%H:%M" if left < 20 * 3600 else "%a %d %b, %H:%M"
    return f"in {ago(left)}, at {time.strftime(form, time.localtime(now + left))}"


def ago(seconds: float) -> str:
    """'8 s', '5 min', '3.2 h', '4.1 days'."""
    if seconds < 90:
        return f"{max(0.0, seconds):.0f} s"
    if seconds < 90 * 60:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h" if seconds < 48 * 3600 else f"{seconds / 86400:.1f} days"
