"""A page of one run, or of several side by side: one HTML file that needs nothing else."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from functools import cache
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template
from markupsafe import Markup

from llm_local.files import Json, write_whole, writing
from llm_local.report.charts import charts_of, to_json, token_axes
from llm_local.report.library import UPLOT, uplot
from llm_local.report.now import now_of
from llm_local.report.read import RunData, read_runs
from llm_local.report.tables import alarms, headline, parts_of, tables_of
from llm_local.report.timeline import timeline_of

NO_CHARTS = Markup('{"charts": [], "tokens": []}')
_FOLDER = Path(__file__).parent / "page"
REPORT = "report.html"


def write_report(folders: Sequence[Path], output: Path) -> list[str]:
    """Writes the page; returns what could not be read, a line each. Raises ValueError for what is no run, NoCharts,
    and Unwritten."""
    runs = read_runs(list(folders))
    text = render(runs)
    with writing(output):
        output.parent.mkdir(parents=True, exist_ok=True)
        write_whole(output, text)
    return [fault for run in runs for fault in run.faults]


def report_problem(folders: Sequence[Path], output: Path) -> str:
    """Writes the page, as the last thing of longer work that has gone well without it; why it could not, or ''."""
    try:
        write_report(folders, output)
    except Exception as error:
        return f"warning: {output} was not written: {' '.join(str(error).split())}"
    return ""


def render(runs: Sequence[RunData], seconds: float = 0.0) -> str:
    """The page. seconds: how often it asks its server for what is new; 0 of one that stands alone. Raises NoCharts."""
    title = ", ".join(run.name for run in runs[:3]) + (", ..." if len(runs) > 3 else "")
    return framed(title, **content(runs, is_live=seconds > 0), seconds=seconds)


def framed(title: str, main: Markup, data: Markup = NO_CHARTS, seconds: float = 0.0) -> str:
    """A page that needs nothing else. data: of its charts. Raises NoCharts."""
    script, style = uplot()
    return template("page.html").render(
        title=title,
        uplot=Markup(script),  # both are known byte for byte
        uplot_style=Markup(style),
        uplot_version=UPLOT,
        style=Markup((_FOLDER / "page.css").read_text()),
        script=Markup((_FOLDER / "page.js").read_text()),
        content={"main": main, "data": data},
        seconds=seconds,
    )


def content(runs: Sequence[RunData], is_live: bool = False) -> Json:
    """What changes as a run goes on: the page's sections, and the data of its charts, as text that is safe there.

    is_live: with what the runs do now, and without their traces, which take long to read.
    """
    charts = charts_of(runs)
    values = {"charts": to_json(charts), "tokens": token_axes(runs)}
    main = template("main.html").render(
        runs=runs,
        charts=charts,
        now=now_of(runs, time.time()) if is_live else None,
        tables=tables_of(runs),
        headlines=[headline(run) for run in runs],
        cuts=[parts_of(run) for run in runs],
        timelines=[] if is_live else [timeline_of(run) for run in runs],
        alarms=[alarms(run) for run in runs],
    )
    return {"main": Markup(main), "data": Markup(json.dumps(values, allow_nan=False).replace("<", "\\u003c"))}


@cache
def template(name: str) -> Template:
    loader = FileSystemLoader(_FOLDER)
    options = {"trim_blocks": True, "lstrip_blocks": True, "undefined": StrictUndefined}
    return Environment(loader=loader, autoescape=True, **options).get_template(name)
