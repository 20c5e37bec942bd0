"""The local loss: the model's own, computed without whole logits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import TINY
from torch.nn import functional as F
from transformers import AutoConfig

from llm_local.flags import ModelArguments
from llm_local.model import loss
from llm_local.model.anatomy import SliceError, probe
from llm_local.model.loss import LossLinear, fit_head, head_logits, head_loss
from llm_local.model.slices import Slice, new_slice
from llm_local.partition import Span

KINDS: dict[str, dict[str, Any]] = {
    "llama": {},
    "gemma2": {"head_dim": 8, "final_logit_softcapping": 5.0},
    "granite": {"logits_scaling": 4.0},
}


def fitted(kind: str) -> Slice:
    config = AutoConfig.for_model(kind, **{k: v for k, v in TINY.items() if k != "model_type"}, **KINDS[kind])
    part = new_slice(config, probe(config, ModelArguments()), Span(0, 4), seed=1)
    fit_head(part)
    return part


@pytest.fixture
def ids() -> torch.Tensor:
    return torch.randint(0, 4096, (2, 24), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(("kind", "older"), [*((kind, False) for kind in KINDS), ("llama", True)])
def test_loss_and_gradients_are_the_models_own(
    kind: str, older: bool, ids: torch.Tensor, monkeypatch: pytest.MonkeyPatch
):
    """older: with a torch that has no product and loss in one."""
    monkeypatch.setattr(loss, "_CHUNK_LOGITS", 7 * 4096)  # several chunks
    if older:
        monkeypatch.delattr(F, "linear_cross_entropy", raising=False)
    part = fitted(kind)
    part.model.train()
    ours = head_loss(part, part(None, input_ids=ids)[1], ids, None)
    ours.backward()
    grads = {name: p.grad.clone() for name, p in part.model.named_parameters() if p.grad is not None}
    part.model.zero_grad()
    theirs = part.model(input_ids=ids, labels=ids, use_cache=False).loss
    theirs.backward()
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=0.0)
    for name, p in part.model.named_parameters():
        torch.testing.assert_close(grads[name], p.grad, rtol=1e-4, atol=1e-7)


def test_the_chunked_product_is_used_only_where_it_is_the_head():
    assert isinstance(fitted("llama").model.get_output_embeddings(), LossLinear)
    assert not isinstance(fitted("gemma2").model.get_output_embeddings(), LossLinear)


def test_ignored_labels_do_not_count(ids: torch.Tensor):
    part = fitted("llama")
    labels = ids.clone()
    labels[:, :12] = loss.IGNORED
    normed = part(None, input_ids=ids)[1]
    wanted = part.model(input_ids=ids, labels=labels, use_cache=False).loss
    torch.testing.assert_close(head_loss(part, normed, ids, labels), wanted, rtol=1e-6, atol=0.0)
    nothing = torch.full_like(ids, loss.IGNORED)
    assert head_loss(part, normed, ids, nothing) == 0.0


def test_the_bf16_loss_is_right():
    """A sum in bf16 over thousands of positions is wrong by a tenth."""
    generator = torch.Generator().manual_seed(0)
    linear = LossLinear.of(torch.nn.Linear(32, 4096, bias=False).bfloat16())
    states = torch.randn(2000, 32, generator=generator).bfloat16()
    targets = torch.randint(0, 4096, (2000,), generator=generator)
    exact = F.cross_entropy(F.linear(states.double(), linear.weight.double()), targets)
    assert float(linear(states, targets).detach() / 2000) == pytest.approx(float(exact), rel=1e-3)


def test_logits_are_never_whole(ids: torch.Tensor):
    """No tensor of the loss has as many elements as (positions, vocabulary)."""
    part = fitted("llama")
    rows = ids.repeat(64, 1)
    normed = part(None, input_ids=rows)[1].detach().requires_grad_()
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            for tensor in out if isinstance(out, (tuple, list)) else (out,):
                if isinstance(tensor, torch.Tensor):
                    largest = max(largest, tensor.numel())
            return out

    with Watch():
        head_loss(part, normed, rows, None).backward()
    assert largest <= loss._CHUNK_LOGITS < rows.numel() * 4096


def test_a_head_that_needs_more_than_hidden_states_is_refused(monkeypatch: pytest.MonkeyPatch):
    """A forward whose logits depend on the layers beyond their last output."""
    config = AutoConfig.for_model("llama", **{k: v for k, v in TINY.items() if k != "model_type"})
    part = new_slice(config, probe(config, ModelArguments()), Span(0, 4), seed=1)
    whole = type(part.model).forward

    def forward(self: Any, **inputs: Any) -> Any:
        output = whole(self, **inputs)
        output.logits = output.logits + len(self._modules)
        return output

    monkeypatch.setattr(type(part.model), "forward", forward)
    with pytest.raises(SliceError, match="the head of model type 'llama' reads more than the last hidden states"):
        fit_head(part)


def test_logits_of_a_slice_in_the_middle_are_its_own_heads(ids: torch.Tensor):
    config = AutoConfig.for_model("llama", **{k: v for k, v in TINY.items() if k != "model_type"})
    part = new_slice(config, probe(config, ModelArguments()), Span(1, 3), seed=1)
    fit_head(part)
    _, normed = part(torch.randn(2, 24, 32), input_ids=ids)
    assert torch.equal(head_logits(part, normed, ids), F.linear(normed, part.model.lm_head.weight))
