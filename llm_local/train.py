"""A run from the command line's arguments to an exported model: check, build, train, export.

deepspeed --num_gpus 2 scripts/pretrain.py configs/quickstart.yaml
"""

from __future__ import annotations

import logging
import os
import sys
import time
import traceback
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from llm_local.anatomy import load_model_config, text_config
from llm_local.backprop import make_backprop_engine
from llm_local.checkpoint import Layout, layout_of, load_checkpoint, save_checkpoint
from llm_local.config import ConfigError, RunConfig, parse
from llm_local.data import prepare
from llm_local.device import peak_memory_bytes, seed_everything, synchronize
from llm_local.ds_config import resolve
from llm_local.engine import LocalEngine, NonFiniteLoss, StepResult, make_block_engine
from llm_local.feed import Feed
from llm_local.finish import Engine, finish
from llm_local.links import Receiver, Sender
from llm_local.metrics import MetricsFile, Record, total_norm
from llm_local.preflight import Plan, open_output, preflight
from llm_local.progress import Progress
from llm_local.stage import build_blocks
from llm_local.tokenizer import load_tokenizer
from llm_local.watchdog import LAST_WORDS_SECONDS, LostPeer, Watchdog
from llm_local.world import (
    PLAN,
    Launch,
    Place,
    Refused,
    World,
    connect,
    fetch_plan,
    join_stage,
    open_store,
    say_no,
)

RUN = "llm_local"  # prefix of the store's keys
REFUSED = 2
LAUNCHER_SECONDS = 10.0
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
    links: list[Sender | Receiver]
    metrics: MetricsFile | None
    progress: Progress
    first_step: int


def main(arguments: Sequence[str]) -> int:
    """Trains one rank's share. Returns 0, 2 for a configuration that was refused, 1 for a run that failed."""
    quiet_libraries()
    rank = int(os.environ.get("RANK", "0"))
    watchdog = Watchdog(rank)
    watchdog.start()
    try:
        launch = Launch.from_environment(os.environ)
        config = parse(arguments)
    except ConfigError as error:
        return _refuse(rank, error)
    try:
        if rank == 0:
            print("llm_local: checking the configuration, the model and the data", file=sys.stderr, flush=True)
        plan = preflight(config, launch.world_size) if rank == 0 else None
    except ConfigError as error:
        _refuse(rank, error)
        say_no(launch, RUN, REFUSAL_SECONDS)
        return REFUSED
    try:
        run = build(config, launch, watchdog, plan)
        train(run)
        finish(run.config, run.plan, run.world, run.engine, run.feed, run.progress)
        for link in run.links:
            link.close(config.train.max_steps)
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
    by_a_peer = isinstance(error, RuntimeError) and not isinstance(error, NonFiniteLoss)
    cause = watchdog.explain() if by_a_peer else None
    if not cause and not isinstance(error, (LostPeer, NonFiniteLoss)):
        traceback.print_exc()
    watchdog.fail(ours, cause)


def build(config: RunConfig, launch: Launch, watchdog: Watchdog, plan: Plan | None) -> Run:
    """Meets the other ranks and makes this one's stage. Every rank must call; rank 0 brings the plan."""
    startup = float(config.train.ddp_timeout)
    store = open_store(launch, RUN, startup)
    if plan is not None:
        open_output(config, plan)
        store.set(PLAN, plan.to_json())
    plan = Plan.from_json(fetch_plan(store, startup))
    place = Place.of(launch.rank, launch.world_size, config.local.num_stages)
    world = connect(launch, place, store, watchdog, startup, config.local.link_timeout_seconds)
    join_stage(world, one_world=config.local.method == "backprop")
    model_config = load_model_config(config.model)
    layout = layout_of(config, plan.partition, place.num_replicas, model_config)
    feed = _make_feed(config, world, startup) if place.is_first_stage else None
    seed_everything(config.train.seed + place.rank)
    engine, links = _make_engine(config, plan, world, feed)
    first_step = load_checkpoint(Path(plan.checkpoint), world, layout, engine.engines) if plan.checkpoint else 0
    metrics = None
    if place.is_recorder:
        metrics = MetricsFile(config.output_dir, place.stage, engine.engines[-1].monitor, first_step)
    tokens = layout.sequences_per_step * config.data.seq_length
    progress = Progress(world, config.train.max_steps, first_step, tokens)
    for warning in plan.warnings:
        progress.say(f"llm_local: warning: {warning}")
    layout_text = f"{place.num_stages} stages x {place.num_replicas} replicas, {config.precision}"
    progress.say(f"llm_local: {layout_text}; {plan.partition.describe()}")
    return Run(config, plan, layout, world, engine, feed, links, metrics, progress, first_step)


def _make_feed(config: RunConfig, world: World, startup: float) -> Feed:
    """Rank 0 prepares the data once; the other replicas find it in the cache."""
    if world.place.rank != 0:
        world.fetch("data", startup, "rank 0 to prepare the data")
    tokenizer = load_tokenizer(config)
    sources = prepare(config, tokenizer, progress=world.place.rank == 0 and sys.stderr.isatty())
    world.publish("data", "ready")
    train = config.train
    rows, micro_batches = train.per_device_train_batch_size, train.gradient_accumulation_steps
    return Feed(*sources, world.place, rows, micro_batches, train.eval_batches)


def _make_engine(
    config: RunConfig, plan: Plan, world: World, feed: Feed | None
) -> tuple[Engine, list[Sender | Receiver]]:
    place, startup = world.place, float(config.train.ddp_timeout)
    model_config = load_model_config(config.model)
    text, cpu = text_config(model_config), world.device.type == "cpu"
    name = f"stage-{place.stage:02d}"
    if config.local.method == "backprop":
        world.everybody("ready", startup, "all ranks to be ready")
        settings = resolve(config, place.num_replicas, text, cpu, name if place.is_recorder else None)
        return make_backprop_engine(config, model_config, plan.anatomy, plan.partition, settings, feed), []
    blocks = build_blocks(config, model_config, plan.anatomy, plan.partition, place.stage)
    engines = []
    for index, block in enumerate(blocks):
        monitor = name if index == len(blocks) - 1 else None
        engines.append(make_block_engine(config, block, resolve(config, place.num_replicas, text, cpu, monitor)))
    world.everybody("ready", startup, "all stages to be built")
    receiver = None if place.is_first_stage else Receiver(world)
    sender = None if place.is_last_stage else Sender(world, config.wire_dtype, config.local.max_packets_in_flight)
    micro_batches = config.train.gradient_accumulation_steps
    engine = LocalEngine(engines, place.stage, place.num_stages, micro_batches, feed, receiver, sender)
    return engine, [link for link in (receiver, sender) if link is not None]


def train(run: Run) -> None:
    """The steps from the first to the last. No stage waits for a later one, but by the packets in flight."""
    train = run.config.train
    for step in range(run.first_step + 1, train.max_steps + 1):
        last = step == train.max_steps
        run.world.watchdog.step = step
        before = _Meter(run)
        result = run.engine.train_batch(step)
        if step == 1 or step % train.logging_steps == 0 or last:
            _record_step(run, step, result, before)
        run.progress.step(time.perf_counter() - before.start)
        if train.eval_batches and train.eval_steps and step % train.eval_steps == 0 and not last:
            _evaluate(run, step)
        if train.save_steps and step % train.save_steps == 0:
            save_checkpoint(run.world, run.config, run.layout, run.engine.engines, step)
    if train.eval_batches:
        _evaluate(run, train.max_steps)
    run.progress.close()


class _Meter:
    """Clock and link counters at the start of a step."""

    def __init__(self, run: Run):
        self.start = time.perf_counter()
        self.wait = sum(link.wait_seconds for link in run.links)
        self.sent = sum(link.bytes for link in run.links if isinstance(link, Sender))
        self.received = sum(link.bytes for link in run.links if isinstance(link, Receiver))


def _record_step(run: Run, step: int, result: StepResult, before: _Meter) -> None:
    synchronize(run.world.device)
    after = _Meter(run)
    mine = [after.start - before.start, after.wait - before.wait]
    mine += [float(after.sent - before.sent), float(after.received - before.received)]
    values = torch.tensor([*result.losses.tolist(), *mine], dtype=torch.float64)
    *losses, seconds, wait, sent, received = run.world.mean_over_replicas(values).tolist()
    replicas = run.world.place.num_replicas
    if run.metrics is not None:
        run.progress.publish("train", step, losses[-1])
        run.metrics.write(
            Record(
                step=step,
                split="train",
                stage=run.world.place.stage,
                loss=losses[-1],
                block_losses=losses,
                tokens=run.layout.sequences_per_step * run.layout.seq_length,
                lr=result.lr,
                grad_norm=total_norm(result.grad_norms),
                step_seconds=seconds,
                wait_seconds=wait,
                sent_bytes=round(sent * replicas),
                received_bytes=round(received * replicas),
                peak_memory_bytes=peak_memory_bytes(run.world.device),
            )
        )


def _evaluate(run: Run, step: int) -> None:
    """Every stage measures its own exit with the weights of this step; nobody waits for a later stage."""
    batches = run.config.train.eval_batches
    losses = run.world.mean_over_replicas(run.engine.eval_batch(step, batches).double().cpu()).tolist()
    place = run.world.place
    if run.metrics is not None:
        run.progress.publish("eval", step, losses[-1])
        rows = batches * run.config.train.per_device_train_batch_size * place.num_replicas
        run.metrics.write(
            Record(step, "eval", place.stage, losses[-1], losses, tokens=rows * run.config.data.seq_length)
        )
