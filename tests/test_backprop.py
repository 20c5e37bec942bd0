"""What the stages of the backpropagating pipeline send each other."""

from __future__ import annotations

import pytest
import torch

from llm_local.backprop import id_columns, parted, with_ids

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# padding is marked by a negative number (packing.py); as bits of floating-point numbers some of these are NaN
IDS = torch.tensor([[0, 1, 255, 32_639, 65_535], [65_536, 131_071, 2**31 - 1, -1, -50_257]]).unsqueeze(-1)


@pytest.mark.parametrize("dtype", DTYPES)
def test_ids_travel_with_hidden_states_unchanged(dtype: torch.dtype):
    hidden = torch.randn(2, 5, 3, dtype=dtype)
    sent = with_ids(hidden, IDS)
    assert (sent.shape, sent.dtype) == ((2, 5, 3 + id_columns(dtype)), dtype)
    received, ids = parted(sent.clone())
    assert torch.equal(received, hidden)
    assert torch.equal(ids, IDS)
    assert received.is_contiguous()


@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients_come_back_for_hidden_states_alone(dtype: torch.dtype):
    hidden, weights = torch.randn(2, 5, 3, dtype=dtype, requires_grad=True), torch.randn(2, 5, 3, dtype=dtype)
    received = with_ids(hidden, IDS).detach().requires_grad_()
    (parted(received)[0] * weights).sum().backward()
    with_ids(hidden, IDS).backward(received.grad)
    assert hidden.grad is not None
    assert torch.equal(hidden.grad, weights)


def test_one_token_of_an_odd_width():
    hidden, ids = torch.randn(1, 1, 3, dtype=torch.bfloat16), torch.tensor([[[70_000]]])
    received, same = parted(with_ids(hidden, ids))
    assert torch.equal(received, hidden)
    assert torch.equal(same, ids)
