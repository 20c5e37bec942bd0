"""Private layers with matrices of low rank: cheaper heads that stay plain models when exported.

Every nn.Linear of a head's private layers becomes two factors; norms, the output matrix and what is no nn.Linear (fused
experts, subclasses with a forward of their own) stay as they are. An exit is written with the product of the factors.
"""

from __future__ import annotations

import hashlib
from typing import cast

import torch
from torch import nn
from transformers import PretrainedConfig

from llm_local.config import Config
from llm_local.model.anatomy import Anatomy
from llm_local.model.heads.head import head_of
from llm_local.model.slices import Slice, model_without_weights
from llm_local.partition import Partition

_MORE, _ROUNDS = 8, 4  # of svd_lowrank: columns beyond the rank, and power iterations


class LowRankLinear(nn.Module):
    """A matrix as the product of two: (N, in) → (N, rank) → (N, out), with the bias of the original."""

    def __init__(self, down: nn.Linear, up: nn.Linear):
        super().__init__()
        self.down = down
        self.up = up

    @staticmethod
    def of(linear: nn.Linear, rank: int, keep_norm: bool) -> LowRankLinear:
        """The truncated singular value decomposition of the matrix, by torch's global generator.

        keep_norm: scaled so that the product has the original's Frobenius norm, as the initialisation meant it.
        """
        weight, bias = linear.weight.detach(), cast("nn.Parameter | None", linear.bias)
        columns = min(rank + _MORE, *weight.shape)
        left, values, right = (t[..., :rank] for t in torch.svd_lowrank(weight.float(), columns, _ROUNDS))
        size, kept = torch.linalg.vector_norm(weight.float()), torch.linalg.vector_norm(values)
        if keep_norm and kept > 0:
            values = values * (size / kept)
        root = values.sqrt()
        # of a matrix of zeros one factor must not be zero, or neither would ever get a gradient
        rows = right * (root if kept > 0 else linear.in_features**-0.5)
        up = nn.Linear(rank, linear.out_features, bias=bias is not None)
        made = LowRankLinear(nn.Linear(linear.in_features, rank, bias=False), up)
        made.down.weight.data = rows.T.contiguous().to(weight.dtype)
        made.up.weight.data = (left * root).contiguous().to(weight.dtype)
        if bias is not None:
            made.up.bias = bias
        return made

    @property
    def weight(self) -> torch.Tensor:
        """The product (out, in): models ask their matrices for dtype and device."""
        return self.up.weight @ self.down.weight

    @property
    def bias(self) -> torch.Tensor | None:
        return self.up.bias

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return self.up(self.down(input))


def make_low_rank(head: Slice, rank: int, seed: int, is_new: bool) -> None:
    """Replaces the matrices of the head's private layers, each under a seed of its own, in place."""
    layers = [f"{head.anatomy.layers}.{index}" for index in range(head.span.start, head.span.stop)]
    for layer in layers:
        for name, module in list(head.model.get_submodule(layer).named_modules()):
            if type(module) is not nn.Linear:
                continue
            full = f"{layer}.{name}"
            digest = hashlib.sha256(f"{seed}:{full}@{head.span.start}:rank".encode()).digest()
            with torch.random.fork_rng(devices=[]):
                torch.default_generator.manual_seed(int.from_bytes(digest[:7], "big"))
                head.model.set_submodule(full, LowRankLinear.of(module, rank, keep_norm=is_new))


def multiplied(head: Slice, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The head's tensors with the product, rounded once, in the place of its factors; none if there are none."""
    for name, module in head.model.named_modules():
        if isinstance(module, LowRankLinear) and tensors:
            down, up = tensors.pop(f"{name}.down.weight"), tensors.pop(f"{name}.up.weight")
            tensors[f"{name}.weight"] = (up.float() @ down.float()).to(up.dtype)
            if module.bias is not None:
                tensors[f"{name}.bias"] = tensors.pop(f"{name}.up.bias")
    return tensors


def rank_problems(config: Config, model_config: PretrainedConfig, anatomy: Anatomy, partition: Partition) -> list[str]:
    """Whether the matrices of the private layers can have the rank."""
    rank = config.local.head_rank
    schedule = config.head_layers_schedule
    spans = [partition.private_layers(index, schedule) for index in range(len(partition.blocks))]
    private = sorted({layer for span in spans for layer in range(span.start, span.stop)})
    if rank is None or not config.method.has_local_losses or not head_of(config).takes_private_layers:
        return []
    if not private:
        return [f"head_rank={rank}: no head has private layers; set head_layers=1 or more, or leave it out"]
    trusted = config.model.trust_remote_code
    model = model_without_weights(model_config, anatomy.task, trust_remote_code=trusted)
    sizes = {
        name: min(module.weight.shape)
        for layer in private
        for name, module in model.get_submodule(f"{anatomy.layers}.{layer}").named_modules(prefix=f"layer {layer}")
        if type(module) is nn.Linear
    }
    if not sizes:
        kind = model_config.model_type
        return [f"head_rank={rank}: the layers of model type {kind!r} have no nn.Linear to make smaller; leave it out"]
    smallest = min(sizes, key=lambda name: sizes[name])
    if rank >= sizes[smallest]:
        return [
            f"head_rank={rank} is not below the smaller side {sizes[smallest]} of {smallest}; "
            f"use at most {sizes[smallest] - 1}"
        ]
    return []
