"""A stage from its parts: blocks, an engine around each, links to the neighbours, and the schedule they follow."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Protocol

import torch
from deepspeed.runtime.engine import DeepSpeedEngine

from llm_local.backprop import make_backprop_engine
from llm_local.block_engine import BlockEngine, make_block_engine
from llm_local.data.feed import Feed
from llm_local.delayed_engine import DelayedEngine
from llm_local.ds_config import monitor_folder, resolve
from llm_local.engine import LocalEngine, TrainingPlan
from llm_local.files import writing
from llm_local.head_plan import HeadPlan
from llm_local.job import Job
from llm_local.links.links import Links
from llm_local.model.anatomy import text_config
from llm_local.model.block import Block
from llm_local.model.distillation import Distillation
from llm_local.model.heads.head import head_of
from llm_local.model.slices import Slice
from llm_local.model.stage import Blueprint, build_blocks
from llm_local.replicas import of_stage
from llm_local.results import EvalResult, StepResult
from llm_local.setup import Setup
from llm_local.trace import Tracer
from llm_local.world import World


class Engine(Protocol):
    """What the training loop needs of a stage, trained locally or by the stock pipeline."""

    @property
    def engines(self) -> Sequence[DeepSpeedEngine]: ...

    @property
    def blocks(self) -> Sequence[Block]:
        """Those of the stage; none where only the whole model has a loss."""
        ...

    @property
    def bodies(self) -> list[Slice]:
        """The stage's layers, and the model's head where it belongs to them."""
        ...

    def trace(self, tracer: Tracer) -> None: ...

    def train_batch(self, step: int) -> StepResult: ...

    def check_finite(self) -> None: ...

    def eval_batch(self, step: int, micro_batches: int) -> EvalResult: ...

    def check_logits(self) -> torch.Tensor | None: ...


def make_engine(setup: Setup, world: World, feed: Feed | None, job: Job | None = None) -> tuple[Engine, Links]:
    """This rank's part of the run, ready to train. Every rank must call; feed is stage 0's, job that of a stage in a
    launch of its own."""
    config, place = setup.config, world.place
    startup, model_config = float(config.train.ddp_timeout), setup.model_config()
    text = text_config(model_config)
    of_engine = of_stage(config, place.replicas, place.stage)
    name = f"stage-{place.stage:02d}"
    plan = Blueprint(config, model_config, setup.anatomy, setup.partition, setup.documents)
    if config.is_pipelined:
        world.everybody("ready", startup, "all ranks to be ready")
        settings = resolve(of_engine, place.num_replicas, text, name if place.is_recorder else None)
        with writing(monitor_folder(settings) or config.output_dir, reads=True):
            return make_backprop_engine(plan, settings, feed), Links()
    blocks = build_blocks(plan, place.stage, world.tensor, world.sequence)
    is_delayed, engines = config.method.is_delayed, []
    for index, block in enumerate(blocks):
        monitor = name if index == len(blocks) - 1 and place.is_recorder else None
        settings = resolve(of_engine, config.engine_ranks(place.num_replicas), text, monitor)
        with writing(monitor_folder(settings) or config.output_dir, reads=True):
            kind = DelayedEngine if is_delayed else BlockEngine
            engines.append(make_block_engine(config, block, settings, world.tensor, kind))
    if is_delayed:
        pairs = [build_blocks(plan, place.stage, sequence=world.sequence) for _ in range(2)]
        for engine, *copies in zip(engines, *pairs, strict=True):
            engine.copies, engine.corrects = copies, config.local.delay_correction
    world.everybody("ready", startup, "all stages to be built")
    local = config.local
    links = (
        job.links
        if job
        else Links.join(
            world,
            config.wire_dtype,
            local.max_packets_in_flight,
            back_dtype=config.method.back_dtype(local, config.precision, config.wire_dtype),
            refresh_dtype=config.precision if head_of(config).shares_matrix else None,
        )
    )
    training = TrainingPlan(
        micro_batches=of_engine.train.gradient_accumulation_steps,
        schedule_of=partial(config.method.schedule_at, local, config.train.max_steps),
        heads=HeadPlan.of(config, setup.partition, place.stage, place.dealing(0)),
        distillation=Distillation(local.distillation_weight, local.distillation_top_k, local.distillation_sampling),
    )
    return LocalEngine(engines, training, world, links, feed), links
