"""What hidden states are on a link: floating-point numbers as they are or rounded, or 8 or 4 bits and scales.

Eight bits halve the traffic of bf16. A token's numbers are divided by their largest magnitude, so that one token with
large ones does not cost the others their digits (as LLM.int8 does it with rows, Dettmers et al. 2022). Four bits halve
it again; there each group of 64 numbers of a token has a scale, in bf16 (as in TAH-Quant, arXiv 2506.01352).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.nn.functional import pad

from llm_local.device import DTYPES

COARSE = ("int8", "int4")
CODES = (*DTYPES, *COARSE)  # by their number in a header
GROUP = 64  # numbers that have one scale in int4
_LARGEST = {"int8": 127, "int4": 7}


def encode(hidden: torch.Tensor, wire_dtype: str) -> list[torch.Tensor]:
    """Hidden states (B, T, D) → the tensors to send: themselves in that dtype, or numbers and scales.

    int8: (B, T, D) and (B, T, 1) float32. int4: of G groups, two numbers a byte, (B, T, 32 G) uint8 and (B, T, G)
    bfloat16; a last group that is not full is filled up.
    """
    if wire_dtype == "int8":
        numbers = hidden.float()
        scale = _scale(numbers, "int8")
        return [(numbers / scale).round().to(torch.int8), scale]
    if wire_dtype == "int4":
        numbers = pad(hidden.float(), (0, -hidden.shape[-1] % GROUP)).unflatten(-1, (-1, GROUP))
        scale = _scale(numbers, "int4").to(torch.bfloat16)
        digits = (numbers / scale.float()).round().clamp(-7, 7).add(8).to(torch.uint8).flatten(-2)
        return [digits[..., 0::2] | digits[..., 1::2] << 4, scale.squeeze(-1)]
    return [hidden.to(DTYPES[wire_dtype])]


def _scale(numbers: torch.Tensor, wire_dtype: str) -> torch.Tensor:
    """Of the numbers along the last dimension, never zero."""
    largest = numbers.abs().amax(-1, keepdim=True) / _LARGEST[wire_dtype]
    return largest.clamp(min=torch.finfo(torch.float32).tiny)


def expected(wire_dtype: str, shape: tuple[int, int, int]) -> list[tuple[tuple[int, ...], torch.dtype]]:
    """Shape and dtype of each tensor that `encode` makes of hidden states of that shape."""
    rows, groups = shape[:2], -(-shape[2] // GROUP)
    if wire_dtype == "int8":
        return [(shape, torch.int8), ((*rows, 1), torch.float32)]
    if wire_dtype == "int4":
        return [((*rows, groups * GROUP // 2), torch.uint8), ((*rows, groups), torch.bfloat16)]
    return [(shape, DTYPES[wire_dtype])]


def decode(received: Sequence[torch.Tensor], width: int) -> torch.Tensor:
    """The inverse of `encode`: hidden states (B, T, width) in the dtype of the wire, or float32 of coarse numbers."""
    if len(received) == 1:
        return received[0]
    numbers, scale = received
    if numbers.dtype == torch.int8:
        return numbers.float() * scale
    digits = torch.stack((numbers & 15, numbers >> 4), -1).flatten(-2).float() - 8
    return (digits.unflatten(-1, (-1, GROUP)) * scale.float().unsqueeze(-1)).flatten(-2)[..., :width].contiguous()


def wire_dtype_of(hidden: torch.Tensor) -> str:
    """The wire dtype in which nothing is lost."""
    return next(name for name, dtype in DTYPES.items() if dtype == hidden.dtype)
