"""A model from a checkpoint or from parts, on one CPU, without the ranks that wrote them; `export` and `assemble` are
the commands.

Blocks are made and filled one after the other, and a stage's tensors go to disk before the next stage is read: memory
is that of about one stage.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from transformers import BaseImageProcessor

from llm_local.checkpoint.catalog import Catalog
from llm_local.checkpoint.line import METRICS
from llm_local.checkpoint.loader import fill, fill_block
from llm_local.checkpoint.manifest import read_data_state, read_note
from llm_local.checks.exit_check import refused_exits
from llm_local.config import Config
from llm_local.cut import plan_partition
from llm_local.data.feed import SOURCES, trained_tokens
from llm_local.data.image_processor import load_processor, pixel_shape
from llm_local.data.packing import PackedSource
from llm_local.data.sets import ProcessingClass, class_names
from llm_local.data.special_tokens import generation_values, run_model_config
from llm_local.data.tokenizer import load_tokenizer
from llm_local.device import DTYPES
from llm_local.ds_config import load_json
from llm_local.export.adapter import complete_adapter
from llm_local.export.model_card import Training, installed_versions, model_card, write_cards
from llm_local.export.model_folder import CARD, Description, replaced, write_text
from llm_local.export.parts import MODEL, Check, fitting, read_check
from llm_local.export.stages import (
    StageTensors,
    check_exit,
    collect,
    compose,
    exit_folder,
    exit_name,
    has_exits,
    write_stage,
)
from llm_local.files import Json
from llm_local.flags import ModelArguments
from llm_local.jobs.positions import NOTE
from llm_local.model.anatomy import Anatomy, probe
from llm_local.model.block import EXITS, named_once
from llm_local.model.classes import set_classes
from llm_local.model.lora import add_adapters, with_adapters
from llm_local.model.model_config import load_model_config
from llm_local.model.remote_code import read_code
from llm_local.model.stage import Blueprint, build_block, build_slice
from llm_local.partition import Partition
from llm_local.records import read_records
from llm_local.replicas import replicas_of

Say = Callable[[str], None]


class NoSuchExit(ValueError):
    """The checkpoint has no exit of that name."""


@dataclass(frozen=True)
class _Run:
    """What the flags of a run say of its model. config: with which blocks are built."""

    config: Config
    model: Description
    anatomy: Anatomy
    partition: Partition
    dtype: torch.dtype

    @staticmethod
    def of(config: Config, dtype: str, folder: Path | None = None) -> _Run:
        """folder: where the model is described, if not where the flags say."""
        # no layer runs here, and the kernel of the training may be on another machine
        config = replace(config, model=replace(config.model, attn_implementation="eager"))
        if folder is None:
            model = described(config)
        else:
            named = ModelArguments(
                task=config.model.task,
                model_name_or_path=str(folder),
                trust_remote_code=config.model.trust_remote_code,
                attn_implementation="eager",
            )
            model = described(replace(config, model=named), of_export=True)
            config = replace(config, model=replace(config.model, model_name_or_path=None))  # no weights to begin with
        model.config.dtype = DTYPES[dtype]
        anatomy = probe(model.config, config.model, row_shape=_row_shape(model))
        partition = plan_partition(config, anatomy)
        anatomy = with_adapters(config, model.config, anatomy, partition)
        return _Run(config, model, anatomy, partition, DTYPES[dtype])

    def refused(self) -> dict[str, str]:
        return refused_exits(self.config, self.model.config, self.anatomy, self.partition)


def _row_shape(model: Description) -> tuple[int, ...] | None:
    return pixel_shape(model.tokenizer) if isinstance(model.tokenizer, BaseImageProcessor) else None


def described(config: Config, of_export: bool = False) -> Description:
    """The run's model as its flags describe it. of_export: they name what a run has written, which knows the classes.
    Raises ConfigError where what they name is not there."""
    if config.task.reads_images:
        model_config = load_model_config(config.model)
        if not of_export:
            set_classes(model_config, class_names(config))
        processing: ProcessingClass = load_processor(config, model_config)
        generation = None
    else:
        processing = load_tokenizer(config)
        model_config = run_model_config(config, processing)
        generation = generation_values(config, model_config, processing)
    return Description(model_config, "", processing, generation, read_code(model_config), config.task.name)


def export_checkpoint(checkpoint: Path, out: Path, exit: str | None, dtype: str, say: Say = lambda _line: None) -> None:
    """Writes the model, or the exit of a stage ('stage-01'), as a folder for from_pretrained.

    dtype: fp32, bf16, fp16, or auto for that of the training. Raises BrokenCheckpoint, ConfigError and Unwritten,
    which name a file, and NoSuchExit.
    """
    catalog = Catalog(checkpoint)
    config = catalog.manifest.config()
    run = _Run.of(config, config.precision if dtype == "auto" else dtype)
    last = _stage_of(exit, catalog, run.partition)
    reason = run.refused().get(exit or "")
    if reason:
        raise NoSuchExit(f"{exit} of {checkpoint} is no model of its own: {reason}")
    with replaced(out) as draft:
        _write(draft, run, [catalog] * (last + 1), False, say)
        training = _training(catalog, config, run)
        if exit is None:
            write_cards(training, draft)
        else:
            write_text(draft / CARD, model_card(training, last))


def assemble(
    given: Sequence[Path], out: Path, dtype: str | None = None, trusted: bool = False, say: Say = lambda _line: None
) -> None:
    """Writes the model that the parts of all stages make, and the exits, as a run of one launch does.

    dtype: by default what the run's --export_dtype says. trusted: whether code that a part brings along may run. Raises
    ConfigError, BrokenCheckpoint, Unwritten, and WrongExport where the whole model is not the one that was trained; out
    is then as it was.
    """
    parts = fitting(given)
    catalogs, checks = [Catalog(part) for part in parts], [read_check(part) for part in parts]
    config = catalogs[0].manifest.config()
    config = replace(config, model=replace(config.model, trust_remote_code=trusted))
    if dtype is not None:
        config = replace(config, train=replace(config.train, export_dtype=dtype))
    described_in = next((part / MODEL for part in parts if (part / MODEL).is_dir()), None)
    run, stages, exits = _Run.of(config, config.export_dtype, described_in), range(len(parts)), has_exits(config)
    refused = run.refused()
    with replaced(out) as draft:
        _write(draft, run, catalogs, exits, say)
        for stage in stages if exits else stages[-1:]:
            reason = refused.get(exit_name(stage))
            exit_stage = None if stage == stages[-1] else stage
            say(check_exit(run.config, draft, out, exit_stage, reason, _check_of(checks, stage)))
        there = tuple(stage for stage in stages if exit_folder(draft, stage).is_dir())
        skipped = tuple(read_note(part, NOTE, stage).get("skipped", 0) for stage, part in enumerate(parts))
        found = [_evaluated(part, stage, catalogs[0].manifest.step) for stage, part in enumerate(parts)]
        losses = tuple(each.get("loss") for each in found)
        measures = tuple(tuple(each[name] for name in config.task.measures) for each in found) if all(found) else ()
        training = replace(_training(catalogs[0], config, run), exits=there, losses=losses, measures=measures)
        write_cards(replace(training, skipped=skipped), draft)


def _check_of(checks: Sequence[Check | None], stage: int) -> tuple[torch.Tensor, torch.Tensor] | None:
    """The stage's logits, with the row that they are of: of an image the first stage alone has it."""
    own, first = checks[stage], checks[0]
    if own is None:
        return None
    row = own.row if own.row is not None or first is None else first.row
    return None if row is None else (row, own.logits)


def _evaluated(part: Path, stage: int, step: int) -> Json:
    """What the exit scored on the first validation set after that step; nothing if it was not evaluated then."""
    records = read_records(part / METRICS / f"stage-{stage:02d}.jsonl")
    return next((each for each in reversed(records) if (each["split"], each["step"]) == ("eval", step)), {})


def _stage_of(exit: str | None, catalog: Catalog, partition: Partition) -> int:
    last = partition.num_stages - 1
    if exit is None or exit == exit_name(last):
        return last
    names = [exit_name(stage) for stage in range(last + 1)]
    if exit not in names:
        raise NoSuchExit(f"{catalog.path} has no exit {exit}; it has {', '.join(names)}")
    stage = names.index(exit)
    below = partition.layers_of(stage).stop
    if not any(name.startswith(f"{EXITS}{below}.") for name in catalog.weights):
        raise NoSuchExit(f"{catalog.path} has no head of its own for {exit}: method=backprop trains the last one alone")
    if any(name.startswith(f"{EXITS}{below}.feature_scale") for name in catalog.weights):
        raise NoSuchExit(f"{catalog.path}: {exit} is no model of its own, as its head reads more (head_features)")
    return stage


def _write(draft: Path, run: _Run, catalogs: Sequence[Catalog], exits: bool, say: Say) -> None:
    """The model of as many stages as there are catalogs, with all exits or none. catalogs: that of each stage."""
    last, class_name = len(catalogs) - 1, ""
    for stage, catalog in enumerate(catalogs):
        say(f"stage {stage}: {run.partition.describe().split(' | ')[stage].partition(': ')[2]}")
        class_name = _write_stage(draft, run, catalog, stage, last, exits or stage == last)
    model = replace(run.model, class_name=class_name)
    compose(draft, run.partition, run.config.head_layers_schedule, model, exits, last)
    complete_adapter(draft, run.config, catalogs[0].manifest.flags["model_name_or_path"])


def _write_stage(draft: Path, run: _Run, catalog: Catalog, stage: int, last: int, has_head: bool) -> str:
    """Returns the name of the model's class."""
    plan = Blueprint(run.config, run.model.config, run.anatomy, run.partition)
    numbers, tensors, class_name = run.partition.stages[stage], StageTensors({}, {}), ""
    for index in range(numbers.start, numbers.stop):
        if has_head and index == numbers.stop - 1:
            block = build_block(plan, index)
            fill_block(catalog, block)
            body = block.body
            found = collect([body], block.head, True, block.folded(), run.dtype)
        else:
            body = build_slice(run.config, run.model.config, run.anatomy, run.partition.blocks[index], has_head=False)
            add_adapters(run.config, body)
            fill(catalog, named_once([("", body.model)]))
            found = collect([body], None, True, {}, run.dtype)
        adapter = tensors.adapter | found.adapter if last + 1 == run.partition.num_stages else {}
        tensors = StageTensors(tensors.body | found.body, found.head, adapter)
        class_name = type(body.model).__name__
    write_stage(draft, stage, last + 1, tensors, has_head)
    return class_name


def _training(catalog: Catalog, config: Config, run: _Run) -> Training:
    """catalog: of the first stage, which read the data."""
    manifest, state, train = catalog.manifest, read_data_state(catalog.path), config.train
    most_replicas = manifest.layout.sequences_per_step // (
        train.per_device_train_batch_size * train.gradient_accumulation_steps
    )
    return Training(
        config=config,
        partition=run.partition,
        replicas=replicas_of(config, most_replicas * config.launched_stages),
        model_type=run.model.config.model_type,
        steps=manifest.step,
        tokens=trained_tokens(state, manifest.rows, config.data.seq_length),
        losses=(None,) * run.partition.num_stages,
        exits=(),
        deepspeed=load_json(config),
        versions=installed_versions() | manifest.versions,
        places=manifest.rows * config.data.seq_length,
        sources=tuple(PackedSource.of(source) for source in state.get(SOURCES, [])),
    )
