"""Memory that a host has left: what its kernel can give, and what the limits of control groups leave of it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import psutil

_GROUPS = Path("/sys/fs/cgroup")
# limit, use, and what of that is files that would go first: version 2 of control groups, and version 1
_FILES = (
    ("memory.max", "memory.current", "inactive_file"),
    ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
)


def host_room(groups: Path = _GROUPS, own: Path = Path("/proc/self/cgroup")) -> float:
    """Bytes that processes of this host, or container, can still take; free swap is among them."""
    memory = psutil.virtual_memory().available + psutil.swap_memory().free
    return float(min((memory, *_left_by_groups(groups, own))))


def _left_by_groups(groups: Path, own: Path) -> Iterator[float]:
    """What each group that this process is in leaves, those around it included."""
    names = {"/"}
    with suppress(OSError):
        names |= {line.split(":", 2)[2] for line in own.read_text().splitlines() if line.count(":") >= 2}
    tops = (groups, groups / "memory")
    folders = {top / part for top in tops for name in names for part in _around(Path(name.lstrip("/")))}
    for folder in folders:
        for limit, used, inactive in _FILES:
            with suppress(OSError, ValueError):  # "max", or no such group
                most, now = (int((folder / name).read_text()) for name in (limit, used))
                values = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
                yield most - now + int(values.get(inactive, 0))


def _around(path: Path) -> tuple[Path, ...]:
    return (path, *path.parents)
