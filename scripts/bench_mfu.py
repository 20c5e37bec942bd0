"""Share of the device's peak that one stage reaches: a 350M-class model in bf16 on a GPU, with ZeRO and offload.

python scripts/bench_mfu.py --peak_tflops 989 [--configs zero0,zero3,zero3_offload]

On a machine without a GPU it measures the same on a tiny model, and says nothing about a GPU.
"""

from __future__ import annotations

import sys
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch

from llm_local.bench.cases import (
    ROOT,
    BenchmarkError,
    Case,
    Spread,
    arguments_of,
    bench_model,
    in_turns,
    table,
    write,
)
from llm_local.bench.mfu import LARGE, flops_a_step
from llm_local.files import ends_with_a_line

INTRODUCTION = """
Model FLOPs a second over the device's peak: 6 FLOPs a parameter and token and 12·T·H for attention, the head included,
recomputation not. One rank with one block, which is a stage without its links.
"""


def flags(zero: str, large: bool, rows: int) -> dict[str, Any]:
    model = bench_model(**(LARGE if large else {}))
    sizes = {"seq_length": 2048 if large else 128, "per_device_train_batch_size": rows}
    return {**model, **sizes, "bf16": large, "deepspeed": str(ROOT / f"configs/ds/{zero}.json")}


@ends_with_a_line(BenchmarkError)
def main(arguments: list[str] | None = None) -> int:
    parser = arguments_of(__doc__, repeats=2, steps=10)
    parser.add_argument("--peak_tflops", type=float, help="of the device in bf16; an H100 has 989")
    parser.add_argument("--configs", default="zero0,zero3,zero3_offload", help="files of configs/ds, without .json")
    parser.add_argument("--rows", type=int, default=8, help="sequences of a step (default 8)")
    given = parser.parse_args(arguments)
    if given.peak_tflops is not None and given.peak_tflops <= 0:
        parser.error(f"--peak_tflops {given.peak_tflops:g}: give a number above 0")
    names = given.configs.split(",")
    if missing := [name for name in names if not (ROOT / f"configs/ds/{name}.json").exists()]:
        parser.error(f"--configs {','.join(missing)}: not in configs/ds")
    large = torch.accelerator.is_available()
    cases = [Case(name, 1, "rate", "local", flags(name, large, given.rows), given.steps) for name in names]
    found = in_turns(cases, given.repeats)
    rows, data = [], {}
    for case in cases:
        work = flops_a_step(case.flags)
        rates = Spread.of(work / median(ranks[0]["seconds"]) / 1e12 for ranks in found[case.name])
        share = f"{rates.median / given.peak_tflops:.1%}" if given.peak_tflops else ""
        data[case.name] = {"tflops": rates.median, "low": rates.low, "high": rates.high}
        rows.append([case.name, rates.text(3), share])
    text = f"{INTRODUCTION}\n{table(['configuration', 'TFLOP/s', 'of the peak'], rows)}"
    write(given.output, "mfu", text, {"peak_tflops": given.peak_tflops, "large": large, "configs": data})
    return 0


if __name__ == "__main__":
    sys.exit(main())
