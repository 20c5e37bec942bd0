"""Which part of a tensor a rank of a replica holds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

import torch


@dataclass(frozen=True)
class TensorCut:
    """One of `ranks` equal parts of a tensor of that shape, along a dimension. pieces: of several matrices that lie one
    behind the other in it, the rank has a part of each."""

    shape: tuple[int, ...]
    dim: int
    rank: int
    ranks: int
    pieces: int = 1

    @property
    def numel(self) -> int:
        """Of the whole."""
        return prod(self.shape)

    @property
    def start(self) -> int:
        """Where the part begins along the dimension, of a single piece."""
        return self.shape[self.dim] // self.ranks * self.rank

    def part(self, whole: torch.Tensor) -> torch.Tensor:
        """This rank's, in memory of its own; whole may be flat."""
        split = whole.reshape(self.shape).unflatten(self.dim, (self.pieces, self.ranks, -1))
        return (
            split.select(self.dim + 1, self.rank)
            .flatten(self.dim, self.dim + 1)
            .clone(memory_format=torch.contiguous_format)
        )

    def whole(self, parts: Sequence[torch.Tensor]) -> torch.Tensor:
        """The inverse of `part`, of all ranks' parts, which may be flat."""
        shape = [*self.shape]
        shape[self.dim] //= self.ranks
        split = [part.reshape(shape).unflatten(self.dim, (self.pieces, -1)) for part in parts]
        return torch.stack(split, self.dim + 1).flatten(self.dim, self.dim + 2)
