"""Tokens a second of local learning beside backpropagation in pipelines, on the same model, rows and cores.

python scripts/bench_throughput.py [--micro_batches 1,2,4,8] [--systems local,deepspeed] [--repeats 3] [--steps 8]

Two stages with one core each. The systems take turns, so that a drift of the machine meets them all.
"""

from __future__ import annotations

import sys
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from llm_local.bench.cases import (
    METHODS,
    BenchmarkError,
    Case,
    Spread,
    arguments_of,
    bench_model,
    in_turns,
    ratios,
    table,
    write,
)
from llm_local.bench.peers import PEERS, missing
from llm_local.files import ends_with_a_line

PIPES = ("deepspeed", *PEERS)
GOALS = {1: 1.7, 2: 1.35, 4: 1.18, 8: 1.07}
INTRODUCTION = """
Seconds of a step, and how many times as fast as each backpropagating pipeline local learning is: the median over the
rounds of a round's ratio, and the smallest and largest. Two stages with a core each; 8 layers of width 256, 2048
pieces, micro-batches of 4 x 128 tokens, fp32. `deepspeed` is PipelineEngine's 1F1B; the others are schedules of
torch.distributed.pipelining; all train the same slices on the same rows and have equal losses. Local learning computes
one head more, 14 % of a stage.
"""


def flags(system: str, micro_batches: int) -> dict[str, Any]:
    return {
        **bench_model(),
        "method": METHODS.get(system, "chunked"),
        "seq_length": 128,
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": micro_batches,
    }


def seconds_of(name: str, ranks: list[dict[str, Any]]) -> float:
    """Of a step, by the rank that has the last stage."""
    return median(ranks[0 if name == "torch-zbv" else -1]["seconds"])


@ends_with_a_line(BenchmarkError)
def main(arguments: list[str] | None = None) -> int:
    parser = arguments_of(__doc__, repeats=3, steps=8)
    parser.add_argument("--micro_batches", default="1,2,4,8", help="of a step (default 1,2,4,8)")
    parser.add_argument("--systems", default=",".join(PIPES), help=f"beside local, of {', '.join(PIPES)}; default: all")
    given = parser.parse_args(arguments)
    pipes = given.systems.split(",")
    if unknown := sorted(set(pipes) - set(PIPES)):
        parser.error(f"--systems {','.join(unknown)}: choose of {', '.join(PIPES)}")
    if absent := [line for line in map(missing, pipes) if line]:
        parser.error(f"{'; '.join(absent)}: leave it out (--systems)")
    rows, data = [], {}
    for micro_batches in map(int, given.micro_batches.split(",")):
        # torch's schedules want as many as there are stages
        possible = ["local", *(pipe for pipe in pipes if pipe == "deepspeed" or micro_batches > 1)]
        steps = max(given.steps, 24 // micro_batches)
        print(f"{micro_batches} micro-batches", file=sys.stderr)
        found = in_turns([Case(s, 2, "rate", s, flags(s, micro_batches), steps) for s in possible], given.repeats)
        seconds = {name: [seconds_of(name, ranks) for ranks in rounds] for name, rounds in found.items()}
        data[str(micro_batches)] = seconds
        local = seconds["local"]
        times = [ratios(seconds[pipe], local).text() if pipe in seconds else "" for pipe in pipes]
        rows.append([str(micro_batches), Spread.of(local).text(3), *times, str(GOALS.get(micro_batches, ""))])
    header = ["micro-batches", "local, s", *(f"against {pipe}" for pipe in pipes), "goal against deepspeed"]
    write(given.output, "throughput", f"{INTRODUCTION}\n{table(header, rows)}", {"seconds_a_step": data})
    return 0


if __name__ == "__main__":
    sys.exit(main())
