"""A run that is told to stop saves first: its ranks agree on a step, whichever of them the signal reached."""

from __future__ import annotations

import signal
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from conftest import Trainer, records
from launching import START_SECONDS, by_hand, deepspeed, job, until, until_step
from torch.distributed import TCPStore

from llm_local.checkpoint.line import committed
from llm_local.stopping import REQUEST, Stop

STEADY = {"num_stages": 2, "eval_batches": 0, "lr_scheduler_type": "constant", "save_steps": 100_000}
ENDLESS = {**STEADY, "max_steps": 1_000_000}


def saved_step(output: Path) -> int:
    (checkpoint,) = committed(output)
    return int(checkpoint.name.removeprefix("step-"))


def test_ranks_agree_on_the_step_of_the_furthest_and_wait_for_none():
    """One of them is far behind: what it has to do until then it does after the agreement."""
    store: Any = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    stops, far = [Stop() for _ in range(3)], (1, 40, 25)
    for stop, begun in zip(stops, far, strict=True):
        assert all(stop.begins(step) for step in range(1, begun + 1))
        stop.exchange(store, stops.index(stop), 3)
        assert not stop.reason
    store.compare_set(REQUEST, "", "SIGTERM")
    store.compare_set(REQUEST, "", "SIGUSR1")
    stops[1].exchange(store, 1, 3)
    went_on: list[bool] = []
    waiting = threading.Thread(target=lambda: went_on.append(stops[1].begins(41)))
    waiting.start()
    for rank in (0, 2):
        stops[rank].exchange(store, rank, 3)
    assert waiting.is_alive(), "it begins no step before the others have said where they are"
    for rank in range(3):
        stops[rank].exchange(store, rank, 3)
    waiting.join(10)
    assert went_on == [False]
    for stop, begun in zip(stops, far, strict=True):
        assert (stop.last, stop.status) == (40, 128 + signal.SIGTERM)
        assert [stop.begins(step) for step in range(begun + 1, 42)] == [True] * (40 - begun) + [False]


@pytest.mark.processes
def test_a_signal_to_one_rank_saves_the_run_which_goes_on_bit_for_bit(trainer: Trainer, tmp_path: Path):
    output = trainer.folder / "run"
    with by_hand(2, trainer.flags("run", **ENDLESS, resume_from_checkpoint="auto"), tmp_path) as ranks:
        until_step(5, output, 2, lambda: "\n".join(rank.text for rank in ranks))
        ranks[1].send(signal.SIGUSR1)
        codes = [rank.wait(START_SECONDS) for rank in ranks]
    assert codes == [128 + signal.SIGUSR1] * 2, "\n".join(rank.text for rank in ranks)
    step = saved_step(output)
    said = f"llm_local: SIGUSR1: stopped and saved at step {step}; --resume_from_checkpoint auto goes on\n"
    assert ranks[0].text.endswith(f"report: {output / 'report.html'}\n{said}")
    assert [records(output, stage)[-1]["step"] for stage in (0, 1)] == [step, step]
    settings = {**STEADY, "max_steps": step + 5}
    trainer.run("run", 2, **settings, resume_from_checkpoint="auto")
    straight = trainer.run("straight", 2, **settings)
    for stage in (0, 1):
        ours, theirs = ([(r["step"], r["loss"]) for r in records(f, stage)] for f in (output, straight))
        assert ours == theirs


@pytest.mark.processes
def test_a_launcher_that_ends_its_ranks_one_after_the_other_saves_the_run(trainer: Trainer, tmp_path: Path):
    """deepspeed's waits for the first rank's end before it tells the second."""
    output = trainer.folder / "run"
    with job(deepspeed(2), trainer.flags("run", **ENDLESS), tmp_path) as run:
        until_step(5, output, 2, lambda: run.text)
        launcher = run.ranks()[0].parent()
        assert launcher is not None
        launcher.terminate()
        assert run.wait(START_SECONDS) != 0
        until(lambda: not run.processes(), 15, lambda: f"{run.processes()}\n{run.text}")
    assert f"llm_local: SIGTERM: stopped and saved at step {saved_step(output)};" in run.text
    assert " ends: " not in run.text


@pytest.mark.processes
@pytest.mark.parametrize("ended_by", ["the bound", "a second signal"])
def test_a_stop_that_cannot_be_done_ends_in_time(trainer: Trainer, tmp_path: Path, ended_by: str):
    """One rank hangs, so that there is nothing to agree with."""
    seconds = 2 if ended_by == "the bound" else 600
    flags = trainer.flags("run", **ENDLESS, signal_save_seconds=seconds, link_timeout_seconds=600)
    with by_hand(2, flags, tmp_path) as ranks:
        until_step(2, trainer.folder / "run", 2, lambda: ranks[0].text)
        ranks[1].send(signal.SIGSTOP)
        ranks[0].send(signal.SIGTERM)
        while ended_by == "a second signal" and ranks[0].process.is_alive():
            with suppress(ProcessLookupError):
                ranks[0].send(signal.SIGTERM)
            time.sleep(0.2)
        assert ranks[0].wait(30) == 128 + signal.SIGTERM, ranks[0].text
        bound = "; not done in 2 s (--signal_save_seconds 2)" if ended_by == "the bound" else ""
        last = ranks[0].text.strip().splitlines()[-1]
        assert last.startswith("llm_local: stage 0, replica 0 (rank 0) ends: SIGTERM at step ")
        assert last.endswith(bound)
        assert committed(trainer.folder / "run") == []
