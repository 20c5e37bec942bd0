"""The tokens of a source on disk: made once, in parts (parts.py), then only mapped.

FOLDER/data-00003-of-00064.arrow    a part of the documents: the tokens of each, and the bytes of its text
FOLDER/counts.json                  tokens and bytes in all, what ends a document, special tokens made of text
FOLDER/state.json                   the folder is complete
FOLDER/rows-best_fit-512/           which tokens lie in which row, for each packing that was used
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import partial
from itertools import chain, pairwise
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow
from datasets import Dataset, Features, Value
from datasets.table import MemoryMappedTable
from transformers import PreTrainedTokenizerBase

from llm_local.adapters.hf_internals import saved_fingerprint
from llm_local.data.encoding import (
    CONTEXT,
    Tokens,
    count_spelled,
    encode,
    encode_running,
    find_cut,
    first_token,
    joined_text,
    never_text,
)
from llm_local.data.packing import CONCAT, GROUP, Packed, Pieces, count_cut, pack
from llm_local.data.parts import MOST_PARTS, STATE, Parts, is_complete, make, read
from llm_local.data.token_folder import COUNTS
from llm_local.files import write_json, writing

FEATURES = Features({"tokens": datasets.Sequence(Value("int32")), "bytes": Value("int64")})
BATCH = 200  # documents tokenised together: bounds memory with documents of a megabyte
BATCH_TOKENS = 1 << 20  # that are written together
PART_BYTES = 16 << 20  # of text in a part: seconds of work, which is what an interruption costs
PIECES = {"starts": np.int64, "sizes": np.int32, "ends": np.int64}


@dataclass(frozen=True)
class Job:
    """Documents to be tokenised into a folder, each ended by `end`; None: they are blocks of one running text."""

    rows: Dataset
    column: str
    tokenizer: PreTrainedTokenizerBase
    end: int | None
    folder: Path

    def starts(self) -> list[tuple[int, int]]:
        """Of each part, and the end of the last: a document, and how much of its text is in the part before.

        They depend on the data alone, so that another number of processes finds the same parts.
        """
        count = self.rows.num_rows
        share = count / max(1, self.rows.data.num_rows)
        parts = max(1, min(MOST_PARTS, count, -(-int(self.rows.data.nbytes * share) // PART_BYTES)))
        inner = [count * n // parts for n in range(1, parts)]
        cuts = [(row, 0 if self.end is not None else self._cut_in(row)) for row in inner]
        return [(0, 0), *((row, cut) for row, cut in cuts if cut is not None), (count, 0)]

    def text(self, row: int) -> str:
        return joined_text(self.rows[row][self.column]) if 0 <= row < self.rows.num_rows else ""

    def _cut_in(self, row: int) -> int | None:
        before = len(self.text(row - 1))
        cut = find_cut(self.text(row - 1) + self.text(row), max(before, CONTEXT), self.tokenizer)
        return None if cut is None else cut - before


@dataclass(frozen=True)
class Prepared:
    """The tokens of a folder, mapped. text_bytes: of the documents' UTF-8; end: what ends each document, None where
    they are pieces of one running text; spelled: special tokens that were made of text (encoding.never_text), None for
    a folder of a time when each that a text spelled was."""

    folder: Path
    fingerprint: str
    pieces: list[np.ndarray]
    documents: int
    tokens: int
    text_bytes: int
    end: int | None
    spelled: int | None

    def lengths(self) -> Iterator[np.ndarray]:
        """Tokens of the documents, EOS included, some at a time."""
        column: Any = read(self.folder).data.column("tokens")
        for chunk in column.chunks:
            yield np.diff(chunk.offsets.to_numpy())


def prepare_tokens(job: Job, fingerprint: str, workers: int, title: str | None = None) -> Prepared:
    """The folder's tokens; what is missing of them is made first, by so many processes. title: of a progress bar.

    Raises Unwritten where a file cannot be written, ConfigError where one cannot be read or a process is killed;
    finished parts are kept.
    """
    if not is_complete(job.folder):
        starts = job.starts()
        sizes = [stop - start for (start, _), (stop, _) in pairwise(starts)]
        write = partial(_write_part, job, starts)
        parts = Parts(job.folder, FEATURES, sizes, "documents", write, "tokenised")
        make(parts, fingerprint, workers, title, last=lambda: _count(parts, job))
    return open_tokens(job.folder)


def open_tokens(folder: Path, repair: str = "remove it, and it is made again") -> Prepared:
    """The tokens of a complete folder, mapped. Raises ConfigError with the repair for a damaged one."""
    rows = read(folder, repair)
    counts = json.loads((folder / COUNTS).read_text())
    column: Any = rows.data.column("tokens")
    pieces = [chunk.flatten().to_numpy(zero_copy_only=True) for chunk in column.chunks]
    key, end = saved_fingerprint(json.loads((folder / STATE).read_text())), counts["end"]
    spelled = counts.get("spelled")
    return Prepared(folder, key, pieces, rows.num_rows, counts["tokens"], counts["bytes"], end, spelled)


def _write_part(job: Job, starts: list[tuple[int, int]], number: int, writer: Any) -> Iterator[int]:
    """Tokenises a part; yields the numbers of documents as they are done. Raises OSError."""
    tokens: list[list[int]] = []
    sizes: list[int] = []
    for found, found_sizes, documents in (_documents if job.end is not None else _running)(job, *starts[number:][:2]):
        tokens += found
        sizes += found_sizes
        if sum(map(len, tokens)) >= BATCH_TOKENS:
            writer.write_table(_table(tokens, sizes))
            tokens, sizes = [], []
        yield documents
    writer.write_table(_table(tokens, sizes))


def _documents(job: Job, start: tuple[int, int], stop: tuple[int, int]) -> Iterator[tuple[Tokens, list[int], int]]:
    """Tokens and sizes of a part's documents, and how many documents those are."""
    for texts in _batches(job, start[0], stop[0]):
        yield *encode(texts, job.tokenizer, job.end), len(texts)


def _running(job: Job, start: tuple[int, int], stop: tuple[int, int]) -> Iterator[tuple[Tokens, list[int], int]]:
    """The same of a part of a running text."""
    text, first = job.text(start[0] - 1) + job.text(start[0]), len(job.text(start[0] - 1)) + start[1]
    kept = [text[:first][-CONTEXT:], text[first:]]
    for texts in _batches(job, start[0] + 1, stop[0]):
        tokens, sizes, kept = encode_running(texts, kept, job.tokenizer)
        yield tokens, sizes, len(texts)
    kept[1] += job.text(stop[0])[: stop[1]]
    yield *encode_running(None, kept, job.tokenizer)[:2], 1


def _batches(job: Job, start: int, stop: int) -> Iterator[list[Any]]:
    for first in range(start, stop, BATCH):
        columns: Any = job.rows[first : min(first + BATCH, stop)]
        yield columns[job.column]


def _table(tokens: list[list[int]], sizes: list[int]) -> pyarrow.Table:
    offsets = np.zeros(len(tokens) + 1, dtype=np.int32)
    np.cumsum([len(document) for document in tokens], out=offsets[1:])
    flat = np.fromiter(chain.from_iterable(tokens), dtype=np.int32, count=int(offsets[-1]))
    column = pyarrow.ListArray.from_arrays(offsets, flat)
    return pyarrow.table([column, pyarrow.array(sizes, pyarrow.int64())], schema=FEATURES.arrow_schema)


def _count(parts: Parts, job: Job) -> None:
    tokens = text_bytes = spelled = 0
    special = never_text(job.tokenizer).values()
    around = [] if job.end is None else [first_token(job.tokenizer), job.end]
    for number in range(len(parts.sizes)):
        table = MemoryMappedTable.from_file(str(parts.path(number)))
        for chunk in table.column("tokens").chunks:
            tokens += len(chunk.flatten())
            spelled += count_spelled([chunk.flatten().to_numpy()], special, len(chunk), around)
        text_bytes += sum(int(chunk.to_numpy().sum()) for chunk in table.column("bytes").chunks)
    write_json(parts.folder / COUNTS, {"tokens": tokens, "bytes": text_bytes, "end": job.end, "spelled": spelled})


def packed_rows(prepared: Prepared, room: int, packing: str, kept: Path | None = None) -> tuple[Pieces | None, Packed]:
    """Which tokens lie in which row, mapped, and what that costs; made the first time, and kept beside the tokens if
    not elsewhere. Of concat only the latter."""
    kept = kept or prepared.folder
    folder = kept / f"rows-{packing}-{room}"
    if not folder.is_dir():
        with writing(folder):
            kept.mkdir(parents=True, exist_ok=True)
        with writing(folder), tempfile.TemporaryDirectory(dir=kept, prefix=".rows-") as unfinished:
            draft = Path(unfinished, "rows")
            draft.mkdir()
            write_json(draft / COUNTS, asdict(_pack_into(draft, prepared, room, packing)))
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
