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
from llm_local.memory.division import NOTHING, WHOLE, Division, Listener, Told, as_divided, told_by_plan
from llm_local.memory.engine import BYTES
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
    """The numbers of a model, or of a rank's share of one that several divide between them. Parameters are all that
    there are; active ones take part in a product with each token.

    feed_forward_width: hidden units that a token passes, of all its experts; is_gated: with a second matrix beside.
    layer_matrices: rows and columns of the matrices of a layer. keeps_scores: attention is not a fused kernel.
    activations: of a row, of the length and in the precision that was asked for, where they could be counted. ahead,
    back: what a rank tells the others for a row in a layer's forward pass, and in its backward pass.
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
    division: Division = WHOLE
    ahead: Told = NOTHING
    back: Told = NOTHING

    @property
    def num_parameters(self) -> int:
        once = self.embedding_parameters + (0 if self.is_tied else self.head_parameters)
        return self.num_layers * self.layer_parameters + once


def read_model(model: ModelArguments, seq_length: int = 0, precision: str = "bf16") -> tuple[Anatomy, ModelSizes]:
    """How the model is put together, and its numbers; with a length of rows also what these take. Raises ConfigError
    for a config that is none, says no sizes, or is of a model that cannot be cut."""
    anatomy, (sizes,) = read_shares(model, seq_length, precision, (WHOLE,))
    return anatomy, sizes


def read_shares(
    model: ModelArguments, seq_length: int, precision: str, divisions: tuple[Division, ...]
) -> tuple[Anatomy, tuple[ModelSizes, ...]]:
    """The same with the numbers of a rank's share in each of the divisions."""
    config, task = load_model_config(model), TASKS[model.task]
    _require_sizes(model, config)
    num_layers = num_layers_of(task.part_of(config))
    measuring = Measuring(seq_length, precision, attention_kernel(model, config), divisions)
    try:
        small = trim_config(config, min(num_layers, MOST_LAYERS), task)
        anywhere = replace(model, attn_implementation=EAGER)  # the kernel may be on the machines that are planned for
        anatomy, found = probe_and(measuring, small, anywhere)
    except SliceError as error:
        raise ConfigError([str(error)]) from error
    return replace(anatomy, num_layers=num_layers), tuple(replace(sizes, num_layers=num_layers) for sizes in found)


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
    """A trial of a watched model, which has its sizes, a rank's in each of the divisions. seq_length: of the rows whose
    activations are counted, if it is not 0. then: what else is done to it."""

    seq_length: int
    precision: str
    kernel: str | None
    divisions: tuple[Division, ...] = (WHOLE,)
    then: Trial | None = None

    def __call__(self, model: PreTrainedModel, anatomy: Anatomy) -> tuple[ModelSizes, ...]:
        whole = _measure(model, anatomy, self)
        found = tuple(_with_activations(_share(whole, model, anatomy, d), model, anatomy, self) for d in self.divisions)
        if self.then is not None:
            self.then(model, anatomy)
        return found


def _measure(model: PreTrainedModel, anatomy: Anatomy, wanted: Measuring) -> ModelSizes:
    text: Any = TASKS[anatomy.task].part_of(model.config)
    head, outside, whole = _parameters(model, anatomy)
    layers: Any = model.get_submodule(anatomy.layers)
    width, is_gated = _feed_forward(layers[anatomy.num_layers - 1], anatomy.hidden_size, text)
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
    )


def _parameters(model: PreTrainedModel, anatomy: Anatomy, share: PreTrainedModel | None = None) -> tuple[int, int, int]:
    """Of the head, of all but the layers, and of these; share: what a rank has of the model."""
    held = share or model
    layers = sum(p.numel() for p in held.get_submodule(anatomy.layers).parameters())
    outside = sum(p.numel() for p in held.parameters()) - layers  # a tied matrix is counted once
    head = anatomy.head_parameters
    if not head:  # the matrix is the embedding
        return sum(p.numel() for p in held.get_input_embeddings().parameters()), outside, layers
    matrices = [each.get_output_embeddings() for each in (model, held)]
    whole, part = (0 if matrix is None else sum(p.numel() for p in matrix.parameters()) for matrix in matrices)
    return head - whole + part, outside, layers


def _share(whole: ModelSizes, model: PreTrainedModel, anatomy: Anatomy, division: Division) -> ModelSizes:
    """Parameters of a rank. Of a model that so many ranks cannot divide, as if they could."""
    ranks, made = division.layers, replace(whole, division=division)
    if ranks == 1:
        return made
    try:
        head, outside, layers = _parameters(model, anatomy, as_divided(model, division, Listener(ranks)))
    except Exception:  # of whatever kind: others say what is wrong with the number
        parts = (whole.head_parameters, whole.embedding_parameters, whole.layer_parameters * anatomy.num_layers)
        head, embedding, layers = (part // ranks for part in parts)
        outside = embedding + (0 if anatomy.tied else head)
    each = round(layers / anatomy.num_layers)
    return replace(
        made,
        vocab_size=whole.vocab_size * head // whole.head_parameters,
        layer_parameters=each,
        active_layer_parameters=round(whole.active_layer_parameters * each / whole.layer_parameters),
        head_parameters=head,
        embedding_parameters=outside - (0 if anatomy.tied else head),
        feed_forward_width=whole.feed_forward_width // ranks,
        num_attention_heads=whole.num_attention_heads // ranks,
    )


def _with_activations(sizes: ModelSizes, model: PreTrainedModel, anatomy: Anatomy, wanted: Measuring) -> ModelSizes:
    """And what is told in a layer's passes."""
    if not wanted.seq_length:
        return sizes
    length, division = wanted.seq_length // sizes.division.rows, sizes.division
    row = torch.zeros(1, *anatomy.row_shape) if anatomy.row_shape else torch.full((1, length), 3)
    inputs = {TASKS[anatomy.task].main_input: row}
    if division.rows > 1:
        inputs["position_ids"] = torch.arange(length).expand(1, -1)
    counted = count_activations(model, anatomy, inputs, wanted.precision, wanted.kernel, division)
    row_bytes = length * sizes.hidden_size * BYTES[wanted.precision]
    told = told_by_plan(model, anatomy, division, row_bytes) if counted is None else (counted.ahead, counted.back)
    return replace(sizes, activations=counted, ahead=told[0], back=told[1])


def _feed_forward(layer: nn.Module, hidden_size: int, text: Any) -> tuple[int, bool]:
    """Hidden units that a token passes, and whether they are gated: three matrices of that width then, else two."""
    names = ("moe_intermediate_size", "intermediate_size", "n_inner", "ffn_dim", "ffn_hidden_size")
    inner = next((n for name in names if isinstance(n := getattr(text, name, None), int)), 4 * hidden_size)
    total, used = experts_of(text)
    shapes = [tuple(p.shape[-2:]) for p in layer.parameters() if p.dim() >= 2 and hidden_size in p.shape[-2:]]
    sides = [rows if columns == hidden_size else columns for rows, columns in shapes]
    matrices = sum(side // inner for side in sides if side in (inner, 2 * inner))  # a gate may be fused with the other
    return inner * (used if total > 1 else 1), matrices > 2
