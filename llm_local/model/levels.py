"""Models whose width changes on the way, in levels: only the level with most layers is cut.

The levels before it belong to the first block, and those behind it to each block's head: hidden states between stages
have one shape, and an exit is a model of the class with fewer layers in that level.
"""

from __future__ import annotations

import json
from typing import Any

from torch import nn
from transformers import PretrainedConfig, PreTrainedModel


def longest_level(part: PretrainedConfig) -> int | None:
    """Of a model whose width changes on the way, the number of the level that is cut: the one with most layers. None
    where all layers are alike."""
    depths = getattr(part, "depths", None)
    return depths.index(max(depths)) if isinstance(depths, (list, tuple)) and len(depths) > 1 else None


def num_layers_of(part: PretrainedConfig) -> int:
    """Those that can be cut apart."""
    sizes: Any = part
    return int(sizes.num_hidden_layers if longest_level(part) is None else max(sizes.depths))


def with_layers(part: PretrainedConfig, count: int) -> dict[str, Any]:
    """What the config says of a model with so many layers, of a level with so many."""
    level, sizes = longest_level(part), vars(part)
    if level is None:
        return {"num_hidden_layers": count}
    return {"depths": [count if n == level else depth for n, depth in enumerate(sizes["depths"])]}


def layers_override(part: PretrainedConfig, count: int) -> str:
    """The same as --config_overrides takes it."""
    ((name, value),) = with_layers(part, count).items()
    return f"{name}={json.dumps(value, separators=(',', ':'))}"


def layers_of_level(model: PreTrainedModel, part: Any, level: int) -> tuple[str, nn.ModuleList] | None:
    """The one module list that has that level's number in its name, and its number of layers."""
    found = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList)
        and len(module) == part.depths[level]
        and [piece for piece in name.split(".") if piece.isdecimal()] == [str(level)]
    ]
    return found[0] if len(found) == 1 else None
