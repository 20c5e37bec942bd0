"""Sequences packed while a stream is read, and the state from which a resumed run goes on in the middle of it."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch
from datasets import IterableDataset

from llm_local.data.packing import CONCAT, rows_of
from llm_local.data.text_files import UnreadableText, missing_column
from llm_local.files import Json

WINDOW = 10_000  # documents that are read, and drawn from in random order, before the next are
WINDOW_CHARACTERS = 1 << 28  # or fewer, if they are long
READ_BATCH = 64  # documents that are tokenised together
PACK_BATCH, PACK_CHARACTERS = 1024, 1 << 24  # or that are packed together, by themselves, where they are not cut


@dataclass(frozen=True)
class Mark:
    """A place in a stream where documents are about to be tokenised.

    row: number of the first sequence that is cut behind it. source: state of the dataset where the window of documents
    begins, None at an epoch's start; documents: how many of the window are used up; waiting: tokens left over before;
    kept: what encode_running keeps of a running text; spelled: what `count` found before.
    """

    row: int = 0
    epoch: int = 0
    window: int = 0
    documents: int = 0
    source: Json | None = None
    waiting: list[int] = field(default_factory=list)
    kept: list[str] = field(default_factory=lambda: ["", ""])
    spelled: int = 0


@dataclass(frozen=True)
class TokensOf:
    """How texts become tokens. encode: texts into token lists, EOS included; running: the same for the next blocks of a
    running text (None: it has ended) and what was kept. first, last: begin and end an epoch's text. count: spelled
    special tokens of token lists."""

    encode: Callable[[list[Any]], Iterable[list[int]]]
    running: Callable[[list[Any] | None, list[str]], tuple[Iterable[list[int]], list[str]]] | None = None
    first: Sequence[int] = ()
    last: Sequence[int] = ()
    count: Callable[[list[list[int]]], int] = lambda documents: 0


@dataclass(frozen=True)
class RowPacking:
    """How documents become rows of seq_length tokens. padding: marks padding, where the kind of packing pads."""

    seq_length: int
    kind: str = CONCAT
    padding: int = -1


class StreamedSequences:
    """Sequences packed while a stream is read; its documents are shuffled by (seed, epoch, window) if there is a seed.

    The list is the same at each start, but a stream can only be read forwards: a later batch is reached by reading and
    tokenising all that lies before it or before the state that was restored, an earlier one by starting again. With a
    seed, files and shards come in another order in each epoch, too, where documents were not held out from the first.
    The tail of an epoch is dropped. spelled: the sum of what tokens.count gave of the token lists so far, and in the
    runs before.
    """

    num_sequences = None

    def __init__(
        self,
        rows: IterableDataset,
        tokens: TokensOf,
        packing: RowPacking,
        seed: int | None,
        source: str,
        column: str = "text",
    ):
        # A buffer of one document draws the order of the shards and nothing else: `datasets` forgets what waits in a
        # larger one when it resumes
        self._rows = rows if seed is None else rows.shuffle(seed=seed, buffer_size=1, max_buffer_input_shards=1)
        self._first_state = copy.deepcopy(self._rows.state_dict())
        self._encode = tokens.running or (lambda texts, kept: (tokens.encode(texts or []), kept))
        self._count = tokens.count
        self._column = column
        self._seq_length, self._packing, self._padding = packing.seq_length, packing.kind, packing.padding
        self._seed = seed
        self._source = source
        self._first, self._last = list(tokens.first), list(tokens.last)
        self._start(Mark(waiting=self._first))

    def _start(self, mark: Mark) -> None:
        self._mark, self._position, self.spelled = mark, mark.row, mark.spelled
        self._ahead = self._sequences(mark)

    def batch(self, index: int, rows: int, first: int = 0) -> torch.Tensor:
        """Sequences first + index*rows to first + (index+1)*rows: (rows, seq_length) int64.

        Raises UnreadableText for a document that cannot be read, or if a whole epoch of the stream holds no sequence.
        """
        start = first + index * rows
        if start < self._position:
            self._start(Mark(waiting=self._first))
        while self._position < start:
            self._next()
        return torch.from_numpy(np.stack([self._next() for _ in range(rows)]))

    def state(self) -> Json:
        return {"identity": self._identity(), "position": self._position, **asdict(self._mark)}

    def restore(self, state: Json) -> bool:
        if state.get("identity") != self._identity():
            return False
        position = state["position"]
        self._start(Mark(**{name: value for name, value in state.items() if name not in ("identity", "position")}))
        while self._position < position:
            self._next()
        return True

    def _identity(self) -> list[Any]:
        """What two streams have in common whose states mean the same."""
        packing = [] if self._packing == CONCAT else [self._packing]
        return [self._source, self._column, self._seq_length, self._seed, self._rows.num_shards, *packing]

    def _next(self) -> np.ndarray:
        row = next(self._ahead)
        self._position += 1
        return row

    def _sequences(self, mark: Mark) -> Iterator[np.ndarray]:
        """All sequences from the mark on, without an end."""
        row, epoch, window, source, done = mark.row, mark.epoch, mark.window, mark.source, mark.documents
        waiting, kept = list(mark.waiting), mark.kept
        begun = row if mark == Mark(row, mark.epoch, waiting=self._first, spelled=mark.spelled) else -1
        while True:
            for texts, before in self._windows(epoch, window, source):
                while done < len(texts):
                    self._mark = Mark(row, epoch, window, done, before, list(waiting), kept, self.spelled)
                    count = self._together(texts, done)
                    documents, kept = self._tokens(texts[done : done + count], kept)
                    for sequence in self._packed(documents, waiting):
                        row += 1
                        yield sequence
                    done += count
                done, window = 0, window + 1
            waiting += [token for tokens in self._tokens(None, kept)[0] for token in tokens] + self._last
            for sequence in self._cut(waiting):
                row += 1
                yield sequence
            if row == begun:
                problem = f"the whole stream holds fewer than the {self._seq_length} tokens of one sequence"
                raise UnreadableText(self._source, f"{problem}; give more text or lower seq_length")
            epoch, window, source, waiting, kept, begun = epoch + 1, 0, None, list(self._first), ["", ""], row

    def _tokens(self, texts: list[Any] | None, kept: list[str]) -> tuple[list[list[int]], list[str]]:
        documents, kept = self._encode(texts, kept)
        found = list(documents)
        self.spelled += self._count(found)
        return found, kept

    def _windows(self, epoch: int, number: int, source: Json | None) -> Iterator[tuple[list[Any], Any]]:
        """The texts of one window after the other, shuffled, with the dataset's state before it."""
        self._rows.set_epoch(epoch)
        self._rows.load_state_dict(source or {**copy.deepcopy(self._first_state), "epoch": epoch})
        texts, characters, before = [], 0, source
        for text in self._texts(epoch):
            texts.append(text)
            characters += len(text or "")
            if len(texts) >= (READ_BATCH if self._seed is None else WINDOW) or characters >= WINDOW_CHARACTERS:
                after = copy.deepcopy(self._rows.state_dict())
                yield self._shuffled(texts, epoch, number), before
                texts, characters, before, number = [], 0, after, number + 1
        if texts:
            yield self._shuffled(texts, epoch, number), before

    def _shuffled(self, texts: list[Any], epoch: int, window: int) -> list[Any]:
        if self._seed is None:
            return texts
        return [texts[n] for n in np.random.default_rng([self._seed, epoch, window]).permutation(len(texts))]

    def _texts(self, epoch: int) -> Iterator[Any]:
        rows, read = iter(self._rows), 0
        while True:
            try:
                row: Any = next(rows, None) if read else _first(rows)
            except UnreadableText:
                raise
            except Exception as error:  # of whatever library reads the stream
                place = f"{self._source}, {read} documents further on in epoch {epoch}"
                raise UnreadableText(place, f"cannot be read ({' '.join(str(error).split())})") from error
            if row is None:
                return
            if self._column not in row:
                raise UnreadableText(self._source, missing_column(self._column, list(row)))
            read += 1
            yield row[self._column]

    def _together(self, texts: list[Any], start: int) -> int:
        """How many texts from this one on are tokenised, and packed, in one go."""
        if self._packing == CONCAT:
            return READ_BATCH
        characters = 0
        for count, text in enumerate(texts[start : start + PACK_BATCH], start=1):
            characters += len(text or "")
            if characters >= PACK_CHARACTERS:
                return count
        return PACK_BATCH

    def _packed(self, documents: Iterable[list[int]], waiting: list[int]) -> Iterator[np.ndarray]:
        """The sequences that the documents fill, behind what waits."""
        if self._packing != CONCAT:
            yield from rows_of(list(documents), self._seq_length, self._packing, self._padding)
            return
        for tokens in documents:
            waiting += tokens
        yield from self._cut(waiting)

    def _cut(self, waiting: list[int]) -> Iterator[np.ndarray]:
        """Takes all whole sequences off the front of `waiting`."""
        whole = len(waiting) // self._seq_length * self._seq_length
        taken = np.array(waiting[:whole], dtype=np.int64).reshape(-1, self._seq_length)
        del waiting[:whole]
        yield from taken


def _first(rows: Iterator[Any]) -> Any:
    """The first row, without the warning that what waited in a shuffle buffer is lost: ours was empty."""
    log = logging.getLogger("datasets.iterable_dataset")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        return next(rows, None)
    finally:
        log.setLevel(level)
