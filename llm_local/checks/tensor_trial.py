"""A small model divided between threads, which shows before the start whether its type's plan holds."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from math import gcd
from typing import Any

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from llm_local.checks.trial import EXACT, named, small_model, trial_rows
from llm_local.config import Config
from llm_local.model.anatomy import Anatomy
from llm_local.model.tensor_parallel import divide, multiples, part_of
from llm_local.world import TensorRanks

_LENGTH, _SECONDS = 12, 60.0


class Meeting:
    """Where threads exchange what the ranks of a replica would."""

    def __init__(self, size: int):
        self.size = size
        self.barrier = threading.Barrier(size, timeout=_SECONDS)
        self.turn = threading.Lock()  # model classes are not made for threads: one runs at a time
        self._values: list[Any] = [None] * size

    def exchange(self, rank: int, values: torch.Tensor) -> list[torch.Tensor]:
        self._values[rank] = values.detach()
        self._wait()
        found = [*self._values]
        self._wait()
        return found

    def _wait(self) -> None:
        self.turn.release()
        try:
            self.barrier.wait()
        finally:
            self.turn.acquire()


class ThreadRanks(TensorRanks):
    """What a thread is in place of a rank."""

    def __init__(self, rank: int, meeting: Meeting):
        self.rank, self.size = rank, meeting.size
        self._meeting = meeting

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        return torch.stack(self.gather(values)).sum(0)

    def largest(self, values: torch.Tensor) -> torch.Tensor:
        return torch.stack(self.gather(values)).amax(0)

    def gather(self, values: torch.Tensor) -> list[torch.Tensor]:
        return self._meeting.exchange(self.rank, values)

    def exchange(self, values: torch.Tensor) -> torch.Tensor:
        return torch.stack([each[self.rank] for each in self.gather(values)])


def in_threads(work: Callable[[ThreadRanks], float], size: int) -> float:
    """The most that work returns for one of so many ranks. Raises what the first to fail has raised."""
    meeting, failed = Meeting(size), []

    def of(rank: int) -> float:
        try:
            with meeting.turn:
                return work(ThreadRanks(rank, meeting))
        except BaseException as error:
            failed.append(error)
            meeting.barrier.abort()  # the others wait for it
            raise

    with ThreadPoolExecutor(size) as pool:
        found = [pool.submit(of, rank) for rank in range(size)]
    if failed:
        raise failed[0]
    return max(future.result() for future in found)


def division_problems(config: Config, model_config: PretrainedConfig, anatomy: Anatomy) -> list[str]:
    """Whether the model's type, divided by its plan, has the logits and gradients that it has whole."""
    kind, given = model_config.model_type, f"tensor_parallel_size={config.local.tensor_parallel_size}"
    try:
        whole = small_model(config, model_config, anatomy)
        size = gcd(config.local.tensor_parallel_size, *multiples(whole).values())
        if size == 1:
            return []  # so small a model cannot be divided
        wanted = _logits_of(config, whole)
        difference = in_threads(lambda ranks: _differs(config, whole, wanted, ranks), size)
    except Exception as error:  # whatever a model class makes of parts of its matrices
        return [f"{given}: model type {kind!r} does not run divided by its plan ({named(error)}); use 1"]
    if difference <= EXACT:
        return []
    return [
        f"{given}: model type {kind!r} divided by its plan is another model (logits or gradients differ by "
        f"{difference:.1%}); use 1, with more stages or replicas"
    ]


def _logits_of(config: Config, model: PreTrainedModel) -> torch.Tensor:
    """With what a backward pass from them leaves in the model."""
    rows = trial_rows(config, model, _LENGTH)
    logits = model(**rows, **config.task.options).logits.float()
    (logits * torch.randn(logits.shape, generator=torch.Generator().manual_seed(0))).sum().backward()
    return logits.detach()


def _differs(config: Config, whole: PreTrainedModel, wanted: torch.Tensor, ranks: TensorRanks) -> float:
    model = copy.deepcopy(whole)
    model.zero_grad()
    divide((model,), ranks)
    return max(relative(_logits_of(config, model), wanted), gradients_differ(model, whole))


def gradients_differ(divided: nn.Module, whole: nn.Module) -> float:
    """The largest difference of a divided module's gradients from those of the whole one."""
    theirs = dict(whole.named_parameters())
    # some are zero but for rounding: those of a key's bias
    least = 1e-3 * max(float(p.grad.norm()) for p in theirs.values() if p.grad is not None)
    found = [0.0]
    for name, parameter in divided.named_parameters():
        part, wanted = part_of(parameter), theirs[name].grad
        assert (wanted is None) == (parameter.grad is None), name
        if wanted is not None and parameter.grad is not None:
            found.append(relative(parameter.grad, wanted if part is None else part.cut.part(wanted), least))
    return max(found)


def relative(ours: torch.Tensor, theirs: torch.Tensor, least: float = 1e-12) -> float:
    """The difference of two tensors, by the size of the second."""
    return float((ours - theirs).detach().norm()) / max(float(theirs.norm()), least)
