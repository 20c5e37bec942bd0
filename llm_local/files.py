"""Files that others may look at while they are written."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)


class Unwritten(RuntimeError):
    """A file could not be written; the message says all there is to say of it."""


@contextmanager
def writing(path: Path, reads: bool = False) -> Iterator[None]:
    """Raises Unwritten for an error of the system, which names the file where the error has none. reads: other files
    are read meanwhile, so that only an error of a full disk is one of this kind."""
    try:
        yield
    except OSError as error:
        if reads and error.errno not in _FULL:
            raise
        reason = error.strerror or str(error).partition("\n")[0]
        raise Unwritten(
            f"{error.filename or path} could not be written ({reason}); make room there or change its permissions, "
            "and start again"
        ) from error


def write_whole(path: Path, text: str) -> None:
    """The file appears whole or not at all, also where several processes write it."""
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    draft.write_text(text)
    os.replace(draft, path)


def write_json(path: Path, content: Any) -> None:
    """As `write_whole`."""
    write_whole(path, json.dumps(content, indent=1))


def link_or_copy(source: Path, target: Path) -> None:
    """One file in two folders; a copy where the file system has no hard links. Target must not exist."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
