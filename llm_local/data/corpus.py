"""The built-in corpus: the Python sources of the running interpreter's standard library, about 30 MB.

Real text that is on every machine, so a first run needs no download and a test needs no fixture. A file is a
document; the library's own tests are in it (more than half of the bytes) where the interpreter brings them along.
"""

from __future__ import annotations

import os
import sysconfig
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from datasets import Dataset, Features, Value
from datasets.fingerprint import Hasher

INSTALLED = {"site-packages", "dist-packages", "__pycache__"}


def stdlib_folder() -> Path:
    """The library of the interpreter itself, also inside a virtual environment."""
    return Path(sysconfig.get_path("stdlib"))


def source_files(folder: Path) -> list[Path]:
    """All .py files below folder but those of installed packages, in an order that is the same on every machine."""
    found = []
    for where, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if name not in INSTALLED]
        found += [Path(where, name) for name in names if name.endswith(".py")]
    return sorted(found, key=lambda path: path.relative_to(folder).as_posix())


def documents(folder: Path) -> Iterator[str]:
    """The text of every source file that is UTF-8 and not empty; the library tests other encodings with a few."""
    for path in source_files(folder):
        try:
            text = path.read_bytes().decode("utf-8")
        except UnicodeDecodeError:
            continue
        if text:
            yield text


def corpus_key(folder: Path) -> str:
    """Changes with the names and sizes of the files: what a cache of anything made from the corpus goes by."""
    return _stdlib_key() if folder == stdlib_folder() else _key(folder)


@cache
def _stdlib_key() -> str:
    """Looked up once: the interpreter's own library stays as it is while it runs."""
    return _key(stdlib_folder())


def _key(folder: Path) -> str:
    return Hasher.hash([(path.relative_to(folder).as_posix(), path.stat().st_size) for path in source_files(folder)])


def _rows(folder: str, key: str) -> Iterator[dict[str, str]]:
    # datasets caches by the arguments of this function, so the key is one of them though nothing here reads it
    for text in documents(Path(folder)):
        yield {"text": text}


def builtin_corpus(cache_dir: Path, folder: Path | None = None) -> Dataset:
    """The corpus as a memory-mapped dataset with a "text" column, written below cache_dir the first time."""
    folder = folder or stdlib_folder()
    rows = Dataset.from_generator(
        _rows,
        features=Features({"text": Value("string")}),
        cache_dir=str(cache_dir / "datasets"),
        gen_kwargs={"folder": str(folder), "key": corpus_key(folder)},
    )
    assert isinstance(rows, Dataset)
    return rows
