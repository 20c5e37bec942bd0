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
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from llm_local.assembly import Engine, make_engine
from llm_local.checkpoint.catalog import BrokenCheckpoint, Catalog, Layout, layout_of, read_data_state
from llm_local.checkpoint.loader import load_shared_head, take_up
from llm_local.checkpoint.saver import Saver, UnsavedCheckpoint
from llm_local.checks.preflight import Plan, open_output, preflight
from llm_local.config import ConfigError, RunConfig, parse
from llm_local.data.feed import SOURCES, Feed, trained_tokens
from llm_local.data.packing import PackedSource
from llm_local.data.sets import Data, prepare_all
from llm_local.data.text_files import UnreadableText
from llm_local.data.tokenizer import load_tokenizer
from llm_local.engine import NonFiniteLoss, StepResult
from llm_local.evaluation import EvalSet, learn, over_replicas, tell
from llm_local.export.model_folder import ExportError
from llm_local.finish import finish
from llm_local.links import Links
from llm_local.metrics import MetricsFile
from llm_local.model.anatomy import load_model_config
from llm_local.model.refresh import Refresher, make_refresher
from llm_local.progress import Progress
from llm_local.recorder import Recorder
from llm_local.run_trace import begin_trace, end_trace
from llm_local.trace import REFRESH_WAIT, Tracer, UnwrittenTrace, traced
from llm_local.watchdog import LAST_WORDS_SECONDS, LostPeer, Watchdog
from llm_local.world import (
    PLAN,
    Launch,
    Place,
    Refused,
    Rendezvous,
    World,
    connect,
    fetch_plan,
    join_stage,
)

REFUSED = 2
# their message says all there is to say
PLAIN = (NonFiniteLoss, BrokenCheckpoint, UnsavedCheckpoint, UnwrittenTrace, ExportError, UnreadableText)
LAUNCHER_SECONDS = 10.0
_started = threading.Event()  # what DeepSpeed and torch.distributed keep of a run serves no second one
REFUSAL_SECONDS = 30.0


@dataclass
class Run:
    """A stage's rank, ready to train."""

    config: RunConfig
    plan: Plan
    layout: Layout
    world: World
    engine: Engine
    feed: Feed | None
    links: Links
    refresher: Refresher | None
    metrics: MetricsFile | None
    progress: Progress
    saver: Saver
    recorder: Recorder
    tracer: Tracer | None
    eval_sets: tuple[EvalSet, ...]
    first_step: int
    first_row: int
    sources: tuple[PackedSource, ...] = ()

    def traced(self, split: str, step: int) -> AbstractContextManager[None]:
        """What is recorded meanwhile belongs to this step, evaluation or checkpoint, if there is a trace."""
        return nullcontext() if self.tracer is None else self.tracer.batch(split, step)

    def rows_after(self, step: int) -> int:
        """Sequences of the training data that are used up after the step."""
        return self.first_row + (step - self.first_step) * self.layout.sequences_per_step

    def data_state(self) -> dict[str, Any] | None:
        """What a checkpoint has of the training data."""
        return {**self.feed.state(), SOURCES: [asdict(source) for source in self.sources]} if self.feed else None


def main(arguments: Sequence[str]) -> int:
    """Trains one rank's share, once in a process. Returns 0, 2 for a run that was refused, 1 for one that failed."""
    if _started.is_set():
        print("llm_local: this process has had its run; start another process for the next one", file=sys.stderr)
        return REFUSED
    quiet_libraries()
    rank = int(os.environ.get("RANK", "0"))
    watchdog = Watchdog(rank)
    watchdog.start()
    try:
        launch = Launch.from_environment(os.environ)
        config = parse(arguments)
    except ConfigError as error:
        return _refuse(rank, error)
    meeting = Rendezvous(launch, store_name(config), float(config.train.ddp_timeout))
    try:
        plan, data = check(config, launch.world_size, meeting) if rank == 0 else (None, None)
    except Exception as error:
        return _call_off(meeting, error)
    _started.set()
    try:
        run = build(config, launch, watchdog, plan, data, meeting)
        train(run)
        rows = run.rows_after(config.train.max_steps)
        finish(run.config, run.plan, run.world, run.engine, run.feed, run.progress, rows, run.sources)
        run.links.close(config.train.max_steps)
        if run.refresher is not None:
            run.refresher.close(config.train.max_steps)
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


def check(config: RunConfig, world_size: int, meeting: Rendezvous | None = None) -> tuple[Plan, Data]:
    """Rank 0's part of a start, while the others wait at the rendezvous: nothing is written but below cache_dir.

    Data may take long to prepare: with a meeting the others wait for it as long as this rank lives. Raises ConfigError
    for all that is wrong with the run and its data.
    """
    print("llm_local: checking the configuration, the model and the data", file=sys.stderr, flush=True)
    plan = preflight(config, world_size)
    with nullcontext() if meeting is None else meeting.kept_waiting():
        return plan, prepare_all(config, load_tokenizer(config), progress=sys.stderr.isatty())


def store_name(config: RunConfig) -> str:
    """Prefix of the store's keys. Ranks that reach another run's store, by a port used twice, find nothing there."""
    return f"llm_local/{config.train.output_dir}"


def _call_off(meeting: Rendezvous, error: Exception) -> int:
    """Says why there is no run, and tells the ranks that wait for one; only a defect shows its traceback."""
    if isinstance(error, ConfigError):
        status = _refuse(0, error)
    else:
        traceback.print_exception(error)
        status = 1
    meeting.say_no(REFUSAL_SECONDS)
    return status


def quiet_libraries() -> None:
    """Leaves the screen to the run's own lines; warnings still come through."""
    import datasets
    import transformers

    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch|transformers")
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    datasets.disable_progress_bars()


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
    # A collective or the store that loses a peer raises a plain RuntimeError.
    by_a_peer = isinstance(error, RuntimeError) and not isinstance(error, PLAIN)
    cause = watchdog.explain() if by_a_peer else None
    if not cause and not isinstance(error, (LostPeer, *PLAIN)):
        traceback.print_exc()
    watchdog.fail(ours, cause)


def build(
    config: RunConfig,
    launch: Launch,
    watchdog: Watchdog,
    plan: Plan | None,
    data: Data | None,
    meeting: Rendezvous | None = None,
) -> Run:
    """Meets the other ranks and makes this one's stage. Every rank must call; rank 0 brings the plan and its data."""
    startup = float(config.train.ddp_timeout)
    store = (meeting or Rendezvous(launch, store_name(config), startup)).store()
    if plan is not None:
        open_output(plan.resolve(config), plan)
        store.set(PLAN, plan.to_json())
    plan = Plan.from_json(fetch_plan(store, startup, config.local.link_timeout_seconds))
    config = plan.resolve(config)
    place = Place.of(launch.rank, launch.world_size, config.local.num_stages)
    world = connect(launch, place, store, watchdog, startup, config.local.link_timeout_seconds)
    join_stage(world, one_world=config.is_pipelined)
    model_config = load_model_config(config.model)
    layout = layout_of(config, plan.partition, place.num_replicas, model_config)
    catalog = Catalog(Path(plan.checkpoint)) if plan.checkpoint else None
    first_step, first_row = (catalog.manifest.step, catalog.manifest.rows) if catalog else (0, 0)
    if data is not None:
        tell(world, data.validation)
    feed = _make_feed(config, place, data, (first_step, first_row)) if place.is_first_stage else None
    warnings_of_data = _go_on_reading(feed, catalog)
    engine, links = make_engine(config, plan, world, feed)
    tracer = begin_trace(config, world, engine, links)
    news = take_up(catalog, config, layout, world, engine.engines) if catalog else ()
    refresher = make_refresher(config, plan.partition, world, links, engine.engines)
    if refresher is not None:
        block: Any = engine.engines[-1].module
        refresher.start(first_step, load_shared_head(catalog, block.head) if catalog else None)
    metrics = None
    if place.is_recorder:
        metrics = MetricsFile(config.output_dir, place.stage, engine.engines[-1].monitor, first_step)
    progress = Progress(world, config.train.max_steps, first_step)
    for warning in (*plan.warnings, *warnings_of_data):
        progress.say(f"llm_local: warning: {warning}")
    for line in news:
        progress.say(f"llm_local: {line}")
    layout_text = f"{place.num_stages} stages x {place.num_replicas} replicas, {config.precision}"
    progress.say(f"llm_local: {layout_text}; {plan.partition.describe()}")
    for source in data.sources if data is not None else ():
        progress.say(f"llm_local: {source.describe()}")
    saver = Saver(world, config, layout)
    recorder = Recorder(config, world, layout, links, refresher, saver, metrics, progress)
    return Run(
        config,
        plan,
        layout,
        world,
        engine,
        feed,
        links,
        refresher,
        metrics,
        progress,
        saver,
        recorder,
        tracer,
        learn(world, config),
        first_step,
        first_row,
        tuple(source.facts() for source in data.sources) if data is not None else (),
    )


def _make_feed(config: RunConfig, place: Place, data: Data | None, start: tuple[int, int]) -> Feed:
    """Rank 0 has prepared the data before it published the plan; the other replicas find it in the cache."""
    data = data or prepare_all(config, load_tokenizer(config))
    validation = [each.sequences for each in data.validation]
    train = config.train
    rows, micro_batches = train.per_device_train_batch_size, train.gradient_accumulation_steps
    return Feed(data.train, validation, place, rows, micro_batches, train.eval_batches, start)


def _go_on_reading(feed: Feed | None, catalog: Catalog | None) -> tuple[str, ...]:
    """Puts the training data where the checkpoint left it; says so where that takes reading all of it again."""
    if feed is None or catalog is None:
        return ()
    state = read_data_state(catalog.path)
    goes_on = feed.restore(state)
    feed.tokens = trained_tokens(state, catalog.manifest.rows, catalog.manifest.layout.seq_length)
    if goes_on:
        return ()
    rows = f"{catalog.manifest.rows:,} sequences"
    return (f"{catalog.path} has no place in this stream; it is read from its start, past {rows}, which may take long",)


def train(run: Run) -> None:
    """The steps from the first to the last. No stage waits for a later one, but by the packets in flight."""
    train = run.config.train
    if train.eval_on_start and run.first_step == 0:
        _evaluate(run, 0)
    for step in range(run.first_step + 1, train.max_steps + 1):
        last = step == train.max_steps
        run.world.watchdog.step = step
        run.recorder.begin()
        with run.traced("train", step):
            result = _train_step(run, step)
        saves = bool(train.save_steps) and step % train.save_steps == 0
        records = step == 1 or step % train.logging_steps == 0 or last
        if saves or records:  # the device is waited for in no other step
            run.engine.check_finite()
        if records:
            run.recorder.record(step, result)
        run.recorder.end(run.feed.step_tokens if run.feed else 0)
        if train.eval_batches and train.eval_steps and step % train.eval_steps == 0 and not last:
            _evaluate(run, step)
        if saves:
            shared_head = run.refresher.state() if run.refresher else None
            with run.traced("save", step):
                run.saver.save(run.engine.engines, step, run.rows_after(step), shared_head, run.data_state())
        run.saver.check()
    if train.eval_batches:
        _evaluate(run, train.max_steps)
    run.saver.wait()
    end_trace(run.tracer, run.config, run.world)
    run.progress.close()


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
    for number, each in enumerate(run.eval_sets):
        if run.feed is not None:
            run.feed.validate_on(number)
        with run.traced(each.split, step):
            losses, tokens = over_replicas(run.world, run.engine.eval_batch(step, batches))
        if run.metrics is not None:
            run.progress.publish(each.split, step, losses[-1])
            padding = 1 - tokens / (rows * run.config.data.seq_length)
            run.metrics.write(each.record(step, place.stage, losses, tokens, padding))
