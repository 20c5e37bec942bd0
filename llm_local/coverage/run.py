"""Tries many model types, each in a process of its own with a limit of time and memory, for some of them crash."""

from __future__ import annotations

import multiprocessing
import os
import resource
import sys
import time
from collections import deque
from collections.abc import Sequence
from multiprocessing.connection import Connection, wait
from typing import Any

import torch
from tqdm import tqdm
from transformers import logging

from llm_local.coverage.model_type import UNTRIED, Finding, examine

SECONDS = 240.0
MEMORY_BYTES = 6 << 30
BAR = "{n_fmt}/{total_fmt} types |{bar:20}| {elapsed}<{remaining}{postfix}"
PRELOAD = ["torch._dynamo", "deepspeed", "llm_local.coverage.run"]


def examine_all(
    types: Sequence[str], jobs: int, task: str = "causal-lm", seconds: float = SECONDS, memory: int = MEMORY_BYTES
) -> list[Finding]:
    """A finding for each type, in their order; so many side by side."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    pending, active, found = deque(types), {}, {}
    with tqdm(total=len(types), disable=not sys.stderr.isatty(), bar_format=BAR, dynamic_ncols=True) as bar:
        try:
            while pending or active:
                while pending and len(active) < jobs:
                    kind = pending.popleft()
                    ours, theirs = context.Pipe(duplex=False)
                    process = context.Process(target=_work, args=(kind, task, theirs, memory), daemon=True)
                    process.start()
                    theirs.close()
                    active[ours] = (process, kind, time.monotonic() + seconds)
                bar.set_postfix_str(", ".join(kind for _, kind, _ in active.values()))
                for ours in _ready(active):
                    process, kind, _ = active.pop(ours)
                    found[kind] = _receive(ours, process, kind, seconds)
                    bar.update()
        finally:
            for process, _, _ in active.values():
                process.kill()
    return [found[kind] for kind in types]


def _ready(active: dict[Connection, tuple[Any, str, float]]) -> list[Connection]:
    """Those that have something to say, have ended, or have had their time."""
    soonest = min(deadline for _, _, deadline in active.values())
    spoken = wait(list(active), timeout=max(0.0, soonest - time.monotonic()))
    now = time.monotonic()
    return [ours for ours, (_, _, deadline) in active.items() if ours in spoken or now >= deadline]


def _receive(ours: Connection, process: Any, kind: str, seconds: float) -> Finding:
    try:
        if ours.poll():
            return ours.recv()
        process.kill()
        return Finding(kind, UNTRIED, f"took longer than {seconds:.0f} s")
    except EOFError:  # it is gone without a word
        process.join()
        return Finding(kind, UNTRIED, f"its process ended with exit status {process.exitcode}")
    finally:
        ours.close()
        process.join()


def _work(kind: str, task: str, theirs: Connection, memory: int) -> None:
    """Sends the finding; what transformers prints on the way is lost."""
    silent = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silent, sys.stderr.fileno())
    resource.setrlimit(resource.RLIMIT_DATA, (memory, memory))
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    theirs.send(examine(kind, task))
