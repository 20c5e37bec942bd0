"""Heads that read the last block's output matrix: SOLO's shared readout (Yin et al. 2026, arXiv 2609.35440).

Every block but the last has its private layers, a norm and a temperature of its own, and behind them a copy of the last
block's output matrix. The copy is read and never trained: it is no parameter, so no optimizer, no gradient norm and no
ZeRO partition knows of it, and its gradient is not computed. refresh.py brings it up to date; the last block's head is
the plain one. All blocks of a stage read one tensor.

The published head also has a learned bias. One number for all tokens does nothing under a softmax, and a vector in
front of the matrix has no place in the checkpoint of a model with RMSNorm. What stays private and trained is the bias
that the model class has: that of a LayerNorm, and the output matrix's own (Phi, GPT-J).
"""

from __future__ import annotations

import deepspeed
import torch
from torch import nn

from llm_local.adapters.deepspeed_internals import is_partitioned
from llm_local.adapters.torch_internals import parameters_of
from llm_local.config import Config
from llm_local.model.anatomy import Anatomy, SliceError
from llm_local.model.heads.head import Head, register_head
from llm_local.model.loss import head_logits
from llm_local.model.slices import Slice


class Temperature(nn.Module):
    """Multiplies normed hidden states with a learned number, at first 1; an export has it in its output matrix."""

    def __init__(self) -> None:
        super().__init__()
        self.temperature = nn.Parameter(torch.ones(1))

    def forward(self, normed: torch.Tensor) -> torch.Tensor:
        """(B, T, D) → (B, T, D) in the same dtype."""
        return normed * self.temperature.to(normed.dtype)


def make_read_only(head: Slice) -> None:
    """Makes the head's output matrix a tensor that is no parameter.

    Raises SliceError where the model's head is not linear up to that matrix: its temperature could not be exported.
    """
    output = head.output_matrix
    matrix = output.weight.detach()
    # a power of two: both ways have the same bits, whatever comes behind the matrix
    normed = torch.randn(1, 8, matrix.shape[-1], generator=torch.Generator().manual_seed(0))
    ids = torch.zeros(1, 8, dtype=torch.int64)
    with torch.no_grad():
        before = head_logits(head, 2 * normed, ids)
        del parameters_of(output)["weight"]
        install(head, 2 * matrix)
        after = head_logits(head, normed, ids)
    install(head, matrix)
    if not torch.equal(before, after):
        kind = head.model.config.model_type
        raise SliceError(
            f"head=shared: the head of model type {kind!r} does more than its norm before the output matrix; "
            "use head=linear or decoder"
        )


def install(head: Slice, matrix: torch.Tensor) -> None:
    """Lets the head read `matrix`, (V, D), from now on."""
    head.output_matrix.__dict__["weight"] = matrix


def installed(head: Slice) -> torch.Tensor:
    """What the head reads, (V, D)."""
    return head.output_matrix.weight


def matrix_name(head: Slice) -> str:
    """The output matrix's name in the model: 'lm_head.weight'."""
    return next(f"{name}.weight" for name, module in head.model.named_modules() if module is head.output_matrix)


class Shared(Head):
    """Private layers if wanted, a norm, a temperature, and the copy."""

    shares_matrix = True

    def output_of(self, anatomy: Anatomy) -> int | None:
        return anatomy.num_layers

    def connect(self, config: Config, head: Slice, body: Slice) -> None:
        make_read_only(head)

    def transform(self, head: Slice) -> nn.Module:
        return Temperature()

    def folded(self, head: Slice, transform: nn.Module | None) -> dict[str, torch.Tensor]:
        """The head's matrix with its temperature in it, by the name that it has in the model."""
        assert isinstance(transform, Temperature)
        scale, matrix = transform.temperature, installed(head)
        with deepspeed.zero.GatheredParameters([scale], enabled=is_partitioned(scale)):
            return {matrix_name(head): (matrix.float() * scale.detach().float()).to(matrix.dtype).cpu()}


register_head("shared", Shared())
