"""Text files as documents on disk, to be read in any order: converted once, in parts (parts.py).

A part has the documents of consecutive pieces of the files, PART_BYTES of them or more, so that many small files do not
become many tiny ones. A packed file and a .csv cannot be divided, and are in one part.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow
from datasets import Dataset, Features, Value
from datasets.fingerprint import Hasher

from llm_local.data.parts import MOST_PARTS, Parts, is_complete, make, read
from llm_local.data.text_files import Piece, UnreadableText, pieces_of, read_texts

REVISION = 1  # counts changes of this file and text_files.py that change the documents of the same files
PART_BYTES = 16 << 20  # on disk: a second of work
BATCH_DOCUMENTS, BATCH_CHARACTERS = 10_000, 1 << 24  # that are written together


@dataclass(frozen=True)
class TextFiles:
    """Files of one kind (text_files.py) that a document each is in, where `whole`, else one each line or row."""

    files: list[Path]
    kind: str
    column: str
    whole: bool

    @property
    def key(self) -> str:
        """Changes with the names, sizes and times of the files."""
        stamps = [(str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns) for file in self.files]
        return Hasher.hash([REVISION, stamps, self.kind, self.column, self.whole])

    def pieces(self, piece_bytes: int | None = None) -> list[Piece]:
        """Consecutive pieces of the files, of so many bytes where they can be divided."""
        return [piece for file in self.files for piece in pieces_of(file, self.whole, piece_bytes)]


def features_of(column: str) -> Features:
    return Features({column: Value("large_string")})  # a plain string column holds 2 GB in a batch at most


def convert(texts: TextFiles, cache_dir: Path, workers: int, title: str | None) -> Dataset:
    """The documents in the files' order, mapped; what is missing of them is made first, by so many processes.

    Their fingerprint depends on the key of the files alone. Raises UnreadableText for the first document that is wrong,
    Unwritten where a file cannot be written, and ConfigError where a process is killed.
    """
    key = texts.key
    folder = cache_dir / "texts" / key
    if not is_complete(folder):
        groups = grouped(texts.pieces(PART_BYTES))
        sizes = [sum(map(_size, group)) for group in groups]
        parts = Parts(folder, features_of(texts.column), sizes, "B", partial(_write, texts, groups), "read text")
        try:
            make(parts, key, workers, title)
        except UnreadableText:
            shutil.rmtree(folder, ignore_errors=True)  # mended files have another key
            raise
    return read(folder)


def grouped(pieces: list[Piece]) -> list[list[Piece]]:
    """Consecutive pieces in groups of PART_BYTES or a little more, MOST_PARTS groups at most; the last may be small."""
    wanted = max(PART_BYTES, -(-sum(map(_size, pieces)) // MOST_PARTS))
    groups: list[list[Piece]] = []
    size = wanted
    for piece in pieces:
        if size >= wanted:
            groups.append([])
            size = 0
        groups[-1].append(piece)
        size += _size(piece)
    return groups


def _size(piece: Piece) -> int:
    path, start, stop = piece
    return min(stop, Path(path).stat().st_size) - start


def _write(texts: TextFiles, groups: list[list[Piece]], number: int, writer: Any) -> Iterator[int]:
    """Writes the documents of a group; yields the sizes of its pieces."""
    held: list[str] = []
    characters = 0
    for piece in groups[number]:
        for row in read_texts([piece], texts.kind, texts.column, texts.whole):
            held.append(row[texts.column])
            characters += len(held[-1])
            if len(held) >= BATCH_DOCUMENTS or characters >= BATCH_CHARACTERS:
                writer.write_table(_table(held, texts.column))
                held, characters = [], 0
        yield _size(piece)
    if held:
        writer.write_table(_table(held, texts.column))


def _table(held: list[str], column: str) -> pyarrow.Table:
    return pyarrow.table([pyarrow.array(held, pyarrow.large_string())], schema=features_of(column).arrow_schema)
