"""What a flag names, by its name: methods, heads, tasks. A new one is added by one call, before the flags are parsed.

A package holds what comes with the library, a module each, and the first look reads it: this file knows none of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from importlib import import_module
from pkgutil import iter_modules
from typing import Any, Generic, TypeVar

Entry = TypeVar("Entry")


class Registry(Mapping[str, Entry], Generic[Entry]):
    """The entries of a package's modules, which add them when they are imported, and those that were added since."""

    def __init__(self, kind: str, package: str):
        self._kind = kind
        self._package = package
        self._entries: dict[str, Entry] = {}
        self._is_read = False

    def add(self, name: str, entry: Entry) -> None:
        """Raises ValueError for a name that another entry has."""
        if name in self._all():
            raise ValueError(f"there is a {self._kind} {name!r} already; choose another name")
        self._entries[name] = entry

    def __getitem__(self, name: str) -> Entry:
        return self._all()[name]

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self._all()))

    def __len__(self) -> int:
        return len(self._all())

    def _all(self) -> dict[str, Entry]:
        if not self._is_read:
            self._is_read = True
            package = import_module(self._package)
            for found in iter_modules(package.__path__):
                import_module(f"{self._package}.{found.name}")
        return self._entries


METHODS: Registry[Any] = Registry("method", "llm_local.methods")
HEADS: Registry[Any] = Registry("head", "llm_local.model.heads")
TASKS: Registry[Any] = Registry("task", "llm_local.tasks")
