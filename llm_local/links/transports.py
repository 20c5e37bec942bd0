"""How the tensors of a link travel: through host memory by gloo, or from GPU to GPU by NCCL."""

from __future__ import annotations

import time
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from llm_local.adapters.torch_internals import set_timeout
from llm_local.device import DeviceName, host_memory

SENDER, RECEIVER = 0, 1
_NEVER = timedelta(days=365)  # NCCL's clock starts when something is asked for, and its end is the process's
_CTAS = 4  # that a transfer takes from what computes


class Gloo:
    """Bytes in host memory. A receive may be asked for long before it is met, and be longer than what comes.

    gloo sends when the other side has asked, so that only what was asked for beforehand comes without a round trip.
    What has the same tag arrives in order. device: where the bytes are copied from, or to.
    """

    def __init__(self, store: Any, side: int, timeout: timedelta, device: torch.device):
        self._group: Any = dist.ProcessGroupGloo(store, side, 2, timeout)
        self._device = device

    def send(self, tensor: torch.Tensor, tag: int) -> Any:
        """Of uint8. Returns work, for which the tensor must live."""
        return self._group.send([tensor], RECEIVER, tag)

    def ask(self, num_bytes: int, tag: int) -> tuple[Any, torch.Tensor]:
        """Work, and the tensor that it will fill from its beginning."""
        tensor = host_memory(num_bytes, self._device)
        return self._group.recv([tensor], SENDER, tag), tensor

    def finish(self, work: Any, timeout: timedelta) -> None:
        """Raises RuntimeError if it takes longer, or the other side is gone."""
        work.wait(timeout)


class Nccl:
    """Tensors from GPU to GPU. Completion is polled, so that no compute stream waits for a peer."""

    def __init__(self, store: Any, side: int, device: torch.device):
        options = dist.ProcessGroupNCCL.Options()
        set_timeout(options, _NEVER)
        options.config.max_ctas = _CTAS
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
        """Raises RuntimeError if it takes longer, or has failed: what has failed is completed, too."""
        end = time.monotonic() + timeout.total_seconds()
        while not work.is_completed():
            if time.monotonic() > end:
                raise RuntimeError(f"Timed out waiting {1000 * timeout.total_seconds():.0f}ms")
            time.sleep(0.0002)
        work.wait(timeout)

    def close(self) -> None:
        """Once both sides are done. A communicator that is left to the process's end may hang it."""
        self._group.shutdown()


def transport(mine: DeviceName, theirs: DeviceName) -> str:
    """How hidden states travel: 'nccl' between two GPUs, else 'gloo'. NCCL refuses a GPU twice, and takes a GPU's time
    for what goes over sockets."""
    if {mine.kind, theirs.kind} != {"cuda"} or mine.identity == theirs.identity:
        return "gloo"
    return "nccl" if mine.machine == theirs.machine or (mine.has_rdma and theirs.has_rdma) else "gloo"
