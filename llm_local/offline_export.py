"""A model from a checkpoint, on one CPU, without the ranks that wrote it; scripts/export.py is the command.

Blocks are made and filled one after the other, and a stage's tensors go to disk before the next stage is read: memory
is that of about one stage.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

from llm_local.checkpoint.catalog import Catalog, read_data_state
from llm_local.checkpoint.loader import fill, fill_block
from llm_local.checks.exit_check import refused_exits
from llm_local.checks.preflight import plan_partition
from llm_local.config import Config
from llm_local.data.feed import SOURCES, trained_tokens
from llm_local.data.packing import PackedSource
from llm_local.data.special_tokens import generation_values, run_model_config
from llm_local.data.tokenizer import load_tokenizer
from llm_local.device import DTYPES
from llm_local.ds_config import load_json
from llm_local.export.model_card import Training, installed_versions, model_card
from llm_local.export.model_folder import (
    CARD,
    Description,
    complete,
    replaced,
    shard_name,
    tied_names,
    write_shard,
    write_text,
)
from llm_local.export.stages import collect, exit_name, trimmed
from llm_local.model.anatomy import Anatomy, probe
from llm_local.model.remote_code import read_code
from llm_local.model.stage import EXITS, build_block, build_slice
from llm_local.partition import Partition


class NoSuchExit(ValueError):
    """The checkpoint has no exit of that name."""


def export_checkpoint(
    checkpoint: Path, out: Path, exit: str | None, dtype: str, say: Callable[[str], None] = lambda _line: None
) -> None:
    """Writes the model, or the exit of a stage ('stage-01'), as a folder for from_pretrained.

    dtype: fp32, bf16, fp16, or auto for that of the training. Raises BrokenCheckpoint, ConfigError and Unwritten,
    which name a file, and NoSuchExit.
    """
    catalog = Catalog(checkpoint)
    config = catalog.manifest.config()
    # no layer runs here, and the kernel of the training may be on another machine
    config = replace(config, model=replace(config.model, attn_implementation="eager"))
    model_config = run_model_config(config)
    anatomy = probe(model_config, config.model)
    partition = plan_partition(config, model_config, anatomy)
    last = _stage_of(exit, catalog, partition)
    reason = refused_exits(config, model_config, anatomy, partition).get(exit or "")
    if reason:
        raise NoSuchExit(f"{exit} of {checkpoint} is no model of its own: {reason}")
    tied = tied_names(model_config)
    model_config.dtype = DTYPES[config.precision if dtype == "auto" else dtype]
    class_name = ""
    with replaced(out) as draft:
        shards = [draft / shard_name(index, last + 2) for index in range(last + 2)]
        for stage in range(last + 1):
            say(f"stage {stage}: {partition.describe().split(' | ')[stage].partition(': ')[2]}")
            class_name = _write_stage(
                catalog, config, anatomy, partition, stage, shards[stage:], stage == last, model_config.dtype
            )
        depth = partition.private_layers(partition.stages[last].stop - 1, config.head_layers_schedule).stop
        tokenizer = load_tokenizer(config)
        generation = generation_values(config, model_config, tokenizer)
        model = Description(model_config, class_name, tokenizer, generation, read_code(model_config))
        complete(draft, shards, trimmed(model, depth), tied)
        training = _training(catalog, catalog.manifest.config(), partition, model_config.model_type)
        write_text(draft / CARD, model_card(training, None if exit is None else last))


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


def _write_stage(
    catalog: Catalog,
    config: Config,
    anatomy: Anatomy,
    partition: Partition,
    stage: int,
    shards: list[Path],
    with_head: bool,
    dtype: torch.dtype,
) -> str:
    """The first of the shards gets the stage's layers, with_head the second one the head of its last block."""
    model_config = run_model_config(config)
    numbers, bodies, heads, class_name = partition.stages[stage], {}, {}, ""
    for index in range(numbers.start, numbers.stop):
        if with_head and index == numbers.stop - 1:
            block = build_block(config, model_config, anatomy, partition, index)
            fill_block(catalog, block)
            body = block.body
            found = collect([body], block.head, False, True, block.folded(), dtype)
            heads = found.head
        else:
            body = build_slice(config, model_config, anatomy, partition.blocks[index], has_head=False)
            fill(catalog, dict(body.model.state_dict(keep_vars=True)))
            found = collect([body], None, False, True, {}, dtype)
        bodies |= found.body
        class_name = type(body.model).__name__
    write_shard(shards[0], bodies)
    if with_head:
        write_shard(shards[1], heads)
    return class_name


def _training(catalog: Catalog, config: Config, partition: Partition, model_type: str) -> Training:
    manifest, state = catalog.manifest, read_data_state(catalog.path)
    return Training(
        config=config,
        partition=partition,
        num_replicas=manifest.layout.replicas,
        model_type=model_type,
        steps=manifest.step,
        tokens=trained_tokens(state, manifest.rows, config.data.seq_length),
        losses=(None,) * partition.num_stages,
        exits=(),
        deepspeed=load_json(config),
        versions=installed_versions() | manifest.versions,
        places=manifest.rows * config.data.seq_length,
        sources=tuple(PackedSource.of(source) for source in state.get(SOURCES, [])),
    )
