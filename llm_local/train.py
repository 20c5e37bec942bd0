"""A run from the command line's arguments to an exported model: check, build, train, export.

deepspeed --num_gpus 2 scripts/pretrain.py configs/quickstart.yaml
"""

from __future__ import annotations

import sys
import time
import traceback
from collections.abc import Sequence
from contextlib import suppress

from transformers import TrainerCallback

from llm_local.checkpoint.manifest import BrokenCheckpoint
from llm_local.checkpoint.saver import UnsavedCheckpoint
from llm_local.checkpoint.shards import MisplacedWeights
from llm_local.config import Config, ConfigError, parse
from llm_local.data.image_files import UnreadableImage
from llm_local.data.text_files import UnreadableText
from llm_local.export.model_folder import WrongExport
from llm_local.files import Unwritten
from llm_local.job_start import is_done
from llm_local.peer import LostPeer
from llm_local.rendezvous import RunRefused
from llm_local.results import NonFiniteLoss
from llm_local.start import begin, first_watchdog, has_begun
from llm_local.watchdog import LAST_WORDS_SECONDS, Watchdog

REFUSED = 2
# their message says all there is to say
PLAIN = (NonFiniteLoss, BrokenCheckpoint, UnsavedCheckpoint, MisplacedWeights, WrongExport)
PLAIN += (UnreadableText, UnreadableImage, Unwritten)
LAUNCHER_SECONDS = 10.0


def main(arguments: Sequence[str], callbacks: Sequence[TrainerCallback] = ()) -> int:
    """Trains one rank's share, once in a process. Returns 0, 2 for a run that was refused, 1 for one that failed."""
    said: list[Exception] = []

    def say(error: Exception) -> None:
        said.append(error)
        _say(error)

    try:
        watchdog = first_watchdog()
    except ConfigError as error:
        return _refuse(0, error)
    try:
        config = parse(arguments)
        if is_done(config):  # its neighbours are gone
            _say_done(config, watchdog.rank)
            return 0
        run = begin(config, watchdog, callbacks, refused=say)
        run.train()
        run.export()
        run.close()
    except RunRefused:
        return REFUSED
    except ConfigError as error:
        if has_begun():
            watchdog.report(f"rank {watchdog.rank} refuses its configuration")
            status = _refuse(0, error)
            time.sleep(LAST_WORDS_SECONDS)  # the store may go with this rank
            return status
        return REFUSED if said else _refuse(watchdog.rank, error)
    except Exception as error:
        if not has_begun():
            if not said:
                _say(error)
            return 1
        _fail(watchdog, error)
    finally:
        if not has_begun():
            watchdog.call_off()
    return 0


def _say_done(config: Config, rank: int) -> None:
    if rank == 0:
        stage, folder = config.local.stage, config.output_dir
        print(f"llm_local: stage {stage} has come to its end before: {folder / 'export'}", file=sys.stderr, flush=True)


def _say(error: Exception) -> None:
    """Why there is no run; only a defect shows its traceback."""
    with suppress(OSError):  # what is printed may go to a full disk
        if isinstance(error, (ConfigError, *PLAIN)):
            print(f"llm_local: {error}", file=sys.stderr, flush=True)
        else:
            traceback.print_exception(error)


def _refuse(rank: int, error: ConfigError) -> int:
    """One rank speaks for all; the others leave the launcher the time to see it go first."""
    if rank == 0:
        print(f"llm_local: {error}", file=sys.stderr, flush=True)
    else:
        time.sleep(LAUNCHER_SECONDS)
    return REFUSED


def _fail(watchdog: Watchdog, error: Exception) -> None:
    """Ends the process with a message that names what ended the run first; only a defect shows its traceback."""
    ours = str(error).splitlines()[0] if str(error) else type(error).__name__
    # A collective or the store that loses a peer raises a plain RuntimeError; who cannot write removes a half folder.
    by_a_peer = isinstance(error, RuntimeError) and (not isinstance(error, PLAIN) or getattr(error, "is_gone", False))
    cause = watchdog.explain() if by_a_peer else None
    if not cause and not isinstance(error, (LostPeer, *PLAIN)):
        with suppress(OSError):
            traceback.print_exc()
    watchdog.fail(ours, cause)
