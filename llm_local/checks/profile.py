"""Costs of the layers and of a head as seconds measured on this device, in place of counted FLOPs.

FLOPs miss what does not multiply matrices: recurrences, routing, small widths, a kernel that a device has not. Layers
that are alike are measured once. One layer is in memory at a time.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
from torch import nn
from transformers import PretrainedConfig

from llm_local.config import Config
from llm_local.device import DTYPES, finish_queued_work, local_device
from llm_local.model.anatomy import Anatomy
from llm_local.model.loss import head_loss
from llm_local.model.slices import model_without_weights
from llm_local.model.stage import build_slice
from llm_local.partition import Costs, Span
from llm_local.tasks.task import IGNORED

WARMUP, PASSES = 2, 5
_NUMBERED = ("layer_idx", "layer_id", "layer_number")


def measure_costs(config: Config, model_config: PretrainedConfig, anatomy: Anatomy) -> Costs:
    """Seconds of a forward and backward pass of a micro-batch through each layer, and through the model's own head."""
    kinds = layer_kinds(config, model_config, anatomy)
    seconds: dict[str, float] = {}
    for index in reversed(range(anatomy.num_layers)):  # the first layer comes with the embedding
        if kinds[index] not in seconds:
            seconds[kinds[index]] = _measure(config, model_config, anatomy, Span(index, index + 1), has_head=False)
    layers = tuple(seconds[kind] for kind in kinds)
    end = Span(anatomy.num_layers, anatomy.num_layers)
    head = _measure(config, model_config, anatomy, end, has_head=True)
    return Costs(sum(layers) / len(layers), head, layers)


def layer_kinds(config: Config, model_config: PretrainedConfig, anatomy: Anatomy) -> list[str]:
    """Of each layer what it is made of; layers of one kind cost the same."""
    model = model_without_weights(model_config, anatomy.task, trust_remote_code=config.model.trust_remote_code)
    return [_kind(layer) for layer in anatomy.layers_in(model)]


def _kind(layer: nn.Module) -> str:
    parts = []
    for name, module in layer.named_modules():
        plain = {k: v for k, v in vars(module).items() if isinstance(v, (bool, int, float, str)) and k not in _NUMBERED}
        shapes = [(n, tuple(p.shape)) for n, p in module.named_parameters(recurse=False)]
        parts.append((name, type(module).__name__, sorted(plain.items()), shapes))
    return repr(parts)


def _measure(config: Config, model_config: PretrainedConfig, anatomy: Anatomy, span: Span, has_head: bool) -> float:
    device = local_device(int(os.environ.get("LOCAL_RANK", "0")))
    part = build_slice(config, model_config, anatomy, span, has_head)
    model: Any = part.model
    model.to(device, DTYPES[config.precision]).train()
    shape = (config.train.per_device_train_batch_size, config.data.seq_length)
    ids = torch.zeros(shape, dtype=torch.int64, device=device)
    scored = torch.rand(shape, device=device) < config.task.scored_share(config.data)
    labels = ids[:, :1] if anatomy.row_shape else ids.masked_fill(~scored, IGNORED)
    given = torch.zeros(shape[0], *anatomy.row_shape, device=device) if anatomy.row_shape else ids
    inputs = {config.task.main_input: given}
    hidden = torch.randn(*shape, anatomy.hidden_size, device=device, dtype=DTYPES[config.precision])
    entering = None if part.is_first else hidden.requires_grad_()

    def once() -> None:
        leaving, normed = part(entering, **inputs)
        loss = head_loss(part, normed, ids, labels) if has_head else leaving.float().sum()
        loss.backward()
        part.model.zero_grad()

    return _seconds(once, device)


def _seconds(once: Callable[[], None], device: torch.device) -> float:
    found = []
    for _ in range(WARMUP + PASSES):
        finish_queued_work(device)
        start = time.perf_counter()
        once()
        finish_queued_work(device)
        found.append(time.perf_counter() - start)
    return median(found[WARMUP:])
