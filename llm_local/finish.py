"""The end of a run: every stage exports, the exports are checked, and a person sees what came out."""

from __future__ import annotations

import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import PretrainedConfig

from llm_local.assembly import Engine
from llm_local.checkpoint.line import committed
from llm_local.config import Config
from llm_local.device import DTYPES
from llm_local.ds_config import load_json
from llm_local.engine import LocalEngine
from llm_local.evaluation import EvalSet, better_exit, measures_key
from llm_local.export.adapter import FOLDER as ADAPTER
from llm_local.export.adapter import complete_adapter
from llm_local.export.masters import masters_of
from llm_local.export.model_card import Training, installed_versions, write_cards
from llm_local.export.model_folder import Description, draft_of, put_in_place, writing
from llm_local.export.parts import Check, write_part
from llm_local.export.sample import sample
from llm_local.export.stages import (
    CHECK_FILE,
    check_exit,
    collect,
    compose,
    exit_folder,
    exit_name,
    has_exits,
    write_stage,
)
from llm_local.files import Unwritten
from llm_local.links.packet import CHECK
from llm_local.model.levels import layers_override
from llm_local.model.slices import Slice
from llm_local.place import Place
from llm_local.rank import Rank, Start
from llm_local.report.notes import add_sample
from llm_local.setup import Setup
from llm_local.world import World


def finish(run: Rank, step: int, is_evaluated: bool) -> None:
    """Exports and checks what the run is after `step`; every rank must call. Rank 0 composes what the stages wrote, and
    reports. is_evaluated: whether the exits were measured at that step.

    Raises Unwritten where the disk takes no more, and WrongExport where the whole model is not the pipeline's;
    what was exported before is there in both cases.
    """
    export = run.config.output_dir / "export"
    try:
        _export(run, draft_of(export))
        if run.start is not None:
            _report(run, run.start, step, export, is_evaluated)
    except Unwritten as error:
        shutil.rmtree(draft_of(export), ignore_errors=True)  # what lacks a shard is of no use, and takes space
        raise Unwritten(f"{error}{_again(run.config)}", error.is_gone) from error


def finish_part(run: Rank, checkpoint: Path) -> Path:
    """Exports the part of the model that a job has trained, of its last checkpoint; returns the folder. Every rank must
    call. Raises Unwritten, and BrokenCheckpoint where that is damaged."""
    engine, export = run.engine, run.config.output_dir / "export"
    assert isinstance(engine, LocalEngine), "jobs train locally"
    logits = engine.check_logits()
    if run.start is None:
        return export
    config = run.setup.model_config()
    config.dtype = DTYPES[run.config.export_dtype]
    name = type(engine.bodies[0].model).__name__
    model = _described(run.setup, config, name, run.start)
    metrics = run.metrics.path if run.metrics else None
    write_part(checkpoint, export, model, Check(engine.check_row, logits), metrics)
    run.progress.say(f"part: {export}; llm-local assemble makes the model of those of all stages")
    return export


def _again(config: Config) -> str:
    """Where an export that failed can start from."""
    found = committed(config.output_dir)
    if not found:
        return ", by another run: this one saved no checkpoint (save_steps)"
    return f", from the checkpoint {found[-1]} (--resume_from_checkpoint true)"


def _export(run: Rank, export: Path) -> None:
    config, world, engine, place = run.config, run.world, run.engine, run.world.place
    has_head = has_exits(config) or place.is_last_stage
    logits = engine.check_logits()
    bodies, head = slices_of(engine)
    seconds = float(config.train.ddp_timeout)
    tensors = collect(
        bodies,
        head,
        place.is_recorder,
        _folded(engine),
        None if config.train.export_dtype == "auto" else DTYPES[config.export_dtype],
        masters_of(engine.engines, world.shard) if config.export_dtype == "fp32" != config.precision else None,
    )
    if place.is_recorder:
        write_stage(export, place.stage, place.num_stages, tensors, has_head)
        world.publish(f"export/{place.stage}", "written")
    if run.start is not None:
        for stage in range(place.num_stages):
            world.fetch(f"export/{stage}", seconds, f"stage {stage} to write its shard")
        assert run.feed is not None, "rank 0 reads the data"
        with writing(export / CHECK_FILE):
            save_file(run.feed(CHECK, 0, 0).inputs(), export / CHECK_FILE)
        _compose(run.setup, run.start, type(bodies[0].model).__name__, export)
        world.publish("export/all", "composed")
    if place.is_recorder and has_head:
        world.fetch("export/all", seconds, "rank 0 to compose the export")
        assert logits is not None
        world.publish(f"checked/{place.stage}", check_stage(run.setup, place, export, logits))


def _compose(setup: Setup, start: Start, class_name: str, export: Path) -> None:
    config, model_config = setup.config, setup.model_config()
    model_config.dtype = DTYPES[config.export_dtype]
    model = _described(setup, model_config, class_name, start)
    compose(export, setup.partition, config.head_layers_schedule, model, has_exits(config))
    complete_adapter(export, config, config.model.model_name_or_path)


def _described(setup: Setup, model_config: PretrainedConfig, class_name: str, start: Start) -> Description:
    task = setup.config.task.name
    return Description(model_config, class_name, start.processing_class, setup.generation, setup.code, task)


def slices_of(engine: Engine) -> tuple[list[Slice], Slice | None]:
    """The layers of this stage, and the head of its last block."""
    return engine.bodies, engine.blocks[-1].head if engine.blocks else None


def _folded(engine: Engine) -> dict[str, torch.Tensor]:
    """What the exit's output matrix is where it is not the one that the head reads."""
    return engine.blocks[-1].folded() if engine.blocks else {}


def check_stage(setup: Setup, place: Place, export: Path, logits: torch.Tensor) -> str:
    """This stage's exit, compared as in check_exit with its logits on the row that lies in the export."""
    config, row = setup.config, load_file(export / CHECK_FILE)[setup.config.task.main_input]
    reason = setup.refused_exits.get(exit_name(place.stage))  # in bf16 a small difference would not show here
    final = config.output_dir / "export"
    return check_exit(config, export, final, None if place.is_last_stage else place.stage, reason, (row, logits))


def _report(run: Rank, start: Start, step: int, export: Path, is_evaluated: bool) -> None:
    """Puts the checked exports in their place, and says what a person sees at the end: the exports, every stage's
    validation loss, and some text."""
    config, world, progress = run.config, run.world, run.progress
    seconds, draft, stages = float(config.train.ddp_timeout), draft_of(export), range(world.place.num_stages)
    for stage in stages if has_exits(config) else stages[-1:]:
        progress.say(world.fetch(f"checked/{stage}", seconds, f"stage {stage} to check its export"))
    progress.show()
    sets = run.setup.eval_sets if is_evaluated else ()
    found = [[_losses_at(step, config, world, each, stage) for each in sets] for stage in stages]
    measured = [[_measured_at(step, config, world, each, stage) for each in sets] for stage in stages]
    losses = [scores[0][-1] if scores else None for scores in found]
    exits = tuple(stage for stage in stages if exit_folder(draft, stage).is_dir())
    training = _training(run, step, tuple(losses), exits)
    write_cards(replace(training, measures=tuple(some[0] for some in measured if some)), draft)
    (draft / CHECK_FILE).unlink()
    put_in_place(export)
    for stage, scores in enumerate(found):
        for each, block_losses, measures in zip(sets, scores, measured[stage], strict=True):
            progress.say(f"stage {stage}: {each.describe(block_losses[-1], measures)}")
    early = f"exits: {export / 'exits'} ({', '.join(map(exit_name, exits))}); " if exits else ""
    early = "no exits, because of head_features; " if config.local.head_features else early
    early += f"adapter: {export / ADAPTER}; " if (export / ADAPTER).is_dir() else ""
    progress.say(f"model: {export}; {early}metrics: {config.output_dir / 'metrics'}")
    by_set = {each.name: [scores[n] for scores in found] for n, each in enumerate(sets)}
    for line in (*_better_exits(run, by_set, exits), *_spelled(start)):
        progress.say(f"llm_local: warning: {line}")
    if config.train.sample_prompt:
        text = sample(export, config.train.sample_prompt, config.train.seed, config.model.trust_remote_code)
        add_sample(config.output_dir, step, config.train.sample_prompt, text)
        progress.say(f"{export} writes:\n{text}")


def _spelled(start: Start) -> tuple[str, ...]:
    return start.data.spelled_in_streams(start.processing_class) if start.data else ()


def _better_exits(run: Rank, losses: dict[str, list[list[float]]], exits: tuple[int, ...]) -> list[str]:
    """Lines on the validation sets on which an exit is better than the whole model."""
    config = run.config
    if config.has_one_head:
        return []
    export = config.output_dir / "export"
    folders = {stage: exit_folder(export, stage) for stage in exits} if has_exits(config) else None
    resume = "--resume_from_checkpoint true" if committed(config.output_dir) else ""
    if resume and config.local.layers_per_block is not None:
        resume += f" --layers_per_block {config.local.layers_per_block}"
    override = partial(layers_override, config.task.part_of(run.setup.model_config()))
    told = (run.setup.partition, folders, resume, override)
    return [line for name, scores in losses.items() if (line := better_exit(name, scores, *told))]


def _losses_at(step: int, config: Config, world: World, each: EvalSet, stage: int) -> list[float]:
    """Of the stage's blocks."""
    return _published(f"{each.split}/{step}/{stage}", config, world, stage)


def _measured_at(step: int, config: Config, world: World, each: EvalSet, stage: int) -> tuple[float, ...]:
    """What the task measures beside the loss of the stage's exit."""
    if not each.measures or (config.has_one_head and stage + 1 < config.local.num_stages):
        return ()
    return tuple(_published(measures_key(each.split, step, stage), config, world, stage))


def _published(key: str, config: Config, world: World, stage: int) -> list[float]:
    """What an evaluation of the stage has left in the store."""
    text = world.fetch(key, float(config.train.ddp_timeout), f"stage {stage} to evaluate")
    return [float(value) for value in text.split()]


def _training(run: Rank, step: int, losses: tuple[float | None, ...], exits: tuple[int, ...]) -> Training:
    config = run.config
    assert run.feed is not None, "rank 0 reads the data"
    return Training(
        config=config,
        partition=run.setup.partition,
        replicas=run.world.place.replicas,
        model_type=run.setup.model["model_type"],
        steps=step,
        tokens=run.feed.tokens,
        losses=losses,
        exits=exits,
        deepspeed=load_json(config),
        versions=installed_versions(),
        places=run.rows_after(step) * config.data.seq_length,
        sources=run.sources,
    )
