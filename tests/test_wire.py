"""Hidden states as they travel: what is lost, and how many bytes it takes."""

from __future__ import annotations

import pytest
import torch

from llm_local.links.wire import COARSE, CODES, GROUP, decode, encode, expected, wire_dtype_of

HIDDEN = torch.randn(2, 16, 256, generator=torch.Generator().manual_seed(0))


def num_bytes(wire_dtype: str) -> int:
    return sum(part.numel() * part.element_size() for part in encode(HIDDEN, wire_dtype))


@pytest.mark.parametrize(
    ("wire_dtype", "error"), [("fp32", 0.0), ("bf16", 2**-8), ("fp16", 2**-11), ("int8", 0.5 / 127)]
)
def test_the_error_is_that_of_the_bits(wire_dtype: str, error: float):
    """Of int8 relative to the largest number of the token, of the others to the number itself."""
    size = HIDDEN.abs().amax(-1, keepdim=True) if wire_dtype == "int8" else HIDDEN.abs()
    assert ((decode(encode(HIDDEN, wire_dtype), 256).float() - HIDDEN).abs() <= error * size * 1.0001).all()


@pytest.mark.parametrize("wire_dtype", CODES)
def test_the_receiver_knows_what_comes(wire_dtype: str):
    assert [(tuple(t.shape), t.dtype) for t in encode(HIDDEN, wire_dtype)] == expected(wire_dtype, (2, 16, 256))


def test_eight_bits_take_a_quarter_of_fp32_and_a_scale_a_token():
    assert num_bytes("int8") == num_bytes("fp32") // 4 + 2 * 16 * 4
    assert num_bytes("bf16") == num_bytes("fp32") // 2


def test_four_bits_take_an_eighth_of_fp32_and_a_scale_a_group():
    assert num_bytes("int4") == num_bytes("fp32") // 8 + 2 * 16 * 256 // GROUP * 2


@pytest.mark.parametrize("width", [1, 63, 64, 65, 96, 200])
def test_four_bits_of_any_width(width: int):
    """The error is half of a fifteenth of each group's range, and what a scale in bf16 adds."""
    hidden = HIDDEN[..., :width]
    parts = encode(hidden, "int4")
    assert [(tuple(t.shape), t.dtype) for t in parts] == expected("int4", (2, 16, width))
    back = decode(parts, width)
    assert back.shape == hidden.shape
    for group in range(0, width, GROUP):
        ours, theirs = back[..., group : group + GROUP], hidden[..., group : group + GROUP]
        largest = theirs.abs().amax(-1, keepdim=True)
        assert ((ours - theirs).abs() <= largest * (0.5 / 7 + 2**-7)).all()


def test_one_large_number_costs_its_group_alone():
    large = HIDDEN.clone()
    large[..., 0] *= 1e4
    a, b = (decode(encode(hidden, "int4"), 256) for hidden in (large, HIDDEN))
    assert torch.equal(a[..., GROUP:], b[..., GROUP:])


@pytest.mark.parametrize("wire_dtype", COARSE)
def test_one_large_token_costs_the_others_nothing(wire_dtype: str):
    large = HIDDEN.clone()
    large[0, 0] *= 1e4
    assert torch.equal(decode(encode(large, wire_dtype), 256)[0, 1:], decode(encode(HIDDEN, wire_dtype), 256)[0, 1:])


@pytest.mark.parametrize("wire_dtype", COARSE)
def test_zeros_stay_zeros(wire_dtype: str):
    assert torch.equal(decode(encode(torch.zeros(1, 2, 4), wire_dtype), 4), torch.zeros(1, 2, 4))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_nothing_is_lost_in_a_tensors_own_dtype(dtype: torch.dtype):
    hidden = HIDDEN.to(dtype)
    (same,) = encode(hidden, wire_dtype_of(hidden))
    assert torch.equal(same, hidden)
