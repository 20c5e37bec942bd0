"""Files that others may look at while they are written."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any


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
