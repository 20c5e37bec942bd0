"""Mixture of experts: the load-balancing loss of the routers that a slice has, by the model class's own code.

The base model records what its routers say; stand-ins have none, so a slice's are those of its own layers. The class's
forward then makes of them what it adds to its loss, coefficient included.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import PretrainedConfig

from llm_local.adapters.torch_internals import modules_of
from llm_local.model.loss import text_vocab_size, without_layers
from llm_local.model.slices import Slice
from llm_local.tasks.task import IGNORED


def wants_router_loss(config: PretrainedConfig) -> bool:
    return bool(getattr(config.get_text_config(decoder=True), "output_router_logits", False))


def want_none(config: PretrainedConfig) -> None:
    """Has the model make no router loss by itself, which fails where none of its layers has a router."""
    for part in (config, config.get_text_config(decoder=True)):
        if getattr(part, "output_router_logits", False):
            part.output_router_logits = False


class Routers:
    """The routers of a slice. A forward pass with `asked` as inputs keeps their logits until the loss is taken."""

    asked = {"output_router_logits": True}  # noqa: RUF012 - read only

    def __init__(self, part: Slice):
        self._part = part
        self._logits: tuple[torch.Tensor, ...] = ()
        part.base().register_forward_hook(self._keep)

    def _keep(self, _base: nn.Module, _args: tuple, output: Any) -> None:
        self._logits = tuple(getattr(output, "router_logits", None) or ())

    def take_loss(self, attention_mask: torch.Tensor | None) -> torch.Tensor | float:
        """The router loss of the last forward pass with its graph; 0 where no layer of the slice has a router."""
        logits, self._logits = self._logits, ()
        return router_loss(self._part, logits, attention_mask) if logits else 0.0


class _NoLogits(nn.Module):
    """Takes the output matrix's place where nobody looks at logits."""

    def __init__(self, vocab_size: int):
        super().__init__()
        self.vocab_size = vocab_size

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden.new_zeros(*hidden.shape[:-1], self.vocab_size)


def router_loss(
    part: Slice, logits: tuple[torch.Tensor, ...], attention_mask: torch.Tensor | None = None
) -> torch.Tensor:
    """Router logits (B·T, E) by layer, mask (B, T) of what is no padding → what the class adds to the loss of its model
    for those layers, a scalar."""
    model = part.model
    nothing = torch.full((1, 2), IGNORED, device=logits[0].device)
    hidden = torch.zeros(1, 2, part.anatomy.hidden_size, device=logits[0].device)
    twin = without_layers(part, hidden, logits)
    output = model.get_output_embeddings()
    for name, module in modules_of(model).items():
        if module is output:
            modules_of(twin)[name] = _NoLogits(text_vocab_size(model))
    # labels without a token have a loss of 0 if it is a sum, and the routers' is added to that
    options = {"use_cache": False, "num_items_in_batch": 1}
    return (
        type(model)
        .forward(twin, input_ids=nothing, attention_mask=attention_mask, labels=nothing, **Routers.asked, **options)
        .loss
    )
