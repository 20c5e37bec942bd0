"""What a model does in one forward pass, as hooks see it, and whether its layers could run apart from each other."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from pydantic import JsonValue
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import PretrainedConfig, PreTrainedModel

from llm_local.adapters.hf_internals import layer_classes
from llm_local.model.levels import layers_of_level, longest_level
from llm_local.tasks.task import Parts, Task

ROWS, TOKENS = 3, 8  # two rows could be taken for a pair of outputs


class SliceError(ValueError):
    """The model cannot be cut into stages; the message says why."""


def text_config(config: PretrainedConfig) -> PretrainedConfig:
    """The part that describes the decoder, where a config has several."""
    return config.get_text_config(decoder=True)


@dataclass
class Events:
    """What the hooks saw, in order."""

    order: list[tuple[str, str]] = field(default_factory=list)
    inputs: dict[int, tuple[tuple, dict, dict]] = field(default_factory=dict)
    outputs: dict[int, Any] = field(default_factory=dict)
    returned: dict[str, JsonValue] = field(default_factory=dict)  # by modules beside the layers, as `pattern` has it
    logits: torch.Tensor | None = None


def check_parameters(model: PreTrainedModel, name: str, layers: nn.ModuleList, events: Events) -> None:
    """Whether each parameter is used where a slice would look for it."""
    owners: dict[int, int] = {}
    for index, layer in enumerate(layers):
        for key, parameter in layer.named_parameters():
            if owners.setdefault(id(parameter), index) != index:
                raise SliceError(f"its layers {owners[id(parameter)]} and {index} share the parameter {key}")
    called = {what for kind, what in events.order if kind == "module"}
    around = sorted(what for what in called if not what or name.startswith(f"{what}."))
    if around:
        raise SliceError(f"{around[0] or 'the model'} has parameters of its own, beside its layers")
    known = owners.keys() | {id(p) for what in called for p in model.get_submodule(what).parameters()}
    unknown = _used_parameters(events.logits) - known
    for key, parameter in model.named_parameters():
        if id(parameter) in unknown:
            raise SliceError(f"it uses {key} without calling the module that has it")


def name_of(model: nn.Module, wanted: nn.Module) -> str:
    """The dotted name of a module of the model."""
    return next(name for name, module in model.named_modules() if module is wanted)


def is_used(module: nn.Module, events: Events) -> bool:
    """Whether the logits depend on a parameter that the module itself has."""
    return bool(_used_parameters(events.logits) & {id(p) for p in module.parameters(recurse=False)})


def _used_parameters(output: torch.Tensor | None, border: torch.Tensor | None = None) -> set[int]:
    """The ids of the leaves that the output's graph ends in; border: a tensor that is not looked behind."""
    found: set[int] = set()
    seen: set[Any] = set() if border is None else {border.grad_fn}
    pending = [None if output is None else output.grad_fn]
    while pending:
        node: Any = pending.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            found.add(id(node.variable))
        pending += [following for following, _ in node.next_functions]
    return found


def find_layers(model: PreTrainedModel, task: Task, inputs: Mapping[str, Any]) -> tuple[str, nn.ModuleList]:
    """The outermost module list with num_hidden_layers entries, or the layers of one level where there are several.
    inputs: of a forward pass, as for `watch`."""
    part = task.part_of(model.config)
    if (level := longest_level(part)) is not None and (found := layers_of_level(model, part, level)) is not None:
        return found
    for name in ("hidden_sizes", "encoder_hidden_sizes", "embed_dims"):
        widths = getattr(part, name, None)
        if isinstance(widths, (list, tuple)) and len({*widths}) > 1:
            missing = "and it has no list of layers of one width that its config counts (depths)"
            raise SliceError(f"its width changes on the way ({name}={[*widths]}), {missing}")
    wanted = getattr(part, "num_hidden_layers", None)
    if wanted is None:
        raise SliceError("its config has no num_hidden_layers: it is no stack of like layers")
    found = [(k, m) for k, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m) == wanted]
    outer = [(k, m) for k, m in found if not any(k.startswith(f"{other}.") for other, _ in found)]
    if len(outer) > 1:  # one of them reads images or sound
        outer = _called(model, outer, inputs)
    if len(outer) > 1:
        decoder_layers = layer_classes(model)
        outer = [(k, m) for k, m in outer if any(type(layer).__name__ in decoder_layers for layer in m)]
    if len(outer) != 1:
        names = ", ".join(k for k, _ in found) or "none"
        raise SliceError(f"there is not one list of num_hidden_layers={wanted} layers (found: {names})")
    return outer[0]


def _called(
    model: PreTrainedModel, lists: list[tuple[str, nn.ModuleList]], inputs: Mapping[str, Any]
) -> list[tuple[str, nn.ModuleList]]:
    """Those whose layers run on what the task feeds."""
    ran: set[str] = set()
    handles = [layers[0].register_forward_pre_hook(lambda *_, key=key: ran.add(key)) for key, layers in lists]
    model.eval()
    model(**inputs)
    for handle in handles:
        handle.remove()
    return [(key, layers) for key, layers in lists if key in ran]


def modules_beside(
    model: PreTrainedModel, layers: str, before: Collection[str], after: Collection[str], events: Events
) -> list[str]:
    """The largest modules with all parameters of those before the layers, then of those behind them: what they return
    can be made up, as the logits see of it what goes through the layers alone. Raises SliceError where that is not so.
    """
    last = first_tensor(events.outputs[max(events.outputs)])
    seen = _used_parameters(events.logits, last)
    for name in before:
        if any(id(parameter) in seen for parameter in model.get_submodule(name).parameters(recurse=False)):
            raise SliceError(f"{name}, which runs before its layers, is also used behind them")
    found = [whole for own in (before, after) for whole in _whole_modules(model, layers, own, events)]
    for name in (*before, *after):
        if not any(f"{name}.".startswith(f"{whole}.") for whole in found):
            raise SliceError(f"{name} returns neither tensors nor plain values, which could be made up")
    return found


def _whole_modules(model: nn.Module, layers: str, own: Collection[str], events: Events) -> Iterator[str]:
    """The largest modules beside the layers whose parameters are all of modules in `own`, and that returned something
    that can be made up."""

    def descend(module: nn.Module, prefix: str) -> Iterator[str]:
        for child_name, child in module.named_children():
            name = f"{prefix}{child_name}"
            inside = {
                f"{name}.{inner}".rstrip(".")
                for inner, each in child.named_modules()
                if next(each.parameters(recurse=False), None) is not None
            }
            if not inside or name == layers:
                continue
            if inside <= {*own} and events.returned.get(name) is not None:
                yield name
            else:
                yield from descend(child, f"{name}.")

    yield from descend(model, "")


def example(task: Task, row_shape: tuple[int, ...]) -> Parts:
    """Rows to watch a model with. row_shape: as Task has it."""
    if row_shape:
        return {task.main_input: torch.zeros(ROWS, *row_shape)}
    return {task.main_input: torch.full((ROWS, TOKENS), 3, dtype=torch.long)}


def pattern(output: Any) -> JsonValue:
    """What a module returns without its numbers, of a forward pass of ROWS rows: of a tensor {"shape": ...}, of a tuple
    a list. None of what is neither of these nor a plain value."""
    if isinstance(output, torch.Tensor):
        return {"shape": [*output.shape]}
    if isinstance(output, (tuple, list)):
        return [pattern(each) for each in output]
    return output if isinstance(output, (int, float, str)) else None


def watch(model: PreTrainedModel, layers: nn.ModuleList, inputs: Mapping[str, Any]) -> Events:
    events = Events()
    inside = {id(module) for module in layers.modules()}
    handles = []

    def enter_layer(index: int):
        def hook(_module: nn.Module, args: tuple, kwargs: dict) -> None:
            sizes = {k: len(v) for k, v in [*enumerate(args), *kwargs.items()] if isinstance(v, (dict, list))}
            events.order.append(("layer", str(index)))
            events.inputs[index] = (args, kwargs, sizes)

        return hook

    def leave_layer(index: int):
        def hook(_module: nn.Module, _args: tuple, output: Any) -> None:
            events.outputs[index] = output

        return hook

    def enter_module(name: str):
        return lambda _module, _args: events.order.append(("module", name))

    def leave_module(name: str):
        def hook(_module: nn.Module, _args: tuple, output: Any) -> None:
            events.returned[name] = pattern(output)

        return hook

    for index, layer in enumerate(layers):
        handles.append(layer.register_forward_pre_hook(enter_layer(index), with_kwargs=True))
        handles.append(layer.register_forward_hook(leave_layer(index)))
    for name, module in model.named_modules():
        if id(module) not in inside:
            handles.append(module.register_forward_hook(leave_module(name)))
            if next(module.parameters(recurse=False), None) is not None:
                handles.append(module.register_forward_pre_hook(enter_module(name)))
    model.eval()
    with torch.enable_grad():  # side inputs that depend on parameters show by requires_grad
        events.logits = model(**inputs).logits
    for handle in handles:
        handle.remove()
    return events


def count_products(model: PreTrainedModel, layers: nn.ModuleList, inputs: Mapping[str, Any]) -> tuple[int, int, int]:
    """Multiplications of matrix products and convolutions that a row takes before the layers, in a layer on average,
    and behind them."""
    counter, passed = FlopCounterMode(display=False), []
    handles = [
        layers[0].register_forward_pre_hook(lambda *_: passed.append(counter.get_total_flops())),
        layers[-1].register_forward_hook(lambda *_: passed.append(counter.get_total_flops())),
    ]
    with torch.no_grad(), counter:
        model(**inputs)
    for handle in handles:
        handle.remove()
    before, inside, behind = (b - a for a, b in pairwise((0, *passed, counter.get_total_flops())))
    return before // (2 * ROWS), inside // (2 * ROWS * len(layers)), behind // (2 * ROWS)


def first_tensor(output: Any) -> torch.Tensor:
    return output if isinstance(output, torch.Tensor) else output[0]


def find_output_length(events: Events) -> int | None:
    lengths = set()
    for index, output in events.outputs.items():
        if isinstance(output, torch.Tensor):
            lengths.add(None)
        elif isinstance(output, (tuple, list)):
            lengths.add(len(output))
        else:
            raise SliceError(f"layer {index} returns {type(output).__name__}, not hidden states")
    if len(lengths) != 1:
        raise SliceError("its layers return different kinds of output")
    return lengths.pop()


def find_argument(events: Events) -> int | str:
    """Where each layer takes the one before's output, unchanged and as the only thing that links them."""
    found: set[int | str] = set()
    side_outputs: list[torch.Tensor] = []
    for index in range(1, len(events.inputs)):
        output = events.outputs[index - 1]
        previous = first_tensor(output)
        if not isinstance(output, torch.Tensor):
            side_outputs += [t for _, t in _tensors(list(output[1:]), "")]
        args, kwargs, sizes = events.inputs[index]
        matches = [k for k, v in [*enumerate(args), *kwargs.items()] if v is previous]
        if len(matches) != 1:
            raise SliceError(f"layer {index} does not take layer {index - 1}'s output as exactly one of its arguments")
        found.add(matches[0])
        if sizes != events.inputs[0][2]:
            raise SliceError(f"its layers pass things on in a container argument ({', '.join(map(str, sizes))})")
        for name, tensor in [*_tensors(args, "argument "), *_tensors(kwargs, "argument ")]:
            if any(tensor is side for side in side_outputs):
                raise SliceError(f"layer {index} takes {name}, a side output of an earlier layer")
            if tensor is not previous and tensor.requires_grad:
                raise SliceError(f"layer {index} also takes {name}, which depends on parameters outside it")
    if len(found) > 1:
        raise SliceError("its hidden states move between arguments")
    return found.pop() if found else 0


def _tensors(value: Any, name: str) -> Iterator[tuple[str, torch.Tensor]]:
    if isinstance(value, torch.Tensor):
        yield name, value
    elif isinstance(value, (tuple, list)):
        for index, item in enumerate(value):
            yield from _tensors(item, f"{name}{index}")
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from _tensors(item, f"{name}{key}")
