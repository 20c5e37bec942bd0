"""The tokens of a source on disk: made once, in parallel and in parts that outlive an interruption, then only mapped.

FOLDER/data-00003-of-00064.arrow    a part of the documents, in their order; appears whole or not at all
FOLDER/counts.json                  documents, tokens and bytes of text
FOLDER/state.json                   written last: the folder is complete, and a data set for load_from_disk
FOLDER/rows-best_fit-512/           which tokens lie in which row, for each packing that was used
"""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow
from datasets import Dataset, DatasetInfo, Features, Value, load_from_disk
from datasets.table import MemoryMappedTable
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from llm_local.config import ConfigError
from llm_local.encoding import encode
from llm_local.packing import CONCAT, GROUP, Packed, Pieces, count_cut, pack

FEATURES = Features({"tokens": datasets.Sequence(Value("int32")), "bytes": Value("int64")})
BATCH = 200  # documents tokenised together: bounds memory with documents of a megabyte
BATCH_TOKENS = 1 << 20  # that are written together
PART_BYTES = 16 << 20  # of text in a part: seconds of work, which is what an interruption costs
MOST_PARTS = 1024
STATE, COUNTS = "state.json", "counts.json"
PIECES = {"starts": np.int64, "sizes": np.int32, "ends": np.int64}
POLL_SECONDS = 1.0


@dataclass(frozen=True)
class Job:
    """Documents to be tokenised into a folder, each ended by `end` unless that is None."""

    rows: Dataset
    column: str
    tokenizer: PreTrainedTokenizerBase
    end: int | None
    folder: Path
    parts: int

    @staticmethod
    def of(rows: Dataset, column: str, tokenizer: PreTrainedTokenizerBase, end: int | None, folder: Path) -> Job:
        """Its number of parts depends on the data alone, so that another number of processes finds the same parts."""
        share = rows.num_rows / max(1, rows.data.num_rows)
        parts = min(MOST_PARTS, rows.num_rows, -(-int(rows.data.nbytes * share) // PART_BYTES))
        return Job(rows, column, tokenizer, end, folder, max(1, parts))

    def part(self, number: int) -> Path:
        return self.folder / f"data-{number:05d}-of-{self.parts:05d}.arrow"


@dataclass(frozen=True)
class Prepared:
    """The tokens of a folder, mapped. text_bytes: of the documents' UTF-8."""

    folder: Path
    pieces: list[np.ndarray]
    documents: int
    tokens: int
    text_bytes: int

    def lengths(self) -> Iterator[np.ndarray]:
        """Tokens of the documents, EOS included, some at a time."""
        for chunk in _open(self.folder).data.column("tokens").chunks:
            yield np.diff(chunk.offsets.to_numpy())


def prepare_tokens(job: Job, fingerprint: str, workers: int, title: str | None = None) -> Prepared:
    """The folder's tokens; what is missing of them is made first, by so many processes. title: of a progress bar.

    Raises ConfigError where a file cannot be written or read, or a process is killed; finished parts are kept.
    """
    if not (job.folder / STATE).is_file():
        try:
            job.folder.mkdir(parents=True, exist_ok=True)
            _make(job, workers, title)
            _complete(job, fingerprint)
        except OSError as error:
            named, repair = error.filename or job.folder, "make room, or choose another cache_dir"
            raise ConfigError([f"{named} cannot be written ({error.strerror or error}); {repair}"]) from error
        except BrokenProcessPool as error:
            repair = "start again, with fewer preprocessing_num_workers if memory was short"
            raise ConfigError([f"a process that tokenised was killed; finished parts are kept: {repair}"]) from error
        except pyarrow.ArrowException as error:
            raise _damaged(job.folder, error) from error
    rows = _open(job.folder)
    counts = json.loads((job.folder / COUNTS).read_text())
    pieces = [chunk.flatten().to_numpy(zero_copy_only=True) for chunk in rows.data.column("tokens").chunks]
    return Prepared(job.folder, pieces, rows.num_rows, counts["tokens"], counts["bytes"])


def _open(folder: Path) -> Any:
    try:
        return load_from_disk(str(folder))
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        raise _damaged(folder, error) from error


def _damaged(folder: Path, error: Exception) -> ConfigError:
    return ConfigError([f"{folder} is damaged ({' '.join(str(error).split())}); remove it, and it is made again"])


def _make(job: Job, workers: int, title: str | None) -> None:
    missing = [number for number in range(job.parts) if not job.part(number).is_file()]
    done = job.rows.num_rows - sum(len(_range(job, number)) for number in missing)
    bar = tqdm(total=job.rows.num_rows, initial=done, desc=title, unit=" documents", disable=title is None)
    with bar:
        if workers == 1 or len(missing) < 2:
            for number in missing:
                for count in _write_part(job, number):
                    bar.update(count)
            return
        # forked, so that documents and tokenizer are not sent to each
        context = multiprocessing.get_context("fork")
        begun = (job, os.getpid())
        pool = ProcessPoolExecutor(min(workers, len(missing)), context, initializer=_adopt, initargs=begun)
        try:
            for future in as_completed([pool.submit(_write_in_worker, number) for number in missing]):
                bar.update(future.result())
        finally:
            pool.shutdown(cancel_futures=True)


_adopted: list[Job] = []  # of a process that tokenises: what it was forked for


def _adopt(job: Job, parent: int) -> None:
    """Begins the life of a process that tokenises; it has one core, and ends with its parent."""
    _adopted[:] = [job]
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the parent, too
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()


def _end_with(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(POLL_SECONDS)
    os._exit(1)


def _write_in_worker(number: int) -> int:
    return sum(_write_part(_adopted[0], number))


def _range(job: Job, number: int) -> range:
    """The documents of a part."""
    bounds = [job.rows.num_rows * n // job.parts for n in (number, number + 1)]
    return range(*bounds)


def _write_part(job: Job, number: int) -> Iterator[int]:
    """Tokenises a part; yields the numbers of documents as they are done. Raises OSError."""
    target = job.part(number)
    draft, schema = target.with_name(f".{target.name}.{os.getpid()}"), FEATURES.arrow_schema
    tokens: list[list[int]] = []
    sizes: list[int] = []
    with draft.open("wb") as file, pyarrow.ipc.new_stream(file, schema) as writer:
        for batch in job.rows.select(_range(job, number)).iter(BATCH):
            texts: Any = batch[job.column]  # pyright: ignore[reportCallIssue, reportArgumentType] -- a dict of columns
            found, found_sizes = encode(texts, job.tokenizer, job.end)
            tokens += found
            sizes += found_sizes
            if sum(map(len, tokens)) >= BATCH_TOKENS:
                writer.write_table(_table(tokens, sizes))
                tokens, sizes = [], []
            yield len(texts)
        writer.write_table(_table(tokens, sizes))
        writer.close()
        os.fsync(file.fileno())
    os.replace(draft, target)


def _table(tokens: list[list[int]], sizes: list[int]) -> pyarrow.Table:
    offsets = np.zeros(len(tokens) + 1, dtype=np.int32)
    np.cumsum([len(document) for document in tokens], out=offsets[1:])
    flat = np.fromiter(chain.from_iterable(tokens), dtype=np.int32, count=int(offsets[-1]))
    column = pyarrow.ListArray.from_arrays(offsets, flat)
    return pyarrow.table([column, pyarrow.array(sizes, pyarrow.int64())], schema=FEATURES.arrow_schema)


def _complete(job: Job, fingerprint: str) -> None:
    """Makes a data set of the parts."""
    files = [job.part(number) for number in range(job.parts)]
    tokens, text_bytes = 0, 0
    for file in files:
        table = MemoryMappedTable.from_file(str(file))
        tokens += sum(len(chunk.flatten()) for chunk in table.column("tokens").chunks)
        text_bytes += sum(int(chunk.to_numpy().sum()) for chunk in table.column("bytes").chunks)
    state = {
        "_data_files": [{"filename": file.name} for file in files],
        "_fingerprint": fingerprint,
        "_format_columns": None,
        "_format_kwargs": {},
        "_format_type": None,
        "_output_all_columns": False,
        "_split": None,
    }
    DatasetInfo(features=FEATURES).write_to_directory(str(job.folder))
    _write_json(job.folder / COUNTS, {"tokens": tokens, "bytes": text_bytes})
    _write_json(job.folder / STATE, state)
    for draft in job.folder.glob(".data-*"):  # of processes that were killed
        draft.unlink(missing_ok=True)


def _write_json(path: Path, content: Any) -> None:
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    draft.write_text(json.dumps(content, indent=1))
    os.replace(draft, path)


def packed_rows(prepared: Prepared, room: int, packing: str) -> tuple[Pieces | None, Packed]:
    """Which tokens lie in which row, mapped, and what that costs; made the first time. Of concat only the latter."""
    folder = prepared.folder / f"rows-{packing}-{room}"
    if not folder.is_dir():
        with tempfile.TemporaryDirectory(dir=prepared.folder, prefix=".rows-") as unfinished:
            draft = Path(unfinished, "rows")
            draft.mkdir()
            _write_json(draft / COUNTS, asdict(_pack_into(draft, prepared, room, packing)))
            try:
                os.rename(draft, folder)
            except OSError:
                if not folder.is_dir():  # else another process was faster, with the same result
                    raise
    packed = Packed(**json.loads((folder / COUNTS).read_text()))
    if packing == CONCAT:
        return None, packed
    return Pieces(**{name: _mapped(folder / name, dtype) for name, dtype in PIECES.items()}), packed


def _mapped(path: Path, dtype: Any) -> np.ndarray:
    return np.memmap(path, dtype, mode="r") if path.stat().st_size else np.empty(0, dtype)


def _pack_into(folder: Path, prepared: Prepared, room: int, packing: str) -> Packed:
    """Packs group by group, so that memory does not grow with the corpus."""
    cut = rows = placed = pieces = before = 0
    with ExitStack() as files:
        written = {name: files.enter_context((folder / name).open("wb")) for name in PIECES}
        for lengths in _groups(prepared):
            cut += count_cut(lengths, room, packing, before)
            if packing != CONCAT:
                found = pack(lengths, room, packing)
                for name, values in (
                    ("starts", found.starts + before),
                    ("sizes", found.sizes),
                    ("ends", found.ends + pieces),
                ):
                    written[name].write(values.astype(PIECES[name]).tobytes())
                pieces, rows = pieces + len(found.sizes), rows + len(found.ends)
                placed += int(found.sizes.sum())
            before += int(lengths.sum())
    if packing == CONCAT:
        rows = prepared.tokens // room
        placed = rows * room
    return Packed(packing, room, prepared.documents, cut, rows, placed)


def _groups(prepared: Prepared) -> Iterator[np.ndarray]:
    """Lengths of GROUP documents at a time."""
    held: list[np.ndarray] = []
    for lengths in prepared.lengths():
        held.append(lengths.astype(np.int64))
        while sum(map(len, held)) >= GROUP:
            together = np.concatenate(held)
            yield together[:GROUP]
            held = [together[GROUP:]]
    if held:
        yield np.concatenate(held)
