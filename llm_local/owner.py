"""Who a run is to others on whatever host, and its folder, which only one run at a time may write."""

from __future__ import annotations

import fcntl
import json
import os
import socket
import time
import uuid
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import datetime
from functools import cache
from pathlib import Path
from typing import TextIO

import psutil

from llm_local.ancestors import is_running
from llm_local.config import ConfigError
from llm_local.files import writing

LOCK = "run.lock"
PATIENCE_SECONDS = 2.0  # a run that ends takes a moment


@cache
def machine() -> str:
    """Equal for two processes that see each other's process numbers: host name, boot, and pid namespace."""
    parts = [socket.gethostname()]
    with suppress(OSError):  # they are Linux's
        parts.append(Path("/proc/sys/kernel/random/boot_id").read_text().strip())
        parts.append(os.readlink("/proc/self/ns/pid"))
    return " ".join(parts)


@dataclass(frozen=True)
class Owner:
    """The process that has something for its run alone. run: of no other run, if rank 0 says it."""

    run: str
    host: str
    machine: str
    pid: int
    started: str
    folder: str

    @staticmethod
    def me(output_dir: str | Path) -> Owner:
        started = datetime.fromtimestamp(psutil.Process().create_time()).astimezone()
        folder = os.path.realpath(output_dir)
        return Owner(uuid.uuid4().hex, socket.gethostname(), machine(), os.getpid(), f"{started:%F %T %Z}", folder)

    def __str__(self) -> str:
        return f"pid {self.pid} on {self.host}, output_dir {self.folder}, started {self.started}"

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @staticmethod
    def from_json(text: str | bytes) -> Owner:
        return Owner(**json.loads(text))


def folder_problems(folder: Path) -> list[str]:
    """Whether another run that lives writes into the folder; touches nothing."""
    if not (folder / LOCK).exists():
        return []
    with (folder / LOCK).open() as file:
        return [] if _locked(file, fcntl.LOCK_SH) else [_in_use(folder, file)]


def claim_folder(folder: Path) -> TextIO:
    """Makes the folder this process's until the file is closed, or the process ends. Raises ConfigError if it is
    another one's, Unwritten if the disk takes nothing."""
    with writing(folder / LOCK):
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / LOCK).open("a+")
        if not _locked(file, fcntl.LOCK_EX):
            raise ConfigError([_in_use(folder, file)])
        file.truncate(0)
        file.write(Owner.me(folder).to_json() + "\n")
        file.flush()
        return file


def _locked(file: TextIO, kind: int) -> bool:
    """Locks the file unless another process has it. Where the file system has no locks the owner it names counts, if it
    is of this machine."""
    end = time.monotonic() + PATIENCE_SECONDS
    while True:
        try:
            fcntl.flock(file, kind | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            if time.monotonic() > end:
                return False
        except OSError:
            owner = _owner(file)
            return owner is None or owner.machine != machine() or owner.pid == os.getpid() or not is_running(owner.pid)
        time.sleep(0.1)


def _owner(file: TextIO) -> Owner | None:
    file.seek(0)
    with suppress(ValueError, TypeError):
        return Owner.from_json(file.read())
    return None


def _in_use(folder: Path, file: TextIO) -> str:
    return (
        f"output_dir={folder} is in use by another run ({_owner(file) or 'which has just begun'}); wait for its end, "
        "stop it, or choose another folder"
    )
