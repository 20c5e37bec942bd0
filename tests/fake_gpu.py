"""A GPU that is a CPU: work that is queued, transfers that are done later, and buffers that hold nothing until then."""

from __future__ import annotations

import os
import random
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.accelerator import real_accelerator
from deepspeed.accelerator.cpu_accelerator import CPU_Accelerator

from llm_local.device import DeviceName
from llm_local.links import ends
from llm_local.links.transports import RECEIVER, SENDER, Nccl

DELAY_SECONDS = 0.02
FAILS_AFTER = "FAKE_NCCL_FAILS_AFTER"  # variable with the number of transfers that a link makes before its errors


class _Stream:
    def __init__(self, device: torch.device | None = None):
        self.device = device

    def synchronize(self) -> None:
        time.sleep(random.random() * DELAY_SECONDS / 10)


class _Event:
    """Of work that is done a moment after it was queued."""

    def record(self, stream: _Stream) -> None:
        self._done = time.monotonic() + random.random() * DELAY_SECONDS

    def synchronize(self) -> None:
        time.sleep(max(0.0, self._done - time.monotonic()))


class QueuedCpu(CPU_Accelerator):
    def is_synchronized_device(self) -> bool:
        return False

    def use_host_timers(self) -> bool:
        return True

    def is_fp16_supported(self) -> bool:
        return True

    @property
    def Stream(self) -> type[_Stream]:
        return _Stream

    @property
    def Event(self) -> type[_Event]:
        return _Event

    def current_stream(self, device_index: int | None = None) -> _Stream:
        return _Stream()

    @contextmanager
    def stream(self, stream: _Stream) -> Iterator[None]:
        yield


class _Work:
    """As NCCL's: completed, too, when it has failed; `wait` raises then."""

    def __init__(self, work: Any, landing: Callable[[], Any], fails: bool):
        self._fails = fails
        self._landed = threading.Event()

        def land() -> None:
            with suppress(RuntimeError):
                work.wait(timedelta(seconds=60))
                time.sleep(random.random() * DELAY_SECONDS)
                landing()
                self._landed.set()

        threading.Thread(target=land, daemon=True).start()

    def is_completed(self) -> bool:
        return self._fails or self._landed.is_set()

    def wait(self, timeout: timedelta) -> None:
        if self._fails:
            raise RuntimeError("NCCL communicator encountered error set by ProcessGroupNCCL")


class FakeNccl(Nccl):
    """Carries any tensor by gloo. What is asked for is NaN, or zero, until it has come."""

    open = 0  # of this process

    def __init__(self, store: Any, side: int, device: torch.device):
        self._group: Any = dist.ProcessGroupGloo(store, side, 2, timedelta(seconds=60))
        self._device = device
        self._num_made = 0
        FakeNccl.open += 1

    def _made(self, work: Any, landing: Callable[[], Any]) -> _Work:
        self._num_made += 1
        return _Work(work, landing, self._num_made > int(os.environ.get(FAILS_AFTER, "1000000")))

    def send(self, tensor: torch.Tensor) -> Any:
        flying = tensor.contiguous().view(-1).view(torch.uint8).clone()
        return self._made(self._group.send([flying], RECEIVER, 0), lambda: None)

    def ask(self, shape: tuple[int, ...], dtype: torch.dtype) -> tuple[Any, torch.Tensor]:
        tensor = torch.full(shape, float("nan") if dtype.is_floating_point else 0, dtype=dtype)
        flying = torch.empty(tensor.numel() * dtype.itemsize, dtype=torch.uint8)
        work = self._group.recv([flying], SENDER, 0)
        return self._made(work, lambda: tensor.copy_(flying.view(dtype).view(shape))), tensor

    def close(self) -> None:
        FakeNccl.open -= 1


def pretend() -> None:
    """Makes this process's CPU such a GPU, whose links go by NCCL."""
    real_accelerator.set_accelerator(QueuedCpu())
    ends.Nccl = FakeNccl  # type: ignore
    ends.transport = lambda mine, theirs: "nccl"


def pretending(function: Callable[..., Any], *args: Any) -> Any:
    pretend()
    return function(*args)


def cuda(identity: str, machine: str = "a", has_rdma: bool = False) -> DeviceName:
    return DeviceName("cuda", identity, machine, has_rdma)
