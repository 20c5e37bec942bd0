"""A step of one process beside one of a plain training loop, on the quickstart's model: what the library costs.

python scripts/bench_overhead.py [--repeats 5] [--steps 20]

Both train in the same process in turns, a step each, so that whatever else a machine does meets both.
"""

from __future__ import annotations

import sys
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).parents[1]))

from llm_local.bench.cases import ROOT, BenchmarkError, Case, Spread, arguments_of, in_turns, table, write
from llm_local.files import ends_with_a_line

QUICKSTART = {
    "config_name": str(ROOT / "configs/quickstart.json"),
    "seq_length": 256,
    "per_device_train_batch_size": 4,
    "max_grad_norm": 1.0,
}
SETTINGS = {
    "backprop": {"method": "backprop"},
    "backprop, ZeRO-1": {"method": "backprop", "deepspeed": str(ROOT / "configs/ds/zero1.json")},
    "chunked, 1 block of 8 layers": {"layers_per_block": 8},
}
INTRODUCTION = """
Seconds of a step of `Run.train_step`, of a plain loop (the model class, its loss, fused AdamW, clipping) and the ratio:
the median over the rounds of the steps' median ratio, and the smallest and largest. One core, fp32, the quickstart's
Llama, 4 x 256 tokens. Goal: at most 1.05.
"""


@ends_with_a_line(BenchmarkError)
def main(arguments: list[str] | None = None) -> int:
    given = arguments_of(__doc__, repeats=5, steps=20).parse_args(arguments)
    cases = [
        Case(name, 1, "beside_plain", "local", {**QUICKSTART, **flags}, given.steps) for name, flags in SETTINGS.items()
    ]
    found = in_turns(cases, given.repeats)
    rows, data = [], {}
    for name, rounds in found.items():
        ours, plain = ([median(ranks[0][which]) for ranks in rounds] for which in ("ours", "plain"))
        each = [median(a / b for a, b in zip(r[0]["ours"], r[0]["plain"], strict=True)) for r in rounds]
        data[name] = {"ours": ours, "plain": plain, "ratio": each}
        rows.append([name, Spread.of(ours).text(3), Spread.of(plain).text(3), Spread.of(each).text()])
    write(given.output, "overhead", f"{INTRODUCTION}\n{table(['run', 'ours, s', 'plain, s', 'ratio'], rows)}", data)
    return 0


if __name__ == "__main__":
    sys.exit(main())
