"""Step times of ranks that divide layers or rows, as a plan predicts them, beside those that are measured.

python scripts/bench_division.py [--repeats 3] [--steps 8] [--link-gbps 10]

What a rank computes a second is taken from a step of one rank alone: the rest is the plan's.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from llm_local.bench.cases import BenchmarkError, Case, arguments_of, bench_model, run_case, table, write
from llm_local.config import from_flat
from llm_local.files import ends_with_a_line
from llm_local.memory.division import Division
from llm_local.memory.sizes import read_shares
from llm_local.plan.layouts import Planner
from llm_local.plan.machine import Machine
from llm_local.plan.stages import Candidate

INTRODUCTION = """
Seconds of a step, predicted by a plan and measured. 8 layers of width 512 and 4,096 tokens, 2 micro-batches of 4 rows
of 256 tokens, fp32, one thread a rank. Ranks that are more than cores share them in equal parts, in the plan as well.
"""
# ranks, stages, and those that divide layers, or rows
LAYOUTS = {
    "1 rank": (1, 1, Division()),
    "2 stages": (2, 2, Division()),
    "2 ranks divide layers": (2, 1, Division(layers=2)),
    "2 ranks divide rows": (2, 1, Division(rows=2)),
    "2 stages of 2 ranks that divide layers": (4, 2, Division(layers=2)),
    "2 stages of 2 ranks that divide rows": (4, 2, Division(rows=2)),
}
ONE = "1 rank"


def flags_of(name: str) -> dict[str, Any]:
    _, stages, division = LAYOUTS[name]
    model = bench_model(hidden_size=512, intermediate_size=1408, vocab_size=4096)
    batch = {"seq_length": 256, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}
    sizes = {"tensor_parallel_size": division.layers, "sequence_parallel_size": division.rows}
    return {**model, **batch, **sizes, "num_stages": stages}


def predicted(name: str, flops: float, gbps: float) -> float:
    """Seconds of a step on ranks that compute so much, alone on a core."""
    ranks, stages, division = LAYOUTS[name]
    config = from_flat(flags_of(name))
    cores = len(os.sched_getaffinity(0))
    anatomy, (whole, share) = read_shares(config.model, config.data.seq_length, "fp32", (Division(), division))
    each = flops * min(1.0, cores / ranks)
    machine = Machine(ranks, 1e12, each, 1e10, gbps, gbps, devices_per_host=ranks)
    planner = Planner(anatomy, whole, machine, config, rows=8, shares={division: share})
    sizes = (division.layers, division.rows)
    found = planner.evaluate(Candidate("chunked", stages, 1, 0, "linear", (), *sizes))
    if found.problem:
        raise BenchmarkError(f"{name}: {found.problem}")
    return found.step_seconds


def measured(name: str, repeats: int, steps: int) -> float:
    case = Case(name, LAYOUTS[name][0], "rate", "local", flags_of(name), steps)
    return median(median(run_case(case)[-1]["seconds"]) for _ in range(repeats))


@ends_with_a_line(BenchmarkError)
def main(arguments: list[str] | None = None) -> int:
    parser = arguments_of(__doc__, repeats=3, steps=8)
    parser.add_argument("--link-gbps", type=float, default=10, help="Gb/s of gloo between ranks (10)")
    given = parser.parse_args(arguments)
    seconds = {}
    for name in LAYOUTS:
        print(name, file=sys.stderr, flush=True)
        seconds[name] = measured(name, given.repeats, given.steps)
    guess = 1e10
    for _ in range(20):  # a step has an optimizer, too, whose time is no rank's to choose
        guess *= predicted(ONE, guess, given.link_gbps) / seconds[ONE]
    rows, data = [], []
    for name, took in seconds.items():
        expected = predicted(name, guess, given.link_gbps)
        data.append({"layout": name, "predicted": expected, "measured": took})
        rows.append([name, f"{expected:.3f}", f"{took:.3f}", f"{expected / took - 1:+.0%}"])
    header = ["layout", "predicted, s", "measured, s", "error"]
    write(given.output, "division", f"{INTRODUCTION}\n{table(header, rows)}", {"steps": data, "gflops": guess / 1e9})
    return 0


if __name__ == "__main__":
    sys.exit(main())
