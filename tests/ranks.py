"""Runs a function on every rank of a small world: real processes, gloo on loopback, a time limit.

The fork server imports torch, DeepSpeed and the project once and rehearses a start (warm.py): a world takes a second.
"""

from __future__ import annotations

import multiprocessing
import os
import random
import socket
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import ExitStack, suppress
from itertools import cycle
from multiprocessing import forkserver
from multiprocessing.connection import Connection, wait
from typing import Any

import pytest

os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"  # else no copy of a process that has asked could use a GPU
os.environ.setdefault("DS_ACCELERATOR", "cpu")  # of all tests but those marked gpu
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # as pretrain.py has it, before torch is imported

PRELOAD = [
    "imports",
    "torch",
    "torch._dynamo",
    "torch._inductor.compile_fx",
    "deepspeed",
    "deepspeed.runtime.zero.muon.muon_optimizer",
    "transformers",
    "transformers.models.llama.modeling_llama",
    "datasets",
    "llm_local.train",
    "ranks",
    "warm",
]


def context() -> Any:
    """Starts processes as forks of the server, which is started here if it is not there."""
    with pytest.MonkeyPatch.context() as patch:  # before Python 3.12 the server has not this process's path
        patch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
        made = multiprocessing.get_context("forkserver")
        made.set_forkserver_preload(PRELOAD)
        forkserver.ensure_running()
    return made


# below those that a system gives away itself; pytest's workers begin at different ones
_ports = cycle(random.sample(range(12_000, 32_000), 20_000))


def free_ports(count: int) -> list[int]:
    """In a row; no other test gets them for a while."""
    for first in _ports:
        with ExitStack() as held, suppress(OSError):
            for port in range(first, first + count):
                held.enter_context(socket.socket()).bind(("127.0.0.1", port))
            return list(range(first, first + count))
    raise AssertionError("no port is free")


def free_port() -> int:
    return free_ports(1)[0]


def _rank(
    pipe: Connection, screen: list[Connection], function: Callable[..., Any], environ: dict[str, str], args: tuple
) -> None:
    for number, stream in enumerate(screen, start=1):  # of this test, not of that which began the server
        os.dup2(stream.fileno(), number)
    os.environ.update(environ)
    import torch

    torch.set_num_threads(1)
    try:
        pipe.send((True, function(*args)))
        parent = multiprocessing.parent_process()
        assert parent is not None
        if environ["RANK"] == "0":  # serves the store, and must not go before the others
            wait([parent.sentinel])  # until run_ranks ends it
    except BaseException:
        pipe.send((False, traceback.format_exc()))
    pipe.close()
    os._exit(0)  # process groups of a failed peer must not hold the exit up


def run_ranks(function: Callable[..., Any], world_size: int, *args: Any, seconds: float = 120.0) -> list[Any]:
    """The results of function(*args) on each rank, by rank; raises the first rank's traceback that arrives."""
    server, port = context(), free_port()
    pipes, processes = [], []
    screen = [Connection(os.dup(number), readable=False) for number in (1, 2)]
    for rank in range(world_size):
        environ = {
            "RANK": str(rank),
            "WORLD_SIZE": str(world_size),
            "LOCAL_RANK": str(rank),
            "LOCAL_WORLD_SIZE": str(world_size),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "OMP_NUM_THREADS": "1",
        }
        ours, theirs = server.Pipe(duplex=False)
        process = server.Process(target=_rank, args=(theirs, screen, function, environ, args), daemon=True)
        process.start()
        theirs.close()
        pipes.append(ours)
        processes.append(process)
    try:
        return _collect(pipes, time.monotonic() + seconds, seconds)
    finally:
        for stream in screen:
            stream.close()
        for process in processes:
            process.kill()
            process.join()


def _collect(pipes: list[Any], end: float, seconds: float) -> list[Any]:
    results: dict[int, Any] = {}
    while len(results) < len(pipes):
        open_pipes = [pipe for rank, pipe in enumerate(pipes) if rank not in results]
        ready = wait(open_pipes, timeout=max(0.0, end - time.monotonic()))
        if not ready:
            raise TimeoutError(f"ranks {[r for r in range(len(pipes)) if r not in results]} not done in {seconds} s")
        for pipe in ready:
            rank = pipes.index(pipe)
            try:
                good, value = pipe.recv()
            except EOFError:
                good, value = False, "the process is gone"
            if not good:
                raise AssertionError(f"rank {rank} failed:\n{value}")
            results[rank] = value
    return [results[rank] for rank in range(len(pipes))]
