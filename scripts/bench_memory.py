"""Bytes that a rank takes, beside what a start expects; activations of stage 0, against the number of stages.

python scripts/bench_memory.py [--stages 2,4,8] [--layouts "2 stages, bf16"]    (what is left out stays as it was)
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from llm_local.bench.cases import METHODS, ROOT, BenchmarkError, Case, arguments_of, bench_model, run_case, table, write
from llm_local.files import ends_with_a_line

EXPECTED = """
## Expected and measured

MB of a rank: what the start expected; the most bytes that tensors took at a time, from before the stage was made to the
end of 3 steps, counted by torch's profiler; the most resident memory, less what the process took before. Of the rank
that took most. A Llama of 8 layers of width 512 and 16,384 tokens; fp32 and 4 rows of 256 tokens where nothing else is
said. Tensors that gloo's threads free are counted until another one has their place, so that a count may be above what
was resident.
"""
ALIVE = """
## Activations and the number of stages

The most bytes that autograd graphs of stage 0 held at a time, counted tensor by tensor, in MB. Two layers a stage, 8
micro-batches of 4 x 128 tokens. Local learning has one micro-batch there however long the pipe; 1F1B has one for each
stage. Local learning's includes its head and loss.
"""
WIDE = {"hidden_size": 512, "intermediate_size": 1408, "vocab_size": 16384}
ALONE: dict[str, Any] = {"num_stages": 1}  # the ranks are replicas
ZERO = {stage: str(ROOT / f"configs/ds/zero{stage}.json") for stage in (1, 2, 3)}
OFFLOAD = {stage: str(ROOT / f"configs/ds/zero{stage}_offload.json") for stage in (2, 3)}
LAYERS, ROWS = {"tensor_parallel_size": 2}, {"sequence_parallel_size": 2}
# two ranks each, where the name says no other number
LAYOUTS: dict[str, dict[str, Any]] = {
    "2 stages": {},
    "2 stages, bf16": {"bf16": True},
    "2 stages, 2 blocks each, 4 micro-batches": {
        "layers_per_block": 2,
        "gradient_accumulation_steps": 4,
    },
    "2 stages, decoder heads, 32 rows, checkpointing": {
        "head": "decoder",
        "head_layers": 1,
        "per_device_train_batch_size": 32,
        "gradient_checkpointing": True,
    },
    "2 stages, shared head, 16 rows": {
        "head": "shared",
        "per_device_train_batch_size": 16,
    },
    "2 stages, 1F1B, 4 micro-batches of 8 rows": {
        "method": "backprop",
        "gradient_accumulation_steps": 4,
        "per_device_train_batch_size": 8,
    },
    "2 stages, checkpoints": {"save_steps": 1},
    "2 replicas, fp32, ZeRO-1": {**ALONE, "deepspeed": ZERO[1]},
    "2 replicas, bf16, ZeRO-1": {**ALONE, "bf16": True, "deepspeed": ZERO[1]},
    "2 replicas, bf16, ZeRO-2, 2 micro-batches": {
        **ALONE,
        "bf16": True,
        "deepspeed": ZERO[2],
        "gradient_accumulation_steps": 2,
    },
    "2 replicas, bf16, ZeRO-2, optimizer offloaded": {**ALONE, "bf16": True, "deepspeed": OFFLOAD[2]},
    "2 replicas, bf16, ZeRO-3": {**ALONE, "bf16": True, "deepspeed": ZERO[3]},
    "2 replicas, fp32, ZeRO-3, 32 rows": {**ALONE, "deepspeed": ZERO[3], "per_device_train_batch_size": 32},
    "2 replicas that meet every 2 steps": {**ALONE, "replica_sync_steps": 2},
    "1 rank, checkpoints": {"save_steps": 1},
    "1 rank, bf16": {"bf16": True},
    "1 rank, bf16, ZeRO-1": {"bf16": True, "deepspeed": ZERO[1]},
    "1 rank, bf16, ZeRO-2, 2 micro-batches": {
        "bf16": True,
        "deepspeed": ZERO[2],
        "gradient_accumulation_steps": 2,
    },
    "2 ranks divide layers": {**ALONE, **LAYERS},
    "2 ranks divide layers, bf16, ZeRO-1, 16 rows": {
        **ALONE,
        **LAYERS,
        "bf16": True,
        "deepspeed": ZERO[1],
        "per_device_train_batch_size": 16,
    },
    "2 ranks divide layers, 32 rows, checkpointing": {
        **ALONE,
        **LAYERS,
        "per_device_train_batch_size": 32,
        "gradient_checkpointing": True,
    },
    "2 ranks divide layers, 2 blocks, decoder heads, 2 micro-batches of 8 rows": {
        **ALONE,
        **LAYERS,
        "layers_per_block": 4,
        "head": "decoder",
        "head_layers": 1,
        "gradient_accumulation_steps": 2,
        "per_device_train_batch_size": 8,
    },
    "2 ranks divide layers, backpropagation, 8 rows": {
        **ALONE,
        **LAYERS,
        "method": "backprop",
        "per_device_train_batch_size": 8,
    },
    "2 stages of 2 ranks that divide layers, 8 rows": {**LAYERS, "per_device_train_batch_size": 8},
    "2 replicas of 2 ranks that divide layers, bf16, ZeRO-2": {**ALONE, **LAYERS, "bf16": True, "deepspeed": ZERO[2]},
    "2 ranks divide rows": {**ALONE, **ROWS},
    "2 ranks divide rows, bf16, ZeRO-2, 16 rows": {
        **ALONE,
        **ROWS,
        "bf16": True,
        "deepspeed": ZERO[2],
        "per_device_train_batch_size": 16,
    },
    "2 ranks divide rows, ZeRO-3, 16 rows": {
        **ALONE,
        **ROWS,
        "deepspeed": ZERO[3],
        "per_device_train_batch_size": 16,
    },
    "2 ranks divide rows, 32 rows, checkpointing": {
        **ALONE,
        **ROWS,
        "per_device_train_batch_size": 32,
        "gradient_checkpointing": True,
    },
    "2 ranks divide rows, backpropagation, 8 rows": {
        **ALONE,
        **ROWS,
        "method": "backprop",
        "per_device_train_batch_size": 8,
    },
    "2 stages of 2 ranks that divide rows, shared head, 8 rows": {
        **ROWS,
        "head": "shared",
        "per_device_train_batch_size": 8,
    },
    "2 replicas of 2 ranks that divide rows, ZeRO-1": {**ALONE, **ROWS, "deepspeed": ZERO[1]},
}


def flags_of(name: str) -> tuple[int, dict[str, Any]]:
    """Of a layout: how many ranks, and its flags."""
    shared = {**bench_model(**WIDE, num_hidden_layers=8), "seq_length": 256, "per_device_train_batch_size": 4}
    ranks = 1 if name.startswith("1 rank") else 4 if " of 2 ranks" in name else 2
    return ranks, {"num_stages": 2, **shared, **LAYOUTS[name]}


def peaks(name: str, steps: int) -> list[dict[str, Any]]:
    """What each rank of a layout measured."""
    ranks, flags = flags_of(name)
    return run_case(Case(name, ranks, "peak", "local", {**flags, "num_stages": min(ranks, flags["num_stages"])}, steps))


def saved_bytes(system: str, stages: int) -> list[int]:
    """The most bytes that graphs of each rank held."""
    flags = {**bench_model(num_hidden_layers=2 * stages), "method": METHODS[system], "seq_length": 128}
    flags |= {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 8}
    flags |= {"stage_layers": ",".join(["2"] * stages)}
    return [rank["peak_saved_bytes"] for rank in run_case(Case(system, stages, "memory", system, flags, 2))]


def page(layouts: dict[str, Any], saved: dict[str, Any]) -> str:
    rows = []
    for name in (name for name in LAYOUTS if name in layouts):
        most = max(layouts[name], key=lambda rank: rank["counted"])
        sizes = [most[what] / 1e6 for what in ("expected", "counted", "resident")]
        rows.append([name, *(f"{size:.0f}" for size in sizes), f"{sizes[0] / sizes[1]:.2f}"])
    expected = table(["layout", "expected", "counted", "resident", "expected / counted"], rows)
    rows = [[n, *(f"{saved[n][system][0] / 1e6:.2f}" for system in METHODS)] for n in sorted(saved, key=int)]
    stages = table(["stages", "local, stage 0", "deepspeed 1F1B, stage 0"], rows)
    return f"{EXPECTED}\n{expected}\n{ALIVE}\n{stages}"


@ends_with_a_line(BenchmarkError)
def main(arguments: list[str] | None = None) -> int:
    parser = arguments_of(__doc__, repeats=1, steps=3)
    parser.add_argument("--stages", default="2,4,8", help="numbers of stages (default 2,4,8; '': none)")
    parser.add_argument("--layouts", default="", help="those whose name has this alone (default all)")
    given = parser.parse_args(arguments)
    os.environ.setdefault("MALLOC_MMAP_THRESHOLD_", "131072")  # what is freed leaves the process
    file = given.output / "memory.json"
    data = json.loads(file.read_text()) if file.exists() else {}
    layouts, by_stages = data.setdefault("peak_bytes", {}), data.setdefault("peak_saved_bytes", {})
    for name in (name for name in LAYOUTS if given.layouts in name):
        print(name, file=sys.stderr, flush=True)
        layouts[name] = peaks(name, given.steps)
        file.write_text(json.dumps(data))
    for stages in filter(None, given.stages.split(",")):
        print(f"{stages} stages", file=sys.stderr, flush=True)
        by_stages[stages] = {system: saved_bytes(system, int(stages)) for system in METHODS}
    data.pop("machine", None)
    write(given.output, "memory", page(layouts, by_stages), data)
    return 0


if __name__ == "__main__":
    sys.exit(main())
