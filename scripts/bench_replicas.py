"""What replicas lose that meet rarely, and what they save: validation loss and traffic against --replica_sync_steps.

python scripts/bench_replicas.py [--steps 800] [--repeats 1]

Runs under torchrun, about a minute each on two cores; one that is there is not run again.
"""

from __future__ import annotations

import sys
from pathlib import Path
from statistics import mean
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from llm_local.bench.cases import ROOT, BenchmarkError, arguments_of, table, write
from llm_local.bench.curves import train
from llm_local.config import Config
from llm_local.data.tokenizer import builtin_tokenizer_dir
from llm_local.files import ends_with_a_line
from llm_local.records import read_records
from llm_local.report.page import report_problem

ROWS, TOKENS = 4, 128
NAMES = (
    "replica_sync_steps",
    "outer_learning_rate",
    "outer_momentum",
    "replica_sync_fragments",
    "replica_sync_delay",
)
PLAIN = (0, 0.0, 0.0, 1, 0)
# as NAMES says
RUNS = [
    PLAIN,
    *((steps, 1.0, 0.0, 1, 0) for steps in (1, 10, 50, 100)),
    *((steps, 0.7, 0.9, 1, 0) for steps in (1, 10, 50, 100)),
    (50, 0.7, 0.5, 1, 0),
    *((50, 0.7, 0.5, 4, delay) for delay in (0, 5)),
]
INTRODUCTION = """
An 8-layer Llama of 0.18M parameters as two blocks in one stage with two replicas, {steps} steps of 2 x 4 x 128 tokens
of the built-in corpus, AdamW at 1e-2. "Meet every": `--replica_sync_steps`; "rate", "momentum": of the outer step; at 1
and 0 it is the mean; "parts": `--replica_sync_fragments`; "late": `--replica_sync_delay`. Losses are of 512 rows of
held-out text at the end, of the blocks of layers 0-3 and 0-7{seeds}.

Traffic is what both replicas send each other in a ring, as counted (`sent_replica_bytes`), of float32 numbers; that of
DeepSpeed's all-reduce, which nobody counts, is one meeting's in each step, and half of it in bf16. "At once": the most
that a step has sent, MB.
"""


def flags_of(steps: int, seed: int) -> dict[str, Any]:
    """Of all runs."""
    return {
        "config_name": "configs/studies/cpu.json",
        "tokenizer_name": builtin_tokenizer_dir(Config().cache_dir, vocab_size=1024),
        "layers_per_block": 4,
        "seq_length": TOKENS,
        "per_device_train_batch_size": ROWS,
        "max_steps": steps,
        "logging_steps": 1,
        "learning_rate": 1e-2,
        "warmup_ratio": 0.1,
        "lr_scheduler_type": "cosine",
        "weight_decay": 0.1,
        "adam_beta2": 0.95,
        "eval_batches": 64,
        "seed": seed,
    }


@ends_with_a_line(BenchmarkError)
def main(arguments: list[str] | None = None) -> int:
    parser = arguments_of(__doc__, repeats=1, steps=800)
    parser.add_argument("--runs", type=Path, default=ROOT / "runs/replicas", help="folder of the runs and their page")
    given = parser.parse_args(arguments)
    found: dict[tuple[float, ...], dict[str, Any]] = {}
    for run in RUNS:
        flags: dict[str, Any] = {} if run == PLAIN else dict(zip(NAMES, run, strict=True))
        losses, sent, most = [], 0, 0
        for seed in range(42, 42 + given.repeats):
            folder = given.runs / f"{'-'.join(map(str, run))}-{given.steps}-{seed}"
            print(folder.name, file=sys.stderr, flush=True)
            train(folder, 2, {**flags_of(given.steps, seed), **flags})
            records = read_records(folder / "metrics/stage-00.jsonl")
            losses.append([record["block_losses"] for record in records if record["split"] == "eval"][-1])
            of_step = [record["sent_replica_bytes"] or 0 for record in records if record["split"] == "train"]
            sent, most = sent + sum(of_step), max(most, *of_step)
        blocks = [mean(of_block) for of_block in zip(*losses, strict=True)]
        tokens = given.repeats * given.steps * 2 * ROWS * TOKENS
        found[run] = {"losses": losses, "mean": blocks, "bytes_a_token": sent / tokens, "most_bytes": most}
    each = found[PLAIN]["bytes_a_token"] = found[RUNS[1]]["bytes_a_token"]
    found[PLAIN]["most_bytes"] = found[RUNS[1]]["most_bytes"]
    rows = []
    for run, one in found.items():
        meeting = ["1, by DeepSpeed", "", "", "", ""] if run == PLAIN else [f"{number:g}" for number in run]
        losses = [*(f"{loss:.4f}" for loss in one["mean"]), f"{one['mean'][-1] - found[PLAIN]['mean'][-1]:+.4f}"]
        share = f"{one['bytes_a_token'] / each:.3g}"
        rows.append([*meeting, *losses, f"{one['bytes_a_token']:,.0f}", share, f"{one['most_bytes'] / 1e6:.2f}"])
    header = ["meet every", "rate", "momentum", "parts", "late"]
    header += ["loss, block 0", "block 1", "less plain's", "bytes a token", "share", "at once"]
    seeds = f"; means over {given.repeats} seeds" if given.repeats > 1 else ""
    said = INTRODUCTION.format(steps=given.steps, seeds=seeds)
    data = {"-".join(map(str, run)): one for run, one in found.items()}
    page = given.runs / "report.html"
    folders = [given.runs / f"{'-'.join(map(str, run))}-{given.steps}-42" for run in RUNS]
    print(report_problem(folders, page) or f"report: {page}", file=sys.stderr)
    write(given.output, "replicas", f"{said}\n{table(header, rows)}", {"steps": given.steps, "runs": data})
    return 0


if __name__ == "__main__":
    sys.exit(main())
