"""What other libraries print beside a run."""

from __future__ import annotations

import logging
import threading
import warnings
from pathlib import Path
from typing import Any

from llm_local.files import unwritten


def quiet_libraries() -> None:
    """Leaves the screen to the run's own lines; warnings still come through."""
    import datasets
    import transformers

    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch|transformers")
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    threading.excepthook = _of_thread


def _of_thread(happened: threading.ExceptHookArgs) -> None:
    """A full disk is said by the thread that waits for this one: a monitor of DeepSpeed's writes in one of its own."""
    if unwritten(happened.exc_value, Path(), reads=True) is None:
        threading.__excepthook__(happened)


def pyplot_without_screen() -> Any:
    """matplotlib's pyplot, for pictures that are files."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot
