"""The numbers of a model that a plan needs, from its config alone: a few of its layers are made without memory."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from llm_local.config import ConfigError
from llm_local.export.stages import trim_config
from llm_local.flags import ModelArguments
from llm_local.memory.activations import EAGER, Activations, count_activations
from llm_local.model.anatomy import Anatomy, SliceError, Trial, attention_kernel, experts_of, probe_and, text_config
from llm_local.model.levels import longest_level, num_layers_of
from llm_local.model.model_config import load_model_config
from llm_local.model.overrides import parse_overrides
from llm_local.registry import TASKS

MOST_LAYERS = 16  # that are looked at; the rest is taken to be like them
NORM = 8  # bytes of a number: what a norm of transformers keeps of its input in float32, and its output
_SIZES = ("hidden_size", "num_hidden_layers", "vocab_size")


@dataclass(frozen=True)
class ModelSizes:
    """The numbers of a model. Parameters are all that there are; active ones take part in a product with each token.

    feed_forward_width: hidden units that a token passes, of all its experts; is_gated: with a second matrix beside.
    layer_matrices: rows and columns of the matrices of a layer. keeps_scores: attention is not a fused kernel.
    activations: of a row, of the length and in the precision that was asked for, where they could be counted.
    """

    num_layers: int
    hidden_size: int
    vocab_size: int
    layer_parameters: int
    active_layer_parameters: int
    head_parameters: int
    embedding_parameters: int
    is_tied: bool
    feed_forward_width: int
    is_gated: bool
    num_attention_heads: int
    max_positions: int | None = None
    layer_matrices: tuple[tuple[int, int], ...] = ()
    model_type: str = ""
    keeps_scores: bool = False
    activations: Activations | None = None

    def divided(self, ranks: int, length: int) -> ModelSizes:
        """Of each of some ranks that divide the layers, the output matrix and the embedding between them. What norms
        keep is whole on each. length: of the rows whose activations were counted."""
        if ranks == 1:
            return self
        whole = 2 * NORM * self.hidden_size * length
        counted = self.activations
        if counted is not None:
            kept = min(whole, counted.kept) + max(0.0, counted.kept - whole) / ranks
            counted = replace(counted, kept=kept)
        return replace(
            self,
            vocab_size=self.vocab_size // ranks,
            layer_parameters=self.layer_parameters // ranks,
            head_parameters=self.head_parameters // ranks,
            embedding_parameters=self.embedding_parameters // ranks,
            activations=counted,
        )

    @property
    def num_parameters(self) -> int:
        once = self.embedding_parameters + (0 if self.is_tied else self.head_parameters)
        return self.num_layers * self.layer_parameters + once


def read_model(model: ModelArguments, seq_length: int = 0, precision: str = "bf16") -> tuple[Anatomy, ModelSizes]:
    """How the model is put together, and its numbers; with a length of rows also what these take. Raises ConfigError
    for a config that is none, says no sizes, or is of a model that cannot be cut."""
    config, task = load_model_config(model), TASKS[model.task]
    _require_sizes(model, config)
    num_layers = num_layers_of(task.part_of(config))
    measuring = Measuring(seq_length, precision, attention_kernel(model, config))
    try:
        small = trim_config(config, min(num_layers, MOST_LAYERS), task)
        anywhere = replace(model, attn_implementation=EAGER)  # the kernel may be on the machines that are planned for
        anatomy, sizes = probe_and(measuring, small, anywhere)
    except SliceError as error:
        raise ConfigError([str(error)]) from error
    return replace(anatomy, num_layers=num_layers), replace(sizes, num_layers=num_layers)


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


@dataclass(frozen=True)
class Measuring:
    """A trial of a watched model, which has its sizes. seq_length: of the rows whose activations are counted, if it is
    not 0. then: what else is done to it."""

    seq_length: int
    precision: str
    kernel: str | None
    then: Trial | None = None

    def __call__(self, model: PreTrainedModel, anatomy: Anatomy) -> ModelSizes:
        sizes = _measure(model, anatomy, self)
        if self.then is not None:
            self.then(model, anatomy)
        return sizes


def _measure(model: PreTrainedModel, anatomy: Anatomy, wanted: Measuring) -> ModelSizes:
    text: Any = TASKS[anatomy.task].part_of(model.config)
    layers = model.get_submodule(anatomy.layers)
    whole = sum(p.numel() for p in layers.parameters())
    head = anatomy.head_parameters
    if not head:  # the matrix is the embedding
        head = sum(p.numel() for p in model.get_input_embeddings().parameters())
    outside = sum(p.numel() for p in model.parameters()) - whole  # a tied matrix is counted once
    width, is_gated = _feed_forward(layers.get_submodule(str(anatomy.num_layers - 1)), anatomy.hidden_size, text)
    row = torch.zeros(1, *anatomy.row_shape) if anatomy.row_shape else torch.full((1, wanted.seq_length), 3)
    inputs = {TASKS[anatomy.task].main_input: row}
    precise = (wanted.precision, wanted.kernel)
    return ModelSizes(
        num_layers=anatomy.num_layers,
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
        keeps_scores=wanted.kernel == EAGER,
        activations=count_activations(model, anatomy, inputs, *precise) if wanted.seq_length else None,
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
