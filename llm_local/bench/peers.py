"""Pipelines of torch.distributed.pipelining over the same slices and rows, to be compared with.

Two ranks. 1F1B has one stage a rank; ZBV, a zero-bubble schedule, two, in the shape of a V: the first rank has the
first and the last stage.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.pipelining import PipelineStage, schedules

from llm_local.block_engine import make_optimizer, parameter_groups
from llm_local.config import Config, from_flat
from llm_local.data.sets import prepare
from llm_local.data.tokenizer import load_tokenizer
from llm_local.model.anatomy import probe
from llm_local.model.loss import head_loss
from llm_local.model.model_config import load_model_config
from llm_local.model.slices import Slice
from llm_local.model.stage import build_slice
from llm_local.partition import Span

PEERS: dict[str, tuple[str, tuple[tuple[int, ...], ...]]] = {
    "torch-1f1b": ("Schedule1F1B", ((0,), (1,))),
    "torch-zbv": ("ScheduleZBVZeroBubble", ((0, 3), (1, 2))),
}


def missing(system: str) -> str:
    """Why the system cannot be measured here; '' if it can."""
    name = PEERS[system][0] if system in PEERS else None
    if name is None or hasattr(schedules, name):
        return ""
    return f"{system} needs {name} of torch.distributed.pipelining, which torch {torch.__version__} has not"


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


@dataclass(frozen=True)
class System:
    """What trains step 1, 2, ... and returns the loss on the rank that has it; a barrier of all ranks; the end; and the
    seconds that links have kept the rank waiting, where they are counted."""

    step: Callable[[int], float | None]
    everybody: Callable[[str], None]
    finish: Callable[[], None]
    waited: Callable[[], float] = float


def make_peer(system: str, flags: dict[str, Any]) -> System:
    """The pipeline on two ranks, which both must call. flags: of a run; the partition is even."""
    config = from_flat(flags)
    dist.init_process_group("gloo", timeout=timedelta(seconds=300))
    stages, optimizers = _stages(config, PEERS[system][1])
    micro_batches, rows = config.train.gradient_accumulation_steps, config.train.per_device_train_batch_size
    head = next((part.submod.part for part in stages if part.submod.part.is_last), None)

    def loss(normed: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        assert head is not None
        return head_loss(head, normed, ids, None)

    schedule = getattr(schedules, PEERS[system][0])(
        stages if len(stages) > 1 else stages[0], micro_batches, loss_fn=loss
    )
    if dist.get_rank() == 0:  # fills the cache
        prepare(config, load_tokenizer(config))
    dist.barrier()
    rows_of = prepare(config, load_tokenizer(config))[0]
    is_first = any(part.submod.part.is_first for part in stages)

    def step(number: int) -> float | None:
        ids = rows_of.batch(number - 1, rows * micro_batches)
        losses: list[torch.Tensor] = []
        schedule.step(*([ids] if is_first else []), target=ids if head is not None else None, losses=losses)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        return float(torch.stack(losses).mean()) if losses else None

    def everybody(_name: str) -> None:
        dist.barrier()

    def finish() -> None:
        dist.barrier()
        if dist.get_rank() == 0:  # it may serve the store
            time.sleep(1)

    return System(step, everybody, finish)


def _stages(config: Config, places: tuple[tuple[int, ...], ...]) -> tuple[list[Any], list[torch.optim.Optimizer]]:
    """This rank's stages, and an optimizer for each. places: the numbers of each rank's."""
    model_config = load_model_config(config.model)
    anatomy = probe(model_config, config.model)
    num_stages = sum(map(len, places))
    cuts = [round(anatomy.num_layers * k / num_stages) for k in range(num_stages + 1)]
    shape = (config.train.per_device_train_batch_size, config.data.seq_length)
    hidden = torch.zeros(*shape, anatomy.hidden_size, requires_grad=True)
    stages, optimizers = [], []
    for number in places[dist.get_rank()]:
        span = Span(cuts[number], cuts[number + 1])
        module = _Stage(build_slice(config, model_config, anatomy, span, has_head=number == num_stages - 1))
        entering = torch.zeros(shape, dtype=torch.int64) if number == 0 else hidden
        stages.append(PipelineStage(module, number, num_stages, torch.device("cpu"), (entering,), (hidden,)))
        optimizers.append(make_optimizer(config)(parameter_groups(config, module)))
    return stages, optimizers
