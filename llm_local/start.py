"""A start: from a configuration to a run that is ready to train, or to one message of all that is wrong with it."""

from __future__ import annotations

import atexit
import os
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from transformers import PretrainedConfig, PreTrainedTokenizerBase, TrainerCallback

from llm_local.config import Config, ConfigError
from llm_local.data.objects import with_objects
from llm_local.files import writing
from llm_local.launch import Launch, of_scheduler
from llm_local.rank import build, check
from llm_local.rendezvous import Rendezvous
from llm_local.run import Run
from llm_local.screen import quiet_libraries
from llm_local.watchdog import LAST_WORDS_SECONDS, Watchdog, leave

REFUSAL_SECONDS = 30.0
REFUSED_FILE = "LLM_LOCAL_REFUSED"  # variable with the file that is made, where a launcher starts ranks again and again
_started = threading.Event()  # what DeepSpeed and torch.distributed keep of a run serves no second one


def prepare(
    config: Config,
    model: PretrainedConfig | Path | str | None = None,
    tokenizer: PreTrainedTokenizerBase | Path | str | None = None,
    train_dataset: Any = None,
    eval_dataset: Any = None,
    callbacks: Sequence[TrainerCallback | type[TrainerCallback]] = (),
) -> Run:
    """This rank's share of a run, checked and ready to train. Every rank of the launcher must call; without a launcher
    the process is the only rank.

    model: a config for a new model, or the folder or hub name of a pretrained one. train_dataset, eval_dataset: a
    Dataset or IterableDataset of `datasets` or torch, or a list, with text in text_column_name or with input_ids;
    several to evaluate on by name. What is not given here the flags say. callbacks: transformers' (callbacks.py), the
    same on each rank.

    Raises ConfigError with all that is wrong, on every rank, before anything starts and before the output folder is
    touched. A process has one run; after a ConfigError it may try again. From here on signals are the run's.
    """
    watchdog = first_watchdog()
    try:
        run = begin(with_objects(config, model, tokenizer, train_dataset, eval_dataset), watchdog, callbacks)
    finally:
        if not has_begun():
            watchdog.call_off()
    atexit.register(_close_at_exit, run, watchdog)
    return run


def begin(
    config: Config,
    watchdog: Watchdog,
    callbacks: Sequence[TrainerCallback | type[TrainerCallback]] = (),
    refused: Callable[[Exception], None] = lambda error: None,
) -> Run:
    """As `prepare`, of flags alone. refused: called on rank 0 with what it finds wrong, before the others know."""
    launch = Launch.from_environment(os.environ)
    meeting = Rendezvous(launch, str(config.output_dir), float(config.train.ddp_timeout))
    try:
        start = check(config, launch, meeting) if launch.rank == 0 else None
    except Exception as error:
        refused(error)
        if isinstance(error, ConfigError) and (file := os.environ.get(REFUSED_FILE)):
            with suppress(OSError):
                Path(file).touch()
        meeting.say_no(error, REFUSAL_SECONDS)
        raise
    _started.set()
    with writing(config.output_dir, reads=True):  # where nobody has said more exactly what is written
        return Run(build(config, launch, watchdog, start, meeting), callbacks)


def has_begun() -> bool:
    """Whether this process has passed the checks of a run."""
    return _started.is_set()


def first_watchdog() -> Watchdog:
    """This rank's, from which on its launcher's death and signals end it. Raises ConfigError in a process that has had
    its run."""
    if has_begun():
        raise ConfigError(["this process has had its run; start another process for the next one"])
    quiet_libraries()
    os.environ.update(of_scheduler(os.environ, at_terminal=os.isatty(0)))  # where it finds its rank
    watchdog = Watchdog(int(os.environ.get("RANK", "0")))
    watchdog.start()
    return watchdog


def _close_at_exit(run: Run, watchdog: Watchdog) -> None:
    """The end of a program that has not closed its run: with a goodbye, or, after an error, by telling the peers."""
    error = getattr(sys, "last_value", None)
    if error is None:
        run.close()
        return
    run.fail(error)
    if watchdog.rank == 0:
        time.sleep(LAST_WORDS_SECONDS)  # the store goes with this rank
    leave(1)  # process groups of a run that is dead hold an exit up
