"""Slices of a pretrained model: transformers' own loading, given this slice's tensors and no others.

A rank opens only the shards that hold a tensor of its slice, and of those reads only that. What a checkpoint calls a
tensor and what the model class calls it may differ (renamed, experts fused into one); transformers' tables say how.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers import PretrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, WEIGHTS_INDEX_NAME, WEIGHTS_NAME

from llm_local.adapters.hf_internals import file_of
from llm_local.config import ConfigError, some_of
from llm_local.model.anatomy import Anatomy
from llm_local.model.slices import Slice, model_without_weights
from llm_local.model.standins import Border, prune
from llm_local.partition import Span

COPY_AGAIN = "copy it again from where it came"


def load_slice(
    path: str, config: PretrainedConfig, anatomy: Anatomy, span: Span, has_head: bool = True, **model_args: Any
) -> Slice:
    """The slice of a pretrained model; only its own tensors are read, and only the files that hold them opened.

    Raises ConfigError naming the directory and the tensors that are missing.
    """
    skeleton = model_without_weights(config, anatomy.task, **model_args)
    whole: Any = type(skeleton)
    files = tensor_files(path)
    sources = sources_of(skeleton, files)
    prune(skeleton, anatomy, span, has_head)
    wanted = skeleton.state_dict()
    read = [source for source in sources if source.parameter in wanted and source.parameter not in anatomy.fresh]
    names = {source.key: source.name for source in read}
    borders: list[Border] = []

    def __init__(self: Any, config: PretrainedConfig, *args: Any, **kwargs: Any) -> None:
        whole.__init__(self, config, *args, **kwargs)
        borders.append(prune(self, anatomy, span, has_head))

    sliced: Any = type(whole.__name__, (whole,), {"__init__": __init__, "__module__": whole.__module__})
    with ExitStack() as opened:
        shards = {name: opened.enter_context(_open(path, name)) for name in sorted({files[n] for n in names.values()})}
        try:
            model, info = sliced.from_pretrained(
                None,
                config=copy.deepcopy(config),
                dtype=torch.float32,
                attn_implementation=None,
                state_dict={key: shards[files[name]].get_slice(name) for key, name in names.items()},
                output_loading_info=True,
                **model_args,
            )
        except (SafetensorError, RuntimeError) as error:
            reason = " ".join(str(error).split())
            raise ConfigError([f"model_name_or_path={path} cannot be loaded: {reason}"]) from error
    if missing := {*info["missing_keys"]} - {*anatomy.fresh}:
        raise ConfigError([f"model_name_or_path={path} lacks {some_of(missing)}"])
    model.config.name_or_path = path
    for parameter in model.parameters():  # no view of a file that somebody may write again during the run
        parameter.data = parameter.data.clone()
    return Slice(model, anatomy, span, has_head, borders[-1])


@dataclass(frozen=True)
class Source:
    """A tensor of a checkpoint, and the parameter or buffer of the model that it becomes, alone or fused with others.

    name: in the checkpoint's files. key: what it is called when it is handed to from_pretrained.
    """

    name: str
    key: str
    parameter: str


def sources_of(model: PreTrainedModel, names: Iterable[str]) -> list[Source]:
    """What a model takes of a checkpoint with tensors of such names, as transformers maps them when it loads: renamed,
    fused, with the prefix that a base class leaves out. What is tied and has no tensor is given the other's.

    model: the whole, without weights.
    """
    rules = get_model_conversion_mapping(model)
    renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
    converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
    wanted, found = model.state_dict(), []
    for name in sorted(names, key=dot_natural_key):
        parameter, _ = rename_source_key(name, renamings, converters, model.base_model_prefix, wanted)
        if parameter in wanted or name in wanted:
            found.append(Source(name, name, parameter if parameter in wanted else name))
    given = {source.parameter: source.name for source in found}
    ties: dict[str, list[str]] = {}
    for target, source in (model.all_tied_weights_keys or {}).items():
        ties.setdefault(source, [source]).append(target)
    for tied in ties.values():
        there = next((given[parameter] for parameter in tied if parameter in given), None)
        if there is not None:
            found += [Source(there, parameter, parameter) for parameter in tied if parameter not in given]
    return found


def tensor_files(path: str) -> dict[str, str]:
    """The file of each tensor, by name, of a directory or hub name: of its index, or of its only file.

    Raises ConfigError naming the file that is missing or that is no index.
    """
    if found := find(path, SAFE_WEIGHTS_NAME):
        return dict.fromkeys(shard_names(Path(found)), SAFE_WEIGHTS_NAME)
    index = find(path, SAFE_WEIGHTS_INDEX_NAME)
    if index is None:
        pickled = next((name for name in (WEIGHTS_NAME, WEIGHTS_INDEX_NAME) if find(path, name)), None)
        what = f"holds no {SAFE_WEIGHTS_NAME} and no {SAFE_WEIGHTS_INDEX_NAME}"
        repair = "name the directory that save_pretrained wrote, or use config_name for a new model"
        if pickled:
            repair = f"{pickled} cannot be read by slices: load it with transformers once and save_pretrained it"
        raise ConfigError([f"model_name_or_path={path} {what}; {repair}"])
    try:
        weight_map = json.loads(Path(index).read_text())["weight_map"]
        return {str(name): str(file) for name, file in weight_map.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        reason = f"line {error.lineno}: {error.msg}" if isinstance(error, json.JSONDecodeError) else "no weight_map"
        raise ConfigError([f"{index} is no index of weights ({reason}); {COPY_AGAIN}"]) from error


def find(path: str, name: str) -> str | None:
    """The file of that name in a directory, or of the hub, which then lies in its cache; None if there is none."""
    try:
        return file_of(path, name)
    except OSError as error:
        raise ConfigError([f"model_name_or_path={path}: {str(error).splitlines()[0]}"]) from error


def shard_names(file: Path) -> list[str]:
    """Names of the tensors of one file. Raises ConfigError if it is cut short or no safetensors file."""
    with open_shard(file) as shard:
        return list(shard.keys())


def open_shard(file: Path) -> Any:
    """A safetensors file to read from; its header is read and compared with the file's size."""
    try:
        return safe_open(file, "pt")
    except (OSError, SafetensorError) as error:
        size = f", {file.stat().st_size} bytes," if file.exists() else ""
        raise ConfigError([f"{file}{size} cannot be read ({error}); {COPY_AGAIN}"]) from error


def _open(path: str, name: str) -> Any:
    found = find(path, name)
    if found is None:
        raise ConfigError([f"{SAFE_WEIGHTS_INDEX_NAME} of {path} names {name}, which is not there; {COPY_AGAIN}"])
    return open_shard(Path(found))
