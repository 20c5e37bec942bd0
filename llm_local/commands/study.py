"""Trains a grid of settings and seeds on the same tokens, and compares them: OUTPUT/study.md, .json and .png.

llm-local study configs/studies/cpu.yaml [--jobs 2] [--output_dir DIR]

What is finished is not trained again, so the same command goes on with a study that was stopped; on another machine,
too, if OUTPUT/results.json is taken there.
"""

from __future__ import annotations

import json
import os
import platform
import signal
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llm_local.files import Unwritten, ends_with_a_line, writing
from llm_local.program import command_parser, program
from llm_local.screen import pyplot_without_screen

if TYPE_CHECKING:
    from llm_local.study.points import Study
    from llm_local.study.runs import StudyRun

NAME = program(__file__)

os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
# A run that ends at once leaves its semaphores to the tracker, which clears them away and need not say so
os.environ.setdefault("PYTHONWARNINGS", "ignore:resource_tracker")
# The fork server must not start CUDA: its children could not use it
os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")

PACKAGES = ("llm_local", "torch", "deepspeed", "transformers", "datasets")
AXES = {"flops": "FLOPs of all blocks", "sequential_flops": "sequential FLOPs"}
# of methods, apart for colour-blind eyes, too (Okabe and Ito)
COLORS = ("black", "#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")


def draw(comparison: dict[str, Any], output: Path) -> None:
    """The loss of the last block that each method reaches with so many FLOPs, by the best of its settings: their Pareto
    front over all evaluations, as the paper draws it. Losses are means over the finished seeds.

    A dot is a setting at its end; a front bears the name of that which has its last place.
    """
    pyplot = pyplot_without_screen()
    from matplotlib.ticker import NullFormatter

    from llm_local.study.comparison import front, mean_curve

    figure, panels = pyplot.subplots(1, len(AXES), sharey=True, figsize=(13, 6))
    points = [point for point in comparison["points"] if point["runs"]]
    for (axis, title), panel in zip(AXES.items(), panels, strict=True):
        for row, method in enumerate(dict.fromkeys(p["flags"]["method"] for p in points)):
            color = COLORS[row % len(COLORS)]
            curves = {p["name"]: mean_curve(p, axis) for p in points if p["flags"]["method"] == method}
            places = front([place for curve in curves.values() for place in curve])
            panel.plot(*zip(*places, strict=True), color=color, linewidth=2)
            text = {"textcoords": "offset points", "color": color}
            for curve in curves.values():
                panel.plot(*curve[-1], "o", color=color, markersize=5, alpha=0.5)
            best = next((name for name, curve in curves.items() if curve[-1] == places[-1]), method)
            side, offset = (("right", -4), ("left", 4))[row % 2]
            panel.annotate(best, places[0], (offset, 4), ha=side, weight="bold", **text)
        panel.set(xlabel=title, xscale="log")
        panel.xaxis.set_minor_formatter(NullFormatter())  # else they write over each other
        panel.grid(alpha=0.3, which="both")
        panel.margins(x=0.4, y=0.1)  # room for the names
    panels[0].set_ylabel("validation loss of the last block (nats)")
    figure.tight_layout()
    with writing(output):
        figure.savefig(output, dpi=120)
    pyplot.close(figure)


def write(comparison: dict[str, Any], output: Path, study: Path, seconds: float) -> None:
    """The comparison as JSON with versions and command, as a table, and, where matplotlib is, as a picture."""
    from llm_local.files import write_whole
    from llm_local.study.comparison import table

    versions = {"python": platform.python_version()} | {name: version(name) for name in PACKAGES}
    facts = {"study": str(study), "command": sys.argv, "versions": versions, "seconds": seconds}
    write_whole(output / "study.json", json.dumps(facts | comparison, indent=1) + "\n")
    write_whole(output / "study.md", f"# {study.stem}\n\n{table(comparison)}")
    try:
        draw(comparison, output / "study.png")
    except ImportError as error:
        print(f"{NAME}: no picture ({error}); pip install matplotlib", file=sys.stderr)


def page(folders: list[Path], output: Path) -> None:
    """The runs side by side, as far as they can be shown."""
    from llm_local.report.page import REPORT, report_problem

    if problem := report_problem(folders, output / REPORT):
        print(f"{NAME}: {problem}", file=sys.stderr)
    else:
        print(f"report: {output / REPORT}")


def conclude(study: Study, runs: list[StudyRun], output: Path, path: Path, seconds: float) -> None:
    """What the finished runs have shown."""
    from llm_local.study.comparison import compare, table
    from llm_local.study.runs import keep_results

    keep_results(runs, output / "results.json")
    comparison = compare(study, {(run.point.name, run.seed): run.result() for run in runs if run.is_finished})
    write(comparison, output, path, seconds)
    print(f"\n{table(comparison)}\n{output / 'study.md'}, study.json and study.png")
    if shown := [run.folder for run in runs if (run.folder / "metrics").exists() and run.seed == study.seeds[0]]:
        page(shown, output)


def run(path: Path, output: Path, jobs: int) -> int:
    """Trains what is missing and writes the comparison. Returns 1 if a run failed."""
    from tqdm import tqdm

    from llm_local.device import take_the_cpu_if_alone

    take_the_cpu_if_alone()
    from llm_local.study.points import read_study
    from llm_local.study.runs import keep_results, runs_of, take_results, train_all

    start, study = time.monotonic(), read_study(path)
    runs = runs_of(study, output)
    results = output / "results.json"
    take_results(runs, results)
    finished = sum(run.is_finished for run in runs)
    print(f"{len(study.points)} points x {len(study.seeds)} seeds, {finished} of {len(runs)} runs are finished")
    output.mkdir(parents=True, exist_ok=True)

    def say(line: str) -> None:
        tqdm.write(line, file=sys.stderr)
        keep_results(runs, results)

    try:
        failures = train_all(runs, jobs, say)
    except KeyboardInterrupt:
        if any(run.is_finished for run in runs):
            conclude(study, runs, output, path, time.monotonic() - start)
        raise
    conclude(study, runs, output, path, time.monotonic() - start)
    for line in failures:
        print(f"{NAME}: {line}", file=sys.stderr)
    return 1 if failures else 0


@ends_with_a_line(Unwritten)
def main(arguments: list[str]) -> int:
    parser = command_parser(NAME, __doc__)
    parser.add_argument("study", type=Path, help="YAML file of the study")
    parser.add_argument("--jobs", type=int, default=2, help="runs side by side, with one thread each (default 2)")
    parser.add_argument("--output_dir", type=Path, help="folder of the study; default: runs/studies/NAME")
    given = parser.parse_args(arguments)
    if given.jobs < 1:
        parser.error(f"--jobs {given.jobs}: give 1 or more")
    output = given.output_dir or Path("runs", "studies", given.study.stem)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler)
    try:
        with writing(output, reads=True):
            return run(given.study, output, given.jobs)
    except ValueError as error:  # ConfigError is one
        print(f"{NAME}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"{NAME}: stopped; the same command goes on, finished runs are kept", file=sys.stderr)
        return 130
