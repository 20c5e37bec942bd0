"""The micro-batches of stage 0: each replica's share of the global batch, whatever the layout."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from llm_local.data.packing import PackedSource, inputs_of
from llm_local.data.sequences import Sequences
from llm_local.data.sets import SourceData
from llm_local.files import Json
from llm_local.head_plan import seed_of
from llm_local.links.packet import EVAL, TRAIN, Packet
from llm_local.model.document_mask import DocumentMask
from llm_local.place import Place
from llm_local.registry import TASKS
from llm_local.tasks.task import Ask, Parts, Task

CHECK_TOKENS = 64
TOKENS, SOURCES = "tokens", "sources"  # of a state: tokens trained on, and what they are of
NOT_OF_THE_DATA = (TOKENS, SOURCES)


def trained_tokens(state: Mapping[str, Any], rows: int, seq_length: int) -> int:
    """Tokens that were trained on before a checkpoint of so many rows, from its state of the data."""
    return state.get(TOKENS, rows * seq_length)  # old ones have none, and may have counted padding


@dataclass(frozen=True)
class _Share:
    """A replica's part of a step. rows: (rows · micro-batches, T); weights: of its micro-batches, as a Packet's;
    tokens: of all replicas, without padding. key: of which step. seeds: of the rows."""

    key: tuple[int, int, int]
    rows: torch.Tensor
    seeds: list[int]
    weights: list[float]
    tokens: int


def changed_since(sources: Sequence[SourceData], state: Mapping[str, Any], checkpoint: Path) -> tuple[str, ...]:
    """Lines on the sources that are not as large as they were when the checkpoint with this state was written."""
    then = [PackedSource.of(source) for source in state.get(SOURCES, [])]
    return tuple(
        f"{now.name} has {now.extent}, and had {old.extent} when {checkpoint} was written: "
        "its rows come in another order from here on, some again and others not at all"
        for now, old in zip(sources, then, strict=False)
        if now.facts().name == old.name and (now.packed is None) == (old.packed is None)
        if now.extent and old.extent and now.extent != old.extent
    )


@dataclass(frozen=True)
class BatchSize:
    """rows: of a micro-batch. micro_batches: of a step, eval_batches: of an evaluation, of each replica."""

    rows: int
    micro_batches: int
    eval_batches: int


@dataclass(frozen=True)
class RowUse:
    """What becomes of a row. task: what the model is trained for, by name. ask: what that makes of a row, by seed and
    the row's number in the whole run; an evaluation asks the same in every run. documents: how packed documents are
    kept apart, if they are; the first token of each is not scored then. row_tokens: that a model makes of a row which
    is an image."""

    task: str = "causal-lm"
    ask: Ask | None = None
    seed: int = 0
    documents: DocumentMask | None = None
    row_tokens: int = 0


class Feed:
    """load(kind, step, index) for an engine of stage 0.

    A step's global batch does not depend on the layout; replica r of R takes its rows r, r + R, r + 2R, ...
    start: the steps that are done and the rows that they used up, which may have been of other batches than these.

    tokens: what the steps up to the last one that was read had of all replicas, without padding, if it was begun with
    those that were done before.
    """

    def __init__(
        self,
        train: Sequences,
        validation: Sequence[Sequences],
        place: Place,
        batch: BatchSize,
        start: tuple[int, int] = (0, 0),
        use: RowUse | None = None,
    ):
        self._train = train
        self._validation = validation
        self._number = 0
        self._micro_batches = {TRAIN: batch.micro_batches, EVAL: batch.eval_batches}
        self._start = start
        self._place = place
        self._rows = batch.rows
        self._use = use or RowUse()
        self._task: Task = TASKS[self._use.task]
        self._held: dict[int, _Share] = {}  # by kind
        self._counted = start[0]
        self.tokens = self._step_tokens = 0
        self._before: tuple[Json, int] = {}, 0  # state and tokens of the step before that

    def __call__(self, kind: int, step: int, index: int) -> Packet:
        """Micro-batch `index` of training step 1, 2, ... or of an evaluation; or a short row to check an export."""
        if kind in self._micro_batches:
            if kind == TRAIN and step > self._counted:
                self._begin(step)
            share = self._share(kind, step)
            these = slice(index * self._rows, (index + 1) * self._rows)
            parts = self._parts(share.rows[these], share.seeds[these])
            return Packet(kind, step, index, weight=share.weights[index], row_tokens=self._use.row_tokens, **parts)
        share = next(iter(self._held.values()), None) or self._share(TRAIN, self._start[0] + 1)
        rows = share.rows
        if self._task.reads_images:
            parts = self._parts(rows[:1], share.seeds[:1])
            return Packet(kind, step, index, weight=1.0, row_tokens=self._use.row_tokens, **parts)
        tokens = CHECK_TOKENS - CHECK_TOKENS % self._place.sequence_ranks
        ids = inputs_of(rows[:1, :tokens].contiguous())["input_ids"]  # logits of padding are logits, too
        return Packet(kind, step, index, input_ids=ids)

    def validate_on(self, number: int) -> None:
        """The next evaluation reads this one of the validation sets."""
        self._number = number

    def _begin(self, step: int) -> None:
        self._before = self.state(self._counted), self._step_tokens
        self._step_tokens = self._share(TRAIN, step).tokens
        self._counted, self.tokens = step, self.tokens + self._step_tokens

    def step_tokens(self, step: int) -> int:
        """Of all replicas, without padding; step: the last one that was begun, or that before."""
        return self._before[1] if step < self._counted else self._step_tokens

    def state(self, step: int) -> Json:
        """Where the training data stands after the step, as in step_tokens, beyond the number of rows."""
        return self._before[0] if step < self._counted else {**self._train.state(), TOKENS: self.tokens}

    def restore(self, state: Json) -> bool:
        """Takes up what state() gave; False where it is of other data."""
        self.tokens = state.get(TOKENS, 0)
        return self._train.restore({name: value for name, value in state.items() if name not in NOT_OF_THE_DATA})

    def _share(self, kind: int, step: int) -> _Share:
        """This replica's part of the step; an evaluation always has the same rows."""
        key = (kind, step, self._number)
        if kind not in self._held or self._held[kind].key != key:
            source = self._train if kind == TRAIN else self._validation[self._number]
            replicas = self._place.num_replicas
            done, first = self._start if kind == TRAIN else (step - 1, 0)
            count = self._rows * self._micro_batches[kind] * replicas
            batch, seeds = source.batch(step - 1 - done, count, first), self._seeds(kind, step - 1 - done, count, first)
            mine = slice(self._place.replica, None, replicas)
            weights = self._weights(batch, seeds)[mine].view(-1, self._rows).mean(dim=1).tolist()
            tokens = int((batch >= 0).sum()) * (self._use.row_tokens or 1)
            self._held[kind] = _Share(key, batch[mine].contiguous(), seeds[mine], weights, tokens)
        return self._held[kind]

    def _seeds(self, kind: int, index: int, count: int, first: int) -> list[int]:
        """Of the rows first + index*count and so on."""
        if self._use.ask is None:
            return []
        whose = f"train:{self._use.seed}" if kind == TRAIN else "eval"
        start = first + index * count
        return [seed_of(f"mask:{whose}:{number}") for number in range(start, start + count)]

    def _parts(self, rows: torch.Tensor, seeds: list[int]) -> Parts:
        parts = inputs_of(rows)
        return parts if self._use.ask is None else self._use.ask(parts, seeds)

    def _weights(self, batch: torch.Tensor, seeds: list[int]) -> torch.Tensor:
        """A step's rows (B, T) → (B,) float64: the scored positions of each, over their mean; of an image one."""
        if self._task.reads_images:
            return torch.ones(len(batch), dtype=torch.float64)
        parts = self._parts(batch, seeds)
        labels = parts.get("labels")
        if self._use.documents is not None:
            labels = self._use.documents.labels(parts["input_ids"], labels)
        if labels is None:
            return torch.ones(len(batch), dtype=torch.float64)
        scored = self._task.count_scored(labels).double()
        return scored / (scored.mean() or 1.0)
