"""Step times as the simulator predicts them beside those that are measured.

python scripts/bench_prediction.py [--stages 2,4] [--micro_batches 1,2,4,8] [--repeats 2]

Passes and optimizer steps of each stage are timed in a run of 4 micro-batches; the simulator makes step times of them
for other numbers of micro-batches, which are then measured.
"""

from __future__ import annotations

import sys
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from llm_local.benchmark import BenchmarkError, Case, arguments_of, bench_model, run_case, table, write
from llm_local.plan_times import StageSeconds, predict

SYSTEMS = {"local": ("chunked", "local"), "deepspeed": ("backprop", "1f1b")}
CALIBRATED = 4
INTRODUCTION = """
Seconds of a step, predicted from the seconds of single passes in a run of 4 micro-batches, and measured; links count
nothing. 8 layers of width 256, micro-batches of 4 x 128 tokens, fp32, one thread a stage. Four stages share two cores
where there are no more: a pass then takes as long as its neighbours let it, which differs with the number of
micro-batches.
"""


def flags(system: str, micro_batches: int) -> dict[str, Any]:
    batch = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": micro_batches}
    return {**bench_model(), "method": SYSTEMS[system][0], "seq_length": 128, **batch}


def stage_seconds(measured: dict[str, float]) -> StageSeconds:
    """Of what is not a wait for another stage: loading belongs to the forward pass, reducing to the optimizer."""
    forward = measured["ForwardPass"] + measured.get("LoadMicroBatch", 0.0)
    once = measured["OptimizerStep"] + measured.get("ReduceGrads", 0.0) + measured.get("ReduceTiedGrads", 0.0)
    return StageSeconds((forward,), (measured["BackwardPass"],), once)


def main(arguments: list[str] | None = None) -> int:
    parser = arguments_of(__doc__, repeats=2, steps=8)
    parser.add_argument("--stages", default="2,4", help="numbers of stages (default 2,4)")
    parser.add_argument("--micro_batches", default="1,2,4,8", help="of a step (default 1,2,4,8)")
    given = parser.parse_args(arguments)
    counts = [int(count) for count in given.micro_batches.split(",")]
    rows, data = [], []
    try:
        for stages in map(int, given.stages.split(",")):
            for system, (_, schedule) in SYSTEMS.items():
                print(f"{stages} stages: {system}", file=sys.stderr, flush=True)
                seconds = calibrate(system, stages, given.steps, given.repeats)
                for count in counts:
                    predicted = predict(schedule, seconds, count).step_seconds
                    case = Case(system, stages, "rate", system, flags(system, count), max(given.steps, 24 // count))
                    measured = median(median(run_case(case)[-1]["seconds"]) for _ in range(given.repeats))
                    error = predicted / measured - 1
                    row = {"stages": stages, "system": system, "micro_batches": count, "predicted": predicted}
                    data.append({**row, "measured": measured, "error": error})
                    figures = [f"{predicted:.3f}", f"{measured:.3f}", f"{error:+.1%}"]
                    rows.append([str(stages), system, str(count), *figures])
    except BenchmarkError as error:
        print(f"bench_prediction.py: {error}", file=sys.stderr)
        return 1
    header = ["stages", "", "micro-batches", "predicted, s", "measured, s", "error"]
    write(given.output, "prediction", f"{INTRODUCTION}\n{table(header, rows)}", {"steps": data})
    return 0


def calibrate(system: str, stages: int, steps: int, repeats: int) -> list[StageSeconds]:
    case = Case(system, stages, "passes", system, flags(system, CALIBRATED), steps)
    runs = [run_case(case) for _ in range(repeats)]
    found = []
    for stage in range(stages):
        own = [run[stage]["seconds"] for run in runs]
        found.append(stage_seconds({name: median(seconds[name] for seconds in own) for name in own[0]}))
    return found


if __name__ == "__main__":
    sys.exit(main())
