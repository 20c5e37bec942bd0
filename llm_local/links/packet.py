"""What a link carries for one micro-batch."""

from __future__ import annotations

from dataclasses import dataclass

import torch

TRAIN, EVAL, CHECK, END, GRADIENT, REFRESH, SKIPPED = range(7)
KINDS = ("train", "eval", "check", "end", "gradient", "refresh", "skipped")
INTEGER_PARTS = ("input_ids", "attention_mask", "position_ids", "labels")


@dataclass(frozen=True)
class Packet:
    """One micro-batch on its way through the stages.

    hidden: (B, T, D), or None where only token ids exist yet; of a gradient packet, the gradient of hidden states.
    input_ids, attention_mask, position_ids, labels: (B, T) int64 on the CPU, the last three only where the data has
    them, and none in a gradient packet; of images there are labels (B, 1) alone. index: the micro-batch within its
    step. weight: of its losses, which are means over its own scored positions, in the mean over all micro-batches of
    the step, so that this is one over positions.

    What no link carries: pixel_values (B, C, H, W), images that only the first stage sees; row_tokens: how many tokens
    the model makes of each.
    """

    kind: int
    step: int
    index: int
    input_ids: torch.Tensor | None = None
    hidden: torch.Tensor | None = None
    attention_mask: torch.Tensor | None = None
    position_ids: torch.Tensor | None = None
    labels: torch.Tensor | None = None
    weight: float = 1.0
    pixel_values: torch.Tensor | None = None
    row_tokens: int = 0

    def integer_parts(self) -> dict[str, torch.Tensor]:
        """The tensors beside the hidden states that this packet has, by the names the models use."""
        parts = {name: getattr(self, name) for name in INTEGER_PARTS}
        return {name: tensor for name, tensor in parts.items() if tensor is not None}

    def inputs(self) -> dict[str, torch.Tensor]:
        """What a model is given of it beside hidden states, and labels, by the names the models use."""
        parts = self.integer_parts()
        return parts if self.pixel_values is None else {**parts, "pixel_values": self.pixel_values}

    @property
    def num_tokens(self) -> int:
        """Tokens of text, padding left out, or of images; counted on the CPU, where the mask is."""
        if self.input_ids is None:
            if self.hidden is not None:
                return self.hidden.shape[0] * self.hidden.shape[1]
            assert self.pixel_values is not None
            return len(self.pixel_values) * self.row_tokens
        return self.input_ids.numel() if self.attention_mask is None else int(self.attention_mask.sum())

    def differs(self, kind: int, step: int, index: int) -> str:
        """That it is not the packet that was expected, in words; '' if it is."""
        if (self.kind, self.step, self.index) == (kind, step, index):
            return ""
        return f"{self.title}, expected was {KINDS[kind]} micro-batch {index} of step {step}"

    @property
    def title(self) -> str:
        return f"{KINDS[self.kind]} micro-batch {self.index} of step {self.step}"
