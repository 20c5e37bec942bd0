"""A run of layers as a Hugging Face model of its own, exact and without code per architecture.

The model class's own forward runs from end to end. Layers of other slices are stand-ins; the one before the slice
returns the hidden states that were received. What runs before the layers (masks, rotary angles, dropout) works as its
authors wrote it, on zeros that the stand-in throws away.

The list of layers keeps its full length, because models look at layer numbers and at config.layer_types[i].
"""

from __future__ import annotations

import copy
import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.initialization import guard_torch_init_functions, no_init_weights
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from llm_local.anatomy import Anatomy, SliceError
from llm_local.config import ConfigError
from llm_local.partition import Span


@dataclass
class Border:
    """The hidden states that enter and leave a slice during one forward pass, (B, T, D) each.

    running: a forward pass is under way, and not one that gradient checkpointing repeats. seam: that of the last
    forward pass, if the slice has one.
    """

    entering: torch.Tensor | None = None
    leaving: torch.Tensor | None = None
    running: bool = False
    seam: Seam | None = None

    def take_seam(self) -> Seam | None:
        """The seam of the last forward pass, which is then the caller's to keep alive."""
        seam, self.seam = self.seam, None
        return seam


@dataclass(frozen=True)
class Seam:
    """Where a slice's graph is in two pieces: the lower one ends with `below`, the upper one starts from the leaf
    `above`, the same values (B, T, D). A backward pass from the top stops here, until the gradient is handed on."""

    below: torch.Tensor
    above: torch.Tensor


class _StandIn(nn.Module):
    """Takes the place of a module that another stage owns; holds no parameters."""

    def __init__(self, original: nn.Module, border: Border):
        super().__init__()
        self.__dict__["border"] = border
        # models ask their layers and embeddings for plain facts (layer_type, padding_idx, ...)
        for name, value in original.__dict__.items():
            if not name.startswith("_") and name != "training" and isinstance(value, (str, int, float, type(None))):
                self.__dict__.setdefault(name, value)

    def zeros(self) -> torch.Tensor:
        # a fresh tensor each time: some models scale it in place
        return torch.zeros_like(self.__dict__["border"].entering)


class AbsentLayer(_StandIn):
    """A layer of another slice: passes its input on; the one before this slice, what was received."""

    def __init__(self, original: nn.Module, border: Border, anatomy: Anatomy, enters: bool):
        super().__init__(original, border)
        self.__dict__["anatomy"] = anatomy
        self.enters = enters

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        border, anatomy = self.__dict__["border"], self.__dict__["anatomy"]
        where = anatomy.argument
        hidden = args[where] if isinstance(where, int) else kwargs[where]
        if self.enters:
            hidden = border.entering
        return hidden if anatomy.output_length is None else (hidden,) + (None,) * (anatomy.output_length - 1)


class AbsentEmbedding(_StandIn):
    """The token embedding of a slice that does not start the model."""

    @property
    def weight(self) -> torch.Tensor:  # asked for its dtype and device
        entering = self.__dict__["border"].entering
        return torch.empty(0) if entering is None else entering.new_empty(0, entering.shape[-1])

    def forward(self, *_args: Any, **_kwargs: Any) -> torch.Tensor:
        return self.zeros()


class AbsentModule(_StandIn):
    """Another trained module of the preamble: learned positions, embedding norm, projection."""

    def forward(self, *_args: Any, **_kwargs: Any) -> torch.Tensor:
        return self.zeros()


class PassedBy(nn.Module):
    """A head module that a slice without a loss does not have."""

    def forward(self, hidden: torch.Tensor, *_args: Any, **_kwargs: Any) -> torch.Tensor:
        return hidden


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
    def is_first(self) -> bool:
        return self.span.start == 0

    @property
    def is_last(self) -> bool:
        return self.span.stop == self.anatomy.num_layers

    def base(self) -> PreTrainedModel:
        """The model below the output matrix: from ids to normed hidden states."""
        return getattr(self.model, self.anatomy.base)

    def __call__(self, hidden: torch.Tensor | None, **inputs: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """(B, T, D) received hidden states (None at the start of the model) and ids →
        the last layer's output (B, T, D) and what the output matrix reads, the normed one."""
        border = self.border
        border.entering, border.leaving, border.running, border.seam = hidden, None, True, None
        normed = self.base()(use_cache=False, **inputs)[0]
        leaving = border.leaving if len(self.span) else hidden
        assert leaving is not None, "the last layer of the slice was not called"
        border.entering, border.leaving, border.running = None, None, False
        return leaving, normed

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


def new_slice(
    config: PretrainedConfig,
    anatomy: Anatomy,
    span: Span,
    seed: int,
    has_head: bool = True,
    head_of: int | None = None,
    output_of: int | None = None,
    **model_args: Any,
) -> Slice:
    """A slice with new weights, each layer and module under a seed of its own, so that any cut gives the same model.

    head_of: layers below a slice that is a block's head; its weights depend on that number and on nothing else.
    output_of: layers below the head that the output matrix is to equal, where that is another one.
    Raises SliceError if the model class leaves a parameter unset.
    """
    with torch.device("meta"), no_init_weights():
        model = AutoModelForCausalLM.from_config(copy.deepcopy(config), **model_args)
    border = _prune(model, anatomy, span, has_head)
    _materialise(model)
    with torch.no_grad(), guard_torch_init_functions(), torch.random.fork_rng(devices=[]):
        for name, module, owner in _groups(model, anatomy):
            # layers of a head are not those of the next block that have the same name
            is_head = name in anatomy.after or (head_of is not None and name.startswith(f"{anatomy.layers}."))
            number = span.stop if head_of is None else head_of
            if output_of is not None and module is model.get_output_embeddings():
                number = output_of
            suffix = f"@{number}" if is_head else ""
            digest = hashlib.sha256(f"{seed}:{name}{suffix}".encode()).digest()
            torch.manual_seed(int.from_bytes(digest[:7], "big"))
            if name.startswith(f"{anatomy.layers}."):
                module.apply(owner._initialize_weights)
            else:
                owner._initialize_weights(module)
    tensors = [*model.named_parameters(), *model.named_buffers()]
    unset = [name for name, t in tensors if t.is_floating_point() and t.isnan().any()]
    if unset:
        raise SliceError(
            f"model type {config.model_type!r} leaves {unset[0]} and {len(unset) - 1} more unset in a new model; "
            "start from a pretrained one (--model_name_or_path)"
        )
    return Slice(model, anatomy, span, has_head, border)


def load_slice(
    path: str, config: PretrainedConfig, anatomy: Anatomy, span: Span, has_head: bool = True, **model_args: Any
) -> Slice:
    """The slice of a pretrained model; only its own tensors are read.

    Raises ConfigError naming the directory and the tensors that are missing.
    """
    whole: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    borders: list[Border] = []

    def __init__(self: Any, config: PretrainedConfig, *args: Any, **kwargs: Any) -> None:
        whole.__init__(self, config, *args, **kwargs)
        borders.append(_prune(self, anatomy, span, has_head))

    others = "|".join(str(i) for i in range(anatomy.num_layers) if not span.start <= i < span.stop)
    elsewhere = [rf"^{re.escape(anatomy.layers)}\.({others})\."] if others else []
    elsewhere += [] if has_head else [rf"^{re.escape(name)}\." for name in anatomy.after]
    renamed: dict[str, str] = {}
    if span.start > 0:
        elsewhere += [rf"^{re.escape(name)}\." for name in anatomy.before]
        with torch.device("meta"), no_init_weights():
            tied = whole(copy.deepcopy(config)).all_tied_weights_keys or {}
        renamed = {f"^{re.escape(source)}$": target for target, source in tied.items()}
    ignored = [*(whole._keys_to_ignore_on_load_unexpected or []), *elsewhere]
    members = {"__init__": __init__, "__module__": whole.__module__, "_keys_to_ignore_on_load_unexpected": ignored}
    sliced: Any = type(whole.__name__, (whole,), members)
    if renamed:
        model_args["key_mapping"] = renamed
    try:
        model, info = sliced.from_pretrained(
            path, config=copy.deepcopy(config), dtype=torch.float32, output_loading_info=True, **model_args
        )
    except OSError as error:
        raise ConfigError([f"model_name_or_path={path}: {str(error).splitlines()[0]}"]) from error
    absent = sorted(info["missing_keys"])
    if absent:
        raise ConfigError([f"model_name_or_path={path} lacks {absent[0]} and {len(absent) - 1} more tensors"])
    if renamed and getattr(model, "_weight_conversions", None):
        # transformers keeps the renaming and would turn it round when saving
        model._weight_conversions = [
            c for c in model._weight_conversions if not set(renamed) & set(_as_list(c.source_patterns))
        ]
    return Slice(model, anatomy, span, has_head, borders[-1])


def _as_list(patterns: Any) -> list[str]:
    return patterns if isinstance(patterns, list) else [patterns]


def _prune(model: PreTrainedModel, anatomy: Anatomy, span: Span, has_head: bool) -> Border:
    """Puts stand-ins where other slices' modules were, in place."""
    border = Border()
    layers = model.get_submodule(anatomy.layers)
    assert isinstance(layers, nn.ModuleList)
    for index in range(anatomy.num_layers):
        if not span.start <= index < span.stop:
            layers[index] = AbsentLayer(layers[index], border, anatomy, enters=index == span.start - 1)
    if len(span):
        layers[span.stop - 1].register_forward_hook(_leave(border))
    for name in () if has_head else anatomy.after:
        model.set_submodule(name, PassedBy())
    if span.start > 0:
        _replace_preamble(model, anatomy, border)
    if span.start > 0 or not has_head:
        for module in model.modules():
            if isinstance(module, PreTrainedModel):  # there is nothing left to be tied to
                module.all_tied_weights_keys = {}
                module.__dict__["_tied_weights_keys"] = None
    return border


def _replace_preamble(model: PreTrainedModel, anatomy: Anatomy, border: Border) -> None:
    """Stand-ins for what has parameters and runs before the layers."""
    for name in anatomy.before:
        if any(name.startswith(f"{other}.") for other in anatomy.before):
            continue
        original = model.get_submodule(name)
        if name == anatomy.embedding:
            model.set_submodule(name, AbsentEmbedding(original, border))
        elif any(p.requires_grad for p in original.parameters()):  # frozen ones (sinusoids) are kept: they cost nothing
            model.set_submodule(name, AbsentModule(original, border))


def _leave(border: Border) -> Any:
    """Keeps what the last layer returns: it is what leaves the slice."""

    def hook(_layer: nn.Module, _args: tuple, output: Any) -> None:
        if border.running:
            border.leaving = output if isinstance(output, torch.Tensor) else output[0]

    return hook


def _materialise(model: PreTrainedModel) -> None:
    """Gives every parameter and buffer memory, filled with NaN so that what nobody initialises shows."""
    made: dict[int, nn.Parameter] = {}
    for module in model.modules():
        module.__dict__.pop("_is_hf_initialized", None)
        for name, parameter in module._parameters.items():
            if parameter is not None:
                if id(parameter) not in made:  # tied weights stay tied
                    made[id(parameter)] = nn.Parameter(_filled(parameter), parameter.requires_grad)
                module._parameters[name] = made[id(parameter)]
        for name, buffer in module._buffers.items():
            if buffer is not None and buffer.is_meta:
                module._buffers[name] = _filled(buffer)


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
            if isinstance(child, _StandIn):
                continue
            if module is layers:
                yield full, child, owner
            else:
                yield from descend(child, full, owner)
        if module is not layers:
            yield name, module, owner

    yield from descend(model, "", model)
