"""The micro-batches of stage 0: each replica's share of the global batch, whatever the layout."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from llm_local.packet import EVAL, TRAIN, Packet
from llm_local.packing import inputs_of
from llm_local.sequences import Sequences
from llm_local.world import Place

CHECK_TOKENS = 64


class Feed:
    """load(kind, step, index) for an engine of stage 0.

    A step's global batch does not depend on the layout; replica r of R takes its rows r, r + R, r + 2R, ...
    start: the steps that are done and the rows that they used up, which may have been of other batches than these.
    """

    def __init__(
        self,
        train: Sequences,
        validation: Sequence[Sequences],
        place: Place,
        rows: int,
        micro_batches: int,
        eval_batches: int,
        start: tuple[int, int] = (0, 0),
    ):
        self._train = train
        self._validation = validation
        self._number = 0
        self._micro_batches = {TRAIN: micro_batches, EVAL: eval_batches}
        self._start = start
        self._place = place
        self._rows = rows
        self._held: tuple[tuple[int, int, int], torch.Tensor] | None = None

    def __call__(self, kind: int, step: int, index: int) -> Packet:
        """Micro-batch `index` of training step 1, 2, ... or of an evaluation; or a short row to check an export."""
        if kind in self._micro_batches:
            rows = self._share(kind, step)[index * self._rows : (index + 1) * self._rows]
            return Packet(kind, step, index, **inputs_of(rows))
        rows = self._share(TRAIN, self._start[0] + 1) if self._held is None else self._held[1]
        ids = inputs_of(rows[:1, :CHECK_TOKENS].contiguous())["input_ids"]  # logits of padding are logits, too
        return Packet(kind, step, index, input_ids=ids)

    def validate_on(self, number: int) -> None:
        """The next evaluation reads this one of the validation sets."""
        self._number = number

    def state(self) -> dict[str, Any]:
        """Where the training data stands after the last step, beyond the number of rows; empty if that says it all."""
        return self._train.state()

    def restore(self, state: dict[str, Any]) -> bool:
        """Takes up what state() gave; False where it is of other data."""
        return self._train.restore(state)

    def _share(self, kind: int, step: int) -> torch.Tensor:
        """This replica's rows of the step, (rows · micro-batches, T); an evaluation always has the same ones."""
        key = (kind, step, self._number)
        if self._held is None or self._held[0] != key:
            source = self._train if kind == TRAIN else self._validation[self._number]
            replicas = self._place.num_replicas
            done, first = self._start if kind == TRAIN else (step - 1, 0)
            batch = source.batch(step - 1 - done, self._rows * self._micro_batches[kind] * replicas, first)
            self._held = (key, batch[self._place.replica :: replicas].contiguous())
        return self._held[1]
