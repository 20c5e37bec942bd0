"""What the pipe itself costs: its throughput over what its slowest stage does alone, fed from memory.

python scripts/bench_efficiency.py [--stages 2] [--repeats 5] [--steps 20]

Rounds of steps in the pipe and of steps of all stages by themselves take turns in the same processes.
"""

from __future__ import annotations

import sys
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).parents[1]))

from llm_local.bench.cases import (
    BenchmarkError,
    Case,
    Spread,
    arguments_of,
    bench_model,
    ratios,
    run_case,
    table,
    write,
)
from llm_local.files import ends_with_a_line

INTRODUCTION = """
Efficiency: seconds of a step that the slowest stage takes when it is fed from memory and sends nothing, while the
others do the same, over those of a step in the pipe. Waiting: share of a step in which that stage waits for a link. Two
stages with a core each, 8 layers of width 256, micro-batches of 4 x 128 tokens, fp32; median, smallest and largest of
the rounds. Goals: an efficiency of 0.97, waiting below 2 %.
"""


@ends_with_a_line(BenchmarkError)
def main(arguments: list[str] | None = None) -> int:
    parser = arguments_of(__doc__, repeats=5, steps=20)
    parser.add_argument("--micro_batches", default="1,4", help="of a step (default 1,4)")
    given = parser.parse_args(arguments)
    rows, data = [], {}
    for micro_batches in map(int, given.micro_batches.split(",")):
        flags = {**bench_model(), "seq_length": 128, "per_device_train_batch_size": 4}
        flags |= {"gradient_accumulation_steps": micro_batches}
        steps = max(2, given.steps // micro_batches)
        case = Case(f"{micro_batches} micro-batches", 2, "efficiency", "local", flags, steps, given.repeats)
        print(case.name, file=sys.stderr)
        ranks = run_case(case)
        slowest = max(range(len(ranks)), key=lambda stage: median(ranks[stage]["fed"]))
        found = ranks[slowest]
        efficiency, waiting = ratios(found["fed"], ranks[-1]["piped"]), Spread.of(found["waiting"])
        data[str(micro_batches)] = {"slowest_stage": slowest, "stages": ranks}
        fed = Spread.of(found["fed"])
        rows.append([str(micro_batches), str(slowest), fed.text(3), efficiency.text(3), waiting.text(4)])
    header = ["micro-batches", "slowest stage", "alone, s a step", "efficiency", "waiting"]
    write(given.output, "efficiency", f"{INTRODUCTION}\n{table(header, rows)}", {"micro_batches": data})
    return 0


if __name__ == "__main__":
    sys.exit(main())
