"""Documents into rows of one length: which tokens lie in which row, and how much of a row is padding.

    concat      end to end, cut wherever a row is full
    best_fit    what is longer than a row is cut into rows, every rest goes into the fullest row that has room for it:
                best-fit decreasing, as in "Fewer Truncations Improve Language Modeling" (arXiv 2404.10830)
    none        each document begins a row of its own

Padding is at the end of a row, behind an EOS. Rows of numbers mark it by the complement ~n of the token n that a model
reads there, which is EOS: with a document mask each is a document of its own, and so kept apart like any other.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from llm_local.tasks.task import IGNORED

CONCAT, BEST_FIT = "concat", "best_fit"
GROUP = 1 << 16  # documents that are packed together: bounds memory, and costs one row that is not full


@dataclass(frozen=True)
class Pieces:
    """Where the tokens of rows are: piece n is sizes[n] tokens from number starts[n] on, counted through all documents;
    row r has the pieces before ends[r] that no earlier row has."""

    starts: np.ndarray
    sizes: np.ndarray
    ends: np.ndarray

    def of_row(self, row: int) -> list[tuple[int, int]]:
        """(start, size) of each piece of the row."""
        first, stop = int(self.ends[row - 1]) if row else 0, int(self.ends[row])
        return list(zip(self.starts[first:stop].tolist(), self.sizes[first:stop].tolist(), strict=True))


@dataclass(frozen=True)
class Packed:
    """What packing did. cut: documents of which no row has the whole; tokens: those that are in a row of `room`."""

    packing: str
    room: int
    documents: int
    cut: int
    rows: int
    tokens: int

    @property
    def padding(self) -> float:
        """Share of the rows' places that hold no token."""
        return 1 - self.tokens / (self.rows * self.room) if self.rows else 0.0

    def describe(self) -> str:
        """In a line for a person."""
        shares = f"{self.padding:.1%} padding, {self.cut / max(1, self.documents):.1%} of the documents cut"
        return f"{self.documents:,} documents in {self.rows:,} rows of {self.room} ({self.packing}): {shares}"


@dataclass(frozen=True)
class PackedSource:
    """What packing made of a source of training data. weight: its part of the rows; packed: not known of a stream;
    extent: how much there is of it, for a person, '' where that is not known."""

    name: str
    weight: float
    packed: Packed | None
    extent: str = ""

    @staticmethod
    def of(values: dict[str, Any]) -> PackedSource:
        """The inverse of dataclasses.asdict."""
        packed = values["packed"]
        packed = Packed(**packed) if packed else None
        return PackedSource(values["name"], values["weight"], packed, values.get("extent", ""))


def pack(lengths: np.ndarray, room: int, packing: str) -> Pieces:
    """The rows of documents that lie end to end, by best_fit or none. A row's longest piece comes first.

    Without packing a rest of one token is left out, for it would be a row in which nothing is predicted.
    """
    counts = -(-lengths // room)
    document = np.repeat(np.arange(len(lengths)), counts)
    offsets = (np.arange(len(document)) - np.repeat(np.cumsum(counts) - counts, counts)) * room
    starts, sizes = (np.cumsum(lengths) - lengths)[document] + offsets, np.minimum(room, lengths[document] - offsets)
    if packing != BEST_FIT:
        kept = sizes > 1
        return Pieces(starts[kept], sizes[kept], np.arange(1, int(kept.sum()) + 1))
    order = np.argsort(-sizes, kind="stable")
    rows = _best_fit(sizes[order].tolist(), room)
    order = order[np.argsort(rows, kind="stable")]
    return Pieces(starts[order], sizes[order], np.cumsum(np.bincount(rows)))


def _best_fit(sizes: list[int], room: int) -> np.ndarray:
    """The row of each piece, of pieces from the longest to the shortest."""
    rows = np.empty(len(sizes), dtype=np.int64)
    with_room: list[list[int]] = [[] for _ in range(room)]  # rows by the room that is left in them
    left_somewhere, count = 0, 0  # bit n: some row has room for n tokens
    for number, size in enumerate(sizes):
        fitting = left_somewhere >> size
        if fitting:
            left = size + (fitting & -fitting).bit_length() - 1
            row = with_room[left].pop()
            if not with_room[left]:
                left_somewhere ^= 1 << left
        else:
            row, left, count = count, room, count + 1
        if left > size:
            with_room[left - size].append(row)
            left_somewhere |= 1 << (left - size)
        rows[number] = row
    return rows


def count_openings(pieces: Pieces, lengths: Iterable[np.ndarray]) -> int:
    """Rows that begin with the first token of a document, and not in the middle of one. lengths: of the documents that
    lie end to end, some at a time."""
    firsts = np.sort(pieces.starts[np.concatenate([[0], pieces.ends[:-1]])]) if len(pieces.ends) else pieces.starts
    before = found = 0
    for some in lengths:
        starts = before + np.cumsum(some, dtype=np.int64) - some
        places = np.searchsorted(firsts, starts)
        found += int((firsts[places[places < len(firsts)]] == starts[places < len(firsts)]).sum())
        before += int(some.sum())
    return found


def count_cut(lengths: np.ndarray, room: int, packing: str, before: int = 0) -> int:
    """Documents that are not whole in one row; `before` are the tokens in front of them, which matter to concat."""
    if packing != CONCAT:
        return int((lengths > room).sum())
    ends = before + np.cumsum(lengths)
    return int(((ends - lengths) // room != (ends - 1) // room).sum())


def rows_of(documents: list[list[int]], room: int, packing: str, padding: int) -> list[np.ndarray]:
    """The rows (room,) int64 of some documents by themselves, by best_fit or none."""
    tokens = np.array([token for document in documents for token in document], dtype=np.int64)
    pieces = pack(np.array([len(document) for document in documents], dtype=np.int64), room, packing)
    rows = []
    for number in range(len(pieces.ends)):
        row, filled = np.full(room, padding, dtype=np.int64), 0
        for start, size in pieces.of_row(number):
            row[filled : filled + size] = tokens[start : start + size]
            filled += size
        rows.append(row)
    return rows


def mark_of(eos: int) -> int:
    """What marks padding that is to be read as EOS."""
    return ~eos


def inputs_of(rows: torch.Tensor) -> dict[str, torch.Tensor]:
    """Rows (B, T) as a model takes them: the ids, and where there is padding its mask and labels that ignore it."""
    padding = rows < 0
    if not padding.any():
        return {"input_ids": rows}
    ids, labels = torch.where(padding, ~rows, rows), rows.masked_fill(padding, IGNORED)
    return {"input_ids": ids, "attention_mask": (~padding).long(), "labels": labels}


def marked(input_ids: torch.Tensor, attention_mask: torch.Tensor | None) -> torch.Tensor:
    """The inverse of inputs_of: one tensor that says it all."""
    return input_ids if attention_mask is None else torch.where(attention_mask == 0, ~input_ids, input_ids)
