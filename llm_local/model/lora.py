"""Low-rank adapters in the layers of a pretrained model (LoRA, Hu et al. 2021, arXiv 2106.09685), as PEFT makes them.

The model's own weights stay: layers, embedding, and the norm and output matrix of its last block. What is trained are
the adapters and, by the same losses as ever, the heads of earlier blocks, which the pretrained model does not have. In
a checkpoint the model's weights have their own names, and adapters stand beside them:

    model.layers.3.self_attn.q_proj.weight
    model.layers.3.self_attn.q_proj.lora_A.default.weight    and lora_B

An export has their sum; beside it lies the adapter of the whole model, for whoever has the pretrained one.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import replace
from importlib.util import find_spec
from typing import Any

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from llm_local.config import Config, ConfigError, some_of
from llm_local.model.anatomy import Anatomy
from llm_local.model.slices import Slice, model_without_weights
from llm_local.partition import Partition

ALL_LINEAR = "all-linear"
_NAME = "default"  # PEFT's, of a model's only adapter
_A, _B, _BASE = f".lora_A.{_NAME}.weight", f".lora_B.{_NAME}.weight", ".base_layer."


def lora_config(config: Config, modules: Iterable[str] | str | None) -> Any:
    """PEFT's, of the flags. modules: those that get adapters; None: as PEFT has it for the model's type."""
    from peft import LoraConfig

    local = config.local
    assert local.lora_rank is not None, "without it there are no adapters"
    return LoraConfig(
        r=local.lora_rank,
        lora_alpha=local.lora_alpha,
        lora_dropout=local.lora_dropout,
        target_modules=modules if modules is None or isinstance(modules, str) else sorted(modules),
        task_type="CAUSAL_LM" if config.task.generates else None,
    )


def lora_problems(config: Config) -> list[str]:
    """What the flags show without the model."""
    local, defaults = config.local, Config().local
    if local.lora_rank is None:
        names = ("lora_alpha", "lora_dropout", "lora_target_modules", "lora_layers_to_transform")
        given = [(name, value) for name in names if (value := getattr(local, name)) != getattr(defaults, name)]
        return [f"{name}={value} is of adapters; give lora_rank" for name, value in given]
    named, problems = f"lora_rank={local.lora_rank}", []
    problems += _lacking(config)
    if not config.model.model_name_or_path:
        problems.append(
            f"{named} leaves all other weights as they are, and those of a new model are untrained; give "
            "model_name_or_path: of a run's checkpoint, what llm-local export makes of it"
        )
    text = local.lora_layers_to_transform
    if text is not None and not all(part.strip().isdecimal() for part in text.split(",")):
        problems.append(f"lora_layers_to_transform={text!r} is not a list of layers such as 2,3")
    return problems


def _lacking(config: Config) -> list[str]:
    needs = f"lora_rank={config.local.lora_rank} needs peft, which is not installed: pip install 'llm_local[peft]'"
    return [] if find_spec("peft") else [needs]


def with_adapters(config: Config, model_config: PretrainedConfig, anatomy: Anatomy, partition: Partition) -> Anatomy:
    """The anatomy with the names of the matrices that get adapters: those that PEFT finds in the layers of the whole
    model, but of no frozen stage. Raises ConfigError where there are none, or where PEFT would do something else."""
    local = config.local
    if (local.lora_rank or 0) < 1:  # flags.py refuses 0
        return anatomy
    if lacking := _lacking(config):
        raise ConfigError(lacking)
    if anatomy.fresh:
        new = some_of(anatomy.fresh)
        raise ConfigError([f"lora_rank={local.lora_rank} would leave {new} untrained, which is new; leave it out"])
    found = _found(config, model_config, anatomy)
    chosen = local.lora_layers_to_transform
    layers = range(anatomy.num_layers) if chosen is None else [int(part) for part in chosen.split(",")]
    if beyond := [layer for layer in layers if layer >= anatomy.num_layers]:
        last = anatomy.num_layers - 1
        raise ConfigError([f"lora_layers_to_transform={chosen} names layer {beyond[0]}, the model's last is {last}"])
    frozen = [partition.layers_of(stage) for stage in config.frozen_stages if stage < partition.num_stages]
    kept = {layer for layer in layers if not any(span.start <= layer < span.stop for span in frozen)}
    adapted = [name for name in found if _layer_of(anatomy, name) in kept]
    with_some = {_layer_of(anatomy, name) for name in adapted}
    without = [span for span in partition.blocks if not with_some & {*range(span.start, span.stop)}]
    if not adapted:
        raise ConfigError([f"lora_rank={local.lora_rank}: no layer is left that gets an adapter; name others"])
    if without and (config.is_pipelined or config.method.crosses_back(local)):
        steps, span = local.final_backprop_steps, without[0]
        why = f"final_backprop_steps={steps}" if steps else f"method={local.method}"
        raise ConfigError(
            [
                f"lora_rank={local.lora_rank}: layers {span.start} to {span.stop - 1} get no adapter, and {why} sends "
                "a gradient through them; name modules that they have, or leave one of them out"
            ]
        )
    return replace(anatomy, adapted=tuple(adapted))


def _found(config: Config, model_config: PretrainedConfig, anatomy: Anatomy) -> list[str]:
    """The modules of the layers that PEFT adapts. Raises ConfigError."""
    given, kind = config.local.lora_target_modules, model_config.model_type
    model = model_without_weights(model_config, anatomy.task, trust_remote_code=config.model.trust_remote_code)
    inside = f"{anatomy.layers}."
    there = {n for n, m in model.named_modules() if n.startswith(inside) and isinstance(m, (nn.Linear, Conv1D))}
    repair = f"use some of {', '.join(sorted({name.rpartition('.')[2] for name in there}))}"
    repair += "" if given == ALL_LINEAR else f", or {ALL_LINEAR}"
    wanted = None if given is None else [part.strip() for part in given.split(",")]
    named = f"lora_target_modules={given}"
    for name in wanted or ():
        if name != ALL_LINEAR and not any(n == name or n.endswith(f".{name}") for n in there):
            raise ConfigError([f"{named}: {name} is no matrix of the layers of model type {kind!r}; {repair}"])
    try:
        _inject(lora_config(config, ALL_LINEAR if wanted == [ALL_LINEAR] else wanted), model)
    except (ValueError, NotImplementedError) as error:
        reason = " ".join(str(error).split()).partition(". ")[0]
        raise ConfigError([f"{named}: PEFT adapts no model of type {kind!r} so ({reason}); {repair}"]) from error
    return [name for name, _ in _adapters(model) if name in there]


def _layer_of(anatomy: Anatomy, name: str) -> int:
    return int(name.removeprefix(f"{anatomy.layers}.").partition(".")[0])


def _inject(made: Any, model: PreTrainedModel) -> None:
    """On the meta device, where the model is there."""
    from peft import inject_adapter_in_model

    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        warnings.simplefilter("ignore")  # of what it sets right by itself: Conv1D
        inject_adapter_in_model(made, model, low_cpu_mem_usage=model.device.type == "meta")


def _adapters(model: PreTrainedModel) -> Iterator[tuple[str, Any]]:
    """The matrices that have adapters, by name."""
    from peft.tuners.lora import Linear

    for name, module in model.named_modules():
        if isinstance(module, Linear):
            yield name, module


def add_adapters(config: Config, part: Slice) -> None:
    """Freezes a slice and puts adapters into its layers, in place; each begins under a seed of its own, with a product
    of zero. Nothing without lora_rank."""
    if config.local.lora_rank is None:
        return
    part.model.requires_grad_(False)
    layers = range(part.span.start, part.span.stop)
    names = [name for name in part.anatomy.adapted if _layer_of(part.anatomy, name) in layers]
    if not names:
        return
    _inject(lora_config(config, names), part.model)
    for name, module in _adapters(part.model):
        digest = hashlib.sha256(f"{config.train.seed}:{name}:lora".encode()).digest()
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(int.from_bytes(digest[:7], "big"))
            module.reset_lora_parameters(_NAME, True)


def original_name(name: str) -> str:
    """A parameter's in the model without adapters."""
    return name.replace(_BASE, ".")


def merged(part: Slice, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A slice's tensors with the adapters' products, as these are, in the matrices beside them; none if there are
    none."""
    if not part.anatomy.adapted or not tensors:
        return tensors
    for name, module in _adapters(part.model):
        a, b, matrix = (tensors.pop(f"{name}{end}") for end in (_A, _B, f"{_BASE}weight"))
        change = module.scaling[_NAME] * (b.float() @ a.float())
        change = change.T if module.fan_in_fan_out else change
        tensors[f"{name}{_BASE}weight"] = (matrix.float() + change).to(matrix.dtype)
    return {original_name(name): tensor for name, tensor in tensors.items()}


def adapter_of(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The factors among a slice's tensors, by the names of PEFT's files."""
    ends = (_A, _B)
    return {f"base_model.model.{n.replace(f'.{_NAME}.', '.')}": t for n, t in tensors.items() if n.endswith(ends)}


def adapted_by(adapter: Collection[str]) -> set[str]:
    """The matrices that an adapter is of, from the names in its file."""
    end = _A.replace(f".{_NAME}.", ".")
    return {name.removeprefix("base_model.model.").removesuffix(end) for name in adapter if name.endswith(end)}


def resume_problems(
    checkpoint: str, names: Collection[str], flags: Mapping[str, Any], config: Config, anatomy: Anatomy
) -> list[str]:
    """Why a run cannot go on from a checkpoint: adapters belong to the weights that they were trained beside. names: of
    its weights; flags: of the run that wrote it."""
    there = {name for name in names if name.endswith(_A)}
    theirs = {name.removesuffix(_A) for name in there}
    ours = {name for name in anatomy.adapted if f"{name}.weight" in names}  # of a job's layers, as far as there
    settings = [f"{name} {flags.get(name)}" for name in ("lora_rank", "lora_alpha")]
    wanted = [f"{name} {getattr(config.local, name)}" for name in ("lora_rank", "lora_alpha")]
    if theirs == ours and (settings == wanted or not ours):
        return []

    def said(adapted: set[str], given: list[str]) -> str:
        return f"adapters of {', '.join(given)} beside {len(adapted)} matrices" if adapted else "no adapters"

    return [
        f"{checkpoint} has {said(theirs, settings)}, this run {said(ours, wanted)}; give the same lora_ flags and "
        "freeze_stages, or start a new run from its export (--model_name_or_path)"
    ]
