"""Tokens cut into sequences, and their order: an endless list of which a batch is a slice.

Because a batch is given by its number alone, a run resumes by remembering one number, and the order is the same
whatever the stages, replicas or micro-batches that read it. A stream has a state besides, from which it finds the place
of that number without reading what lies before.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch

from llm_local.data.packing import Pieces
from llm_local.files import Json


class Sequences(Protocol):
    """An endless list of sequences of one length."""

    @property
    def num_sequences(self) -> int | None:
        """Different sequences, after which the list begins again; None where that is not known."""
        ...

    def batch(self, index: int, rows: int, first: int = 0) -> torch.Tensor:
        """Sequences first + index*rows to first + (index+1)*rows of the list: (rows, seq_length) int64.

        A negative number is padding (packing.py).
        """
        ...

    def state(self) -> Json:
        """Where the last batch ended, to be kept as JSON; empty for a list that can be read anywhere."""
        ...

    def restore(self, state: Json) -> bool:
        """Takes up a state; False where it is not one of this list, which then reads up to where it is asked for."""
        ...


class Rows(Protocol):
    """Numbered rows of one length; a negative number in a row is padding (packing.py)."""

    seq_length: int
    num_tokens: int
    num_rows: int

    def row(self, index: int) -> np.ndarray:
        """Row `index`: (seq_length,) int64."""
        ...


class PackedTokens:
    """The tokens of all documents end to end, cut into rows of seq_length; what is left at the end is dropped.

    `pieces` are consecutive 1-d arrays, typically memory-mapped; a row may lie across several.
    """

    def __init__(self, pieces: Sequence[np.ndarray], seq_length: int):
        self._pieces = pieces
        self._ends = np.cumsum([len(piece) for piece in pieces], dtype=np.int64)
        self.seq_length = seq_length
        self.num_tokens = int(self._ends[-1]) if len(pieces) else 0
        self.num_rows = self.num_tokens // seq_length

    def row(self, index: int) -> np.ndarray:
        """Row `index`: (seq_length,) int64."""
        assert 0 <= index < self.num_rows
        row = np.empty(self.seq_length, dtype=np.int64)
        self.read(index * self.seq_length, row)
        return row

    def read(self, start: int, into: np.ndarray) -> None:
        """Fills an array with the tokens from number `start` on."""
        filled = 0
        number = int(np.searchsorted(self._ends, start, side="right"))
        while filled < len(into):
            piece = self._pieces[number]
            offset = start + filled - (int(self._ends[number]) - len(piece))
            part = piece[offset : offset + len(into) - filled]
            into[filled : filled + len(part)] = part
            filled, number = filled + len(part), number + 1


class FittedTokens:
    """Rows of whole documents, or pieces of long ones, with padding behind them."""

    def __init__(self, tokens: PackedTokens, pieces: Pieces, padding: int):
        self._tokens = tokens
        self._pieces = pieces
        self._padding = padding
        self.seq_length = tokens.seq_length
        self.num_tokens = tokens.num_tokens
        self.num_rows = len(pieces.ends)

    def row(self, index: int) -> np.ndarray:
        """Row `index`: (seq_length,) int64."""
        row, filled = np.full(self.seq_length, self._padding, dtype=np.int64), 0
        for start, size in self._pieces.of_row(index):
            self._tokens.read(start, row[filled : filled + size])
            filled += size
        return row


class StoredSequences:
    """Sequences on disk, in an order that is a pure function of (seed, epoch); of `most` the first so many."""

    def __init__(self, tokens: Rows, seed: int, most: int | None = None):
        self._tokens = tokens
        self._seed = seed
        self._epoch = -1
        self._num_sequences = tokens.num_rows if most is None else min(most, tokens.num_rows)
        self._permutation = np.arange(self._num_sequences)

    @property
    def num_sequences(self) -> int:
        return self._num_sequences

    @property
    def num_tokens(self) -> int:
        """Tokens in all, those of the dropped tail included."""
        return self._tokens.num_tokens

    def batch(self, index: int, rows: int, first: int = 0) -> torch.Tensor:
        """Sequences first + index*rows to first + (index+1)*rows: (rows, seq_length) int64.

        Raises ValueError if there are none.
        """
        if not self.num_sequences:
            raise ValueError(f"no sequence to read: {self.num_tokens} tokens are less than {self._tokens.seq_length}")
        start = first + index * rows
        numbers = [self._number(position) for position in range(start, start + rows)]
        return torch.from_numpy(np.stack([self._tokens.row(number) for number in numbers]))

    def state(self) -> Json:
        return {}

    def restore(self, state: Json) -> bool:
        return True

    def _number(self, position: int) -> int:
        epoch, offset = divmod(position, self.num_sequences)
        if epoch != self._epoch:
            self._permutation = np.random.default_rng([self._seed, epoch]).permutation(self.num_sequences)
            self._epoch = epoch
        return int(self._permutation[offset])


CYCLE = 10_000  # sequences in which each source of a mixture has exactly its share


class MixedSequences:
    """Sequences of several lists, of which each has a share of the places that is its weight, rounded to 1/CYCLE.

    Which list has a place is drawn by (seed, cycle), and each list goes through its own sequences in its own order and
    begins again by itself, so a short source is repeated while a long one lasts.
    """

    num_sequences = None

    def __init__(self, parts: Sequence[Sequences], weights: Sequence[float], seed: int):
        self._parts = parts
        self.counts = shares(weights)
        self._seed = seed
        self._drawn: tuple[int, np.ndarray] | None = None

    def batch(self, index: int, rows: int, first: int = 0) -> torch.Tensor:
        """Sequences first + index*rows to first + (index+1)*rows: (rows, seq_length) int64."""
        start = first + index * rows
        owners = np.array([self._cycle(position // CYCLE)[position % CYCLE] for position in range(start, start + rows)])
        cycle, offset = divmod(start, CYCLE)
        before = self._cycle(cycle)[:offset]
        found: list[tuple[int, torch.Tensor]] = []
        for number, part in enumerate(self._parts):
            places = np.flatnonzero(owners == number)
            if len(places):
                done = cycle * self.counts[number] + int((before == number).sum())
                found += zip(places.tolist(), part.batch(0, len(places), done), strict=True)
        return torch.stack([row for _, row in sorted(found, key=lambda pair: pair[0])])

    def state(self) -> Json:
        return {"parts": [part.state() for part in self._parts]}

    def restore(self, state: Json) -> bool:
        states = state.get("parts", [])
        pairs = zip(self._parts, states, strict=False)
        return len(states) == len(self._parts) and all([part.restore(saved) for part, saved in pairs])

    def _cycle(self, number: int) -> np.ndarray:
        """Which list has each place of a cycle."""
        if self._drawn is None or self._drawn[0] != number:
            owners = np.repeat(np.arange(len(self.counts)), self.counts)
            self._drawn = (number, np.random.default_rng([self._seed, number]).permutation(owners))
        return self._drawn[1]


def shares(weights: Sequence[float]) -> list[int]:
    """The places of a cycle that each weight gets, CYCLE in all, one at least: by largest remainders."""
    exact = np.array(weights, dtype=np.float64) / np.sum(weights) * CYCLE
    counts = np.maximum(1, np.floor(exact)).astype(int)
    order = np.argsort(np.floor(exact) - exact, kind="stable")
    counts[order[: max(0, CYCLE - counts.sum())]] += 1
    counts[np.argmax(counts)] -= counts.sum() - CYCLE  # what tiny weights were raised by
    return counts.tolist()
