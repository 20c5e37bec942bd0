"""Soft targets: what the next block's head makes of the same micro-batch, as a second loss for this one.

The targets go back over one boundary, in the place of an overlapping block's gradient: 2k numbers a position. Between
stages a block's backward pass waits for the next block's forward pass.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from llm_local.model.loss import chunk_rows, head_logits, text_vocab_size
from llm_local.model.slices import Slice


@dataclass(frozen=True)
class Distillation:
    """weight: of the divergence beside the local loss. top_k: tokens of a soft target. samples: they are drawn."""

    weight: float
    top_k: int
    samples: bool = False


@torch.no_grad()
def soft_targets(head: Slice, normed: torch.Tensor, top_k: int, samples: bool = False) -> torch.Tensor:
    """(B, T, D) normed hidden states → (B, T, 2k) float32: log-probabilities of the k likeliest tokens, which add up
    to one among themselves, and the tokens' numbers.

    With samples the k tokens are drawn from the head's probabilities, and each weighs a k-th: the gradient of their
    cross-entropy is on average that of the whole distribution's, where the likeliest k leave out its tail (Anshumann et
    al. 2025, arXiv 2503.16870). torch's generator draws.
    """
    flat = normed.reshape(-1, normed.shape[-1])
    found = []
    for states in flat.split(chunk_rows(text_vocab_size(head.model), flat.device)):
        logits = _logits(head, states)
        if samples:
            tokens = logits.softmax(-1).multinomial(top_k, replacement=True)
            chosen = torch.zeros_like(tokens, dtype=torch.float32)
        else:
            chosen, tokens = logits.topk(top_k)
        found.append(torch.cat([chosen.log_softmax(-1), tokens.float()], dim=-1))  # exact below 2^24 tokens
    return torch.cat(found).reshape(*normed.shape[:-1], 2 * top_k)


def distillation_loss(
    head: Slice, normed: torch.Tensor, targets: torch.Tensor, mask: torch.Tensor | None = None
) -> torch.Tensor:
    """Mean over the positions of the Kullback-Leibler divergence from soft targets (B, T, 2k) to this head's
    predictions, from (B, T, D) normed hidden states; a float32 scalar. The logits are never whole.

    mask: (B, T), 0 where padding is, which is no position then. So a padded row counts as the same row without.
    """
    flat, wanted = normed.reshape(-1, normed.shape[-1]), targets.reshape(-1, targets.shape[-1])
    total = torch.zeros((), dtype=torch.float32, device=flat.device)
    rows = chunk_rows(text_vocab_size(head.model), flat.device)
    is_padding = [None] * -(-len(flat) // rows) if mask is None else (mask == 0).reshape(-1).split(rows)
    for states, some, padding in zip(flat.split(rows), wanted.split(rows), is_padding, strict=True):
        total = total + checkpoint(
            _divergence, head, states, some, padding, use_reentrant=False, preserve_rng_state=False
        )
    return total / (len(flat) if mask is None else mask.sum().clamp(min=1))


def _divergence(head: Slice, states: torch.Tensor, targets: torch.Tensor, padding: torch.Tensor | None) -> torch.Tensor:
    teacher, tokens = targets.chunk(2, dim=-1)
    student = F.log_softmax(_logits(head, states), dim=-1).gather(-1, tokens.long())
    divergence = teacher.exp() * (teacher - student)
    return (divergence if padding is None else divergence.masked_fill(padding[:, None], 0.0)).sum()


def _logits(head: Slice, states: torch.Tensor) -> torch.Tensor:
    """(N, D) → (N, V) float32; a head looks at the shape of the ids and not at what they are."""
    ids = torch.zeros(1, len(states), dtype=torch.int64, device=states.device)
    return head_logits(head, states[None], ids)[0].float()
