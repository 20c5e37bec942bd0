"""Loss curves of a benchmark: each run is pretrain.py under torchrun, and one that is there is not run again."""

from __future__ import annotations

import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from llm_local.bench.cases import ROOT, BenchmarkError, environment, torchrun
from llm_local.checkpoint.line import committed
from llm_local.records import read_records

Curve = Sequence[tuple[int, float]]


def train(folder: Path, ranks: int, flags: Mapping[str, Any]) -> None:
    """One run, unless it is there; what was cut short goes on from its last checkpoint. Raises BenchmarkError."""
    if (folder / "export").exists():
        return
    start = {"resume_from_checkpoint": "true"} if committed(folder) else {"overwrite_output_dir": True}
    told = {**flags, **start, "output_dir": folder}
    arguments = [part for name, value in told.items() for part in (f"--{name}", str(value))]
    command = [*torchrun(ranks), "scripts/pretrain.py", *arguments]
    done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, check=False)
    if done.returncode:
        raise BenchmarkError(f"{folder.name} failed:\n{done.stderr[-4000:]}")


def evaluations(folder: Path) -> list[tuple[int, float]]:
    """Steps of a run that were evaluated, each with the validation loss of the whole model."""
    last = sorted((folder / "metrics").glob("stage-*.jsonl"))[-1]
    return [(r["step"], r["block_losses"][-1]) for r in read_records(last) if r["split"] == "eval"]


def steps_until(curve: Curve, loss: float) -> float | None:
    """Steps until the curve is first as low as that, in a straight line between evaluations; None if it never is."""
    before: tuple[int, float] | None = None
    for step, reached in curve:
        if reached <= loss:
            if before is None:
                return float(step)
            return before[0] + (step - before[0]) * (before[1] - loss) / (before[1] - reached)
        before = step, reached
    return None


def draw(panels: Mapping[str, Mapping[str, tuple[Curve, float]]], path: Path) -> None:
    """The loss against minutes, a panel for each link: by system its curve, and the seconds of a step."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(panels), figsize=(4.5 * len(panels), 4.2), sharey=True)
    for axis, (link, systems) in zip(axes, panels.items(), strict=True):
        for number, (name, (curve, seconds)) in enumerate(systems.items()):
            minutes, losses = [step * seconds / 60 for step, _ in curve], [loss for _, loss in curve]
            axis.semilogx(minutes, losses, "-" if number % 2 else "--", color=f"C{number}", label=name)
        axis.set_title(link)
        axis.set_xlabel("minutes")
        axis.grid(alpha=0.3, which="both")
    axes[0].set_ylabel("validation loss, nats")
    axes[-1].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
