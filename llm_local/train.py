"""A run from the command line's arguments to an exported model: check, build, train, export.

deepspeed --num_gpus 2 scripts/pretrain.py configs/quickstart.yaml
"""

from __future__ import annotations

import logging
import os
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import NoReturn

from llm_local.best import load_best
from llm_local.checkpoint.catalog import BrokenCheckpoint
from llm_local.checkpoint.saver import UnsavedCheckpoint
from llm_local.checkpoint.shards import MisplacedWeights
from llm_local.config import ConfigError, is_due, parse
from llm_local.data.text_files import UnreadableText
from llm_local.engine import NonFiniteLoss, StepResult
from llm_local.evaluation import over_replicas
from llm_local.export.model_folder import WrongExport
from llm_local.files import Unwritten, unwritten, writing
from llm_local.finish import finish
from llm_local.launch import Launch, of_scheduler
from llm_local.rendezvous import Refused, Rendezvous
from llm_local.run import Run, build, check
from llm_local.run_trace import end_trace
from llm_local.trace import REFRESH_WAIT, traced
from llm_local.watchdog import LAST_WORDS_SECONDS, LostPeer, Watchdog, leave

REFUSED = 2
# their message says all there is to say
PLAIN = (NonFiniteLoss, BrokenCheckpoint, UnsavedCheckpoint, MisplacedWeights, WrongExport)
PLAIN += (UnreadableText, Unwritten)
LAUNCHER_SECONDS = 10.0
_started = threading.Event()  # what DeepSpeed and torch.distributed keep of a run serves no second one
REFUSAL_SECONDS = 30.0


def main(arguments: Sequence[str]) -> int:
    """Trains one rank's share, once in a process. Returns 0, 2 for a run that was refused, 1 for one that failed."""
    if _started.is_set():
        print("llm_local: this process has had its run; start another process for the next one", file=sys.stderr)
        return REFUSED
    quiet_libraries()
    os.environ.update(of_scheduler(os.environ, at_terminal=os.isatty(0)))
    rank = int(os.environ.get("RANK", "0"))
    watchdog = Watchdog(rank)
    watchdog.start()
    try:
        launch = Launch.from_environment(os.environ)
        config = parse(arguments)
    except ConfigError as error:
        return _refuse(rank, error)
    meeting = Rendezvous(launch, config.train.output_dir, float(config.train.ddp_timeout))
    try:
        start = check(config, launch, meeting) if rank == 0 else None
    except Exception as error:
        return _call_off(meeting, error)
    _started.set()
    try:
        with writing(config.output_dir, reads=True):  # where nobody has said more exactly what is written
            run = build(config, launch, watchdog, start, meeting)
            train(run)
            last = run.config.train.max_steps
            finish(run, load_best(run) if run.config.train.load_best_model_at_end else last)
        run.links.close(last)
        if run.refresher is not None:
            run.refresher.close(last)
        run.world.finish()
    except Refused:
        return REFUSED
    except ConfigError as error:
        watchdog.report(f"rank {rank} refuses its configuration")
        status = _refuse(0, error)
        time.sleep(LAST_WORDS_SECONDS)  # the store may go with this rank
        return status
    except Exception as error:
        _fail(watchdog, error)
    return 0


def _call_off(meeting: Rendezvous, error: Exception) -> int:
    """Says why there is no run, and tells the ranks that wait for one; only a defect shows its traceback."""
    with suppress(OSError):  # what is printed may go to a full disk
        if isinstance(error, (ConfigError, *PLAIN)):
            print(f"llm_local: {error}", file=sys.stderr, flush=True)
        else:
            traceback.print_exception(error)
    meeting.say_no(REFUSAL_SECONDS)
    return REFUSED if isinstance(error, ConfigError) else 1


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


def train(run: Run) -> None:
    """The steps from the first to the last. No stage waits for a later one, but by the packets in flight.

    A run that is told to stop saves, and the process ends here.
    """
    config, train = run.config, run.config.train
    if config.save_interval:
        run.world.watchdog.saves(train.signal_save_seconds)
    if train.eval_on_start and run.first_step == 0:
        _evaluate(run, 0)
    for step in range(run.first_step + 1, train.max_steps + 1):
        if not run.world.watchdog.stop.begins(step):
            _stop(run, step - 1)
        last = step == train.max_steps
        run.world.watchdog.step = step
        run.recorder.begin()
        with run.traced("train", step):
            result = _train_step(run, step)
        saves = _saves(run, step)
        records = is_due(step, config.logging_interval) or (step == 1 and train.logging_first_step) or last
        if saves or records:  # the device is waited for in no other step
            run.engine.check_finite()
        if records:
            run.recorder.record(step, result)
        run.recorder.end(run.feed.step_tokens if run.feed else 0)
        if train.eval_batches and is_due(step, config.eval_interval) and not last:
            _evaluate(run, step)
        if saves:
            _save(run, step)
        run.saver.check()
    if train.eval_batches:
        _evaluate(run, train.max_steps)
    run.saver.wait()
    end_trace(run.tracer, run.config, run.world)
    run.progress.close()


def _saves(run: Run, step: int) -> bool:
    interval = run.config.save_interval
    return is_due(step, interval) or (interval > 0 and step == run.config.train.max_steps)


def _save(run: Run, step: int) -> None:
    shared_head = run.refresher.state() if run.refresher else None
    with run.traced("save", step):
        run.saver.save(run.engine.engines, step, run.rows_after(step), shared_head, run.data_state())


def _stop(run: Run, step: int) -> NoReturn:
    """Saves after the step on which the ranks have agreed. None ends before all have: launchers then end the others."""
    stop = run.world.watchdog.stop
    if step > run.first_step and not _saves(run, step):
        run.engine.check_finite()
        _save(run, step)
    run.saver.wait()
    end_trace(run.tracer, run.config, run.world)
    run.progress.close()
    run.world.everybody("stopped", run.config.train.signal_save_seconds, "the others to save")
    run.progress.say(
        f"llm_local: {stop.reason}: stopped and saved at step {step}; --resume_from_checkpoint auto goes on"
    )
    run.world.say_goodbye()
    leave(stop.status)


def _train_step(run: Run, step: int) -> StepResult:
    if run.refresher is not None:
        with traced(run.tracer, REFRESH_WAIT):
            run.refresher.before(step)
    result = run.engine.train_batch(step)
    if run.refresher is not None:
        run.refresher.after(step)
    return result


def _evaluate(run: Run, step: int) -> None:
    """Every stage measures its own exit with the weights of this step; nobody waits for a later stage."""
    batches, place = run.config.train.eval_batches, run.world.place
    rows = batches * run.config.train.per_device_train_batch_size * place.num_replicas
    for number, each in enumerate(run.setup.eval_sets):
        if run.feed is not None:
            run.feed.validate_on(number)
        with run.traced(each.split, step):
            losses, tokens = over_replicas(run.world, run.engine.eval_batch(step, batches))
        if run.metrics is not None:
            run.progress.publish(each.split, step, losses)
            padding = 1 - tokens / (rows * run.config.data.seq_length)
            run.metrics.write(each.record(step, place.stage, losses, tokens, padding))
