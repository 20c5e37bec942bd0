"""Bytes over a boundary for each token, counted where they are sent.

python scripts/bench_traffic.py
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from llm_local.bench.cases import BenchmarkError, Case, arguments_of, bench_model, run_case, table, write
from llm_local.files import ends_with_a_line

RUNS: dict[str, dict[str, Any]] = {
    "deepspeed 1F1B, bf16": {"method": "backprop", "bf16": True},
    "local, bf16": {"bf16": True},
    "local, int8": {"bf16": True, "wire_dtype": "int8"},
    "local, int4": {"bf16": True, "wire_dtype": "int4"},
    "local, fp32": {},
}
GOALS = {"local, bf16": "0.51", "local, int8": "0.27", "local, int4": "0.14"}
INTRODUCTION = """
Bytes that two stages send each other for one token of training, of 1F1B activations and gradients alone, of local
learning all that its links carry: hidden states, token ids, headers. Width 256, 4 micro-batches of 4 x 128 tokens.
"""


@ends_with_a_line(BenchmarkError)
def main(arguments: list[str] | None = None) -> int:
    given = arguments_of(__doc__, repeats=1, steps=3).parse_args(arguments)
    sent = {}
    for name, run in RUNS.items():
        flags = {**bench_model(), **run, "seq_length": 128, "per_device_train_batch_size": 4}
        flags |= {"gradient_accumulation_steps": 4}
        print(name, file=sys.stderr)
        ranks = run_case(Case(name, 2, "traffic", "local", flags, given.steps))
        sent[name] = sum(rank["bytes_a_step"] for rank in ranks) / (4 * 4 * 128)
    pipe = sent["deepspeed 1F1B, bf16"]
    rows = [[name, f"{bytes_:.1f}", f"{bytes_ / pipe:.3f}", GOALS.get(name, "")] for name, bytes_ in sent.items()]
    header = ["", "bytes a token", "of 1F1B in bf16", "goal, at most"]
    write(given.output, "traffic", f"{INTRODUCTION}\n{table(header, rows)}", {"bytes_a_token": sent})
    return 0


if __name__ == "__main__":
    sys.exit(main())
