"""Files that others may look at while they are written, and what is said of one that cannot be."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from inspect import getfile
from pathlib import Path
from typing import Any, ParamSpec, TypeAlias

from safetensors import SafetensorError

from llm_local.program import program

Json: TypeAlias = dict[str, Any]  # an object of JSON: a record, a state, a manifest, a config
_P = ParamSpec("_P")
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)
_FORBIDDEN = (errno.EACCES, errno.EPERM, errno.EEXIST, errno.EISDIR, errno.ENOTDIR)
_REPAIR = "make room there or change its permissions, and start again"


class Unwritten(RuntimeError):
    """A file could not be written; the message says all there is to say of it. is_gone: it or its folder was not there
    any more, which another rank that failed may have removed."""

    def __init__(self, message: str, is_gone: bool = False):
        super().__init__(message)
        self.is_gone = is_gone


@contextmanager
def writing(path: Path, reads: bool = False, repair: str = _REPAIR) -> Iterator[None]:
    """Raises Unwritten for an error of the system, which names the file where the error has none. reads: other files
    are read meanwhile, so that it is one of this kind only where a disk is full, or something in path not to be had."""
    try:
        yield
    except Unwritten:
        raise
    except Exception as error:
        if (said := unwritten(error, path, reads, repair)) is None:
            raise
        raise said from error


def unwritten(error: BaseException | None, path: Path, reads: bool = False, repair: str = _REPAIR) -> Unwritten | None:
    """What `writing` raises; None for an error of another kind. A full disk is found behind a library's error, too."""
    if error is None or isinstance(error, Unwritten):
        return error
    number, reason = _of_system(error)
    named = os.fsdecode(getattr(error, "filename2", None) or getattr(error, "filename", None) or path)
    is_ours = number in _FULL or (number in _FORBIDDEN and Path(named).is_relative_to(path))
    if not reason or (reads and not is_ours):
        return unwritten(error.__cause__, path, True, repair)
    return Unwritten(f"{named} could not be written ({reason}); {repair}", is_gone=number == errno.ENOENT)


def _of_system(error: BaseException) -> tuple[int | None, str]:
    """Number and words of an error of the system; safetensors, and tokenizers by no class of its own, pass on both."""
    if isinstance(error, OSError):
        return error.errno, error.strerror or str(error).partition("\n")[0]
    found = re.search(r"([^:]+) \(os error (\d+)\)", str(error))
    if found and (type(error) is Exception or isinstance(error, SafetensorError)):
        return int(found[2]), found[1].strip()
    return None, ""


def ends_with_a_line(*kinds: type[Exception]) -> Callable[[Callable[_P, int]], Callable[_P, int]]:
    """A script's main that says in a line what failed in one of these ways, and returns 1."""

    def wrap(main: Callable[_P, int]) -> Callable[_P, int]:
        @wraps(main)
        def wrapper(*args: _P.args, **kwargs: _P.kwargs) -> int:
            try:
                return main(*args, **kwargs)
            except kinds as error:
                print(f"{program(getfile(main))}: {error}", file=sys.stderr)
                return 1

        return wrapper

    return wrap


def write_whole(path: Path, text: str) -> None:
    """The file appears whole or not at all, also where several processes write it. Raises Unwritten."""
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    with writing(path):
        try:
            draft.write_text(text)
            os.replace(draft, path)
        except OSError as error:
            draft.unlink(missing_ok=True)
            error.filename = path  # nobody knows the draft
            raise


def write_json(path: Path, content: Any) -> None:
    """As `write_whole`."""
    write_whole(path, json.dumps(content, indent=1))


def link_or_copy(source: Path, target: Path) -> None:
    """One file in two folders; a copy where the file system has no hard links. Target must not exist."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
