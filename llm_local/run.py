"""A rank's share of a run, put together: checked by rank 0, agreed with the others, ready to train."""

from __future__ import annotations

import sys
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TextIO

from llm_local.assembly import Engine, make_engine
from llm_local.checkpoint.catalog import Catalog, Layout, layout_of, read_data_state
from llm_local.checkpoint.loader import load_shared_head, take_up
from llm_local.checkpoint.saver import Saver
from llm_local.checks.epochs import with_epochs
from llm_local.checks.preflight import Plan, open_output, preflight
from llm_local.config import RunConfig
from llm_local.data.feed import SOURCES, Feed, changed_since, trained_tokens
from llm_local.data.packing import PackedSource
from llm_local.data.sets import Data, prepare_all
from llm_local.data.tokenizer import load_tokenizer
from llm_local.evaluation import EvalSet, learn, tell
from llm_local.files import writing
from llm_local.launch import Launch
from llm_local.links.ends import Links
from llm_local.metrics import MetricsFile
from llm_local.model.document_mask import DocumentMask
from llm_local.model.refresh import Refresher, make_refresher
from llm_local.owner import claim_folder
from llm_local.progress import Progress
from llm_local.recorder import Recorder
from llm_local.rendezvous import Rendezvous, fetch_plan
from llm_local.run_trace import begin_trace
from llm_local.trace import Tracer
from llm_local.watchdog import Watchdog
from llm_local.world import Place, World, connect, join_stage


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
    start: Start | None = None

    def traced(self, split: str, step: int) -> AbstractContextManager[None]:
        """What is recorded meanwhile belongs to this step, evaluation or checkpoint, if there is a trace."""
        return nullcontext() if self.tracer is None else self.tracer.batch(split, step)

    def rows_after(self, step: int) -> int:
        """Sequences of the training data that are used up after the step."""
        return self.first_row + (step - self.first_step) * self.layout.sequences_per_step

    def data_state(self) -> dict[str, Any] | None:
        """What a checkpoint has of the training data."""
        return {**self.feed.state(), SOURCES: [asdict(source) for source in self.sources]} if self.feed else None


@dataclass(frozen=True)
class Start:
    """What rank 0 brings to a run. news: lines for a person. folder: the output folder's lock, held as long as this
    object lives."""

    plan: Plan
    data: Data
    news: tuple[str, ...]
    folder: TextIO


def check(config: RunConfig, launch: Launch, meeting: Rendezvous | None = None) -> Start:
    """Rank 0's part of a start, while the others wait at the rendezvous; the output folder is touched when all is well.

    Data may take long to prepare: with a meeting the others wait for it as long as this rank lives. Raises ConfigError
    for all that is wrong with the run and its data.
    """
    print("llm_local: checking the configuration, the model and the data", file=sys.stderr, flush=True)
    with writing(config.cache_dir, reads=True):
        with nullcontext() if meeting is None else meeting.kept_waiting():
            config = with_epochs(config, launch.world_size)
        plan = preflight(config, launch.world_size)
        with nullcontext() if meeting is None else meeting.kept_waiting():
            config = plan.resolve(config)
            data = prepare_all(config, load_tokenizer(config), progress=sys.stderr.isatty())
    with writing(config.output_dir / "run.yaml"):
        folder = claim_folder(config.output_dir)
        news = open_output(config, plan, launch.restart > 0)
    return Start(plan, data, news, folder)


def build(
    config: RunConfig,
    launch: Launch,
    watchdog: Watchdog,
    start: Start | None,
    meeting: Rendezvous | None = None,
) -> Run:
    """Meets the other ranks and makes this one's stage. Every rank must call; rank 0 brings the start."""
    startup = float(config.train.ddp_timeout)
    meeting = meeting or Rendezvous(launch, config.train.output_dir, startup)
    store = meeting.store()
    if start is not None:
        meeting.publish(start.plan.to_json())
    data, news = (start.data, start.news) if start is not None else (None, ())
    plan = Plan.from_json(fetch_plan(store, startup, config.local.link_timeout_seconds))
    config = plan.resolve(config)
    place = Place.of(launch.rank, launch.world_size, config.local.num_stages)
    world = connect(launch, place, store, watchdog, startup, config.local.link_timeout_seconds)
    join_stage(world, one_world=config.is_pipelined)
    model_config = plan.model_config(config)
    layout = layout_of(config, plan.partition, place.num_replicas, model_config)
    catalog = Catalog(Path(plan.checkpoint)) if plan.checkpoint else None
    first_step, first_row = (catalog.manifest.step, catalog.manifest.rows) if catalog else (0, 0)
    if data is not None:
        tell(world, data.validation)
    feed = _make_feed(config, place, data, plan.documents, (first_step, first_row)) if place.is_first_stage else None
    warnings_of_data = _go_on_reading(feed, catalog, data)
    engine, links = make_engine(config, plan, world, feed)
    tracer = begin_trace(config, world, engine, links)
    news += take_up(catalog, config, layout, world, engine.engines) if catalog else ()
    refresher = make_refresher(config, plan.partition, world, links, engine.engines)
    if refresher is not None:
        block: Any = engine.engines[-1].module
        refresher.start(first_step, load_shared_head(catalog, block.head) if catalog else None)
    metrics = None
    if place.is_recorder:
        samples = first_step * layout.sequences_per_step
        metrics = MetricsFile(config.output_dir, place.stage, engine.engines[-1].monitor, first_step, samples)
    progress = Progress(world, config.train.max_steps, first_step)
    for warning in (*plan.warnings, *warnings_of_data, *(data.warnings if data is not None else ())):
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
        start,
    )


def _make_feed(
    config: RunConfig, place: Place, data: Data | None, documents: DocumentMask | None, start: tuple[int, int]
) -> Feed:
    """Rank 0 has prepared the data before it published the plan; the other replicas find it in the cache."""
    data = data or prepare_all(config, load_tokenizer(config))
    validation = [each.sequences for each in data.validation]
    train = config.train
    rows, micro_batches = train.per_device_train_batch_size, train.gradient_accumulation_steps
    return Feed(data.train, validation, place, rows, micro_batches, train.eval_batches, start, documents)


def _go_on_reading(feed: Feed | None, catalog: Catalog | None, data: Data | None) -> tuple[str, ...]:
    """Puts the training data where the checkpoint left it; says so where that takes reading all of it again, or where
    it is not the same any more."""
    if feed is None or catalog is None:
        return ()
    state = read_data_state(catalog.path)
    goes_on = feed.restore(state)
    feed.tokens = trained_tokens(state, catalog.manifest.rows, catalog.manifest.layout.seq_length)
    lines = changed_since(data.sources if data is not None else (), state, catalog.path)
    if goes_on:
        return lines
    rows = f"{catalog.manifest.rows:,} sequences"
    again = f"it is read from its start, past {rows}, which may take long"
    return (*lines, f"{catalog.path} has no place in this stream; {again}")
