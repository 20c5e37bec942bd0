"""Step times as the simulator predicts them beside those that are measured.

python scripts/bench_prediction.py [--stages 2,4] [--micro_batches 1,2,4,8] [--repeats 2]

Passes and optimizer steps of each stage are timed in a run of 4 micro-batches; the simulator makes step times of them
for other numbers of micro-batches, which are then measured.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from llm_local.bench.calibration import SCHEDULES, calibrate
from llm_local.bench.cases import METHODS, BenchmarkError, Case, arguments_of, bench_model, run_case, table, write
from llm_local.files import ends_with_a_line
from llm_local.plan.times import Pipe, predict

CALIBRATED = 4
INTRODUCTION = """
Seconds of a step, predicted from the seconds of single passes in a run of 4 micro-batches, and measured; links count
nothing. 8 layers of width 256, micro-batches of 4 x 128 tokens, fp32, one thread a stage. Where there are fewer cores
than stages, stages share them in equal parts, in the simulation as well: passes and messages then count for the seconds
in which they had a core.
"""


def flags(system: str, micro_batches: int) -> dict[str, Any]:
    batch = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": micro_batches}
    return {**bench_model(), "method": METHODS[system], "seq_length": 128, **batch}


@ends_with_a_line(BenchmarkError)
def main(arguments: list[str] | None = None) -> int:
    parser = arguments_of(__doc__, repeats=2, steps=8)
    parser.add_argument("--stages", default="2,4", help="numbers of stages (default 2,4)")
    parser.add_argument("--micro_batches", default="1,2,4,8", help="of a step (default 1,2,4,8)")
    given = parser.parse_args(arguments)
    counts = [int(count) for count in given.micro_batches.split(",")]
    rows, data = [], []
    for stages in map(int, given.stages.split(",")):
        cores = shared_cores(stages)
        for system, schedule in SCHEDULES.items():
            print(f"{stages} stages: {system}", file=sys.stderr, flush=True)
            timed = Case(system, stages, "passes", system, flags(system, CALIBRATED), given.steps)
            seconds = calibrate(timed, given.repeats, shares_cores=cores is not None)
            for count in counts:
                predicted = predict(Pipe(schedule, seconds, count, num_cores=cores)).step_seconds
                case = Case(system, stages, "rate", system, flags(system, count), max(given.steps, 24 // count))
                measured = median(median(run_case(case)[-1]["seconds"]) for _ in range(given.repeats))
                error = predicted / measured - 1
                row = {"stages": stages, "system": system, "micro_batches": count, "predicted": predicted}
                data.append({**row, "measured": measured, "error": error})
                figures = [f"{predicted:.3f}", f"{measured:.3f}", f"{error:+.1%}"]
                rows.append([str(stages), system, str(count), *figures])
    header = ["stages", "", "micro-batches", "predicted, s", "measured, s", "error"]
    write(given.output, "prediction", f"{INTRODUCTION}\n{table(header, rows)}", {"steps": data})
    return 0


def shared_cores(stages: int) -> int | None:
    cores = len(os.sched_getaffinity(0))
    return cores if cores < stages else None


if __name__ == "__main__":
    sys.exit(main())
