"""What stands in a sliced model where other slices' modules were, and what crosses its two borders."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from llm_local.adapters.hf_internals import untie
from llm_local.model.anatomy import Anatomy
from llm_local.model.observation import ROWS
from llm_local.partition import Span


def prune(model: PreTrainedModel, anatomy: Anatomy, span: Span, has_head: bool) -> Border:
    """Puts stand-ins where other slices' modules were, in place."""
    border = Border()
    uncalled = _uncalled(model, anatomy)
    layers = anatomy.layers_in(model)
    for index in range(anatomy.num_layers):
        if not span.start <= index < span.stop:
            layers[index] = AbsentLayer(layers[index], border, anatomy, enters=index == span.start - 1)
    if len(span):
        layers[span.stop - 1].register_forward_hook(_leave(border, anatomy))
    if not has_head:
        take_head(model, anatomy, border)
    if span.start > 0:
        _replace_preamble(model, anatomy, border)
    for name in uncalled:
        if span.start > 0:
            model.set_submodule(name, PassedBy(model.get_submodule(name)))
        else:  # text does not train them; the first slice keeps them for the export
            model.get_submodule(name).requires_grad_(False)
    if span.start > 0 or not has_head:
        for module in model.modules():
            if isinstance(module, PreTrainedModel):  # there is nothing left to be tied to
                untie(module)
    return border


def take_head(model: PreTrainedModel, anatomy: Anatomy, border: Border) -> None:
    """Puts stand-ins where norm and output matrix were, in place."""
    for name in _whole(anatomy, anatomy.after):
        original = model.get_submodule(name)
        model.set_submodule(
            name, AbsentModule(original, border, anatomy, name) if anatomy.row_shape else PassedBy(original)
        )


def _whole(anatomy: Anatomy, names: Sequence[str]) -> list[str]:
    """The modules that go where those of these names do."""
    if not anatomy.row_shape:
        return _outermost(names)
    return [each for each in anatomy.returned if any(f"{name}.".startswith(f"{each}.") for name in names)]


def _outermost(names: Sequence[str]) -> list[str]:
    return [name for name in names if not any(name.startswith(f"{other}.") for other in names)]


def _uncalled(model: PreTrainedModel, anatomy: Anatomy) -> list[str]:
    """Modules with parameters that do not run on text: the vision tower of a model that also sees, and the like."""
    known = [f"{name}." for name in (anatomy.layers, *anatomy.before, *anatomy.after)]
    found = [
        name
        for name, module in model.named_modules()
        if next(module.parameters(), None) is not None
        and not any(f"{name}.".startswith(other) or other.startswith(f"{name}.") for other in known)
    ]
    return _outermost([name for name in found if name])


def _replace_preamble(model: PreTrainedModel, anatomy: Anatomy, border: Border) -> None:
    """Stand-ins for what has parameters and runs before the layers."""
    for name in _whole(anatomy, anatomy.before):
        original = model.get_submodule(name)
        if name == anatomy.embedding:
            model.set_submodule(name, AbsentEmbedding(original, border))
        elif any(p.requires_grad for p in original.parameters()):  # frozen ones (sinusoids) are kept: they cost nothing
            model.set_submodule(name, AbsentModule(original, border, anatomy, name))


def _leave(border: Border, anatomy: Anatomy) -> Any:
    """Keeps what the last layer returns: it is what leaves the slice."""

    def hook(_layer: nn.Module, _args: tuple, output: Any) -> None:
        if border.running:
            border.leaving = anatomy.outside(output if isinstance(output, torch.Tensor) else output[0])

    return hook


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


class StandIn(nn.Module):
    """Takes the place of a module that another stage owns; holds no parameters."""

    def __init__(self, original: nn.Module, border: Border):
        super().__init__()
        self.__dict__ |= {"border": border, "original": original}
        # models ask their layers and embeddings for plain facts (layer_type, padding_idx, ...)
        for name, value in original.__dict__.items():
            if not name.startswith("_") and name != "training" and isinstance(value, (str, int, float, type(None))):
                self.__dict__.setdefault(name, value)

    def __getattr__(self, name: str) -> Any:
        # what a model looks up in its layers, or sets there, while it is initialised: done to what has no memory
        return getattr(self.__dict__["original"], name)

    def zeros(self) -> torch.Tensor:
        # a fresh tensor each time: some models scale it in place
        return torch.zeros_like(self.__dict__["border"].entering)


class AbsentLayer(StandIn):
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
            hidden = anatomy.inside(border.entering)
        return hidden if anatomy.output_length is None else (hidden,) + (None,) * (anatomy.output_length - 1)


class AbsentEmbedding(StandIn):
    """The token embedding of a slice that does not start the model."""

    @property
    def weight(self) -> torch.Tensor:  # asked for its dtype and device
        entering = self.__dict__["border"].entering
        return torch.empty(0) if entering is None else entering.new_empty(0, entering.shape[-1])

    def forward(self, *_args: Any, **_kwargs: Any) -> torch.Tensor:
        return self.zeros()


class AbsentModule(StandIn):
    """Another trained module of the preamble: learned positions, embedding norm, projection. Where a row has a fixed
    shape, any module beside the layers, which returns zeros as the original's output was made up."""

    def __init__(self, original: nn.Module, border: Border, anatomy: Anatomy, name: str):
        super().__init__(original, border)
        self.__dict__ |= {"returned": anatomy.returned.get(name), "is_fixed": bool(anatomy.row_shape)}

    def forward(self, *_args: Any, **_kwargs: Any) -> Any:
        returned, border = self.__dict__["returned"], self.__dict__["border"]
        if self.__dict__["is_fixed"]:
            return _like(returned, border.leaving if border.entering is None else border.entering)
        return (self.zeros(),) + (None,) * (len(returned) - 1) if returned else self.zeros()


def _like(returned: Any, hidden: torch.Tensor) -> Any:
    """Zeros in that pattern, of as many rows as hidden states have."""
    if isinstance(returned, dict):
        rows, *others = returned["shape"]
        return hidden.new_zeros(len(hidden) if rows == ROWS else rows, *others)
    return tuple(_like(each, hidden) for each in returned) if isinstance(returned, list) else returned


class PassedBy(nn.Module):
    """A head module that a slice without a loss does not have, or one that text does not run."""

    def __init__(self, original: nn.Module):
        super().__init__()
        self.__dict__["original"] = original  # without memory: code that initialises a model may look at it

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["original"], name)

    def forward(self, hidden: torch.Tensor, *_args: Any, **_kwargs: Any) -> torch.Tensor:
        return hidden
