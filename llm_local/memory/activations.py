"""Bytes that a layer takes in its passes, counted on one that has shapes alone: whatever its class does is counted."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from llm_local.adapters.hf_internals import can_choose_experts_kernel, rows_as_they_stand
from llm_local.adapters.torch_internals import TensorBytes, parameters_of
from llm_local.device import DTYPES
from llm_local.memory.division import NOTHING, WHOLE, Division, Listener, Told, as_divided
from llm_local.model.anatomy import Anatomy
from llm_local.model.sequence_parallel import exchange_heads
from llm_local.tasks.task import Parts

EAGER = "eager"
ANY_KERNEL = "sdpa"  # keeps what the others do that compute no scores


@dataclass(frozen=True)
class Activations:
    """Bytes of a row on a rank, of the length and in the precision that it was counted for.

    kept: of a layer, from its forward pass to its backward pass. working: beside, while that runs. around: kept of what
    stands before the layers, as embeddings, angles and masks. ahead, back: what a rank tells those that divide the
    layer, or the row, in both passes.
    """

    kept: float
    working: float
    around: float
    ahead: Told = NOTHING
    back: Told = NOTHING


class _Enough(Exception):
    """The layer has run."""


def count_activations(
    model: PreTrainedModel,
    anatomy: Anatomy,
    inputs: Parts,
    precision: str,
    kernel: str | None,
    division: Division = WHOLE,
) -> Activations | None:
    """Of one row of inputs through the model's second layer, or its only one; the model is one of fake tensors, and is
    left as it is. division: of its layers, or of the row, of which inputs are a rank's part. None where they cannot
    tell: experts' kernels need numbers, and a class may do what fake tensors cannot."""
    if can_choose_experts_kernel(model):
        return None
    was_training, listener = model.training, Listener(division.ranks)
    try:
        model.set_attn_implementation(EAGER if kernel == EAGER else ANY_KERNEL)
        share = as_divided(model, division, listener)
        if division.rows > 1:
            exchange_heads(share, listener)
        with _in_precision(share, precision), rows_as_they_stand():
            return _count(share.train(), anatomy, inputs, listener)
    except Exception:  # of whatever kind: a size can be estimated without
        return None
    finally:
        model.set_attn_implementation(EAGER)
        model.train(was_training)


@contextmanager
def _in_precision(model: nn.Module, precision: str) -> Iterator[None]:
    """Has other parameters meanwhile, tied where the model's are."""
    made: dict[int, nn.Parameter] = {}
    before = [(parameters_of(module), dict(parameters_of(module))) for module in model.modules()]
    for holder, parameters in before:
        for name, parameter in parameters.items():
            if parameter is not None:
                if id(parameter) not in made:
                    made[id(parameter)] = nn.Parameter(parameter.detach().to(DTYPES[precision]))
                holder[name] = made[id(parameter)]
    try:
        yield
    finally:
        for holder, parameters in before:
            holder.update(parameters)


def _count(model: nn.Module, anatomy: Anatomy, inputs: Parts, listener: Listener) -> Activations:
    layers: Any = model.get_submodule(anatomy.layers)
    index = min(1, len(layers) - 1)
    layer, has_next = layers[index], index + 1 < len(layers)
    taken: list[int] = []
    told: list[Told] = []
    left: list[torch.Tensor] = []

    def enter(*_: Any) -> None:
        taken.append(count.now)
        told.append(listener.told)
        if left:
            raise _Enough

    def leave(_module: nn.Module, _inputs: Any, output: Any) -> None:
        left.append(output if isinstance(output, torch.Tensor) else output[0])
        if not has_next:
            enter()

    handles = [each.register_forward_pre_hook(enter) for each in layers[: index + 2]]
    handles.append(layer.register_forward_hook(leave))
    handles += [p.register_post_accumulate_grad_hook(_forget) for p in model.parameters()]
    try:
        with TensorBytes() as count:
            with suppress(_Enough):
                model(**inputs)
            gradient = torch.empty_like(left[0])
            count.forget_peak()
            start = count.now
            left[0].backward(gradient, inputs=list(layer.parameters()))
            working = count.peak - start + gradient.nbytes
    finally:
        for handle in handles:
            handle.remove()
    ahead, back = told[-1] - told[-2], listener.told - told[-1]
    return Activations(taken[-1] - taken[-2], working, taken[0], ahead, back)


def _forget(parameter: torch.Tensor) -> None:
    parameter.grad = None  # gradients of weights are counted elsewhere
