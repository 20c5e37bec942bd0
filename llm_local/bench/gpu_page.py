"""docs/gpu.md, of the lines that a day on a GPU has left; whatever was not found is left out."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from llm_local.bench.gpu_day import DONE, NAMES, ROOT, Line, read_lines

Figures = Mapping[str, Any]
INTRODUCTION = "Made by `python scripts/gpu_report.py` of what `python scripts/gpu_day.py` has found."
REHEARSED = (
    "No GPU has run this yet. The same steps ran with tiny sizes on a CPU, so what is equal below is equal there, and "
    "seconds, TFLOP/s and losses say nothing about a GPU or about methods."
)
GOAL = "45 %"


def page(lines: Mapping[str, Line]) -> str:
    """The whole page; its first line says whether these are figures of a rehearsal."""
    ordered = [lines[name] for name in NAMES if name in lines]
    figures = {line.step: line.figures for line in ordered}
    facts = figures.get("facts", {})
    device = facts.get("device", "device unknown")
    rehearsal = any(line.rehearsal for line in ordered)
    title = f"# A CPU rehearsal's figures, not a GPU's: {device}" if rehearsal else f"# One GPU: {device}"
    parts = [title, INTRODUCTION, *([REHEARSED] if rehearsal else [])]
    parts += [_table(("step", "status", "seconds"), [(e.step, e.status, f"{e.seconds:.0f}") for e in ordered])]
    sections = (_machine, _fp32, _zero, _variants, _tests, _mfu, _passes, _study)
    names = ("facts", "fp32", "zero", "variants", "tests", "mfu", "passes", "study")
    for name, section in zip(names, sections, strict=True):
        if figures.get(name):
            parts += section(figures[name])
    failed = [line for line in ordered if line.status not in DONE]
    parts += ["## What failed"]
    parts += [f"**{each.step}**, {each.status}:\n\n{_quoted(each.error)}" for each in failed] or ["Nothing."]
    return "\n\n".join(parts) + "\n"


def _machine(figures: Figures) -> list[str]:
    about = figures.get("device_facts", {})
    said = [f"{figures['cores']} cores, {_gb(figures['memory_bytes'])} of memory, Python {figures['python']}"]
    if about:
        said += [f"{about['count']} device, {_gb(about['memory_bytes'])}, CUDA {about['cuda']}"]
        said += [f"{name} {about[name]}" for name in ("nccl", "driver") if about.get(name)]
    if "product_tflops" in figures:
        said += [f"a plain product in bf16 reaches {figures['product_tflops']:.3g} TFLOP/s"]
    versions = ", ".join(f"{name} {number}" for name, number in figures.get("versions", {}).items() if number)
    return ["## Machine", f"{'; '.join(said)}. {versions}."]


def _fp32(figures: Figures) -> list[str]:
    apart = {name.partition(", ")[2]: value for name, value in figures.items() if name.startswith("difference, ")}
    rows = [(name, f"{value:.1e}") for name, value in apart.items()]
    text = "Two stages on one device, 6 steps in float32: the largest difference of a loss, relative; at most 1e-4."
    carried = figures.get("carried_versions")
    text += (
        f" The carried losses are of torch {carried['torch']} and transformers {carried['transformers']}."
        if carried
        else ""
    )
    return ["## Equal to a CPU", text, _table(("beside losses of", "difference"), rows)]


def _zero(figures: Figures) -> list[str]:
    def resumed(run: Figures) -> str:
        if "resumed_equal" not in run:
            return ""
        return "bit-equal" if run["resumed_equal"] else f"differs by {run['resumed_difference']:.1e}"

    text = "bf16, two stages, 8 steps, and the last 4 again from the checkpoint of step 4."
    header = (*RUN_HEADER, "resumed", "exported")
    rows = [(*_of_run(n, run), resumed(run), "yes" if run.get("exported") else "no") for n, run in figures.items()]
    return ["## ZeRO, resuming and export", text, _table(header, rows)]


def _variants(figures: Figures) -> list[str]:
    header = (*RUN_HEADER, "")
    rows = [(*_of_run(n, run), "failed" if "error" in run else run.get("status", "")) for n, run in figures.items()]
    return ["## Variants", "Two stages, 8 steps.", _table(header, rows)]


RUN_HEADER = ("run", "first loss by stage", "last", "seconds a step", "peak memory")


def _of_run(name: str, run: Figures) -> tuple[str, ...]:
    if "last_losses" not in run:
        return (name, "", "", "", "")
    seconds, peak = max(run["step_seconds"]), max(run["peak_memory_bytes"])
    return (name, _losses(run["first_losses"]), _losses(run["last_losses"]), f"{seconds:.3f}", _gb(peak))


def _tests(figures: Figures) -> list[str]:
    counts = ", ".join(f"{count} {word}" for word, count in figures.get("tests", {}).items())
    return ["## pytest -m gpu", f"{counts or 'none ran'}."]


def _mfu(figures: Figures) -> list[str]:
    peak = figures.get("peak_tflops")
    share = f"of {peak:.0f} TFLOP/s (goal {GOAL})" if peak else f"of the peak (goal {GOAL})"
    header = ("setting", "seconds a step", "TFLOP/s", share, "peak memory")
    rows = []
    for name, run in figures.items():
        if isinstance(run, Mapping) and "tflops" in run:
            part = f"{run['tflops'] / peak:.1%}" if peak else ""
            row = (name, f"{run['step_seconds']:.4f}", f"{run['tflops']:.3g}", part, _gb(run["peak_memory_bytes"]))
            rows.append(row)
    text = "One block as a stage without links, bf16: 6 FLOPs a parameter and token and 12·T·H for attention."
    found = ["## What a stage reaches", text, _table(header, rows)]
    if "profile" in figures:
        profile = figures["profile"]
        said = f"A step of {figures['best']}: {profile['milliseconds']:.1f} ms in {profile['calls']} calls."
        costly = [(f"`{name}`", f"{ms:.2f}", str(calls)) for name, ms, calls in profile["rows"]]
        found += [said, _table(("kernel or operator", "ms", "calls"), costly)]
    return found


def _passes(figures: Figures) -> list[str]:
    rows = []
    for name, run in figures.items():
        if isinstance(run, Mapping) and "passes" in run:
            taken = [f"{run['passes'].get(kind, 0):.4f}" for kind in ("ForwardPass", "BackwardPass", "OptimizerStep")]
            rows.append((name, f"{run['step_seconds']:.4f}", *taken, _gb(run["peak_memory_bytes"])))
    header = ("", "a step, s", "forward", "backward", "optimizer", "peak memory")
    text = (
        "A stage of each cut by itself, and the whole model in one process. Passes wait for the device, steps do not."
    )
    found = ["## Passes", text, _table(header, rows)]
    if "chunked / backprop" in figures:
        ratio = figures["chunked / backprop"]
        found += [f"Two blocks in one process take {ratio:.2f} times as long as backpropagation there."]
    simulated = [(name.partition(", ")[2], run) for name, run in figures.items() if name.startswith("simulated, ")]
    if simulated:
        rows = [(name, *(f"{run[key]:.4f}" for key in ("local", "1f1b", "1f1b / local"))) for name, run in simulated]
        found += [
            "Simulated from these, 8 micro-batches, links free, seconds of a step:",
            _table(("", "local", "1F1B", "times"), rows),
        ]
    return found


def _study(figures: Figures) -> list[str]:
    rows, curves = [], []
    for name, run in figures.items():
        ends = [(step, losses[-1], min(losses)) for step, losses in run["evals"]]
        last = (f"{ends[-1][1]:.4f}", f"{ends[-1][2]:.4f}") if ends else ("", "")
        seconds = "" if run["step_seconds"] is None else f"{run['step_seconds']:.3f}"
        rows.append((name, f"{run['step']} of {run['max_steps']}", *last, seconds))
        curves.append(f"- {name}: " + (", ".join(f"{loss:.3f} ({step})" for step, loss, _ in ends) or "no evaluation"))
    header = ("run", "steps", "validation loss", "of the best exit", "seconds a step")
    text = "The same tokens, side by side on one device; a run that was ended has the curve that it had by then."
    return ["## Study", text, _table(header, rows), "Validation loss (step):\n\n" + "\n".join(curves)]


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])


def _losses(values: Sequence[float]) -> str:
    return " ".join(f"{value:.4f}" for value in values)


def _gb(count: float) -> str:
    return f"{count / 1e9:.2f} GB"


def _quoted(error: str) -> str:
    """As code; of paths the last name is kept, as folders are the machine's own."""
    short = re.sub(r"(?<![\w.])(?:/[\w.+-]+){2,}/([\w.+-]+)", r"\1", error.strip())
    return f"```text\n{short or 'nothing was said'}\n```"


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="gpu_report.py", description=__doc__)
    parser.add_argument("day", type=Path, help="day.jsonl of gpu_day.py")
    parser.add_argument("-o", "--output", type=Path, default=ROOT / "docs/gpu.md", help="default: docs/gpu.md")
    given = parser.parse_args(arguments)
    try:
        lines = read_lines(given.day)
        if not lines:
            raise ValueError(f"{given.day} has no line yet; run gpu_day.py")
        given.output.write_text(page(lines))
    except (OSError, ValueError) as error:
        said = f"{error.filename}: {error.strerror}" if isinstance(error, OSError) else str(error)
        print(f"gpu_report.py: {said}", file=sys.stderr)
        return 2
    print(given.output)
    return 0
