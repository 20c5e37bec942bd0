"""A model of shapes alone as one of several ranks has it, which divide its layers or its rows between them."""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from llm_local.config import Config
from llm_local.model.anatomy import Anatomy, text_config
from llm_local.model.tensor_parallel import divide, sums_of_a_layer
from llm_local.world import TensorRanks


@dataclass(frozen=True)
class Division:
    """Ranks of a replica that divide each layer between them, and those that divide each row; one of the two is 1."""

    layers: int = 1
    rows: int = 1

    @staticmethod
    def of(config: Config) -> Division:
        """Of a run."""
        return Division(max(1, config.local.tensor_parallel_size), max(1, config.local.sequence_parallel_size))

    @property
    def flags(self) -> dict[str, int]:
        """Of a run."""
        return {"tensor_parallel_size": self.layers, "sequence_parallel_size": self.rows}

    def in_flags(self, config: Config) -> Config:
        """The run with this division."""
        return replace(config, local=replace(config.local, **self.flags))

    @property
    def ranks(self) -> int:
        """Of a replica."""
        return self.layers * self.rows


WHOLE = Division()


@dataclass(frozen=True)
class Told:
    """What a rank tells the others of its replica: as many bytes as a gather of what all have, with its own in them; a
    sum is two of these, an exchange one. times: so many collectives."""

    num_bytes: float = 0.0
    times: int = 0

    def __add__(self, other: Told) -> Told:
        return Told(self.num_bytes + other.num_bytes, self.times + other.times)

    def __sub__(self, other: Told) -> Told:
        return Told(self.num_bytes - other.num_bytes, self.times - other.times)

    def through(self, layers: int, rows: int = 1) -> Told:
        """So many layers, if it is a layer's for one row, with so many rows at a time."""
        return Told(self.num_bytes * layers * rows, self.times * layers)


NOTHING = Told()


class Listener(TensorRanks):
    """In the place of a rank's group: what comes back has a shape alone."""

    def __init__(self, size: int):
        self.rank, self.size, self.told = 0, size, NOTHING

    def _tell(self, num_bytes: float) -> None:
        self.told += Told(num_bytes, 1)

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        self._tell(2 * values.nbytes)
        return values.detach().clone(memory_format=torch.contiguous_format)

    def largest(self, values: torch.Tensor) -> torch.Tensor:
        return self.sum(values)

    def gather(self, values: torch.Tensor) -> list[torch.Tensor]:
        self._tell(self.size * values.nbytes)
        return [torch.empty_like(values) for _ in range(self.size)]

    def exchange(self, values: torch.Tensor) -> torch.Tensor:
        self._tell(values.nbytes)
        return torch.empty_like(values, memory_format=torch.contiguous_format)


def as_divided(model: PreTrainedModel, division: Division, listener: Listener) -> PreTrainedModel:
    """A rank's share of its layers. The model itself is left as it is; raises whatever its class makes of a number of
    ranks that does not divide it."""
    if division.layers == 1:
        return model
    # a copy of a fake tensor would be one of its mode, too
    copies: dict[int, Any] = {id(p): nn.Parameter(torch.empty_like(p)) for p in model.parameters()}
    share = copy.deepcopy(model, copies | {id(buffer): buffer for buffer in model.buffers()})
    divide((share,), listener)
    return share


def told_by_plan(model: PreTrainedModel, anatomy: Anatomy, division: Division, row_bytes: float) -> tuple[Told, Told]:
    """In a layer's forward and backward pass, for a row whose hidden states on a rank take so many bytes: for layers
    whose passes cannot be counted."""
    if division.layers > 1:
        ahead, back = sums_of_a_layer(model, anatomy.layers)
        return Told(2 * row_bytes * ahead, ahead), Told(2 * row_bytes * back, back)
    if division.rows == 1:
        return NOTHING, NOTHING
    text: Any = text_config(model.config)
    heads = getattr(text, "num_attention_heads", None) or 1
    keys = (getattr(text, "num_key_value_heads", None) or heads) / heads
    both = Told((2 + 2 * keys) * row_bytes, 4)  # queries and what comes out; keys and values
    return both, both
