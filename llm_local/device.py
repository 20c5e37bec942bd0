"""The device of a rank, through DeepSpeed's accelerator: the one place that knows a CPU from a GPU."""

from __future__ import annotations

import os
import platform
import resource
from typing import Any

import torch

from llm_local.adapters.torch_internals import has_cpp_compiler, has_triton
from llm_local.owner import machine

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


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


def device_identity(device: torch.device) -> str:
    """Names the device across hosts; equal for two ranks that share one."""
    properties = None if device.type == "cpu" else torch.get_device_module(device).get_device_properties(device)
    return identity(device, properties, machine())


def identity(device: torch.device, properties: Any, machine: str) -> str:
    """By the number that its driver gives it, if any: an index counts what a process, or its container, sees."""
    uuid = getattr(properties, "uuid", None)
    return f"{device.type} {uuid}" if uuid else f"{machine}/{device}"


def collective_backend(device: torch.device) -> str:
    return "gloo" if device.type == "cpu" else _accelerator().communication_backend_name()


def describe_device() -> str:
    """What runs here trains on: 'NVIDIA H100', or '2 cores (x86_64)'."""
    accelerator = _accelerator()
    if accelerator.device_name() != "cpu":
        return accelerator.get_device_name() if hasattr(accelerator, "get_device_name") else accelerator.device_name()
    return f"{len(os.sched_getaffinity(0))} cores ({platform.machine()})"


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


def synchronize(device: torch.device) -> None:
    if device.type != "cpu":
        _accelerator().synchronize(device.index)


def seed_everything(seed: int) -> None:
    torch.manual_seed(seed)  # seeds every device's generator as well


def finish_queued_work(device: torch.device) -> None:
    """Waits for what this thread has queued on the device. Not for other streams: a send there waits for its peer."""
    if device.type != "cpu":
        _accelerator().current_stream(device.index).synchronize()
