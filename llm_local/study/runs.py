"""Trains a study's points, several runs side by side, each an ordinary run on one rank in a process of its own.

    OUTPUT/runs/chunked-4-shared-seed1/           the run's own folder, as pretrain.py writes it
    OUTPUT/runs/chunked-4-shared-seed1/log.txt    what it had to say
    OUTPUT/runs/chunked-4-shared-seed1/flags.json the settings it was started with
    OUTPUT/runs/chunked-4-shared-seed1/result.json   its losses; written last: a run that has one is not run again
    OUTPUT/results.json                           settings and losses of all that are finished

With that last file alone a study goes on on another machine, and another day.

A fork server imports torch, DeepSpeed and the project once, so that a run starts in a second or two.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

from tqdm import tqdm

from llm_local.checkpoint.line import committed
from llm_local.config import Config, ConfigError
from llm_local.data.sets import prepare, tokenizer_of
from llm_local.data.tokenizer import builtin_tokenizer_dir
from llm_local.files import Json, write_json, write_whole
from llm_local.flags import MACHINE, START, deciding
from llm_local.model.model_config import load_model_config
from llm_local.records import read_records
from llm_local.study.comparison import Result, summarise
from llm_local.study.points import Point, Study

PRELOAD = [
    "torch._dynamo",
    "torch._inductor.compile_fx",
    "deepspeed",
    "deepspeed.runtime.zero.muon.muon_optimizer",
    "transformers.models.llama.modeling_llama",
    "datasets",
    "llm_local.train",
    "llm_local.study.runs",
]
POLL_SECONDS = 1.0
BAR = "{n:.1f}/{total} runs |{bar:20}| {elapsed}<{remaining}{postfix}"


@dataclass(frozen=True)
class StudyRun:
    """One seed of one point."""

    point: Point
    seed: int
    folder: Path
    config: Config
    flags: Json  # what makes two runs the same, wherever they are

    @property
    def name(self) -> str:
        return self.folder.name

    @property
    def is_finished(self) -> bool:
        return (self.folder / "result.json").exists()

    def result(self) -> Result:
        return Result.from_json(json.loads((self.folder / "result.json").read_text()))


def runs_of(study: Study, output: Path) -> list[StudyRun]:
    """All runs, seed by seed, so that a study that is cut short has every point once rather than some points often.

    Makes the built-in tokenizer of the study's size if there is none yet.
    """
    runs = []
    tokenizer = None
    if study.builtin_vocab_size is not None:
        tokenizer = str(builtin_tokenizer_dir(study.base.config.cache_dir, vocab_size=study.builtin_vocab_size))
    for seed in study.seeds:
        for point in study.points:
            folder, config = output / "runs" / f"{point.name}-seed{seed}", point.config
            train = replace(config.train, output_dir=str(folder), seed=seed)
            model = replace(config.model, tokenizer_name=tokenizer or config.model.tokenizer_name)
            config = replace(config, train=train, model=model)
            runs.append(StudyRun(point, seed, folder, config, _identity(config, study.builtin_vocab_size)))
    return runs


def _identity(config: Config, builtin_vocab_size: int | None) -> Json:
    """Flags, tokenizer and model of a run, without the places where they lie."""
    model = json.dumps(load_model_config(config.model).to_diff_dict(), sort_keys=True, default=str)
    places = (*deciding(START, MACHINE), "tokenizer_name")
    flags = {name: value for name, value in config.flat().items() if name not in places}
    tokenizer = builtin_vocab_size or config.model.tokenizer_name
    return flags | {"tokenizer": tokenizer, "model": hashlib.sha256(model.encode()).hexdigest()[:8]}


def keep_results(runs: Sequence[StudyRun], path: Path) -> None:
    """Writes the finished runs, so that `take_results` finds them wherever the file is taken."""
    known = Config().flat()
    found = {
        run.name: {
            "flags": {name: value for name, value in run.flags.items() if known.get(name) != value},
            "result": asdict(run.result()),
        }
        for run in runs
        if run.is_finished
    }
    write_whole(path, json.dumps(found, indent=1) + "\n")


def take_results(runs: Sequence[StudyRun], path: Path) -> None:
    """Finishes the runs that the file knows, if there is one. Raises ValueError naming a file that cannot be read."""
    if not path.exists():
        return
    try:
        found = {name: (dict(kept["flags"]), Result.from_json(kept["result"])) for name, kept in _read(path).items()}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} has no results of a study ({error!r}); remove it") from error
    for run in runs:
        if run.name in found and not run.is_finished:
            flags, result = found[run.name]
            run.folder.mkdir(parents=True, exist_ok=True)
            write_json(run.folder / "flags.json", flags)
            write_whole(run.folder / "result.json", json.dumps(asdict(result)))


def _read(path: Path) -> Json:
    return json.loads(path.read_text())


def stale_runs(runs: Sequence[StudyRun]) -> list[str]:
    """Finished runs that were trained with other settings than the study's: what is different, and the repair."""
    problems = []
    for run in runs:
        if run.is_finished and (changes := _changes(run)):
            problems.append(
                f"{run.folder} was trained with other settings ({'; '.join(changes)}); "
                "remove that folder to train it again, or choose another --output_dir"
            )
    return problems


def _changes(run: StudyRun) -> list[str]:
    """'learning_rate: 0.001, now 0.002' for each setting with which the run in the folder was started."""
    try:
        before = json.loads((run.folder / "flags.json").read_text())
    except (OSError, ValueError):
        return ["flags.json cannot be read"]
    before = {**Config().flat(), **before}  # a flag that was not there yet had what is now its default
    return [f"{n}: {before.get(n)}, now {value}" for n, value in run.flags.items() if before.get(n) != value]


def arguments_of(run: StudyRun) -> list[str]:
    """pretrain.py's arguments: an unfinished run goes on from its last checkpoint, or starts again."""
    flags = run.config.flat()
    if committed(run.folder) and not _changes(run):
        flags["resume_from_checkpoint"] = "true"
    else:
        flags["overwrite_output_dir"] = True
    return [part for name, value in flags.items() if value is not None for part in (f"--{name}", str(value))]


def train_all(runs: Sequence[StudyRun], jobs: int, say: Callable[[str], None]) -> list[str]:
    """Trains what is not finished, so many runs side by side. Returns a line for each run that failed.

    Raises ConfigError, before any run starts, for runs that were trained with other settings and for wrong data.
    KeyboardInterrupt ends the runs under way; another call goes on.
    """
    problems = stale_runs(runs)
    if problems:
        raise ConfigError(problems)
    pending = deque(run for run in runs if not run.is_finished)
    if not pending:
        return []
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    first = pending[0].config
    prepare(first, tokenizer_of(first), progress=sys.stderr.isatty())  # once, and not by all runs at a time
    failures: list[str] = []
    active: dict[Any, tuple[Any, StudyRun, float]] = {}
    done = len(runs) - len(pending)
    bar = tqdm(
        total=len(runs), initial=done, smoothing=0, disable=not sys.stderr.isatty(), bar_format=BAR, dynamic_ncols=True
    )
    try:
        while pending or active:
            while pending and len(active) < jobs:
                run = pending.popleft()
                process = _start(context, run)
                active[process.sentinel] = process, run, time.monotonic()
            for sentinel in wait(list(active), timeout=POLL_SECONDS):
                process, run, start = active.pop(sentinel)
                process.join()
                failure = _conclude(run, process.exitcode)
                failures += [failure] if failure else []
                done += 1
                say(failure or _line(run, time.monotonic() - start))
            bar.n = done + sum(_share(run) for _, run, _ in active.values())
            bar.set_postfix_str(", ".join(run.name for _, run, _ in active.values()))
    finally:
        for process, _, _ in active.values():
            process.kill()
        for process, _, _ in active.values():
            process.join()
        bar.close()
    return failures


def _start(context: Any, run: StudyRun) -> Any:
    """The process that trains the run."""
    arguments = arguments_of(run)
    run.folder.mkdir(parents=True, exist_ok=True)
    write_json(run.folder / "flags.json", run.flags)
    process = context.Process(target=_train, args=(arguments, str(run.folder / "log.txt")), daemon=True)
    process.start()
    return process


def _train(arguments: list[str], log: str) -> None:
    """Trains in this process, which ends with the status of the run, and with its parent."""
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
        os.dup2(descriptor, stream.fileno())
    threading.Thread(target=_end_with_parent, daemon=True).start()
    os.environ["OMP_NUM_THREADS"] = "1"
    import torch

    from llm_local.train import main

    torch.set_num_threads(1)
    sys.exit(main(arguments))


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _conclude(run: StudyRun, status: int) -> str | None:
    """Writes the result of a run that has ended, or says why there is none."""
    reason = f"exit status {status}"
    if status == 0:
        try:
            result = summarise(read_records(run.folder / "metrics" / "stage-00.jsonl"))
            write_whole(run.folder / "result.json", json.dumps(asdict(result)))
            return None
        except ValueError as error:
            reason = str(error)
    log = run.folder / "log.txt"
    lines = (
        [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()] if log.exists() else []
    )
    return f"{run.name} failed: {lines[-1] if status and lines else reason} ({log})"


def _line(run: StudyRun, seconds: float) -> str:
    losses = " ".join(f"{loss:.4f}" for loss in run.result().block_losses)
    return f"{run.name}: {seconds:.0f} s, validation loss by block: {losses}"


def _share(run: StudyRun) -> float:
    """How much of the run is done, from 0 to 1, as its metrics have it."""
    records = read_records(run.folder / "metrics" / "stage-00.jsonl")
    return records[-1]["step"] / run.config.train.max_steps if records else 0.0
