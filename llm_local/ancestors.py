"""The launcher's processes above this one, whose death ends the run; this module imports nothing that takes long."""

from __future__ import annotations

import ctypes
import os
import signal
import threading

import psutil

POLL_SECONDS = 0.2
# of mpirun and srun, on the first host and on others
_TASK_STARTERS = ("mpirun", "mpiexec", "orterun", "orted", "prterun", "prted", "hydra_pmi_proxy", "slurmstepd")
# what a rank has in its environment from torchrun and accelerate, deepspeed, mpirun
_MARKS = ("TORCHELASTIC_RUN_ID", "CROSS_RANK", "OMPI_COMM_WORLD_RANK")
_PR_SET_PDEATHSIG = 1
_taken_over = threading.Event()


def is_running(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def launcher_pids() -> list[int | None]:
    """The parent, if it is a launcher that has started all ranks of this host, and the runner above deepspeed's.

    None stands for one that was gone before this rank looked. Ranks that were started by hand have no launcher: they
    may outlive the shell that they came from.
    """
    try:
        parents = psutil.Process().parents()[:2]
        if not parents:  # it is process 1 of a container
            return []
        parent = parents[0]
        if parent.name() in _TASK_STARTERS:  # in a container it may be process 1
            return [parent.pid]
        if "deepspeed.launcher.launch" not in parent.cmdline():
            orphaned = _is_init(parent) and any(mark in os.environ for mark in _MARKS)
            parents = parents[:1] if "TORCHELASTIC_RUN_ID" in os.environ or orphaned else []
        return [None if _is_init(each) else each.pid for each in parents]
    except psutil.Error:
        return []


def _is_init(process: psutil.Process) -> bool:
    """Whether this is what adopts orphans; in a container a launcher itself may be process 1."""
    return (process.pid == 1 or process.name() == "systemd") and "python" not in " ".join(process.cmdline())


def gone(pids: list[int | None]) -> list[int | None]:
    return [pid for pid in pids if pid is None or not is_running(pid)]


def end_with_launcher() -> None:
    """Ends this process as soon as a launcher is gone, until `watch_over` says that another does so.

    The kernel sees to the parent, also while an import keeps every other thread of this process waiting.
    """
    pids = launcher_pids()
    if not pids:
        return
    on_death_of_parent(signal.SIGKILL)
    if os.getppid() != pids[0]:  # it may have gone before
        os._exit(1)
    threading.Thread(target=_look, args=(pids,), name="launcher", daemon=True).start()


def watch_over() -> None:
    on_death_of_parent(0)
    _taken_over.set()


def on_death_of_parent(number: int) -> None:
    """Lets the kernel send this process that signal then; 0: none."""
    prctl = getattr(ctypes.CDLL(None), "prctl", None)  # Linux has it
    if prctl is not None:
        prctl(_PR_SET_PDEATHSIG, number)


def _look(pids: list[int | None]) -> None:
    while not _taken_over.wait(POLL_SECONDS):
        if gone(pids):
            os._exit(1)
