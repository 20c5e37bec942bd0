"""Work beside the training: on a GPU in a thread and on a stream of its own; on a CPU, which has no queue, at once."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import TypeVar

import torch

from llm_local.device import SideStream, is_queued, mark

Result = TypeVar("Result")


class Aside:
    """One function after the other, each once what was queued on the device before it was handed over is done."""

    def __init__(self, device: torch.device, name: str):
        self._device = device
        self._stream = SideStream(device)
        self._thread = ThreadPoolExecutor(1, name) if is_queued(device) else None

    def after(self, function: Callable[[], Result], *tensors: torch.Tensor) -> Future[Result]:
        """Its result, to come; on a CPU what it raises is raised here. tensors: those that it reads, if it is not to
        wait for anything else on the device."""
        if self._thread is None:
            done: Future[Result] = Future()
            done.set_result(function())
            return done
        waits = not tensors or any(is_queued(tensor.device) for tensor in tensors)
        return self._thread.submit(self._run, mark(self._device) if waits else None, function)

    def _run(self, wait: Callable[[], None] | None, function: Callable[[], Result]) -> Result:
        with self._stream.work():
            if wait is not None:
                wait()
            return function()


class DeviceClock:
    """Tells when a device comes to a point, which a host that queues work ahead of it reaches earlier."""

    def __init__(self, device: torch.device):
        self._aside = Aside(device, "device clock")

    def here(self) -> Future[float]:
        """When all that is queued so far is done, as time.perf_counter has it."""
        return self._aside.after(time.perf_counter)

    def wait(self) -> Callable[[], float]:
        """Begins a wait. What it returns tells, at the end of the wait, how many seconds of it the device was idle."""
        return partial(_idle_since, time.perf_counter(), self.here())


def _idle_since(start: float, idle: Future[float]) -> float:
    return time.perf_counter() - max(start, idle.result()) if idle.done() else 0.0
