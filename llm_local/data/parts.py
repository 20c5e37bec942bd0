"""A data set on disk, made in parts by several processes; what is finished outlives an interruption.

FOLDER/data-00003-of-00064.arrow    a part of the rows, in their order; appears whole or not at all
FOLDER/state.json                   written last: the folder is complete, and a data set for load_from_disk
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow
from datasets import Dataset, DatasetInfo, Features, load_from_disk
from tqdm import tqdm

from llm_local.adapters.hf_internals import saved_state
from llm_local.config import ConfigError
from llm_local.files import write_json, writing

MOST_PARTS = 1024
STATE = "state.json"
POLL_SECONDS = 1.0


@dataclass(frozen=True)
class Parts:
    """The parts of a folder and how they are made.

    sizes: of each part, in `unit`, "B" or another. write(number, writer) writes a part's rows, and yields how much of
    its size is done. doing: for messages, such as "tokenised".
    """

    folder: Path
    features: Features
    sizes: list[int]
    unit: str
    write: Callable[[int, Any], Iterator[int]]
    doing: str

    def path(self, number: int) -> Path:
        return self.folder / f"data-{number:05d}-of-{len(self.sizes):05d}.arrow"


def is_complete(folder: Path) -> bool:
    return (folder / STATE).is_file()


def make(
    parts: Parts, fingerprint: str, workers: int, title: str | None, last: Callable[[], None] | None = None
) -> None:
    """Makes what is missing of the folder, by so many processes. title: of a progress bar; last: before it is complete.

    Raises Unwritten where a file cannot be written, ConfigError where one cannot be read or a process is killed;
    finished parts are kept. What `write` raises comes from the first part that fails, whoever made it.
    """
    try:
        with writing(parts.folder):
            parts.folder.mkdir(parents=True, exist_ok=True)
            _make_missing(parts, workers, title)
            if last is not None:
                last()
            _complete(parts, fingerprint)
    except BrokenProcessPool as error:
        repair = "start again, with fewer preprocessing_num_workers if memory was short"
        raise ConfigError([f"a process that {parts.doing} was killed; finished parts are kept: {repair}"]) from error
    except pyarrow.ArrowException as error:
        raise damaged(parts.folder, error) from error


def read(folder: Path, repair: str = "remove it, and it is made again") -> Dataset:
    """The rows of a complete folder, mapped. Raises ConfigError with the repair for a damaged one."""
    try:
        rows = load_from_disk(str(folder))
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        raise damaged(folder, error, repair) from error
    assert isinstance(rows, Dataset)
    return rows


def damaged(folder: Path, error: Exception, repair: str = "remove it, and it is made again") -> ConfigError:
    return ConfigError([f"{folder} is damaged ({' '.join(str(error).split())}); {repair}"])


def _make_missing(parts: Parts, workers: int, title: str | None) -> None:
    missing = [number for number in range(len(parts.sizes)) if not parts.path(number).is_file()]
    total = sum(parts.sizes)
    done = total - sum(parts.sizes[number] for number in missing)
    unit: Any = {"unit": "B", "unit_scale": True} if parts.unit == "B" else {"unit": f" {parts.unit}"}
    with tqdm(total=total, initial=done, desc=title, disable=title is None, **unit) as bar:
        if workers == 1 or len(missing) < 2:
            for number in missing:
                for count in _write_part(parts, number):
                    bar.update(count)
            return
        # forked, so that what the parts are made from is not sent to each
        context = multiprocessing.get_context("fork")
        begun = (parts, os.getpid())
        pool = ProcessPoolExecutor(min(workers, len(missing)), context, initializer=_adopt, initargs=begun)
        try:
            for future in [pool.submit(_write_in_worker, number) for number in missing]:
                bar.update(future.result())
        finally:
            pool.shutdown(cancel_futures=True)


_adopted: list[Parts] = []  # of a process that makes parts: what it was forked for


def _adopt(parts: Parts, parent: int) -> None:
    """Begins the life of a process that makes parts; it has one core, and ends with its parent."""
    _adopted[:] = [parts]
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the parent, too
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()


def _end_with(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(POLL_SECONDS)
    os._exit(1)


def _write_in_worker(number: int) -> int:
    return sum(_write_part(_adopted[0], number))


def _write_part(parts: Parts, number: int) -> Iterator[int]:
    with _new_file(parts.path(number)) as file, pyarrow.ipc.new_stream(file, parts.features.arrow_schema) as writer:
        yield from parts.write(number, writer)


@contextmanager
def _new_file(target: Path) -> Iterator[Any]:
    """A file to write that appears as `target` when it is whole; nothing is left of it otherwise."""
    draft = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        with draft.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        try:
            os.replace(draft, target)
        except FileNotFoundError:
            if not target.is_file():  # else another start was faster, with the same result, and tidied up
                raise
    finally:
        draft.unlink(missing_ok=True)


def _complete(parts: Parts, fingerprint: str) -> None:
    """Makes a data set of the parts."""
    files = [parts.path(number) for number in range(len(parts.sizes))]
    DatasetInfo(features=parts.features).write_to_directory(str(parts.folder))
    write_json(parts.folder / STATE, saved_state(files, fingerprint))
    for draft in parts.folder.glob(".data-*"):  # of processes that were killed
        draft.unlink(missing_ok=True)
