"""The blocks of a stage: slices of the model that train by themselves."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import PretrainedConfig

from llm_local.anatomy import Anatomy
from llm_local.config import RunConfig
from llm_local.heads import fit_head, head_logits, head_loss
from llm_local.partition import Partition, Span
from llm_local.slices import Slice, load_slice, new_slice


class Block(nn.Module):
    """A slice with its local loss, as DeepSpeed trains it. Its output carries no graph: nothing flows back into it."""

    def __init__(self, part: Slice):
        super().__init__()
        self.model = part.model
        self.part = part

    def forward(
        self,
        input_ids: torch.Tensor,
        hidden: torch.Tensor | None,
        labels: torch.Tensor | None = None,
        return_logits: bool = False,
        **inputs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """input_ids (B, T), hidden (B, T, D) from the block before or None at the start of the model; inputs are the
        model's own attention_mask and position_ids where the data has them.

        Returns the mean next-token loss (float32 scalar), or the local head's logits (B, T, V) if wanted, and the
        hidden states (B, T, D) for the block behind.
        """
        leaving, normed = self.part(self._entering(hidden), input_ids=input_ids, **inputs)
        if return_logits:
            result = head_logits(self.part, normed, input_ids)
        else:
            result = head_loss(self.part, normed, input_ids, labels)
        return result, leaving.detach()

    def _entering(self, hidden: torch.Tensor | None) -> torch.Tensor | None:
        assert (hidden is None) == self.part.is_first, "only the first block starts from ids"
        return None if hidden is None else hidden.to(self.model.dtype)


def build_slice(config: RunConfig, model_config: PretrainedConfig, anatomy: Anatomy, span: Span) -> Slice:
    """New or pretrained weights for the layers of one block, and of no other.

    Raises ConfigError or SliceError where the weights cannot be had or the head cannot be run by itself.
    """
    model_args: dict[str, Any] = {"trust_remote_code": config.model.trust_remote_code}
    layers = config.private_head_layers
    if config.model.model_name_or_path:
        part = load_slice(config.model.model_name_or_path, model_config, anatomy, span, layers, **model_args)
    else:
        part = new_slice(model_config, anatomy, span, config.train.seed, layers, **model_args)
    fit_head(part)
    if config.model.attn_implementation:  # only now: the head is looked at on the CPU, where not every kernel runs
        part.model.set_attn_implementation(config.model.attn_implementation)
    if config.train.gradient_checkpointing:
        # reentrant checkpointing would drop the gradients of a stage whose input needs none
        part.model.gradient_checkpointing_enable({"use_reentrant": False})
    return part


def build_blocks(
    config: RunConfig, model_config: PretrainedConfig, anatomy: Anatomy, partition: Partition, stage: int
) -> list[Block]:
    """The blocks of one stage, in order."""
    return [Block(build_slice(config, model_config, anatomy, span)) for span in partition.blocks_of(stage)]
