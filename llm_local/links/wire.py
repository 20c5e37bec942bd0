"""What hidden states are on a link: floating-point numbers as they are or rounded, or 8 bits and a scale a token.

Eight bits halve the traffic of bf16 again. A token's numbers are divided by their largest magnitude, so that one token
with large ones does not cost the others their digits (as LLM.int8 does it with rows, Dettmers et al. 2022).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from llm_local.device import DTYPES

CODES = (*DTYPES, "int8")  # by their number in a header
_LARGEST = 127


def encode(hidden: torch.Tensor, wire_dtype: str) -> list[torch.Tensor]:
    """Hidden states (B, T, D) → the tensors to send: themselves in that dtype, or int8 (B, T, D) and scales (B, T, 1)
    float32."""
    if wire_dtype != "int8":
        return [hidden.to(DTYPES[wire_dtype])]
    numbers = hidden.float()
    scale = (numbers.abs().amax(-1, keepdim=True) / _LARGEST).clamp(min=torch.finfo(torch.float32).tiny)
    return [(numbers / scale).round().to(torch.int8), scale]


def expected(wire_dtype: str, shape: tuple[int, int, int]) -> list[tuple[tuple[int, ...], torch.dtype]]:
    """Shape and dtype of each tensor that `encode` makes of hidden states of that shape."""
    if wire_dtype != "int8":
        return [(shape, DTYPES[wire_dtype])]
    return [(shape, torch.int8), ((*shape[:2], 1), torch.float32)]


def decode(received: Sequence[torch.Tensor]) -> torch.Tensor:
    """The inverse of `encode`: hidden states (B, T, D) in the dtype of the wire, or float32 after int8."""
    if len(received) == 1:
        return received[0]
    numbers, scale = received
    return numbers.float() * scale


def wire_dtype_of(hidden: torch.Tensor) -> str:
    """The wire dtype in which nothing is lost."""
    return next(name for name, dtype in DTYPES.items() if dtype == hidden.dtype)
