"""A run of layers as a Hugging Face model of its own, exact and without code per architecture.

The model class's own forward runs from end to end. Layers of other slices are stand-ins; the one before the slice
returns the hidden states that were received. What runs before the layers (masks, rotary angles, dropout) works as its
authors wrote it, on zeros that the stand-in throws away.

The list of layers keeps its full length, because models look at layer numbers and at config.layer_types[i].
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.initialization import guard_torch_init_functions, no_init_weights

from llm_local.adapters.hf_internals import forget_initialised, initialise, rows_as_they_stand
from llm_local.adapters.torch_internals import buffers_of, parameters_of
from llm_local.config import some_of
from llm_local.model.anatomy import Anatomy, SliceError
from llm_local.model.observation import ROWS, TOKENS, example
from llm_local.model.standins import Border, Seam, StandIn, prune, take_head
from llm_local.partition import Span
from llm_local.registry import TASKS
from llm_local.tasks.task import Task

_POSITIONED = {"position_ids", "attention_mask"}


@dataclass(frozen=True)
class Slice:
    """Layers `span` of a model, which may be none, and with `has_head` the model's own norm and output matrix.

    `model` has its parameters under their original names; those of other slices do not exist.
    """

    model: PreTrainedModel
    anatomy: Anatomy
    span: Span
    has_head: bool
    border: Border = field(compare=False)

    @property
    def task(self) -> Task:
        return TASKS[self.anatomy.task]

    @property
    def is_first(self) -> bool:
        return self.span.start == 0

    @property
    def is_last(self) -> bool:
        return self.span.stop == self.anatomy.num_layers

    @property
    def is_models_own(self) -> bool:
        """Of a head: whether it is that of the model's last block."""
        return self.has_head and self.span.start == self.anatomy.num_layers

    def base(self) -> PreTrainedModel:
        """The model below the output matrix: from ids to normed hidden states."""
        return getattr(self.model, self.anatomy.base)

    def __call__(self, hidden: torch.Tensor | None, **inputs: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """(B, T, D) received hidden states (None at the start of the model) and ids →
        the last layer's output (B, T, D) and what the output matrix reads, the normed one; of a task that answers once,
        the logits (B, C) instead. What stays on the first stage is needed there alone."""
        border = self.border
        border.entering, border.leaving, border.running, border.seam = hidden, None, True, None
        answers = self.has_head and self.task.answers_once
        if hidden is not None and self.anatomy.row_shape:  # its size is looked at, and what is made of it thrown away
            inputs[self.task.main_input] = hidden.new_zeros(()).expand(len(hidden), *self.anatomy.row_shape)
        with nullcontext() if inputs.keys() & _POSITIONED else rows_as_they_stand():
            output = (self.model if answers else self.base())(**self.task.options, **inputs)
        normed = output.logits if answers else output[0]
        leaving = border.leaving if len(self.span) else hidden
        assert leaving is not None, "the last layer of the slice was not called"
        border.entering, border.leaving, border.running = None, None, False
        return leaving, normed

    @property
    def output_matrix(self) -> nn.Linear:
        """What makes logits, if the model has such a module."""
        found: Any = self.model.get_output_embeddings()
        return found

    @property
    def embedding(self) -> nn.Embedding:
        found: Any = self.model.get_input_embeddings()
        return found

    def add_seam(self, layer: int) -> None:
        """Has the graph in two pieces, below `layer` and from there on."""
        border, where = self.border, self.anatomy.argument

        def hook(_layer: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
            below = args[where] if isinstance(where, int) else kwargs[where]
            if not below.requires_grad:
                return None
            above = below.detach().requires_grad_()
            if border.running:
                border.seam = Seam(below, above)
            if isinstance(where, int):
                return (*args[:where], above, *args[where + 1 :]), kwargs
            return args, kwargs | {where: above}

        self.model.get_submodule(f"{self.anatomy.layers}.{layer}").register_forward_pre_hook(hook, with_kwargs=True)


def model_without_weights(config: PretrainedConfig, task: str, **model_args: Any) -> PreTrainedModel:
    """The model as its class for that task makes it, with float32 parameters that have shapes and no memory.

    Neither the config's dtype nor its attention kernel is used: the run's precision and kernel come later.
    """
    with torch.device("meta"), no_init_weights():
        return TASKS[task].make(config, dtype=torch.float32, attn_implementation=None, **model_args)


@dataclass(frozen=True)
class HeadDraw:
    """By which the new weights of a block's head are drawn, and by nothing else. below: number of layers below it;
    output_below: of those below the head that the output matrix is to equal, where that is another one."""

    below: int
    output_below: int | None = None


def new_slice(
    config: PretrainedConfig,
    anatomy: Anatomy,
    span: Span,
    seed: int,
    has_head: bool = True,
    drawn: HeadDraw | None = None,
    **model_args: Any,
) -> Slice:
    """A slice with new weights, each layer and module under a seed of its own, so that any cut gives the same model.

    drawn: of a slice that is a block's head. What the model class leaves unset is NaN (check_set).
    """
    model = model_without_weights(config, anatomy.task, **model_args)
    border = prune(model, anatomy, span, has_head)
    _materialise(model)
    with torch.no_grad(), guard_torch_init_functions(), torch.random.fork_rng(devices=[]):
        for name, module, owner in _groups(model, anatomy):
            # layers of a head are not those of the next block that have the same name
            is_head = name in anatomy.after or (drawn is not None and name.startswith(f"{anatomy.layers}."))
            number = span.stop if drawn is None else drawn.below
            if drawn and drawn.output_below is not None and module is model.get_output_embeddings():
                number = drawn.output_below
            suffix = f"@{number}" if is_head else ""
            digest = hashlib.sha256(f"{seed}:{name}{suffix}".encode()).digest()
            torch.default_generator.manual_seed(int.from_bytes(digest[:7], "big"))
            if name.startswith(f"{anatomy.layers}."):
                module.apply(partial(initialise, owner))
            else:
                initialise(owner, module)
    return Slice(model, anatomy, span, has_head, border)


def check_set(part: Slice) -> None:
    """Raises SliceError if the class of a new model leaves some of its weights unset."""
    tensors = [*part.model.named_parameters(), *part.model.named_buffers()]
    unset = [name for name, t in tensors if t.is_floating_point() and t.isnan().any()]
    if unset:
        raise SliceError(
            f"model type {part.model.config.model_type!r} leaves {some_of(unset)} unset in a new model; "
            "start from a pretrained one (--model_name_or_path)"
        )


def try_slices(model: PreTrainedModel, anatomy: Anatomy) -> None:
    """Runs slices of a model without weights, made of it in place one after the other; it is of no use afterwards.

    Raises SliceError where the class looks for something in layers of other slices.
    """
    inputs = example(TASKS[anatomy.task], anatomy.row_shape)
    hidden = torch.zeros(ROWS, anatomy.num_tokens or TOKENS, anatomy.hidden_size)
    lowest, nothing = Span(0, 1), Span(1, 1)
    try:
        first = Slice(model, anatomy, lowest, True, prune(model, anatomy, lowest, has_head=True))
        first(None, **inputs)
        head = Slice(model, anatomy, nothing, True, prune(model, anatomy, nothing, has_head=True))
        head(hidden, **inputs)
        take_head(model, anatomy, head.border)
        head(hidden, **inputs)
    except Exception as error:
        reason = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
        raise SliceError(f"a slice of it does not run ({reason})") from error


def _materialise(model: PreTrainedModel) -> None:
    """Gives every parameter and buffer memory, filled with NaN so that what nobody initialises shows."""
    made: dict[int, nn.Parameter] = {}
    for module in model.modules():
        forget_initialised(module)
        for name, parameter in parameters_of(module).items():
            if parameter is not None:
                if id(parameter) not in made:  # tied weights stay tied
                    made[id(parameter)] = nn.Parameter(_filled(parameter), parameter.requires_grad)
                parameters_of(module)[name] = made[id(parameter)]
        for name, buffer in buffers_of(module).items():
            if buffer is not None and buffer.is_meta:
                buffers_of(module)[name] = _filled(buffer)


def _filled(like: torch.Tensor) -> torch.Tensor:
    return torch.full(like.shape, float("nan") if like.is_floating_point() else 0, dtype=like.dtype, device="cpu")


def _groups(model: PreTrainedModel, anatomy: Anatomy) -> Iterator[tuple[str, nn.Module, PreTrainedModel]]:
    """What is initialised under a seed of its own: each layer as a whole, every other module by itself.

    Yields (dotted name, module, the model class whose rules apply), children before parents as transformers does.
    """
    layers = model.get_submodule(anatomy.layers)

    def descend(module: nn.Module, name: str, owner: PreTrainedModel):
        owner = module if isinstance(module, PreTrainedModel) else owner
        for child_name, child in module.named_children():
            full = f"{name}.{child_name}" if name else child_name
            if isinstance(child, StandIn):
                continue
            if module is layers:
                yield full, child, owner
            else:
                yield from descend(child, full, owner)
        if module is not layers:
            yield name, module, owner

    yield from descend(model, "", model)
