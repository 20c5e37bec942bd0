"""The device of a rank, through DeepSpeed's accelerator: the one place that knows a CPU from a GPU."""

from __future__ import annotations

import json
import os
import platform
import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch

from llm_local.adapters.torch_internals import has_cpp_compiler, has_triton
from llm_local.owner import machine

_RDMA = Path("/sys/class/infiniband")
_LOCAL_RANKS = ("LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_RANK")  # DeepSpeed wants the second to equal the first
# what goes wrong on this rank's own device; the second is in torch from 2.8 on
OWN_ERRORS = (torch.OutOfMemoryError, getattr(torch, "AcceleratorError", torch.OutOfMemoryError))
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def take_the_cpu_if_alone() -> None:
    """Where torch has no accelerator DeepSpeed would else look for one, and warn, in every process."""
    if not torch.accelerator.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")


def _accelerator() -> Any:
    from deepspeed.accelerator import get_accelerator

    return get_accelerator()


def local_device(local_rank: int) -> torch.device:
    """The rank's device, made current. More ranks than GPUs share them in turn."""
    accelerator = _accelerator()
    name = accelerator.device_name()
    if name == "cpu":
        return torch.device("cpu")
    index = local_rank % accelerator.device_count()
    accelerator.set_device(index)
    return torch.device(name, index)


def set_deepspeed_device(device: torch.device) -> None:
    """Sets the variables from which DeepSpeed takes a device's index: it is not the rank's number on its host where
    ranks share a GPU, or each sees only its own. runtime/engine.py, zero/partition_parameters.py"""
    if device.type != "cpu":
        names = [name for name in _LOCAL_RANKS if name == _LOCAL_RANKS[0] or name in os.environ]
        os.environ.update(dict.fromkeys(names, str(device.index)))


@dataclass(frozen=True)
class DeviceName:
    """A rank's device, as the others know it. identity: equal for two ranks that share one, on whatever host.
    has_rdma: whether network cards of its host read memory by themselves."""

    kind: str
    identity: str
    machine: str
    has_rdma: bool

    @staticmethod
    def of(device: torch.device) -> DeviceName:
        properties = None if device.type == "cpu" else torch.get_device_module(device).get_device_properties(device)
        has_rdma = _RDMA.is_dir() and any(_RDMA.iterdir())
        return DeviceName(device.type, identity(device, properties, machine()), machine(), has_rdma)

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @staticmethod
    def from_json(text: str) -> DeviceName:
        return DeviceName(**json.loads(text))


def identity(device: torch.device, properties: Any, machine: str) -> str:
    """By the number that its driver gives it, if any: an index counts what a process, or its container, sees."""
    uuid = getattr(properties, "uuid", None)
    return f"{device.type} {uuid}" if uuid else f"{machine}/{device}"


def collective_backend(device: torch.device) -> str:
    return "gloo" if device.type == "cpu" else _accelerator().communication_backend_name()


def describe_device() -> str:
    """What runs here trains on: 'NVIDIA H100', or '2 cores (x86_64)'."""
    name = _accelerator().device_name()
    if name != "cpu":
        return torch.get_device_module(name).get_device_name()
    return f"{len(os.sched_getaffinity(0))} cores ({platform.machine()})"


def runtime_versions() -> str:
    """'CUDA 13.0, NCCL 2.28.9', of a GPU that has such."""
    cuda, nccl = torch.version.cuda, ""
    if cuda and torch.cuda.is_available():
        from torch.cuda import nccl as library

        nccl = ", NCCL " + ".".join(map(str, library.version()))
    return f"CUDA {cuda}{nccl}" if cuda else f"torch {torch.__version__}"


def supports(precision: str) -> bool:
    """Whether DeepSpeed trains in fp32, bf16 or fp16 on this machine's accelerator. No CPU counts for fp16: the few
    that compute in it gain nothing over bf16, which needs no loss scale."""
    accelerator = _accelerator()
    if precision == "fp16" and accelerator.device_name() == "cpu":
        return False
    return DTYPES[precision] in accelerator.supported_dtypes()


def missing_for_compile() -> str:
    """What torch.compile needs on this machine and does not find; '' if it can go ahead."""
    if _accelerator().device_name() != "cpu":
        return "" if has_triton() else "triton"
    return "" if has_cpp_compiler() else "a C++ compiler, as g++"


def prepare_cpu(device: torch.device, local_world_size: int) -> None:
    """Shares the cores among the host's ranks and spares the start the build of DeepSpeed's shared-memory helper.

    deepspeed.init_distributed compiles `deepspeed_shm_comm` on a CPU (42-180 s, needs g++, and a stale lock file hangs
    every later start). Only tensor-parallel inference calls it; training's collectives are gloo's.
    """
    if device.type != "cpu":
        return
    if "OMP_NUM_THREADS" not in os.environ:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        torch.set_num_threads(max(1, cores // local_world_size))
    from llm_local.adapters.deepspeed_internals import build_no_operators

    build_no_operators(("deepspeed_shm_comm", "deepspeed_not_implemented"))


def peak_memory_bytes(device: torch.device) -> int:
    """Most memory this process has held: of the device on a GPU, resident on a CPU."""
    if device.type == "cpu":
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return _accelerator().max_memory_allocated(device.index)


@cache
def memory_bytes(device: torch.device) -> int:
    """Of a GPU, all that it has."""
    return _accelerator().total_memory(device.index)


def seed_everything(seed: int) -> None:
    """Of the CPU and of the accelerator, if there is one. torch.manual_seed takes milliseconds where there is none: it
    writes down where each of its calls is from, for devices that may yet appear."""
    seed_all = torch.default_generator.manual_seed if _accelerator().device_name() == "cpu" else torch.manual_seed
    seed_all(seed)


def is_queued(device: torch.device) -> bool:
    """Whether what is called for the device is done later."""
    accelerator = _accelerator()
    return device.type == accelerator.device_name() and not accelerator.is_synchronized_device()


def mark(device: torch.device) -> Callable[[], None]:
    """What waits for all that this thread has queued on the device so far."""
    accelerator = _accelerator()
    event = accelerator.Event(**({"blocking": True} if device.type == "cuda" else {}))  # else it keeps a core busy
    event.record(accelerator.current_stream(device.index))
    return event.synchronize


def finish_queued_work(device: torch.device) -> None:
    """Waits for what this thread has queued on the device. Not for other streams: a send there waits for its peer."""
    if is_queued(device):
        mark(device)()


class SideStream:
    """A stream beside the one that computes; nothing on a CPU."""

    def __init__(self, device: torch.device):
        self._device = device
        self._stream: Any = _accelerator().Stream(device=device) if is_queued(device) else None

    @contextmanager
    def work(self) -> Iterator[None]:
        """What this thread queues within the block is queued here, and done at its end."""
        if self._stream is None:
            yield
            return
        accelerator = _accelerator()
        accelerator.set_device(self._device.index)  # a new thread's is the first one, where it would take memory
        with accelerator.stream(self._stream):
            yield
        self._stream.synchronize()


def host_memory(num_bytes: int, device: torch.device) -> torch.Tensor:
    """(num_bytes,) uint8, which copies from and to the device do not wait for."""
    return torch.empty(num_bytes, dtype=torch.uint8, pin_memory=device.type != "cpu")


def use_here(tensor: torch.Tensor) -> None:
    """Keeps a tensor that a side stream has made, and is done with, until this thread's stream has used it."""
    if tensor.device.type != "cpu":
        tensor.record_stream(_accelerator().current_stream(tensor.device.index))
