"""A rank of a run, put together: checked by rank 0, agreed with the others."""

from __future__ import annotations

import socket
import sys
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import TextIO

from transformers import PreTrainedTokenizerBase

from llm_local.assembly import Engine, make_engine
from llm_local.checkpoint.catalog import Catalog
from llm_local.checkpoint.line import after_restart
from llm_local.checkpoint.loader import load_shared_head, restore
from llm_local.checkpoint.manifest import Layout, layout_of, read_data_state
from llm_local.checkpoint.saver import Saver
from llm_local.checks.devices import device_problems, device_warnings
from llm_local.checks.epochs import with_epochs
from llm_local.checks.output_folder import open_output
from llm_local.checks.preflight import set_up
from llm_local.config import Config, ConfigError
from llm_local.data.feed import SOURCES, BatchSize, Feed, RowUse, changed_since, trained_tokens
from llm_local.data.packing import PackedSource
from llm_local.data.sets import Data, ProcessingClass, key_of, load_processing_class, prepare_all
from llm_local.delayed_engine import begin_delayed
from llm_local.device import is_queued, local_device
from llm_local.evaluation import eval_sets
from llm_local.files import Json, writing
from llm_local.job import Job
from llm_local.job_start import identified, log_need, sound_start, write_identity
from llm_local.launch import Launch
from llm_local.links.links import Links
from llm_local.metrics import MetricsFile, best_step
from llm_local.model.refresh import Refresher, make_refresher
from llm_local.outer_optimizer import OuterOptimizer, make_outer, open_checkpoint
from llm_local.owner import claim_folder
from llm_local.place import Place
from llm_local.progress import Progress
from llm_local.recorder import Recorder, Traffic
from llm_local.rendezvous import Rendezvous, fetch_setup
from llm_local.replicas import replicas_text
from llm_local.report.facts import write_facts
from llm_local.run_trace import begin_trace
from llm_local.setup import Setup
from llm_local.trace import Tracer
from llm_local.watchdog import Watchdog
from llm_local.world import World, announce_device, connect, device_names, join_stage


@dataclass
class Rank:
    """All that a rank trains with. start: what rank 0 has brought."""

    config: Config
    setup: Setup
    layout: Layout
    world: World
    engine: Engine
    feed: Feed | None
    links: Links
    refresher: Refresher | None
    outer: OuterOptimizer | None
    metrics: MetricsFile | None
    progress: Progress
    saver: Saver
    recorder: Recorder
    tracer: Tracer | None
    first_step: int
    first_row: int
    local_rank: int = 0
    start: Start | None = None
    job: Job | None = None

    def traced(self, split: str, step: int) -> AbstractContextManager[None]:
        """What is recorded meanwhile belongs to this step, evaluation or checkpoint, if there is a trace."""
        return nullcontext() if self.tracer is None else self.tracer.batch(split, step)

    @property
    def sources(self) -> tuple[PackedSource, ...]:
        """What rank 0 trains on."""
        return tuple(source.facts() for source in self.start.data.sources) if self.start and self.start.data else ()

    def rows_after(self, step: int) -> int:
        """Sequences of the training data that are used up after the step."""
        return self.first_row + (step - self.first_step) * self.layout.sequences_per_step

    def data_state(self, step: int) -> Json | None:
        """What a checkpoint of the step has of the training data."""
        return {**self.feed.state(step), SOURCES: [asdict(source) for source in self.sources]} if self.feed else None


@dataclass(frozen=True)
class Start:
    """What rank 0 alone has. data: where the launch reads any. messages: lines for a person. folder: the lock of the
    output folder, held as long as this object lives."""

    setup: Setup
    processing_class: ProcessingClass
    data: Data | None
    messages: tuple[str, ...]
    folder: TextIO

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """Of a task that reads text."""
        assert isinstance(self.processing_class, PreTrainedTokenizerBase)
        return self.processing_class


def check(config: Config, launch: Launch, meeting: Rendezvous | None = None) -> Start:
    """Rank 0's part of a start, while the others wait at the rendezvous; the output folder is touched when all is well.

    Data may take long to prepare: with a meeting the others wait for it as long as this rank lives. Raises ConfigError
    for all that is wrong with the run and its data.
    """
    print("llm_local: checking the configuration, the model and the data", file=sys.stderr, flush=True)
    given = config.flat()
    if meeting is not None and meeting.is_known():
        config = after_restart(config)
    config = sound_start(config)
    with writing(config.cache_dir, reads=True):
        with nullcontext() if meeting is None else meeting.kept_waiting():
            config = with_epochs(config, launch.world_size)
            # which may have images to fetch
            setup, processing_class = set_up(config, launch.world_size, launch.local_world_size)
            setup = replace(setup, given=given)
        if meeting is not None:
            setup = _with_devices(setup, launch, meeting)
        with nullcontext() if meeting is None else meeting.kept_waiting():
            data = None
            if config.reads_data:
                data = prepare_all(setup.config, processing_class, progress=sys.stderr.isatty())
                setup = replace(setup, counts=data.counts(), eval_sets=eval_sets(data.validation, config.task))
            setup = identified(setup, launch.world_size) if config.is_job else setup
    with writing(config.output_dir / "run.yaml"):
        folder = claim_folder(config.output_dir)
        messages = open_output(setup, launch.restart > 0)
        sources = [source.facts() for source in data.sources] if data is not None else []
        write_facts(setup, Place.of(0, setup.config, launch.world_size).replicas, sources)
        if config.is_job:
            write_identity(setup)
            messages += _log_messages(setup, launch)
    return Start(setup, processing_class, data, messages, folder)


def _with_devices(setup: Setup, launch: Launch, meeting: Rendezvous) -> Setup:
    """With what there is to say of the ranks' GPUs. Raises ConfigError where these ranks cannot train on them."""
    if not is_queued(local_device(launch.local_rank)):
        return setup
    announce_device(launch, meeting.store())
    names = device_names(meeting.store(), launch.world_size, float(setup.config.train.ddp_timeout))
    place = Place.of(0, setup.config, launch.world_size)
    if problems := device_problems(setup.config, place, names):
        raise ConfigError(problems)
    return replace(setup, warnings=setup.warnings + device_warnings(place, names))


def _log_messages(setup: Setup, launch: Launch) -> tuple[str, ...]:
    place = Place.of(0, setup.config, launch.world_size)
    return () if place.is_last_stage else (f"the log for the next stage needs {log_need(setup, place)[1]}",)


def build(
    config: Config, launch: Launch, watchdog: Watchdog, start: Start | None, meeting: Rendezvous | None = None
) -> Rank:
    """Meets the other ranks and makes this one's stage. Every rank must call; rank 0 brings the start."""
    startup = float(config.train.ddp_timeout)
    meeting = meeting or Rendezvous(launch, str(config.output_dir), startup)
    store = meeting.store()
    announce_device(launch, store)
    if start is not None:
        meeting.publish(start.setup.to_json())
    setup = Setup.from_json(fetch_setup(store, startup, config.local.link_timeout_seconds))
    _say_other_flags(setup, config, launch)
    setup = replace(setup, config=replace(setup.config, rows=config.rows))
    config = setup.config
    startup = float(config.train.ddp_timeout)
    place = Place.of(launch.rank, config, launch.world_size)
    world = connect(launch, place, store, watchdog, startup, config.local.link_timeout_seconds)
    join_stage(world, config.is_pipelined, config.local.replica_sync_steps)
    layout = layout_of(config, setup.partition, place.replicas, setup.model_config())
    catalog = open_checkpoint(Path(setup.checkpoint), config.local, place) if setup.checkpoint else None
    first_step, first_row = (catalog.manifest.step, catalog.manifest.rows) if catalog else (0, 0)
    data = start.data if start is not None else None
    feed = _make_feed(setup, place, start, (first_step, first_row)) if place.is_first_stage else None
    messages = start.messages if start is not None else ()
    warnings_of_data = _go_on_reading(feed, catalog, data)
    job = Job(setup, world, launch.local_rank) if config.is_job else None
    engine, links = make_engine(setup, world, feed, job)
    tracer = begin_trace(config, world, engine, links)
    messages += restore(catalog, config, layout, world, engine.engines) if catalog else ()
    begin_delayed(engine.engines, first_step, catalog)
    outer = make_outer(config.local, world, engine.engines, catalog)
    refresher = make_refresher(
        config, setup.partition, world, links, engine.blocks, job.positions.refreshed if job else 0
    )
    if refresher is not None:
        refresher.start(first_step, load_shared_head(catalog, engine.blocks[-1].head) if catalog else None)
    metrics = None
    if place.is_recorder:
        samples = first_step * engine.engines[-1].train_batch_size()
        metrics = MetricsFile(config.output_dir, place.stage, engine.engines[-1].monitor, first_step, samples)
    progress = Progress(world, config.train.max_steps, first_step)
    _say_what_begins(progress, setup, place, data, warnings_of_data, messages)
    saver = Saver(world, config, layout, partial(best_step, config.output_dir, place.num_stages), job)
    recorder = Recorder(config, world, Traffic(links, refresher, outer), saver, metrics, progress)
    return Rank(
        config=config,
        setup=setup,
        layout=layout,
        world=world,
        engine=engine,
        feed=feed,
        links=links,
        refresher=refresher,
        outer=outer,
        metrics=metrics,
        progress=progress,
        saver=saver,
        recorder=recorder,
        tracer=tracer,
        first_step=first_step,
        first_row=first_row,
        local_rank=launch.local_rank,
        start=start,
        job=job,
    )


def _say_what_begins(
    progress: Progress, setup: Setup, place: Place, data: Data | None, warnings: Sequence[str], messages: Sequence[str]
) -> None:
    for warning in (*setup.warnings, *warnings, *(data.warnings if data is not None else ())):
        progress.say(f"llm_local: warning: {warning}")
    for line in messages:
        progress.say(f"llm_local: {line}")
    stages = f"{place.num_stages} stages" if place.job is None else f"stage {place.job} of {place.num_stages}"
    apart = setup.config.local.replica_sync_steps
    replicas = f"{replicas_text(place.replicas)} replicas" + (f" that meet every {apart} steps" if apart else "")
    if place.replica_ranks > 1:
        replicas += f" x {place.replica_ranks} ranks"
    layout = f"{stages} x {replicas}, {setup.config.precision}"
    progress.say(f"llm_local: {layout}; {setup.partition.describe()}")
    for source in data.sources if data is not None else ():
        progress.say(f"llm_local: {source.describe()}")


def _say_other_flags(setup: Setup, config: Config, launch: Launch) -> None:
    """Where a host's YAML or command is not rank 0's; one rank of a host says it."""
    if launch.local_rank == 0 and (other := setup.other_flags(config.flat())):
        said = f"rank {launch.rank} on {socket.gethostname()} was given other flags; rank 0's hold: {other}"
        print(f"llm_local: warning: {said}", file=sys.stderr, flush=True)


def _make_feed(setup: Setup, place: Place, start: Start | None, done: tuple[int, int]) -> Feed:
    """Rank 0 has prepared the data before it published the setup; the other replicas find it in the cache, or prepare
    their host's, which must be the same. done: steps and rows."""
    config = setup.config
    if start is not None:
        processing_class, data = start.processing_class, start.data
    else:
        with writing(config.cache_dir, reads=True):
            processing_class = load_processing_class(config, setup.model_config())
            data = prepare_all(config, processing_class)
        if problem := setup.other_data(key_of(processing_class), data.counts()):
            raise ConfigError([f"rank {place.rank} on {socket.gethostname()}: {problem}"])
    assert data is not None, "the first stage reads data"
    validation = [each.sequences for each in data.validation]
    train = config.train
    micro_batches, eval_batches = place.share(train.gradient_accumulation_steps), place.share(train.eval_batches)
    batch = BatchSize(train.per_device_train_batch_size, micro_batches, eval_batches)
    ask = data.asker(config, processing_class)
    use = RowUse(config.task.name, ask, train.seed, setup.documents, setup.anatomy.num_tokens)
    return Feed(data.train, validation, place, batch, done, use)


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
