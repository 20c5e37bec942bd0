"""How the tensors of a link travel: through host memory by gloo, or from GPU to GPU by NCCL."""

from __future__ import annotations

import time
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from llm_local.adapters.torch_internals import set_timeout

SENDER, RECEIVER = 0, 1


class Gloo:
    """Bytes in host memory. A receive may be asked for long before it is met, and be longer than what comes.

    gloo sends when the other side has asked, so that only what was asked for beforehand comes without a round trip.
    What has the same tag arrives in order.
    """

    def __init__(self, store: Any, side: int, timeout: timedelta):
        self._group: Any = dist.ProcessGroupGloo(store, side, 2, timeout)

    def send(self, tensor: torch.Tensor, tag: int) -> Any:
        """Of uint8. Returns work, for which the tensor must live."""
        return self._group.send([tensor], RECEIVER, tag)

    def ask(self, num_bytes: int, tag: int) -> tuple[Any, torch.Tensor]:
        """Work, and the tensor that it will fill from its beginning."""
        tensor = torch.empty(num_bytes, dtype=torch.uint8)
        return self._group.recv([tensor], SENDER, tag), tensor

    def finish(self, work: Any, timeout: timedelta) -> None:
        """Raises RuntimeError if it takes longer, or the other side is gone."""
        work.wait(timeout)


class Nccl:
    """Tensors from GPU to GPU. Completion is polled, so that no compute stream waits for a peer."""

    def __init__(self, store: Any, side: int, timeout: timedelta, device: torch.device):
        options = dist.ProcessGroupNCCL.Options()
        set_timeout(options, timeout)
        self._group: Any = dist.ProcessGroupNCCL(store, side, 2, options)
        self._group.eager_connect_single_device(device)
        self._device = device

    def send(self, tensor: torch.Tensor) -> Any:
        """Returns work, for which the tensor must live."""
        return self._group.send([tensor.contiguous()], RECEIVER, 0)

    def ask(self, shape: tuple[int, ...], dtype: torch.dtype) -> tuple[Any, torch.Tensor]:
        """Work, and the tensor that it will fill."""
        tensor = torch.empty(shape, dtype=dtype, device=self._device)
        return self._group.recv([tensor], SENDER, 0), tensor

    def finish(self, work: Any, timeout: timedelta) -> None:
        """Raises RuntimeError if it takes longer."""
        end = time.monotonic() + timeout.total_seconds()
        while not work.is_completed():
            if time.monotonic() > end:
                raise RuntimeError(f"Timed out waiting {1000 * timeout.total_seconds():.0f}ms")
            time.sleep(0.0002)


def transport(device: torch.device, mine: str, theirs: str) -> str:
    """How hidden states travel: 'nccl' between two different GPUs, else 'gloo'. NCCL refuses a GPU twice."""
    return "nccl" if device.type == "cuda" and mine != theirs else "gloo"
