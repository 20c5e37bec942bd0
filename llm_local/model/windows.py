"""The head of a block on a window of each row: fewer positions for private layers, norm, output matrix and loss.

A window is contiguous, so that the causal mask and everything relative (rotary angles, ALiBi, relative biases, sliding
windows, convolutions) are right in it whatever the architecture. What is absolute comes before the layers (learned
positions, sinusoids) and is in the hidden states already; a head has stand-ins there. Models that take position ids
get the true ones, for those that scale by them (the temperature of Llama 4, LongRoPE's choice of factors). Two things
a window changes: private layers look back, or recur, no further than to its start, and attention in fixed chunks of
the row has its chunks counted from there.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch

from llm_local.head_plan import HeadPlan
from llm_local.model.slices import Slice

OF_TOKENS = ("input_ids", "labels", "attention_mask", "position_ids")


def draw_window(
    plan: HeadPlan, step: int, index: int, block: int, input_ids: torch.Tensor | None
) -> torch.Tensor | None:
    """(B, L) positions of the rows (B, T) of micro-batch `index` that the head of the stage's block sees in training;
    None: all of them."""
    if input_ids is None:
        return None
    windows = plan.window(step, index, block, *input_ids.shape)
    return None if windows is None else torch.tensor([list(w) for w in windows], device=input_ids.device)


def cut(tensor: torch.Tensor, window: torch.Tensor) -> torch.Tensor:
    """(B, T) or (B, T, D), and (B, L) positions → (B, L) or (B, L, D)."""
    index = window if tensor.dim() == 2 else window[..., None].expand(*window.shape, tensor.shape[-1])
    return tensor.gather(1, index)


def cut_inputs(head: Slice, window: torch.Tensor, inputs: dict[str, Any]) -> dict[str, Any]:
    """A micro-batch's tensors by token, cut to the window, and its positions if the model takes such."""
    taken = {name: cut(t, window) if name in OF_TOKENS and t is not None else t for name, t in inputs.items()}
    if "position_ids" in inspect.signature(head.base().forward).parameters:
        taken.setdefault("position_ids", window)
    return taken
