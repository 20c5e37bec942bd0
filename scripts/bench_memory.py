"""Activations that stage 0 holds for backward passes, against the number of stages.

python scripts/bench_memory.py [--stages 2,4,8]
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from llm_local.bench.cases import METHODS, BenchmarkError, Case, arguments_of, bench_model, run_case, table, write
from llm_local.files import ends_with_a_line

INTRODUCTION = """
The most bytes that autograd graphs of stage 0 held at a time, counted tensor by tensor, in MB. Two layers a stage, 8
micro-batches of 4 x 128 tokens. Local learning has one micro-batch there however long the pipe; 1F1B has one for each
stage. Local learning's includes its head and loss.
"""


@ends_with_a_line(BenchmarkError)
def main(arguments: list[str] | None = None) -> int:
    parser = arguments_of(__doc__, repeats=1, steps=2)
    parser.add_argument("--stages", default="2,4,8", help="numbers of stages (default 2,4,8)")
    given = parser.parse_args(arguments)
    rows, data = [], {}
    for stages in map(int, given.stages.split(",")):
        peaks = {}
        for system, method in METHODS.items():
            flags = {**bench_model(num_hidden_layers=2 * stages), "method": method, "seq_length": 128}
            flags |= {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 8}
            flags |= {"stage_layers": ",".join(["2"] * stages)}
            print(f"{stages} stages: {system}", file=sys.stderr)
            ranks = run_case(Case(system, stages, "memory", system, flags, given.steps))
            peaks[system] = [rank["peak_saved_bytes"] for rank in ranks]
        data[str(stages)] = peaks
        rows.append([str(stages), *(f"{peaks[system][0] / 1e6:.2f}" for system in METHODS)])
    header = ["stages", "local, stage 0", "deepspeed 1F1B, stage 0"]
    write(given.output, "memory", f"{INTRODUCTION}\n{table(header, rows)}", {"peak_saved_bytes": data})
    return 0


if __name__ == "__main__":
    sys.exit(main())
