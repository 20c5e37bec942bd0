"""Looks inside a trained local run: local against true gradients, the loss of every exit, and what a linear readout
finds in each block's output.

llm-local probe runs/quickstart [--checkpoint step-00000200] [--rows 16] [--readout_steps 200] [--output DIR]

Needs a checkpoint (--save_steps). Writes probe.json and probe.png beside the run's metrics.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from dataclasses import asdict, replace
from pathlib import Path

import torch

if not torch.accelerator.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # else DeepSpeed looks for one and warns

from llm_local.checkpoint.manifest import BrokenCheckpoint
from llm_local.config import ConfigError
from llm_local.data.sets import prepare
from llm_local.data.tokenizer import load_tokenizer
from llm_local.device import local_device
from llm_local.examine import TrainedRun, compare_gradients, linear_losses, load_run
from llm_local.files import Json, Unwritten, ends_with_a_line, writing
from llm_local.program import command_parser, program
from llm_local.screen import pyplot_without_screen, quiet_libraries

NAME = program(__file__)

COLUMNS = ("block", "stage", "layers", "loss", "linear_loss", "cosine", "local_norm", "true_norm")


def examine(given: argparse.Namespace) -> Json:
    """What probe.json holds. Raises ValueError for a run that cannot be looked into."""
    for name, least in (("rows", 1), ("readout_steps", 1)):
        if getattr(given, name) < least:
            raise ValueError(f"--{name} {getattr(given, name)} is less than {least}")
    device = local_device(0)
    run = load_run(given.run, given.checkpoint, device)
    unpadded = replace(run.config, data=replace(run.config.data, packing="concat"))
    train, validation = prepare(unpadded, load_tokenizer(run.config))
    ids = validation.batch(0, given.rows).to(device)
    say(f"{len(run.blocks)} blocks of step {run.step}: gradients on {given.rows} rows of validation text")
    gradients = compare_gradients(run, ids)
    say(f"a linear readout of each block, {given.readout_steps} steps on training text")
    linear = linear_losses(run, train, ids, given.readout_steps)
    places = block_places(run)
    found = [
        {**place, "linear_loss": loss, **asdict(gradient)}
        for place, gradient, loss in zip(places, gradients, linear, strict=True)
    ]
    seq_length = run.config.data.seq_length
    shape = {"rows": given.rows, "seq_length": seq_length, "readout_steps": given.readout_steps}
    return {"run": str(given.run), "step": run.step, **shape, "blocks": found}


def say(text: str) -> None:
    print(f"{NAME}: {text}", file=sys.stderr, flush=True)


def block_places(run: TrainedRun) -> list[Json]:
    """Number, stage and layers of each block."""
    cut = run.partition
    stages = [stage for stage, span in enumerate(cut.stages) for _ in range(len(span))]
    layers = [str(b.start) if len(b) == 1 else f"{b.start}-{b.stop - 1}" for b in cut.blocks]
    both = enumerate(zip(stages, layers, strict=True))
    return [{"block": number, "stage": stage, "layers": text} for number, (stage, text) in both]


def table(found: Json) -> str:
    """A line a block; losses in nats a token."""
    rows = [[f"{v:.4g}" if isinstance(v, float) else str(v) for v in (b[c] for c in COLUMNS)] for b in found["blocks"]]
    lines = [[name.replace("_", " ") for name in COLUMNS], *rows]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in lines)


def draw(found: Json, picture: Path) -> None:
    """Three panels over the blocks: losses, cosines, norms."""
    pyplot = pyplot_without_screen()

    blocks = found["blocks"]
    names = [f"{block['block']}\n({block['layers']})" for block in blocks]
    figure, panels = pyplot.subplots(1, 3, figsize=(15, 4))
    lines = [
        ("nats a token", {"loss": "the exit", "linear_loss": "a linear readout"}),
        ("cosine of local and true gradient", {"cosine": ""}),
        ("gradient norm", {"local_norm": "local", "true_norm": "true"}),
    ]
    for panel, (title, curves) in zip(panels, lines, strict=True):
        for name, label in curves.items():
            panel.plot(names, [block[name] for block in blocks], "o-", label=label)
        panel.set_title(title)
        panel.set_xlabel("block (layers)")
        panel.grid(alpha=0.3)
        if len(curves) > 1:
            panel.legend(frameon=False)
    panels[1].set_ylim(min(0.0, *panels[1].get_ylim()), 1.05)
    panels[2].set_yscale("log")
    figure.suptitle(f"{found['run']}, step {found['step']}")
    figure.tight_layout()
    figure.savefig(picture, dpi=120)


@ends_with_a_line(Unwritten)
def main(arguments: list[str]) -> int:
    parser = command_parser(NAME, __doc__)
    parser.add_argument("run", type=Path, help="output folder of a run with a checkpoint")
    parser.add_argument("--checkpoint", help="its name under RUN/checkpoints, or its folder; default: the newest")
    parser.add_argument("--rows", type=int, default=16, help="rows of validation text (16)")
    parser.add_argument("--readout_steps", type=int, default=200, help="training steps of the linear readouts (200)")
    parser.add_argument("--output", type=Path, help="folder of probe.json and probe.png; default: RUN/metrics")
    given = parser.parse_args(arguments)
    quiet_libraries()
    folder = given.output or given.run / "metrics"
    try:
        with writing(folder, reads=True):
            found = examine(given)
        with writing(folder / "probe.json"):
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "probe.json").write_text(json.dumps(found, indent=1) + "\n")
        with writing(folder / "probe.png"):
            draw(found, folder / "probe.png")
    except (ValueError, OSError, BrokenCheckpoint) as error:
        reason = "; ".join(error.problems) if isinstance(error, ConfigError) else error
        print(f"{NAME}: {reason}", file=sys.stderr)
        return 2
    print(table(found))
    print(f"{folder / 'probe.json'}, {folder / 'probe.png'}")
    return 0
