"""Draws the losses of every stage of one run, or of several side by side: RUN/metrics/loss.png.

llm-local plot runs/quickstart [runs/other ...] [--output loss.png]
"""

from __future__ import annotations

import sys
from pathlib import Path

from llm_local.files import Json, Unwritten, ends_with_a_line, writing
from llm_local.program import command_parser, program
from llm_local.records import read_records
from llm_local.report.curves import smoothed
from llm_local.screen import pyplot_without_screen

NAME = program(__file__)


def load(run: Path) -> dict[str, list[Json]]:
    """Records of each stage by its file name. Raises ValueError if the folder holds no metrics."""
    stages = {path.stem: read_records(path) for path in sorted((run / "metrics").glob("stage-*.jsonl"))}
    if not any(stages.values()):
        raise ValueError(f"{run} has no metrics/stage-*.jsonl with a record; name the --output_dir of a run")
    return stages


def draw(runs: list[Path], output: Path) -> None:
    """Training loss (thin: as recorded, thick: smoothed) and validation loss (dots), one panel a run."""
    pyplot = pyplot_without_screen()

    figure, panels = pyplot.subplots(1, len(runs), sharey=True, squeeze=False, figsize=(1 + 6 * len(runs), 4.5))
    for run, panel in zip(runs, panels[0], strict=True):
        for number, (stage, records) in enumerate(load(run).items()):
            train = [r for r in records if r["split"] == "train"]
            tested = [r for r in records if r["split"] == "eval"]
            steps, losses = [r["step"] for r in train], [r["loss"] for r in train]
            panel.plot(steps, losses, color=f"C{number}", linewidth=0.6, alpha=0.35)
            panel.plot(steps, smoothed(losses), color=f"C{number}", label=f"{stage}, training")
            last = f"{tested[-1]['loss']:.3f}" if tested else "none"
            where = [r["step"] for r in tested], [r["loss"] for r in tested]
            panel.plot(*where, "o", color=f"C{number}", markeredgecolor="white", label=f"{stage}, validation: {last}")
        panel.set_title(str(run))
        panel.set_xlabel("step")
        panel.grid(alpha=0.3)
        panel.legend(frameon=False)
    panels[0][0].set_ylabel("loss (nats)")
    figure.tight_layout()
    with writing(output):
        figure.savefig(output, dpi=120)


@ends_with_a_line(Unwritten)
def main(arguments: list[str]) -> int:
    parser = command_parser(NAME, __doc__)
    parser.add_argument("runs", nargs="+", type=Path, help="output folders of runs")
    parser.add_argument("--output", type=Path, help="picture to write; default: metrics/loss.png of the first run")
    given = parser.parse_args(arguments)
    output = given.output or given.runs[0] / "metrics" / "loss.png"
    try:
        draw(given.runs, output)
    except (ValueError, OSError) as error:
        print(f"{NAME}: {error}", file=sys.stderr)
        return 2
    print(f"losses by stage: {output}")
    return 0
