"""Step time against layers, width, sequence length and vocabulary, on one core: an accidental quadratic would show.

python scripts/bench_scaling.py [--repeats 2] [--steps 6]

Writes a table of exponents and a log-log plot.
"""

from __future__ import annotations

import math
import sys
from pathlib import Path
from statistics import linear_regression, median
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from llm_local.bench.cases import BenchmarkError, Case, Spread, arguments_of, bench_model, in_turns, table, write
from llm_local.files import ends_with_a_line

AXES: dict[str, tuple[int, ...]] = {
    "layers": (2, 4, 8, 16),
    "width": (64, 128, 256, 512),
    "sequence": (64, 128, 256, 512),
    "vocabulary": (2048, 8192, 32768, 131072),
}
EXPECTED = {
    "layers": "1 less the head's share",
    "width": "2 for matrices, below it at small widths",
    "sequence": "1 for matrices, 2 for attention",
    "vocabulary": "1 for the head, 0 for the layers",
}
INTRODUCTION = """
Seconds of a step on one core and one stage with one block, one thing changed at a time from 4 layers of width 128,
sequences of 128 tokens, 2048 pieces; 4 rows a step. The exponent is the slope of the last two points, in logarithms;
in brackets that over all points.
"""


def flags(axis: str, value: int) -> dict[str, Any]:
    sizes = {"layers": 4, "width": 128, "sequence": 128, "vocabulary": 2048, axis: value}
    width = sizes["width"]
    overrides = {
        "num_hidden_layers": sizes["layers"],
        "hidden_size": width,
        "intermediate_size": width * 11 // 4,
        "num_attention_heads": width // 32,
        "num_key_value_heads": width // 32,
        "vocab_size": sizes["vocabulary"],
    }
    return {**bench_model(**overrides), "seq_length": sizes["sequence"], "per_device_train_batch_size": 4}


def exponent(values: tuple[int, ...], seconds: list[float]) -> float:
    return linear_regression([math.log(v) for v in values], [math.log(s) for s in seconds]).slope


def draw(data: dict[str, dict[str, list[float]]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, len(data), figsize=(4 * len(data), 3.6), sharey=True)
    for panel, (axis, found) in zip(panels, data.items(), strict=True):
        values, seconds = AXES[axis], [median(rounds) for rounds in found.values()]
        panel.loglog(values, seconds, "o-", color="C0")
        first = seconds[-1] / values[-1]
        panel.loglog(values, [first * v for v in values], ":", color="grey", label="linear")
        panel.set_xlabel(axis)
        panel.set_xticks(values, [str(v) for v in values])
        panel.minorticks_off()
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("seconds of a step")
    panels[0].legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)


@ends_with_a_line(BenchmarkError)
def main(arguments: list[str] | None = None) -> int:
    given = arguments_of(__doc__, repeats=2, steps=6).parse_args(arguments)
    rows, data = [], {}
    for axis, values in AXES.items():
        cases = [Case(f"{axis} {v}", 1, "rate", "local", flags(axis, v), given.steps) for v in values]
        found = in_turns(cases, given.repeats)
        data[axis] = {str(v): [median(r[0]["seconds"]) for r in found[f"{axis} {v}"]] for v in values}
        seconds = [median(rounds) for rounds in data[axis].values()]
        slopes = f"{exponent(values[-2:], seconds[-2:]):.2f} ({exponent(values, seconds):.2f})"
        times = ", ".join(f"{v}: {Spread.of(data[axis][str(v)]).median:.3f}" for v in values)
        rows.append([axis, times, slopes, EXPECTED[axis]])
    text = (
        f"{INTRODUCTION}\n{table(['', 'seconds of a step', 'exponent', 'expected'], rows)}\n\n![scaling](scaling.png)"
    )
    write(given.output, "scaling", text, {"seconds_a_step": data})
    draw(data, given.output / "scaling.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
