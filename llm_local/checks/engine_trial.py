"""A tiny engine with the run's own JSON: what DeepSpeed refuses, or no checkpoint can hold, is known before the start.

It is made in a process of its own, as DeepSpeed's groups and switches stay for as long as a process lives.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import torch
from deepspeed.runtime.config import DeepSpeedConfig
from torch.optim.lr_scheduler import LRScheduler

from llm_local.adapters.torch_internals import compile_nothing
from llm_local.block_engine import BlockEngine, engine_arguments, make_scheduler
from llm_local.checkpoint.saver import snapshot
from llm_local.config import Config, from_flat
from llm_local.device import local_device
from llm_local.ds_config import load_json, resolve
from llm_local.world import join_nobody

WIDTH = 8


def engine_problems(config: Config, num_replicas: int) -> list[str]:
    """Why no engine can train with the run's settings. The flags and the JSON by themselves are right."""
    settings = load_json(config)
    if "scheduler" not in settings and (problem := _schedule_problem(config)):
        return [problem]
    secondary = settings.get("zero_optimization", {}).get("zero_hpz_partition_size", 1)
    if secondary > 1 and num_replicas % secondary:
        where = f"{config.train.deepspeed}: zero_hpz_partition_size={secondary}"
        return [f"{where} does not divide the {num_replicas} replicas of a stage; use a number that does"]
    if config.train.deepspeed is None:
        return []
    with tempfile.TemporaryDirectory() as folder:
        said, seconds = Path(folder) / "said", config.train.ddp_timeout
        where = _fork if local_device(0).type == "cpu" else _start
        ended = where(config, num_replicas, said, seconds)
        if ended == f"ended with {-signal.SIGKILL}":  # by somebody else, who need not come again
            ended = where(config, num_replicas, said, seconds)
        reason = said.read_text() if said.exists() else f"the trial {ended}"
    return [f"{config.train.deepspeed}: DeepSpeed cannot train with it: {reason}"] if reason else []


def _schedule_problem(config: Config) -> str:
    train = config.train
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=train.learning_rate)
    try:
        make_scheduler(config)(optimizer)
    except ValueError as error:
        name = f"lr_scheduler_type={train.lr_scheduler_type} with learning_rate={train.learning_rate}"
        return f"{name}: {error}; raise learning_rate, or choose another"
    return ""


def _fork(config: Config, num_replicas: int, said: Path, seconds: float) -> str:
    """A copy of this process, which has everything imported. Returns how it ended."""
    child = os.fork()
    if child == 0:
        try:
            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            signal.alarm(int(seconds) + 1)  # should nobody be left who waits
            nothing = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nothing, 1)
            os.dup2(nothing, 2)
            os.environ["OMP_NUM_THREADS"] = "1"
            torch.set_num_threads(1)  # the others did not come along
            said.write_text(_try(config, num_replicas))
        finally:
            os._exit(0)
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return f"ended with {os.waitstatus_to_exitcode(status)}"
        time.sleep(0.01)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return f"did not end in {seconds:.0f} s"


def _start(config: Config, num_replicas: int, said: Path, seconds: float) -> str:
    """A new process: no copy of one can use its GPU. Returns how it ended."""
    command = [sys.executable, "-m", __name__, json.dumps(config.flat()), str(num_replicas), str(said)]
    try:
        done = subprocess.run(command, capture_output=True, timeout=seconds, check=False)
    except subprocess.TimeoutExpired:
        return f"did not end in {seconds:.0f} s"
    return f"ended with {done.returncode}"


class _Tiny(torch.nn.Module):
    """A parameter of each kind: embedding, matrix, vector."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = torch.nn.Embedding(WIDTH, WIDTH)
        self.layer = torch.nn.Linear(WIDTH, WIDTH)
        self.norm = torch.nn.LayerNorm(WIDTH)

    def saved_tensors(self) -> dict[str, torch.Tensor]:
        return self.state_dict(keep_vars=True)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.norm(self.layer(self.embedding(ids))).float().square().mean()


def _try(config: Config, num_replicas: int) -> str:
    """What there is to say against the settings; '' if an engine trains with them and can be saved."""
    try:
        join_nobody()
        compile_nothing()  # nothing is worth that here
        settings = resolve(config, num_replicas, SimpleNamespace(hidden_size=WIDTH))
        settings.pop("train_batch_size", None)
        settings.update(train_micro_batch_size_per_gpu=1, gradient_accumulation_steps=1)
        settings["zero_optimization"].pop("zero_hpz_partition_size", None)
        arguments = engine_arguments(config, _Tiny(), settings)
        engine = BlockEngine(config_class=DeepSpeedConfig(settings), **arguments)
        engine.backward(engine(torch.arange(WIDTH, device=engine.device)))
        engine.step()
        if config.save_interval:
            snapshot([engine], 0)
        _step_at(engine.lr_scheduler, config.train.max_steps - 1)
    except Exception as error:  # of whatever library, and asserts
        return " ".join(f"{type(error).__name__}: {error}".split())
    return ""


def _step_at(scheduler: object, step: int) -> None:
    """One more step than so many: a schedule may be shorter than the run."""
    if isinstance(scheduler, LRScheduler):
        scheduler.last_epoch = step
        scheduler.step()


if __name__ == "__main__":
    flat, replicas, path = sys.argv[1:]
    Path(path).write_text(_try(from_flat(json.loads(flat)), int(replicas)))
