"""Hidden states as they travel: what is lost, and how many bytes it takes."""

from __future__ import annotations

import pytest
import torch

from llm_local.links.wire import CODES, decode, encode, expected, wire_dtype_of

HIDDEN = torch.randn(2, 16, 256, generator=torch.Generator().manual_seed(0))


def num_bytes(wire_dtype: str) -> int:
    return sum(part.numel() * part.element_size() for part in encode(HIDDEN, wire_dtype))


@pytest.mark.parametrize(
    ("wire_dtype", "error"), [("fp32", 0.0), ("bf16", 2**-8), ("fp16", 2**-11), ("int8", 0.5 / 127)]
)
def test_the_error_is_that_of_the_bits(wire_dtype: str, error: float):
    """Of int8 relative to the largest number of the token, of the others to the number itself."""
    size = HIDDEN.abs().amax(-1, keepdim=True) if wire_dtype == "int8" else HIDDEN.abs()
    assert ((decode(encode(HIDDEN, wire_dtype)).float() - HIDDEN).abs() <= error * size * 1.0001).all()


@pytest.mark.parametrize("wire_dtype", CODES)
def test_the_receiver_knows_what_comes(wire_dtype: str):
    assert [(tuple(t.shape), t.dtype) for t in encode(HIDDEN, wire_dtype)] == expected(wire_dtype, (2, 16, 256))


def test_eight_bits_take_a_quarter_of_fp32_and_a_scale_a_token():
    assert num_bytes("int8") == num_bytes("fp32") // 4 + 2 * 16 * 4
    assert num_bytes("bf16") == num_bytes("fp32") // 2


def test_one_large_token_costs_the_others_nothing():
    large = HIDDEN.clone()
    large[0, 0] *= 1e4
    assert torch.equal(decode(encode(large, "int8"))[0, 1:], decode(encode(HIDDEN, "int8"))[0, 1:])


def test_zeros_stay_zeros():
    assert torch.equal(decode(encode(torch.zeros(1, 2, 4), "int8")), torch.zeros(1, 2, 4))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_nothing_is_lost_in_a_tensors_own_dtype(dtype: torch.dtype):
    hidden = HIDDEN.to(dtype)
    (same,) = encode(hidden, wire_dtype_of(hidden))
    assert torch.equal(same, hidden)
