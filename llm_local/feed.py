"""The micro-batches of stage 0: each replica's share of the global batch, whatever the layout."""

from __future__ import annotations

import torch

from llm_local.packet import EVAL, TRAIN, Packet
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
        validation: Sequences,
        place: Place,
        rows: int,
        micro_batches: int,
        eval_batches: int,
        start: tuple[int, int] = (0, 0),
    ):
        self._sources = {TRAIN: (train, micro_batches), EVAL: (validation, eval_batches)}
        self._start = start
        self._place = place
        self._rows = rows
        self._held: tuple[tuple[int, int], torch.Tensor] | None = None

    def __call__(self, kind: int, step: int, index: int) -> Packet:
        """Micro-batch `index` of training step 1, 2, ... or of an evaluation; or a short row to check an export."""
        if kind in self._sources:
            ids = self._share(kind, step)[index * self._rows : (index + 1) * self._rows]
        else:
            rows = self._share(TRAIN, self._start[0] + 1) if self._held is None else self._held[1]
            ids = rows[:1, :CHECK_TOKENS].contiguous()
        return Packet(kind, step, index, input_ids=ids)

    def _share(self, kind: int, step: int) -> torch.Tensor:
        """This replica's rows of the step, (rows · micro-batches, T); an evaluation always has the same ones."""
        if self._held is None or self._held[0] != (kind, step):
            source, micro_batches = self._sources[kind]
            replicas = self._place.num_replicas
            done, first = self._start if kind == TRAIN else (step - 1, 0)
            batch = source.batch(step - 1 - done, self._rows * micro_batches * replicas, first)
            self._held = ((kind, step), batch[self._place.replica :: replicas].contiguous())
        return self._held[1]
