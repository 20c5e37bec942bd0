"""How many bytes autograd graphs hold for their backward passes, counted tensor by tensor."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from llm_local.adapters.torch_internals import is_fake


@dataclass
class SavedBytes:
    """Bytes that are held now, and the most that were at any time."""

    now: int = 0
    peak: int = 0

    def hold(self, size: int) -> None:
        self.now += size
        self.peak = max(self.peak, self.now)


class _Held:
    def __init__(self, tensor: torch.Tensor, counted: SavedBytes):
        self.tensor = tensor
        # a model is first watched without weights, and without memory; parameters are there anyway
        if not (isinstance(tensor, torch.nn.Parameter) or is_fake(tensor)):
            size = tensor.numel() * tensor.element_size()
            counted.hold(size)
            weakref.finalize(self, counted.hold, -size)


@contextmanager
def saved_bytes() -> Iterator[SavedBytes]:
    """Counts what graphs save meanwhile, in this thread; a tensor that is saved twice counts twice."""
    counted = SavedBytes()
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: _Held(tensor, counted), lambda held: held.tensor):
        yield counted
