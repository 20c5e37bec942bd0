"""Rows divided by position between the ranks of a replica: whole rows are in attention alone, of some heads on each.

All that a layer does but attention it does position by position, and so does a head. Before attention each rank gives
the others its positions of their heads, and takes theirs of its own; behind it all goes back (Jacobs et al. 2023,
DeepSpeed-Ulysses, arXiv 2309.14509). To DeepSpeed these ranks are replicas more: a rank's loss counts by its scored
positions, so that the mean over ranks is one over those of the rows.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface, PretrainedConfig, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from llm_local.links.packet import Packet
from llm_local.model.anatomy import text_config
from llm_local.model.router_loss import wants_router_loss
from llm_local.model.tensor_parallel import dropout_problems
from llm_local.tasks.task import IGNORED
from llm_local.world import ReplicaRanks

KERNELS = (None, "sdpa")
_BY_LENGTH = ("dynamic", "longrope")  # rotary angles that depend on the longest position that a rank sees


class _Exchange(torch.autograd.Function):
    """(ranks, ...), of which the n-th is for rank n → what each rank has for this one."""

    # DeepSpeed's UlyssesSPAttentionHF and _SeqAllToAll exchange between process groups alone, which a trial between
    # threads has none of, and the former wants one number of rows, and position_ids in each layer's call (GPT-2: none)
    @staticmethod
    def forward(ctx: Any, values: torch.Tensor, ranks: ReplicaRanks) -> torch.Tensor:
        ctx.ranks = ranks
        return ranks.exchange(values)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        return ctx.ranks.exchange(gradients[0]), None


def _exchanged(values: torch.Tensor, ranks: ReplicaRanks) -> torch.Tensor:
    """(B, H, T/S, D) of all heads → (B, H/S, T, D) of the rank's own; or back, (B, T, H/S, D) → (B, T/S, H, D)."""
    parts = _Exchange.apply(values.unflatten(1, (ranks.size, -1)).movedim(1, 0), ranks)
    return parts.permute(1, 2, 0, 3, 4).flatten(2, 3)


def _attend(
    ranks: ReplicaRanks,
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """transformers' attention of (B, H, T/S, D) queries, keys and values, (B, T/S, H, D). Raises ValueError for a mask
    that is not of whole rows."""
    query, key, value = (_exchanged(each, ranks) for each in (query, key, value))
    if attention_mask is not None and attention_mask.shape[-2:] != (query.shape[2], key.shape[2]):
        raise ValueError("its class makes masks of its own")
    found, _ = sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    return _exchanged(found, ranks), None


def _mask(ranks: ReplicaRanks, *, q_length: int, kv_length: int, attention_mask: Any, **options: Any) -> Any:
    """transformers' mask of whole rows. Padding is behind all else, where no other position sees it."""
    return sdpa_mask(q_length=q_length * ranks.size, kv_length=kv_length * ranks.size, **options)


def exchange_heads(model: PreTrainedModel, ranks: ReplicaRanks) -> None:
    """Has the model's attention read whole rows."""
    name = f"positions_{ranks.rank}_of_{ranks.size}"
    AttentionInterface.register(name, partial(_attend, ranks))
    AttentionMaskInterface.register(name, partial(_mask, ranks))
    model.set_attn_implementation(name)


def own_part(packet: Packet, ranks: ReplicaRanks) -> Packet:
    """The rank's positions of whole rows."""
    parts = {name: part.chunk(ranks.size, 1)[ranks.rank] for name, part in packet.integer_parts().items()}
    return dataclasses.replace(packet, **parts)


def completed(packet: Packet, ranks: ReplicaRanks, device: torch.device) -> tuple[Packet, torch.Tensor]:
    """The packet of a rank's positions with what these need of the others: position_ids (B, T/S) in whole rows, and
    labels (B, T/S + 1) to the first one behind. And what the rank's loss counts in a mean over ranks, a scalar."""
    labels = packet.input_ids if packet.labels is None else packet.labels
    assert labels is not None, "there is text"
    rows, count = labels.shape
    told = torch.cat([labels[:, 0], (labels[:, 1:] != IGNORED).sum().view(1)]).to(device)
    found = torch.stack(ranks.gather(told))
    behind = found[:, :rows].roll(-1, 0)
    behind[-1] = IGNORED
    scored = found[:, rows] + (behind != IGNORED).sum(1)
    share = ranks.size * scored[ranks.rank] / scored.sum().clamp(min=1)
    positions = torch.arange(count, device=device).expand(rows, -1) + ranks.rank * count
    labels = torch.cat([labels.to(device), behind[ranks.rank].unsqueeze(1)], 1)
    return dataclasses.replace(packet, attention_mask=None, position_ids=positions, labels=labels), share


def position_problems(config: PretrainedConfig, kernel: str | None, ranks: int) -> Iterator[str]:
    """Why rows of the model cannot be divided between so many ranks."""
    named, kind, text = f"sequence_parallel_size={ranks}", f"model type {config.model_type!r}", text_config(config)
    if kernel not in KERNELS:
        yield f"{named} with attn_implementation={kernel}: heads are exchanged around sdpa alone; use that"
    for name in ("num_attention_heads", "num_key_value_heads"):
        number = getattr(text, name, None)
        if isinstance(number, int) and number % ranks:
            fitting = ", ".join(str(n) for n in range(1, number + 1) if number % n == 0)
            yield f"{named} does not divide {name}={number} of {kind}; use one of {fitting}"
    rope = getattr(text, "rope_parameters", None) or {}
    for values in (rope, *(each for each in rope.values() if isinstance(each, dict))):
        if values.get("rope_type") in _BY_LENGTH:
            yield (
                f"{named}: rope_type={values['rope_type']} of {kind} looks at a row's length, which no rank sees; use "
                "1, or another rope_type"
            )
    if getattr(text, "attn_temperature_tuning", False):
        yield f"{named}: attn_temperature_tuning of {kind} counts a rank's own positions; set it to false"
    for name in (name for name in text.to_dict() if name.startswith("index_topk")):
        yield f"{named}: {kind} chooses {name} of the keys that a rank has; use 1, with more stages or replicas"
    if wants_router_loss(config):
        yield f"{named}: output_router_logits=true asks for a loss of whole rows, which no rank sees; set it to false"
    yield from dropout_problems(named, text, "positions of a row")
