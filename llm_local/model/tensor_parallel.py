"""The layers of a block, and its output matrix, divided between the ranks of a replica.

What is cut how is said by the model class's own plan (transformers' tp_plan): a matrix by its outputs, the next one by
its inputs, so that one sum over the ranks follows the two (Shoeybi et al. 2019, arXiv 1909.08053). A part is an
ordinary parameter of the rank, of which ZeRO knows nothing else; what is not cut is the same on all ranks, and so is
its gradient.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from math import gcd
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers import PretrainedConfig, PreTrainedModel

from llm_local.model.anatomy import Anatomy, text_config
from llm_local.model.slices import model_without_weights
from llm_local.model.tensor_cut import TensorCut
from llm_local.world import TensorRanks

_PART = "tensor_part"
# those with _rep are an older transformers's
_GATHERS, _SPLITS = ("colwise_gather_output", "colwise_rep"), ("rowwise_split_input", "rowwise_rep")
# the dimension of the weight that is cut
_LINEAR = dict.fromkeys(("colwise", *_GATHERS), 0) | dict.fromkeys(("rowwise", *_SPLITS), 1)
_EMBEDDING, _EXPERTS, _WHOLE = "embedding_rowwise", "moe_tp_experts", "replicated_with_grad_allreduce"


@dataclass(frozen=True)
class TensorPart:
    """What a parameter is a part of, and the ranks that have the others."""

    cut: TensorCut
    ranks: TensorRanks

    def whole(self, values: torch.Tensor) -> torch.Tensor:
        """Of each rank's values for its part, in any shape; all ranks of the replica must call."""
        return self.cut.whole(self.ranks.gather(values))


def part_of(parameter: torch.Tensor) -> TensorPart | None:
    """None of a parameter that every rank has whole."""
    return getattr(parameter, _PART, None)


class _Copy(torch.autograd.Function):
    """What all ranks have, for a computation in which each does a part: gradients are summed."""

    @staticmethod
    def forward(ctx: Any, values: torch.Tensor, ranks: TensorRanks) -> torch.Tensor:
        ctx.ranks = ranks
        return values.view_as(values)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        return ctx.ranks.sum(gradients[0]), None


class _Sum(torch.autograd.Function):
    """Of what each rank has computed."""

    @staticmethod
    def forward(ctx: Any, values: torch.Tensor, ranks: TensorRanks) -> torch.Tensor:
        return ranks.sum(values)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        return gradients[0], None


class _Gather(torch.autograd.Function):
    """Each rank's part of the last dimension, one behind the other, for a computation that all ranks do."""

    @staticmethod
    def forward(ctx: Any, values: torch.Tensor, ranks: TensorRanks) -> torch.Tensor:
        ctx.ranks = ranks
        return torch.cat(ranks.gather(values), -1)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        return gradients[0].chunk(ctx.ranks.size, -1)[ctx.ranks.rank].contiguous(), None


class _Own(torch.autograd.Function):
    """The rank's part of the last dimension of what all ranks have."""

    @staticmethod
    def forward(ctx: Any, values: torch.Tensor, ranks: TensorRanks) -> torch.Tensor:
        ctx.ranks = ranks
        return values.chunk(ranks.size, -1)[ranks.rank].contiguous()

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        return torch.cat(ctx.ranks.gather(gradients[0]), -1), None


def shared(values: torch.Tensor, ranks: TensorRanks) -> torch.Tensor:
    """What all ranks have, for a computation in which each does a part."""
    return _Copy.apply(values, ranks)


def summed(values: torch.Tensor, ranks: TensorRanks) -> torch.Tensor:
    """Of what each rank has computed; its gradient is what all ranks have."""
    return _Sum.apply(values, ranks)


def gathered(values: torch.Tensor, ranks: TensorRanks) -> torch.Tensor:
    """Each rank's part of the last dimension, one behind the other."""
    return _Gather.apply(values, ranks)


class OutputMatrix(nn.Linear):
    """One that divides its work itself, by outputs. ranks: those that have the other parts, if it is cut."""

    ranks: TensorRanks | None = None


class ColumnLinear(nn.Linear):
    """A rank's outputs of a matrix; of all ranks where `gathers`."""

    ranks: TensorRanks
    gathers: bool

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        output = F.linear(shared(input, self.ranks), self.weight, self.bias)
        return gathered(output, self.ranks) if self.gathers else output


class RowLinear(nn.Linear):
    """A matrix of which a rank has the inputs that are its own; `splits`: it is given those of all ranks."""

    ranks: TensorRanks
    splits: bool

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        input = _Own.apply(input, self.ranks) if self.splits else input
        output = summed(F.linear(input, self.weight), self.ranks)
        bias: Any = self.bias  # which torch types as if it were always there
        return output if bias is None else output + bias


def divide(models: Sequence[PreTrainedModel], ranks: TensorRanks) -> None:
    """Leaves this rank its part of a block's slices, in place; what is tied stays so."""
    for model in models:
        plan = model.tp_plan
        for name, module in [*model.named_modules()]:
            style = plan.get(_generic(name))
            if style is not None and next(module.parameters(), None) is not None:
                _divide_module(model, name, style, ranks)
        for name, parameter in model.named_parameters():
            style = plan.get(_generic(name))
            if style is not None:
                dim, pieces = _of_parameter(style, parameter.dim())
                _cut(parameter, dim, ranks, pieces)
    for module in (module for model in models for module in model.modules()):
        if isinstance(module, nn.Embedding) and part_of(module.weight) is not None:
            _look_up_in_parts(module, ranks)


def _divide_module(model: PreTrainedModel, name: str, style: str, ranks: TensorRanks) -> None:
    module: Any = model.get_submodule(name)
    if style in _LINEAR:
        _divide_linear(model, name, module, style, ranks)
    elif style == _EMBEDDING:
        _cut(module.weight, 0, ranks)
    elif style == _EXPERTS:
        module.register_forward_pre_hook(partial(_enter_experts, ranks))
        module.register_forward_hook(lambda _module, _inputs, output: summed(output, ranks))
    elif style == _WHOLE:  # each rank has used it for its part
        for parameter in module.parameters():
            parameter.register_hook(ranks.sum)


def _of_parameter(style: str, dims: int) -> tuple[int, int]:
    """Dimension and pieces of a parameter that the plan names itself: the matrices of experts."""
    return (dims - 2, 2) if style == "packed_colwise" else (dims - 1, 1)


def _generic(name: str) -> str:
    """'model.layers.3.mlp' → 'model.layers.*.mlp'."""
    return re.sub(r"(?<=\.)\d+(?=\.|$)", "*", name)


def _cut(parameter: Any, dim: int, ranks: TensorRanks, pieces: int = 1) -> None:
    if part_of(parameter) is not None:  # tied
        return
    cut = TensorCut(tuple(parameter.shape), dim, ranks.rank, ranks.size, pieces)
    parameter.data = cut.part(parameter.data)
    setattr(parameter, _PART, TensorPart(cut, ranks))
    parameter.tensor_model_parallel = True  # DeepSpeed counts it once for each rank in the norm of gradients


def _divide_linear(model: PreTrainedModel, name: str, module: Any, style: str, ranks: TensorRanks) -> None:
    dim = _LINEAR[style]
    for parameter in module.parameters() if dim == 0 else (module.weight,):  # what is added to a sum is whole
        _cut(parameter, dim, ranks)
    module.out_features, module.in_features = module.weight.shape
    if isinstance(module, OutputMatrix):
        module.ranks = ranks
        return
    kind: Any = RowLinear if dim else ColumnLinear
    made = object.__new__(kind)
    made.__dict__ = module.__dict__
    made.__dict__ |= {"ranks": ranks, "gathers": style in _GATHERS, "splits": style in _SPLITS}
    model.set_submodule(name, made)


def _look_up_in_parts(module: nn.Embedding, ranks: TensorRanks) -> None:
    """Of an embedding that is cut by vocabulary: a rank looks up the ids that are its own."""
    part = part_of(module.weight)
    assert part is not None
    start, count = part.cut.start, module.weight.shape[0]
    padding, whole = module.padding_idx, module.forward
    module.padding_idx = padding - start if padding is not None and start <= padding < start + count else None
    module.num_embeddings = count

    def look_up(input: torch.Tensor) -> torch.Tensor:
        others = (input < start) | (input >= start + count)
        return summed(whole((input - start).clamp(0, count - 1)).masked_fill(others.unsqueeze(-1), 0.0), ranks)

    module.forward = look_up


def _enter_experts(ranks: TensorRanks, _module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    """Each rank has a part of every expert: hidden states and routing weights are what all ranks have."""
    hidden, chosen, weights, *others = inputs
    return (shared(hidden, ranks), chosen, shared(weights, ranks), *others)


def plan_problems(config: PretrainedConfig, anatomy: Anatomy, ranks: int, **model_args: Any) -> list[str]:
    """Why layers of the model cannot be divided between so many ranks, with the numbers that would do."""
    model = model_without_weights(config, anatomy.task, **model_args)
    named, kind = f"tensor_parallel_size={ranks}", f"model type {config.model_type!r}"
    found = [*_planned(model)]
    if not any(name.startswith(f"{anatomy.layers}.") for name, _, _ in found):
        why = "has no plan in transformers (tp_plan) by which its layers could be divided"
        return [f"{named}: {kind} {why}; use 1, with more stages or replicas, or another type, as llama"]
    problems = [
        f"{named}: the plan of {kind} divides {name} ({type(module).__name__}) by {style!r}, which is not supported; "
        "use 1, with more stages or replicas"
        for name, style, module in found
        if not _is_known(style, module)
    ]
    if problems:
        return problems[:1]
    numbers = multiples(model)
    most = gcd(*numbers.values())
    fitting = ", ".join(str(n) for n in range(1, most + 1) if most % n == 0)
    problems = [
        f"{named} does not divide {what} of {kind}; use one of {fitting}"
        for what, number in numbers.items()
        if number % ranks
    ]
    return problems + dropout_problems(named, text_config(config), "heads of a layer")


def _planned(model: PreTrainedModel) -> Iterator[tuple[str, str, Any]]:
    """What the plan names: without numbers of layers, how it is divided, and a module or parameter of that name."""
    things = {_generic(name): thing for name, thing in (*model.named_modules(), *model.named_parameters())}
    for name, style in model.tp_plan.items():
        if name in things:
            yield name, style, things[name]


def sums_of_a_layer(model: PreTrainedModel, layers: str) -> tuple[int, int]:
    """How often the ranks sum hidden states in a layer's forward pass, and gradients of them in its backward pass, by
    the plan alone; layers: the name of their list."""
    planned = [(name, style) for name, style, thing in _planned(model) if isinstance(thing, nn.Module)]
    styles = [style for name, style in planned if name.startswith(f"{layers}.")]
    ahead, back = (*_SPLITS, "rowwise", _EXPERTS), (*_GATHERS, "colwise", _EXPERTS)
    return sum(style in ahead for style in styles), sum(style in back for style in styles)


def _is_known(style: str, thing: Any) -> bool:
    if isinstance(thing, nn.Parameter):
        return thing.dim() == 3 and style in ("packed_colwise", "rowwise")
    if style in _LINEAR:
        return type(thing) is nn.Linear
    return style in (_EXPERTS, _WHOLE) or (style == _EMBEDDING and isinstance(thing, nn.Embedding))


def multiples(model: PreTrainedModel) -> dict[str, int]:
    """All numbers that must be multiples of the ranks between which a model is divided, by what they are, in words."""
    return dict(_divided([*_planned(model)], text_config(model.config)))


def _divided(found: list[tuple[str, str, Any]], text: Any) -> Iterator[tuple[str, int]]:
    if any(style == "colwise" and "attn" in name for name, style, _ in found):
        for name in ("num_attention_heads", "num_key_value_heads"):
            if (number := getattr(text, name, None)) is not None:
                yield f"{name}={number}", number
    for name, style, thing in found:
        if isinstance(thing, nn.Parameter):
            dim, pieces = _of_parameter(style, thing.dim())
            yield f"the {thing.shape[dim] // pieces} columns or rows of {name}", thing.shape[dim] // pieces
        elif style == _EMBEDDING:
            yield f"vocab_size={thing.num_embeddings}", thing.num_embeddings
        elif style in _LINEAR:
            number, what = thing.weight.shape[_LINEAR[style]], ("outputs", "inputs")[_LINEAR[style]]
            yield f"the {number} {what} of {name}", number


def dropout_problems(named: str, text: Any, parts: str) -> list[str]:
    """The ranks of a replica would have to draw equal masks for what they all have, and others for their parts."""
    dropped = {
        name: value
        for name, value in text.to_dict().items()
        if "drop" in name
        and "classifier" not in name
        and "summary" not in name
        and isinstance(value, (int, float))
        and value
    }
    return [
        f"{named}: {name}={value} would draw the same masks for different {parts}; set {name}=0.0 in "
        "config_overrides, or use 1"
        for name, value in dropped.items()
    ]
