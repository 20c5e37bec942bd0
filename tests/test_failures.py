"""A peer that dies, hangs or is told to stop takes no rank with it into silence: all end, and say what was lost."""

from __future__ import annotations

import os
import re
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

import launching
import psutil
import pytest
from conftest import Trainer
from launching import Rank, accelerate, by_hand, deepspeed, job, losses, mpirun, torchrun, until, until_step

pytestmark = pytest.mark.processes
ENDLESS = 1_000_000


def endless(trainer: Trainer, **settings: object) -> list[str]:
    return trainer.flags("run", max_steps=ENDLESS, eval_batches=0, **settings)


def texts(ranks: list[Rank]) -> str:
    return "\n".join(f"rank {n}:\n{rank.text}" for n, rank in enumerate(ranks))


def assert_ended(ranks: list[Rank], lost: int, seconds: float, named: Sequence[str]) -> None:
    """Every rank but the lost one has ended in time with an error that names it, in one of these ways, and without a
    traceback."""
    for n, rank in enumerate(ranks):
        if n != lost:
            code = rank.wait(seconds)
            assert code not in (None, 0), f"rank {n}: {code}\n{texts(ranks)}"
            last = rank.text.strip().splitlines()[-1]
            assert last.startswith("llm_local: stage "), texts(ranks)
            assert any(way in last for way in named), texts(ranks)
            assert "Traceback" not in rank.text, rank.text


PLACES = {
    "first-of-3": (3, 3, 0, "stage 0, replica 0 (rank 0, pid {}, link 0→1)"),
    "middle-of-3": (3, 3, 1, "stage 1, replica 0 (rank 1, pid {}, link 0→1 and 1→2)"),
    "last-of-3": (3, 3, 2, "stage 2, replica 0 (rank 2, pid {}, link 1→2)"),
    # for rank 3 of 2x2: rank 2 is its stage mate, rank 1 its link peer, rank 0 neither
    "last-of-2x2": (4, 2, 3, "stage 1, replica 1 (rank 3, pid {}, link 0→1)"),
}


@pytest.mark.parametrize("place", PLACES)
def test_a_killed_rank_is_named_by_all_others_without_a_launchers_help(trainer: Trainer, tmp_path: Path, place: str):
    num_ranks, stages, victim, name = PLACES[place]
    with by_hand(num_ranks, endless(trainer, num_stages=stages), tmp_path) as ranks:
        until_step(2, tmp_path / "run", stages, lambda: texts(ranks))
        ranks[victim].send(signal.SIGKILL)
        lost = f"lost {name.format(ranks[victim].pid)}"
        # of the first rank its peers hear by the store as soon as by its process
        ways = (f"{lost}: its process is gone", *([f"{lost}, which serves the store: it is gone"] * (victim == 0)))
        assert_ended(ranks, victim, 15, ways)
    page = tmp_path / "run/report.html"
    assert victim == 0 or f"the run ended before its time: lost {name.format(ranks[victim].pid)}" in page.read_text()


@pytest.mark.parametrize("place", ["first-of-3", "last-of-2x2"])
def test_a_rank_that_hangs_is_named_with_the_seconds(trainer: Trainer, tmp_path: Path, place: str):
    """The first rank serves the store, whose calls have no time limit of their own."""
    num_ranks, stages, victim, name = PLACES[place]
    with by_hand(num_ranks, endless(trainer, num_stages=stages, link_timeout_seconds=6), tmp_path) as ranks:
        until_step(2, tmp_path / "run", stages, lambda: texts(ranks))
        ranks[victim].send(signal.SIGSTOP)
        assert_ended(ranks, victim, 20, [f"lost {name.format(ranks[victim].pid)}"])
        for n, rank in enumerate(ranks):
            assert n == victim or "for 6 s (--link_timeout_seconds 6)" in rank.text, texts(ranks)


@pytest.mark.parametrize("launcher", [deepspeed, torchrun])
def test_a_killed_rank_is_named_under_a_launcher(trainer: Trainer, tmp_path: Path, launcher):
    with job(launcher(2), endless(trainer, num_stages=2), tmp_path) as run:
        until_step(2, tmp_path / "run", 2, lambda: run.text)
        victim = run.ranks()[1]
        victim.kill()
        assert run.wait(15) != 0
        until(lambda: not run.ranks(), 15, lambda: f"{run.ranks()}\n{run.text}")
        name = f"lost stage 1, replica 0 (rank 1, pid {victim.pid}, link 0→1)"
        said = [line for line in run.text.splitlines() if line.startswith("llm_local: stage") and name in line]
        assert len(said) == 1, run.text


@pytest.mark.parametrize(
    ("launcher", "number"),
    [
        (deepspeed, signal.SIGINT),
        (torchrun, signal.SIGTERM),  # test_a_launcher_that_dies_while_its_ranks_start_takes_them_with_it has the other
        (deepspeed, signal.SIGKILL),
        (torchrun, signal.SIGKILL),
    ],
)
def test_no_rank_outlives_its_launcher(trainer: Trainer, tmp_path: Path, launcher, number: signal.Signals):
    """Ctrl-C reaches the launcher and all its ranks; the other two signals reach the launcher alone."""
    with job(launcher(2), endless(trainer, num_stages=2), tmp_path) as run:
        until_step(2, tmp_path / "run", 2, lambda: run.text)
        ranks = list(run.ranks().values())
        assert len(ranks) == 2
        if number == signal.SIGINT:
            os.killpg(run.process.pid, number)
        else:
            run.process.send_signal(number)
        assert run.wait(15) != 0
        until(lambda: not run.processes(), 15, lambda: f"{run.processes()}\n{run.text}")
        said = [line for line in run.text.splitlines() if line.startswith("llm_local: stage ") and " ends: " in line]
        assert len(said) == 2, run.text
        assert number != signal.SIGINT or all("ends: SIGINT at step " in line for line in said), run.text
        assert f'File "{launching.SCRIPT}"' not in run.text, "a rank printed a traceback"


def checkpoints(output: Path) -> list[str]:
    return sorted(path.parent.name for path in output.glob("checkpoints/*/manifest.json"))


def test_a_loss_that_is_not_finite_stops_the_run_and_spares_the_checkpoints(trainer: Trainer, tmp_path: Path):
    """The first step has learning rate 0, the second one throws the weights away, the third one's loss shows it."""
    spoiling = {"learning_rate": 1e30, "warmup_steps": 1, "max_grad_norm": 0, "max_steps": 9, "eval_batches": 0}
    flags = trainer.flags("run", **spoiling, num_stages=2, save_steps=1)
    with by_hand(2, flags, tmp_path) as ranks:
        codes = [rank.wait(launching.START_SECONDS) for rank in ranks]
    assert codes == [1, 1], texts(ranks)
    said = re.findall(r"the loss of stage \d \(its block 0\) is (?:nan|inf) at step 3", texts(ranks))
    assert len(said) == 2, texts(ranks)
    assert "Traceback" not in texts(ranks)
    assert checkpoints(tmp_path / "run")[0] == "step-00000001"
    first = losses(tmp_path / "run", 2)
    page = (tmp_path / "run/report.html").read_text()
    assert re.search(
        r"the run ended before its time: the loss of stage \d \(its block 0\) is (nan|inf) at step 3", page
    )

    again = trainer.flags(
        "run", **spoiling, num_stages=2, resume_from_checkpoint=tmp_path / "run/checkpoints/step-00000001"
    )
    with by_hand(2, again, tmp_path) as ranks:
        codes = [rank.wait(launching.START_SECONDS) for rank in ranks]
    assert losses(tmp_path / "run", 2) == first, f"the first checkpoint was not intact: {codes}\n{texts(ranks)}"


def test_a_launcher_that_dies_while_its_ranks_start_takes_them_with_it(trainer: Trainer, tmp_path: Path):
    """They find another parent than the one that started them."""
    with job(deepspeed(2), endless(trainer, num_stages=2), tmp_path) as run:
        until(lambda: len(run.ranks()) == 2, launching.START_SECONDS, lambda: run.text)
        run.process.send_signal(signal.SIGTERM)
        assert run.wait(15) != 0
        until(lambda: not run.processes(), 15, lambda: f"{run.processes()}\n{run.text}")
        assert f'File "{launching.SCRIPT}"' not in run.text, "a rank printed a traceback"


# for which Python itself looks into PYTHONPATH
STALL = """
import ctypes, os, sys, time

class Stall:
    def find_spec(self, name, path, target=None):
        if name == "torch":
            open(os.path.join({folder!r}, f"at-{{os.getpid()}}"), "w").close()
            {sleep}(600)

if next((each for each in sys.orig_argv[1:] if not each.startswith("-")), "") == {script!r}:
    sys.meta_path.insert(0, Stall())
"""
IN_PYTHON, IN_A_LIBRARY = "time.sleep", "ctypes.PyDLL(None).sleep"  # the latter lets no other thread run


@pytest.fixture
def stall(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Has every rank stop where it imports torch, and leave a file when it comes there."""

    def of(sleep: str) -> Path:
        folder = tmp_path / "imports"
        folder.mkdir()
        text = STALL.format(folder=str(folder), sleep=sleep, script=launching.SCRIPT)
        (folder / "sitecustomize.py").write_text(text)
        monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(folder), str(launching.ROOT)]))
        return folder

    return of


@pytest.mark.parametrize(
    ("launcher", "sleep"),
    [
        (deepspeed, IN_PYTHON),  # its runner is no parent of the ranks: the kernel does not tell them
        (torchrun, IN_A_LIBRARY),
        (lambda _: accelerate("cpu.yaml"), IN_A_LIBRARY),
        (mpirun, IN_A_LIBRARY),
    ],
    ids=["deepspeed", "torchrun", "accelerate", "mpirun"],
)
def test_a_launcher_killed_while_its_ranks_import_takes_them_with_it(trainer, tmp_path: Path, stall, launcher, sleep):
    folder = stall(sleep)
    with job(launcher(2), endless(trainer, num_stages=2), tmp_path) as run:
        until(lambda: len(list(folder.glob("at-*"))) == 2, launching.START_SECONDS, lambda: run.text)
        run.process.kill()
        run.wait(15)
        until(lambda: not run.processes(), 15, lambda: f"{run.processes()}\n{run.text}")


@pytest.mark.parametrize("mark", ["TORCHELASTIC_RUN_ID", "CROSS_RANK", "OMPI_COMM_WORLD_RANK"])
def test_a_rank_whose_launcher_is_gone_before_its_first_line_ends_there(trainer, tmp_path: Path, stall, mark: str):
    if "python" in " ".join(psutil.Process(1).cmdline()):
        pytest.skip("process 1, which adopts orphans here, may itself be a launcher")
    folder = stall(IN_PYTHON)
    place = ["RANK=0", "WORLD_SIZE=1", "LOCAL_RANK=0", "MASTER_ADDR=127.0.0.1", "MASTER_PORT=1", f"{mark}=0"]
    orphan = ["env", *place, "sh", "-c", '(sleep 1; exec "$@") &', "sh", sys.executable]
    with job(orphan, endless(trainer), tmp_path) as run:
        assert run.wait(15) == 0
        until(lambda: not run.processes(), 60, lambda: run.text)
    assert not list(folder.glob("at-*")), run.text
