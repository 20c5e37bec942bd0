"""Pipelines of torch.distributed.pipelining over the same slices and rows, to be compared with.

Two ranks. 1F1B has one stage a rank; ZBV, a zero-bubble schedule, two, in the shape of a V: the first rank has the
first and the last stage.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from itertools import pairwise
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.pipelining import PipelineStage
from torch.distributed.pipelining.schedules import Schedule1F1B, ScheduleZBVZeroBubble

from llm_local.anatomy import load_model_config, probe
from llm_local.block_engine import make_optimizer
from llm_local.config import from_flat
from llm_local.data import prepare
from llm_local.heads import head_loss
from llm_local.partition import Span
from llm_local.slices import Slice
from llm_local.stage import build_slice
from llm_local.tokenizer import load_tokenizer

PEERS: dict[str, tuple[Any, tuple[tuple[int, ...], ...]]] = {
    "torch-1f1b": (Schedule1F1B, ((0,), (1,))),
    "torch-zbv": (ScheduleZBVZeroBubble, ((0, 3), (1, 2))),
}


class _Stage(nn.Module):
    """A slice between two tensors: hidden states, or token ids at the start and what the output matrix reads at the
    end."""

    def __init__(self, part: Slice):
        super().__init__()
        self.part = part
        self.model = part.model

    def forward(self, entering: torch.Tensor) -> torch.Tensor:
        if self.part.is_first:
            leaving, normed = self.part(None, input_ids=entering)
        else:  # the model looks at the ids' shape alone
            ids = torch.zeros(entering.shape[:2], dtype=torch.int64, device=entering.device)
            leaving, normed = self.part(entering, input_ids=ids)
        return normed if self.part.is_last else leaving


def train_step(system: str, flags: dict[str, Any]) -> tuple[Callable[[int], Any], Callable[[str], None]]:
    """What trains step 1, 2, ... and returns the loss on the rank that has it, and a barrier.

    flags: of a run; the partition is even. Two ranks."""
    config = from_flat(flags)
    dist.init_process_group("gloo", timeout=timedelta(seconds=300))
    rank, world = dist.get_rank(), dist.get_world_size()
    schedule_class, places = PEERS[system]
    assert world == len(places)
    model_config = load_model_config(config.model)
    anatomy = probe(model_config, config.model)
    num_stages = sum(map(len, places))
    cuts = [round(anatomy.num_layers * k / num_stages) for k in range(num_stages + 1)]
    spans = [Span(*cut) for cut in pairwise(cuts)]
    train, device = config.train, torch.device("cpu")
    shape = (train.per_device_train_batch_size, config.data.seq_length)
    hidden = torch.zeros(*shape, anatomy.hidden_size, requires_grad=True)
    stages, optimizers, parts = [], [], []
    for number in places[rank]:
        part = build_slice(config, model_config, anatomy, spans[number], has_head=number == num_stages - 1)
        module = _Stage(part)
        entering = torch.zeros(shape, dtype=torch.int64) if number == 0 else hidden
        stages.append(PipelineStage(module, number, num_stages, device, (entering,), (hidden,)))
        optimizers.append(make_optimizer(config)(module.parameters()))
        parts.append(part)
    micro_batches = train.gradient_accumulation_steps
    head = next((part for part in parts if part.is_last), None)

    def loss(normed: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        assert head is not None
        return head_loss(head, normed, ids, None)

    stage: Any = stages if len(stages) > 1 else stages[0]
    schedule = schedule_class(stage, micro_batches, loss_fn=loss)
    sources = prepare(config, load_tokenizer(config))[0] if rank == 0 else None
    dist.barrier()
    sources = sources or prepare(config, load_tokenizer(config))[0]
    rows = train.per_device_train_batch_size * micro_batches

    def step(number: int) -> float | None:
        ids = sources.batch(number - 1, rows)
        given = (ids,) if 0 in places[rank] else ()
        losses: list[torch.Tensor] = []
        schedule.step(*given, target=ids if head is not None else None, losses=losses)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        return float(torch.stack(losses).mean()) if losses else None

    def everybody(_name: str) -> None:
        dist.barrier()

    return step, everybody
