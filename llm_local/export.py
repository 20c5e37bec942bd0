"""From the stages of a run to Hugging Face models that transformers loads as they are.

    OUTPUT/export/                     the whole model: one shard a stage, and the last stage's head
    OUTPUT/export/exits/stage-00/      the layers up to stage 0 with stage 0's own head, a model of its own

Every stage writes its layers once and its head once, under the model's original parameter names; an exit's folder
links to the layers it shares. Each exported model is loaded back and its logits are compared with the pipeline's.
"""

from __future__ import annotations

import copy
import json
import os
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import deepspeed
import psutil
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, GenerationConfig, PretrainedConfig
from transformers.core_model_loading import revert_weight_conversion

from llm_local.anatomy import text_config
from llm_local.checkpoint import save_tensors
from llm_local.lowrank import multiplied
from llm_local.partition import Partition
from llm_local.slices import Slice

LOGITS_TOLERANCE = {"fp32": 1e-4, "bf16": 0.05, "fp16": 0.02}


@dataclass(frozen=True)
class StageTensors:
    """A stage's parameters and saved buffers under the names that a checkpoint of the model has."""

    body: dict[str, torch.Tensor]
    head: dict[str, torch.Tensor]


def collect(
    bodies: Sequence[Slice], head: Slice | None, zero3: bool, keep: bool, folded: dict[str, torch.Tensor]
) -> StageTensors:
    """The tensors of a stage's layers, and of its last block's head where that is a slice of its own, on the CPU.

    Every replica must call under ZeRO-3, where the parameters are gathered one by one; `keep` says who gets them.
    folded: tensors of the head that take the place of its own.
    """
    body: dict[str, torch.Tensor] = {}
    heads: dict[str, torch.Tensor] = {}
    for part in bodies:
        tensors = _state(part, zero3, keep)
        before = () if part.is_first else tuple(f"{name}." for name in part.anatomy.before)
        after = tuple(f"{name}." for name in part.anatomy.after)
        body |= _original_names(part, {k: v for k, v in tensors.items() if not k.startswith(before + after)})
        if part.has_head:
            heads = _original_names(part, {k: v for k, v in tensors.items() if k.startswith(after)})
    if head is not None:
        layers = [f"{head.anatomy.layers}.{index}." for index in range(head.span.start, head.span.stop)]
        names = (*layers, *(f"{name}." for name in head.anatomy.after))
        tensors = multiplied(head, _state(head, zero3, keep)) | (folded if keep else {})
        heads = _original_names(head, {k: v for k, v in tensors.items() if k.startswith(names)})
    return StageTensors(body, heads)


def _state(part: Slice, zero3: bool, keep: bool) -> dict[str, torch.Tensor]:
    ignored = set(part.model._keys_to_ignore_on_save or [])
    named = {k: v for k, v in part.model.state_dict(keep_vars=True).items() if k not in ignored}
    kept = {}
    for name, tensor in named.items():
        if zero3 and isinstance(tensor, torch.nn.Parameter):
            with deepspeed.zero.GatheredParameters([tensor]):
                if keep:
                    kept[name] = tensor.detach().cpu().clone()
        elif keep:
            kept[name] = tensor.detach().cpu().clone()  # tied weights get a copy each: the export is untied
    return kept


def _original_names(part: Slice, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """transformers fuses experts and renames when it loads; a checkpoint has the names from before."""
    return {k: v.contiguous() for k, v in revert_weight_conversion(part.model, tensors).items()} if tensors else {}


def exit_folder(export: Path, stage: int) -> Path:
    return export / "exits" / f"stage-{stage:02d}"


def shard_name(index: int, count: int) -> str:
    return f"model-{index + 1:05d}-of-{count:05d}.safetensors"


def write_stage(export: Path, stage: int, num_stages: int, tensors: StageTensors, has_head: bool) -> None:
    """Writes what belongs to one stage: its layers into the whole model, its head into its exit."""
    export.mkdir(parents=True, exist_ok=True)
    save_tensors(tensors.body, export / shard_name(stage, num_stages + 1), metadata={"format": "pt"})
    if has_head:
        folder = exit_folder(export, stage)
        folder.mkdir(parents=True, exist_ok=True)
        save_tensors(tensors.head, folder / shard_name(stage + 1, stage + 2), metadata={"format": "pt"})


def compose(
    export: Path,
    partition: Partition,
    head_layers: Sequence[int],
    config: PretrainedConfig,
    class_name: str,
    tokenizer: Any,
    exits: bool,
) -> None:
    """Makes models of the shards, once every stage has written its own. An exit's private layers lie in its head."""
    last = partition.num_stages - 1
    for stage in range(last + 1) if exits else (last,):
        folder, count = exit_folder(export, stage), stage + 2
        for index in range(stage + 1):
            _link(export / shard_name(index, last + 2), folder / shard_name(index, count))
        private = partition.private_layers(partition.stages[stage].stop - 1, head_layers)
        trimmed = trim_config(config, private.stop)
        _write_model(folder, [folder / shard_name(i, count) for i in range(count)], trimmed, class_name, tokenizer)
    whole = exit_folder(export, last)
    _link(whole / shard_name(last + 1, last + 2), export / shard_name(last + 1, last + 2))
    shards = [export / shard_name(index, last + 2) for index in range(last + 2)]
    _write_model(export, shards, trim_config(config, partition.num_layers), class_name, tokenizer)
    if not exits:
        shutil.rmtree(export / "exits")


def _link(source: Path, target: Path) -> None:
    target.unlink(missing_ok=True)
    try:
        os.link(source, target)
    except OSError:  # a file system without hard links
        shutil.copyfile(source, target)


def _write_model(folder: Path, shards: Iterable[Path], config: PretrainedConfig, class_name: str, tokenizer: Any):
    weight_map: dict[str, str] = {}
    size = 0
    for shard in shards:
        with safe_open(shard, "pt") as file:
            for name in file.keys():  # noqa: SIM118 - not a mapping
                assert name not in weight_map, f"{name} is in {weight_map.get(name)} and in {shard.name}"
                weight_map[name] = shard.name
        size += shard.stat().st_size
    index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(weight_map.items()))}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1) + "\n")
    config = copy.deepcopy(config)
    config.architectures = [class_name]
    config.save_pretrained(folder)
    GenerationConfig.from_model_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def trim_config(config: PretrainedConfig, num_layers: int) -> PretrainedConfig:
    """The config of the first num_layers layers, with an output matrix of its own."""
    config = copy.deepcopy(config)
    text = text_config(config)
    whole = text.num_hidden_layers
    for name, value in list(vars(text).items()):
        if isinstance(value, (list, tuple)) and len(value) == whole and name != "architectures":
            setattr(text, name, type(value)(value[:num_layers]))
    text.num_hidden_layers = num_layers
    config.tie_word_embeddings = text.tie_word_embeddings = False
    return config


def check_export(folder: Path, ids: torch.Tensor, logits: torch.Tensor, tolerance: float, **model_args: Any) -> str:
    """Loads an export and compares its logits (1, T, V) with the pipeline's; returns a line that says how it went.

    Raises RuntimeError naming the folder if tensors are missing or left over, or the logits differ by more than
    tolerance, relative to the largest.
    """
    size = sum(shard.stat().st_size for shard in folder.glob("model-*.safetensors"))
    free = psutil.virtual_memory().available
    if free < 1.5 * size:
        return f"{folder}: not checked, {size >> 20} MiB of weights and {free >> 20} MiB of free memory"
    loader: Any = AutoModelForCausalLM
    model, info = loader.from_pretrained(folder, output_loading_info=True, dtype="auto", **model_args)
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if info[kind]:
            raise RuntimeError(f"export {folder}: {kind.replace('_', ' ')} {sorted(info[kind])[:3]}")
    with torch.no_grad():
        again = model.eval()(input_ids=ids, use_cache=False).logits.float()
    logits = logits.cpu().float()
    difference = float((again - logits).abs().max() / logits.abs().max().clamp(min=1e-12))
    if not difference <= tolerance:
        raise RuntimeError(f"export {folder}: its logits differ from the pipeline's by {difference:.2g} of the largest")
    same = (
        "equal the pipeline's" if difference == 0 else f"differ from the pipeline's by {difference:.1g} of the largest"
    )
    return f"{folder}: loads with no missing or unexpected key, logits {same}"
