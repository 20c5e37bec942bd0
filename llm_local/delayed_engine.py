"""The engine of a block that computes with the weights of one step before (methods/delayed.py).

Two copies of the block take turns. Step t computes with what the weights were after step t - 2; its gradients, summed
in the copy, become those of DeepSpeed's own weights when the last one is there; and the copy is refreshed for step
t + 2. Step t + 1 may have begun by then: in the other copy.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from deepspeed.runtime.engine import DeepSpeedEngine

from llm_local.block_engine import BlockEngine, block_of
from llm_local.checkpoint.catalog import Catalog
from llm_local.checkpoint.shards import DELAYED, Stretch
from llm_local.model.block import Block


class DelayedEngine(BlockEngine):
    """A BlockEngine whose gradients come from copies of its block. corrects: methods/delayed.py's delay_correction."""

    copies: Sequence[Block] = ()
    corrects = False
    _step = 0

    def begin(self, step: int, catalog: Catalog | None) -> None:
        """After so many steps, as a checkpoint that the weights were restored from has it. Weights that it does not
        have for a step are today's."""
        self._step = step
        for copy in self.copies:
            copy.to(self.device).train()
            for theirs, own in zip(copy.parameters(), block_of(self).parameters(), strict=True):
                theirs.data = own.detach().clone()
        if catalog is None:
            return
        wanted: dict[str, Stretch] = {}
        for name, tensor in self._kept():
            weight, _, later = name.partition(DELAYED)
            source = catalog.source(f"{catalog.source(weight, tensor.numel())}{DELAYED}{later}", tensor.numel())
            if source is not None:
                wanted[source] = Stretch(tensor.numel(), 0, tensor.view(-1))
        catalog.read(wanted)

    def state(self) -> dict[str, torch.Tensor]:
        """What a checkpoint needs beside the weights, by name."""
        return dict(self._kept())

    def _kept(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Weights that later steps compute with, and that are not those of this one."""
        for later in (1, 2) if self.corrects else (1,):
            for name, tensor in self.of_step(self._step + later).saved_tensors().items():
                if tensor.requires_grad:
                    yield f"{name}{DELAYED}{later}", tensor.detach()

    def of_step(self, step: int) -> Block:
        return self.copies[step % 2]

    def backward(self, loss: torch.Tensor, retain_graph: bool = False, scale_wrt_gas: bool = True) -> None:
        """Adds to the gradients of the copy that the loss is from."""
        (loss / self.gradient_accumulation_steps() if scale_wrt_gas else loss).backward()

    def step(self, lr_kwargs: Any = None) -> None:
        self._step += 1
        copy, module = self.of_step(self._step), block_of(self)
        pairs = [(own, p.grad) for own, p in zip(module.parameters(), copy.parameters(), strict=True)]
        # a sum whose gradients these are takes them through all that DeepSpeed does with those of a loss
        products = [(own * grad).sum() for own, grad in pairs if grad is not None]
        super().backward(torch.stack(products).sum(), scale_wrt_gas=False)
        copy.zero_grad()
        before = [p.detach().clone() for p in module.parameters()] if self.corrects else []
        super().step(lr_kwargs)
        self._refresh(copy, before)

    @torch.no_grad()
    def _refresh(self, copy: Block, before: Sequence[torch.Tensor] = ()) -> None:
        """With today's weights, and what they have moved from those before."""
        for theirs, own in zip(copy.parameters(), block_of(self).parameters(), strict=True):
            theirs.data.copy_(own)
        for theirs, old in zip(copy.parameters(), before, strict=False):
            theirs.data.add_(theirs - old)


def begin_delayed(engines: Sequence[DeepSpeedEngine], step: int, catalog: Catalog | None) -> None:
    """Of a new run or a restored one: all engines that are delayed."""
    for engine in engines:
        if isinstance(engine, DelayedEngine):
            engine.begin(step, catalog)


def delayed_state(engines: Sequence[DeepSpeedEngine]) -> dict[str, torch.Tensor]:
    """What a checkpoint needs of them, the same on all replicas."""
    found = (engine.state() for engine in engines if isinstance(engine, DelayedEngine))
    return {name: tensor for state in found for name, tensor in state.items()}
