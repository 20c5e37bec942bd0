"""Tokens cut into sequences, and their order: an endless list of which a batch is a slice.

Because a batch is given by its number alone, a run resumes by remembering one number, and the order is the same
whatever the stages, replicas or micro-batches that read it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import count
from typing import Any, Protocol

import numpy as np
import torch
from datasets import IterableDataset

SHUFFLE_BUFFER = 10_000  # documents of a stream that wait in memory to be drawn from
READ_BATCH = 64  # documents of a stream that are tokenised together


class Sequences(Protocol):
    """An endless list of sequences of one length."""

    @property
    def num_sequences(self) -> int | None:
        """Different sequences, after which the list begins again; None for a stream, which does not know."""
        ...

    def batch(self, index: int, rows: int, first: int = 0) -> torch.Tensor:
        """Sequences first + index*rows to first + (index+1)*rows of the list: (rows, seq_length) int64."""
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
        start, filled = index * self.seq_length, 0
        number = int(np.searchsorted(self._ends, start, side="right"))
        while filled < self.seq_length:
            piece = self._pieces[number]
            offset = start + filled - (int(self._ends[number]) - len(piece))
            part = piece[offset : offset + self.seq_length - filled]
            row[filled : filled + len(part)] = part
            filled, number = filled + len(part), number + 1
        return row


class StoredSequences:
    """Sequences on disk, in an order that is a pure function of (seed, epoch)."""

    def __init__(self, tokens: PackedTokens, seed: int):
        self._tokens = tokens
        self._seed = seed
        self._epoch = -1
        self._permutation = np.arange(tokens.num_rows)

    @property
    def num_sequences(self) -> int:
        return self._tokens.num_rows

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

    def _number(self, position: int) -> int:
        epoch, offset = divmod(position, self.num_sequences)
        if epoch != self._epoch:
            self._permutation = np.random.default_rng([self._seed, epoch]).permutation(self.num_sequences)
            self._epoch = epoch
        return int(self._permutation[offset])


class StreamedSequences:
    """Sequences packed while a stream is read, its documents shuffled in a buffer by (seed, epoch) if there is a seed.

    The list is the same at each start, but a stream can only be read forwards: a later batch is reached by reading
    and tokenising all that lies before it (that is what resuming a stream costs), an earlier one by starting again.
    The tail of an epoch is dropped. `encode` turns texts into token lists, EOS included; `last` ends an epoch's text.
    """

    num_sequences = None

    def __init__(
        self,
        rows: IterableDataset,
        encode: Callable[[dict[str, list[Any]]], Iterable[list[int]]],
        seq_length: int,
        seed: int | None,
        source: str,
        last: Sequence[int] = (),
    ):
        self._rows = rows if seed is None else rows.shuffle(seed=seed, buffer_size=SHUFFLE_BUFFER)
        self._encode = encode
        self._seq_length = seq_length
        self._source = source
        self._last = list(last)
        self._position = 0
        self._ahead = self._endless()

    def batch(self, index: int, rows: int, first: int = 0) -> torch.Tensor:
        """Sequences first + index*rows to first + (index+1)*rows: (rows, seq_length) int64.

        Raises ValueError if a whole epoch of the stream holds no sequence.
        """
        start = first + index * rows
        if start < self._position:
            self._ahead, self._position = self._endless(), 0
        while self._position < start:
            self._next()
        return torch.from_numpy(np.stack([self._next() for _ in range(rows)]))

    def _next(self) -> np.ndarray:
        row = next(self._ahead)
        self._position += 1
        return row

    def _endless(self) -> Iterator[np.ndarray]:
        for epoch in count():
            number = 0
            for row in self._epoch(epoch):
                number += 1
                yield row
            if not number:
                raise ValueError(
                    f"{self._source}: the whole stream holds fewer than the {self._seq_length} tokens of one sequence; "
                    "give more text or lower seq_length"
                )

    def _epoch(self, epoch: int) -> Iterator[np.ndarray]:
        self._rows.set_epoch(epoch)
        waiting: list[int] = []
        for batch in self._rows.iter(batch_size=READ_BATCH):
            for tokens in self._encode(batch):
                waiting += tokens
            yield from self._cut(waiting)
        waiting += self._last
        yield from self._cut(waiting)

    def _cut(self, waiting: list[int]) -> Iterator[np.ndarray]:
        """Takes all whole sequences off the front of `waiting`."""
        whole = len(waiting) // self._seq_length * self._seq_length
        taken = np.array(waiting[:whole], dtype=np.int64).reshape(-1, self._seq_length)
        del waiting[:whole]
        yield from taken
