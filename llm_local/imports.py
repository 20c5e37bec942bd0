"""Imports of large libraries, which are most of what a short command waits for."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def quick_imports() -> Iterator[None]:
    """No garbage is looked for while modules are imported, a fifth of their time, nor ever again among what is there
    then."""
    is_searched = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        if is_searched:
            gc.enable()
