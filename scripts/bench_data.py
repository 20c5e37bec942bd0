"""Data: tokenising beside `datasets.map` alone, the start from prepared data, how long steps wait for it, and memory.

python scripts/bench_data.py [--megabytes 100,1000] [--repeats 3] [--steps 20]

The text is the built-in corpus, repeated with words exchanged at random, in a temporary folder.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import psutil
from datasets import Dataset, disable_progress_bars, load_dataset
from transformers import AutoTokenizer
from transformers.utils import logging

from llm_local.bench.cases import (
    ROOT,
    BenchmarkError,
    Spread,
    arguments_of,
    bench_model,
    ratios,
    table,
    torchrun,
    write,
)
from llm_local.config import Config
from llm_local.data import corpus
from llm_local.data.prepared import Job, prepare_tokens
from llm_local.data.tokenizer import builtin_tokenizer_dir
from llm_local.files import ends_with_a_line
from llm_local.timeline.measured import LOAD, measured, read_trace

EXCHANGED = 0.05  # of the words
SEQ_LENGTH = 512
SAMPLED_SECONDS = 0.1
INTRODUCTION = """
**Tokenising.** Millions of tokens a second of prepare_data's own work, reading and writing included, and of
`datasets.map` with the same fast tokenizer and nothing else, on the same documents and processes, in turns.

**Start.** From prepared data: seconds of `prepare_all` in a new process, imports left out; and the share of a training
step in which stage 0 waits for its rows, from the trace of a run of two stages.

**Memory.** Of prepare_data and its two processes together, less the pages of mapped files, which the system takes back
when it needs them.
"""
START = """
import json, sys, time
from transformers.utils import logging
from llm_local.config import from_flat
from llm_local.data.sets import prepare_all
from llm_local.data.tokenizer import load_tokenizer
logging.set_verbosity_error()
config = from_flat(json.loads(sys.argv[1]))
tokenizer = load_tokenizer(config)
start = time.perf_counter()
data = prepare_all(config, tokenizer)
data.train.batch(0, 8)
print(json.dumps([time.perf_counter() - start, data.sources[0].tokens.tokens]))
"""


def write_corpus(path: Path, megabytes: float) -> None:
    """Documents of the built-in corpus as JSON lines, over and over, each time with other words exchanged."""
    documents, drawn = list(corpus.documents(corpus.stdlib_folder())), random.Random(0)
    words = [word for text in documents[::50] for word in text.split(" ")]
    written = 0
    with path.open("w") as file:
        while True:
            for text in documents:
                parts = text.split(" ")
                for _ in range(int(len(parts) * EXCHANGED)):
                    parts[drawn.randrange(len(parts))] = drawn.choice(words)
                written += file.write(json.dumps({"text": " ".join(parts)}) + "\n")
                if written >= megabytes * 1e6:
                    return


def tokenising(folder: Path, repeats: int, workers: int) -> dict[str, list[float]]:
    """Tokens a second of both, by round."""
    path = folder / "speed.jsonl"
    write_corpus(path, 40)
    tokenizer = AutoTokenizer.from_pretrained(bench_model()["tokenizer_name"])
    rows: Any = load_dataset("json", data_files=str(path), split="train", cache_dir=str(folder / "datasets"))
    found: dict[str, list[float]] = {"ours": [], "datasets.map": []}
    for number in range(repeats):
        for name in found:
            print(f"round {number + 1} of {repeats}: {name}", file=sys.stderr)
            start = time.perf_counter()
            if name == "ours":
                job = Job(rows, "text", tokenizer, tokenizer.eos_token_id, folder / f"ours-{number}")
                count = prepare_tokens(job, "bench", workers).tokens - rows.num_rows
            else:
                count = _map_alone(rows, tokenizer, workers, folder / f"theirs-{number}.arrow")
            found[name].append(count / (time.perf_counter() - start))
    return found


def _map_alone(rows: Dataset, tokenizer: Any, workers: int, cache: Path) -> int:
    def encode(batch: dict[str, list[str]]) -> dict[str, Any]:
        options = {"add_special_tokens": False, "return_attention_mask": False, "verbose": False}
        return {"input_ids": tokenizer(batch["text"], **options)["input_ids"]}

    made = rows.map(
        encode,
        batched=True,
        num_proc=workers if workers > 1 else None,
        remove_columns=["text"],
        cache_file_name=str(cache),
    )
    return sum(len(chunk.flatten()) for chunk in made.data.column("input_ids").chunks)


def memory(command: list[str]) -> tuple[float, float]:
    """Most bytes of the command and its children that belong to no file, sampled, and its seconds."""
    start, most = time.perf_counter(), 0.0
    with tempfile.TemporaryFile() as log:
        process = psutil.Popen(command, stdout=log, stderr=log, cwd=ROOT)
        while process.poll() is None:
            most = max(most, sum(map(_anonymous_bytes, _family(process))))
            time.sleep(SAMPLED_SECONDS)
        if process.returncode:
            log.seek(0)
            raise BenchmarkError(log.read().decode()[-2000:])
    return most, time.perf_counter() - start


def _family(process: psutil.Process) -> Iterator[psutil.Process]:
    try:
        yield from (process, *process.children(recursive=True))
    except psutil.NoSuchProcess:
        return


def _anonymous_bytes(process: psutil.Process) -> float:
    try:
        lines = Path(f"/proc/{process.pid}/status").read_text().splitlines()
    except OSError:  # it has ended
        return 0
    return sum(1024 * int(line.split()[1]) for line in lines if line.startswith("RssAnon"))


def data_flags(path: Path, cache: Path, workers: int) -> dict[str, Any]:
    folder = builtin_tokenizer_dir(Config().cache_dir, vocab_size=2048)
    flags = {"train_file": str(path), "cache_dir": str(cache), "tokenizer_name": str(folder)}
    return {**flags, "seq_length": SEQ_LENGTH, "preprocessing_num_workers": workers}


def as_arguments(flags: dict[str, Any]) -> list[str]:
    return [text for name, value in flags.items() for text in (f"--{name}", str(value))]


def start_seconds(flags: dict[str, Any]) -> tuple[float, int]:
    """Of prepare_all on what is prepared, and how many tokens that are."""
    command = [sys.executable, "-c", START, json.dumps(flags)]
    return tuple(json.loads(subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT).stdout))


def waiting(flags: dict[str, Any], folder: Path, steps: int) -> float:
    """The share of a step that stage 0 spends on loading its micro-batches."""
    run = {**bench_model(), **flags, "output_dir": str(folder / "run"), "num_stages": 2, "max_steps": steps}
    run |= {"trace": True, "eval_batches": 0, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 4}
    command = [*torchrun(2), "scripts/pretrain.py", *as_arguments(run)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)
    if done.returncode:
        raise BenchmarkError(done.stderr[-2000:])
    trace = read_trace(folder / "run")
    stage = measured(trace, trace.steps[2:])[0]
    return stage.seconds((LOAD,)) / sum(end - start for start, end in stage.steps.values())


@ends_with_a_line(BenchmarkError)
def main(arguments: list[str] | None = None) -> int:
    parser = arguments_of(__doc__, repeats=3, steps=20)
    parser.add_argument("--megabytes", default="100,1000", help="of text whose memory is measured (default 100,1000)")
    parser.add_argument("--workers", type=int, default=2, help="processes that tokenise (default 2)")
    given = parser.parse_args(arguments)
    logging.set_verbosity_error()
    disable_progress_bars()
    with tempfile.TemporaryDirectory(prefix="llm_local-bench-") as name:
        folder = Path(name)
        data = measure(folder, given.repeats, given.steps, given.workers, given.megabytes)
    write(given.output, "data", f"{INTRODUCTION}\n{tables(data)}", data)
    return 0


def measure(folder: Path, repeats: int, steps: int, workers: int, megabytes: str) -> dict[str, Any]:
    data: dict[str, Any] = {"tokens_a_second": tokenising(folder, repeats, workers), "memory": {}}
    for size in megabytes.split(","):
        print(f"{size} MB of text", file=sys.stderr)
        path, cache = folder / f"{size}.jsonl", folder / f"cache-{size}"
        write_corpus(path, float(size))
        flags = data_flags(path, cache, workers)
        command = [sys.executable, "scripts/prepare_data.py", *as_arguments(flags)]
        (first, first_seconds), (again, seconds) = memory(command), memory(command)
        started, tokens = start_seconds(flags)
        data["memory"][size] = {
            "prepare_bytes": first,
            "prepare_seconds": first_seconds,
            "again_bytes": again,
            "again_seconds": seconds,
            "start_seconds": started,
            "tokens": tokens,
        }
        if "load_share" not in data:
            print("steps that wait", file=sys.stderr)
            data["load_share"] = waiting(flags, folder, steps)
        path.unlink()
    return data


def tables(data: dict[str, Any]) -> str:
    rates = data["tokens_a_second"]
    speeds = [*(Spread.of(r / 1e6 for r in rates[name]).text() for name in rates), ratios(*rates.values()).text()]
    rows = [
        [
            size,
            f"{found['tokens'] / 1e6:.1f}",
            f"{found['prepare_seconds']:.0f}",
            f"{found['prepare_bytes'] / 1e6:.0f}",
            f"{found['start_seconds']:.2f}",
        ]
        for size, found in data["memory"].items()
    ]
    header = ["MB of text", "million tokens", "prepare_data, s", "its memory, MB", "start from it, s"]
    return "\n\n".join(
        [
            table(["ours, M tokens/s", "datasets.map alone", "ratio (goal 0.8)"], [speeds]),
            f"Steps wait {data['load_share']:.2%} of their time for data (goal: 1 % at most).",
            table(header, rows),
        ]
    )


if __name__ == "__main__":
    sys.exit(main())
