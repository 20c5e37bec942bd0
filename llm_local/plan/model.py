"""The numbers of a model that a plan needs, from its config alone: a few of its layers are made without memory."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from llm_local.config import ConfigError
from llm_local.export.stages import trim_config
from llm_local.flags import ModelArguments
from llm_local.model.anatomy import (
    Anatomy,
    SliceError,
    attention_kernel,
    experts_of,
    load_model_config,
    probe,
    text_config,
)
from llm_local.model.levels import longest_level, num_layers_of
from llm_local.model.overrides import parse_overrides
from llm_local.plan.memory import ModelSizes
from llm_local.registry import TASKS

MOST_LAYERS = 16  # that are looked at; the rest is taken to be like them
_SIZES = ("hidden_size", "num_hidden_layers", "vocab_size")


def read_model(model: ModelArguments) -> tuple[Anatomy, ModelSizes]:
    """How the model is put together, and its numbers. Raises ConfigError for a config that is none, says no sizes, or
    is of a model that cannot be cut."""
    config, task = load_model_config(model), TASKS[model.task]
    _require_sizes(model, config)
    num_layers = num_layers_of(task.part_of(config))
    found: list[ModelSizes] = []
    try:
        small = trim_config(config, min(num_layers, MOST_LAYERS), task)
        anywhere = replace(model, attn_implementation="eager")  # the kernel may be on the machines that are planned for
        anatomy = probe(small, anywhere, lambda fake, seen: found.append(_measure(fake, seen, num_layers)))
    except SliceError as error:
        raise ConfigError([str(error)]) from error
    sizes = replace(found[0], keeps_scores=attention_kernel(model, config) == "eager")
    return replace(anatomy, num_layers=num_layers), sizes


def _require_sizes(model: ModelArguments, config: PretrainedConfig) -> None:
    """A config's class has a default for each size, which nobody means who leaves one out of a file."""
    source = model.config_name or model.model_name_or_path
    if source is None:
        return
    values: dict[str, Any] = PretrainedConfig.get_config_dict(source)[0]
    parts = [values, *(part for part in values.values() if isinstance(part, dict))]
    named = {key for part in parts for key in part}
    aliases = {**type(config).attribute_map, **type(text_config(config)).attribute_map}
    given = parse_overrides(model.config_overrides)
    wanted = _SIZES[:2] if TASKS[model.task].reads_images else _SIZES
    wanted = ("depths",) if longest_level(TASKS[model.task].part_of(config)) is not None else wanted
    missing = [size for size in wanted if not {size, aliases.get(size, size), *_OLD.get(size, ())} & {*named, *given}]
    if missing:
        raise ConfigError([f"{source} does not say {', '.join(missing)}; a plan needs the model's sizes, so add them"])


_OLD = {
    "num_hidden_layers": ("n_layer", "n_layers", "num_layers", "decoder_layers"),
    "hidden_size": ("n_embd", "d_model", "n_embed"),
}


def _measure(model: PreTrainedModel, anatomy: Anatomy, num_layers: int) -> ModelSizes:
    text: Any = TASKS[anatomy.task].part_of(model.config)
    layers = model.get_submodule(anatomy.layers)
    whole = sum(p.numel() for p in layers.parameters())
    head = anatomy.head_parameters
    if not head:  # the matrix is the embedding
        head = sum(p.numel() for p in model.get_input_embeddings().parameters())
    outside = sum(p.numel() for p in model.parameters()) - whole  # a tied matrix is counted once
    width, is_gated = _feed_forward(layers.get_submodule(str(anatomy.num_layers - 1)), anatomy.hidden_size, text)
    return ModelSizes(
        num_layers=num_layers,
        hidden_size=anatomy.hidden_size,
        vocab_size=int(text.vocab_size) if not anatomy.row_shape else len(model.config.id2label or {}),
        layer_parameters=round(whole / anatomy.num_layers),
        active_layer_parameters=anatomy.active_layer_parameters,
        head_parameters=head,
        embedding_parameters=outside - (0 if anatomy.tied else head),
        is_tied=anatomy.tied,
        feed_forward_width=width,
        is_gated=is_gated,
        num_attention_heads=heads if isinstance(heads := getattr(text, "num_attention_heads", 0), int) else 0,
        max_positions=getattr(text, "max_position_embeddings", None),
        layer_matrices=anatomy.layer_matrices,
        model_type=model.config.model_type,
    )


def _feed_forward(layer: nn.Module, hidden_size: int, text: Any) -> tuple[int, bool]:
    """Hidden units that a token passes, and whether they are gated: three matrices of that width then, else two."""
    names = ("moe_intermediate_size", "intermediate_size", "n_inner", "ffn_dim", "ffn_hidden_size")
    inner = next((n for name in names if isinstance(n := getattr(text, name, None), int)), 4 * hidden_size)
    total, used = experts_of(text)
    shapes = [tuple(p.shape[-2:]) for p in layer.parameters() if p.dim() >= 2 and hidden_size in p.shape[-2:]]
    sides = [rows if columns == hidden_size else columns for rows, columns in shapes]
    matrices = sum(side // inner for side in sides if side in (inner, 2 * inner))  # a gate may be fused with the other
    return inner * (used if total > 1 else 1), matrices > 2
