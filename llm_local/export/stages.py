"""From the stages of a run to Hugging Face models that transformers loads as they are.

    OUTPUT/export/                     the whole model: one shard a stage, and the last stage's head
    OUTPUT/export/exits/stage-00/      the layers up to stage 0 with stage 0's own head, a model of its own

Every stage writes its layers once and its head once, under the model's original parameter names; an exit's folder
links to the layers it shares. Each exported model is loaded back and its logits are compared with the pipeline's.
"""

from __future__ import annotations

import copy
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import deepspeed
import torch
from transformers import PretrainedConfig

from llm_local.adapters.deepspeed_internals import is_partitioned
from llm_local.adapters.hf_internals import unsaved
from llm_local.config import Config
from llm_local.export.adapter import write_share
from llm_local.export.masters import Masters
from llm_local.export.model_folder import (
    Description,
    WrongExport,
    check_export,
    complete,
    link,
    original_names,
    shard_name,
    tied_names,
    write_shard,
)
from llm_local.model.levels import longest_level, with_layers
from llm_local.model.lora import adapter_of, merged
from llm_local.model.lowrank import multiplied
from llm_local.model.overrides import is_per_layer
from llm_local.model.router_loss import want_none
from llm_local.model.slices import Slice
from llm_local.model.tensor_parallel import part_of
from llm_local.partition import Partition
from llm_local.registry import TASKS
from llm_local.tasks.task import Task

CHECK_FILE = "check.safetensors"  # a row of the data, and what the pipeline makes of it
LOGITS_TOLERANCE = {"fp32": 1e-4, "bf16": 0.05, "fp16": 0.02}


@dataclass(frozen=True)
class StageTensors:
    """A stage's parameters and saved buffers under the names that a checkpoint of the model has; adapter: what its
    body has of one (model/lora.py), by PEFT's names."""

    body: dict[str, torch.Tensor]
    head: dict[str, torch.Tensor]
    adapter: dict[str, torch.Tensor] = field(default_factory=dict)


def collect(
    bodies: Sequence[Slice],
    head: Slice | None,
    keep: bool,
    folded: dict[str, torch.Tensor],
    dtype: torch.dtype | None = None,
    masters: Masters | None = None,
) -> StageTensors:
    """The tensors of a stage's layers, and of its last block's head where that is a slice of its own, on the CPU.

    Every rank must call where parameters are gathered one by one: under ZeRO-3, with masters, and of divided layers;
    `keep` says who gets them. folded: tensors of the head that take the place of its own. dtype: of the parameters, by
    default the model's own. masters: where they are read from instead of the model.
    """
    body: dict[str, torch.Tensor] = {}
    heads: dict[str, torch.Tensor] = {}
    adapter: dict[str, torch.Tensor] = {}
    for part in bodies:
        tensors = _cast(part, _state(part, keep, masters), dtype)
        adapter |= adapter_of(tensors)
        tensors = merged(part, tensors)
        before = () if part.is_first else tuple(f"{name}." for name in part.anatomy.before)
        after = tuple(f"{name}." for name in part.anatomy.after)
        body |= _original_names(part, {k: v for k, v in tensors.items() if not k.startswith(before + after)})
        if part.has_head:
            heads = _original_names(part, {k: v for k, v in tensors.items() if k.startswith(after)})
    if head is not None:
        layers = [f"{head.anatomy.layers}.{index}." for index in range(head.span.start, head.span.stop)]
        names = (*layers, *(f"{name}." for name in head.anatomy.after))
        tensors = multiplied(head, _state(head, keep, masters)) | (folded if keep else {})
        tensors = _cast(head, tensors, dtype)
        heads = _original_names(head, {k: v for k, v in tensors.items() if k.startswith(names)})
    return StageTensors(body, heads, adapter)


def _state(part: Slice, keep: bool, masters: Masters | None) -> dict[str, torch.Tensor]:
    ignored = unsaved(part.model)
    named = {k: v for k, v in part.model.state_dict(keep_vars=True).items() if k not in ignored}
    kept: dict[str, torch.Tensor] = {}
    places: set[int] = set()
    for name, tensor in named.items():
        master = None if masters is None else masters(tensor)
        if (divided := part_of(tensor)) is not None:
            gathered = divided.whole(tensor if master is None else master)
            if keep:
                kept[name] = gathered.to("cpu")
        elif master is not None:
            if keep:
                kept[name] = master.detach().to("cpu", copy=True)
        elif is_partitioned(tensor):
            with deepspeed.zero.GatheredParameters([tensor]):
                if keep:
                    kept[name] = tensor.detach().cpu().clone()
        elif keep:
            tied = tensor.data_ptr() in places  # such get a copy each: the export is untied
            places.add(tensor.data_ptr())
            kept[name] = tensor.detach().to("cpu", copy=tied)
    return kept


def _cast(part: Slice, tensors: dict[str, torch.Tensor], dtype: torch.dtype | None) -> dict[str, torch.Tensor]:
    """Parameters in the dtype; buffers have one of their own."""
    buffers = {name for name, _ in part.model.named_buffers()}
    return {
        name: tensor.to(dtype) if dtype and tensor.is_floating_point() and name not in buffers else tensor
        for name, tensor in tensors.items()
    }


def _original_names(part: Slice, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return original_names(part.model, tensors)


def exit_name(stage: int) -> str:
    return f"stage-{stage:02d}"


def exit_folder(export: Path, stage: int) -> Path:
    return export / "exits" / exit_name(stage)


def write_stage(export: Path, stage: int, num_stages: int, tensors: StageTensors, has_head: bool) -> None:
    """Writes what belongs to one stage: its layers into the whole model, its head into its exit."""
    write_shard(export / shard_name(stage, num_stages + 1), tensors.body)
    write_share(export, stage, num_stages, tensors.adapter)
    if has_head:
        write_shard(exit_folder(export, stage) / shard_name(stage + 1, stage + 2), tensors.head)


def has_exits(config: Config) -> bool:
    """Whether each stage has a head that makes it a model."""
    return not config.has_one_head and not config.local.head_features


def compose(
    export: Path,
    partition: Partition,
    head_layers: Sequence[int],
    model: Description,
    exits: bool,
    last: int | None = None,
) -> None:
    """Makes models of the shards, once every stage has written its own. An exit's private layers lie in its head.

    last: stage whose exit is the whole, by default that of the model.
    """
    last, tied = partition.num_stages - 1 if last is None else last, tied_names(model.config, model.task)

    def completed(folder: Path, stage: int) -> None:
        shards = [folder / shard_name(index, stage + 2) for index in range(stage + 2)]
        private = partition.private_layers(partition.stages[stage].stop - 1, head_layers)
        complete(folder, shards, trimmed(model, private.stop), tied)

    for stage in range(last + 1) if exits else ():
        for index in range(stage + 1):
            link(export / shard_name(index, last + 2), exit_folder(export, stage) / shard_name(index, stage + 2))
        completed(exit_folder(export, stage), stage)
    head = shard_name(last + 1, last + 2)
    link(exit_folder(export, last) / head, export / head)
    if not exits:
        shutil.rmtree(export / "exits")
    completed(export, last)


def check_exit(
    config: Config,
    draft: Path,
    final: Path,
    stage: int | None,
    reason: str | None,
    check: tuple[torch.Tensor, torch.Tensor] | None,
) -> str:
    """Compares a stage's exit, or the whole model (None), as transformers loads it, with the pipeline's logits
    (1, T', V) on a row (1, T) of text, if there is such a check.

    Returns a line for a person, in which the draft has its final name. An exit that is no model of its own, for a
    reason that is known or because it shows, is removed; the whole model must be one. Raises WrongExport.
    """
    folder, named = (each if stage is None else exit_folder(each, stage) for each in (draft, final))
    if stage is None or reason is None:
        try:
            said = "not checked, as its part has no logits" if check is None else _compare(config, folder, *check)
            return f"{named}: {said}"
        except WrongExport as error:
            if stage is None:
                raise
            reason = error.reason
    shutil.rmtree(folder)
    return f"no exit {exit_name(stage)}, as it is no model of its own: {reason}"


def _compare(config: Config, folder: Path, ids: torch.Tensor, logits: torch.Tensor) -> str:
    tolerance = max(LOGITS_TOLERANCE[dtype] for dtype in (config.precision, config.export_dtype))
    trusted = config.model.trust_remote_code
    return check_export(folder, ids, logits, tolerance, config.task, trust_remote_code=trusted)


def trimmed(model: Description, num_layers: int) -> Description:
    """The description of the first num_layers layers."""
    return replace(model, config=trim_config(model.config, num_layers, TASKS[model.task]))


def trim_config(config: PretrainedConfig, num_layers: int, task: Task | None = None) -> PretrainedConfig:
    """The config of the first num_layers layers, of a model for the task, by default one of text. Of fewer than all, it
    asks for no router loss: none of them may have a router."""
    config = copy.deepcopy(config)
    part: Any = (task or TASKS["causal-lm"]).part_of(config)
    if longest_level(part) is not None:
        part.depths = with_layers(part, num_layers)["depths"]
        return config
    whole = part.num_hidden_layers
    if num_layers < whole:
        want_none(config)
    # of a config for encoder and decoder its part is a copy
    text = config if config.is_encoder_decoder else part
    different = text.to_dict().get("per_layer_config")  # where single layers have values of their own, by number
    if different:
        text.per_layer_config = None
    for name, value in list(vars(text).items()):
        if is_per_layer(name, value, whole):
            setattr(text, name, type(value)(value[:num_layers]))
    for name in ("num_hidden_layers", "decoder_layers", "num_blocks"):
        if getattr(text, name, None) == whole:
            setattr(text, name, num_layers)
    if names := getattr(text, "stage_names", None):  # of a backbone, the stem's first
        text.stage_names = names[: num_layers + 1]
        text.out_features = text.stage_names[-1:]
    if different:
        text.per_layer_config = {int(k): v for k, v in different.items() if int(k) < num_layers}
    return config
