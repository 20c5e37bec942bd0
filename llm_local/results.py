"""What a step and an evaluation have found, whichever engine trains."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from deepspeed.runtime.engine import DeepSpeedEngine

from llm_local.block_engine import count_step


class NonFiniteLoss(RuntimeError):
    """A loss that is NaN or infinite: the run stops before it spoils a checkpoint."""


@dataclass(frozen=True)
class StepResult:
    """losses: (blocks,) float32, of this replica; where the whole model has one loss that one, 0 on the stages in front
    of its head. Their mean over the replicas is one over all scored positions of the step, as a micro-batch counts by
    its Packet's weight. lr: the rate that the step used. grad_norms: one a block, before clipping; None where DeepSpeed
    computes none. tokens: of this replica, without padding. is_skipped: nothing was trained, as nothing came. What is
    on the device is waited for when somebody looks at it."""

    losses: torch.Tensor
    lr: float
    grad_norms: tuple[float | torch.Tensor | None, ...]
    tokens: int | torch.Tensor
    is_skipped: bool = False


@dataclass(frozen=True)
class EvalResult:
    """losses: (blocks,) float32, as in StepResult. tokens: of this replica, without padding. measures: (blocks, M),
    what the task measures beside the loss, means over rows."""

    losses: torch.Tensor
    tokens: int
    measures: torch.Tensor = field(default_factory=lambda: torch.zeros(1, 0))


def skip_step(engines: Sequence[DeepSpeedEngine]) -> StepResult:
    """A step of which nothing has come: the learning rate's schedule goes on, and nothing else."""
    lr = float(engines[-1].get_lr()[0])
    for engine in engines:
        count_step(engine)
    return StepResult(torch.full((len(engines),), math.nan), lr, (None,) * len(engines), 0, is_skipped=True)
