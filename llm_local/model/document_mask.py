"""Packed documents kept apart: positions count from 0 in each, attention and loss stay inside.

Everything follows from the token ids: a document ends at its EOS, and what is left of one at the start of a row is a
document, too. So nothing but the ids travels to a later stage, and each slice is told what its model needs. The masks
are transformers' own, made from the positions: many a model makes the same ones by itself, but several (GPT-OSS, OPT,
Falcon, MPT) take no notice of positions when they make theirs.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.masking_utils import create_masks_for_generate

from llm_local.tasks.task import IGNORED


@dataclass(frozen=True)
class DocumentMask:
    """end: the token that ends a document."""

    end: int

    def positions(self, input_ids: torch.Tensor) -> torch.Tensor:
        """(B, T) ids → (B, T) numbers of the tokens within their documents."""
        number = torch.arange(input_ids.shape[1], device=input_ids.device).expand_as(input_ids)
        starts = torch.ones_like(input_ids, dtype=torch.bool)
        starts[:, 1:] = input_ids[:, :-1] == self.end
        return number - torch.where(starts, number, 0).cummax(dim=1).values

    def labels(
        self, input_ids: torch.Tensor, labels: torch.Tensor | None = None, position_ids: torch.Tensor | None = None
    ) -> torch.Tensor:
        """(B, T) labels, by default the ids, less the first token of each document, which nothing foretells."""
        positions = self.positions(input_ids) if position_ids is None else position_ids
        return (input_ids if labels is None else labels).masked_fill(positions == 0, IGNORED)

    def inputs(self, base: PreTrainedModel, input_ids: torch.Tensor, given: dict[str, Any]) -> dict[str, Any]:
        """What the base model is to be given beside the ids (B, T), from the position_ids that are given or the ids.

        Padding is a document, too (packing.py), so its own mask is not needed.
        """
        positions = given.get("position_ids")
        positions = self.positions(input_ids) if positions is None else positions
        # read for its shape, dtype and device alone
        embeddings = torch.empty(*input_ids.shape, 0, dtype=base.dtype, device=input_ids.device)
        # without a mask and without a cache, whose argument has another name since transformers 5.24
        masks = create_masks_for_generate(base.config, embeddings, None, None, position_ids=positions)
        told = {**given, "attention_mask": masks, "position_ids": positions}
        if "position_ids" not in inspect.signature(base.forward).parameters:
            del told["position_ids"]
        return told
