"""How a Hugging Face model is put together, found out by watching one forward pass.

`probe` runs the real model class under FakeTensorMode: no weights, no memory, seconds even for a 70B config. It sees
which module list holds the layers, through which argument hidden states pass from layer to layer, and which modules
with parameters run before and after them. A model whose layers exchange anything else is refused with the reason.
"""

from __future__ import annotations

import copy
import logging
import pickle
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import MISSING, dataclass, field, fields
from functools import lru_cache, partial
from math import prod
from textwrap import shorten
from typing import Any, TypeAlias, TypeVar

import torch
from pydantic import JsonValue
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from llm_local.adapters.hf_internals import attention_kernel_of, can_choose_experts_kernel, nothing_kept, rope_kinds
from llm_local.adapters.torch_internals import buffers_of, fake_tensors, parameters_of
from llm_local.config import some_of
from llm_local.flags import ModelArguments
from llm_local.model.observation import (
    ROWS,
    TOKENS,
    SliceError,
    check_parameters,
    count_products,
    example,
    find_argument,
    find_layers,
    find_output_length,
    first_tensor,
    is_used,
    modules_beside,
    name_of,
    text_config,
    watch,
)
from llm_local.registry import TASKS
from llm_local.tasks.task import Task

__all__ = ["Anatomy", "SliceError", "attention_kernel", "probe", "text_config"]


Found = TypeVar("Found")
Trial: TypeAlias = "Callable[[PreTrainedModel, Anatomy], Any]"


@dataclass(frozen=True)
class Anatomy:
    """What cutting a model needs to know of it.

    layers: dotted name of the layer list. argument: position or name of the hidden states among a layer's arguments.
    output_length: None where a layer returns the hidden states alone, else the length of the tuple that they lead.
    embedding, before, after: modules with parameters of their own, by dotted name; before and after the layers.
    tied: the output matrix is the embedding, which a class may do or not do whatever its config says.
    active_layer_parameters: of a layer's, on average, those that one token passes; fewer in a mixture of experts.
    layer_matrices: rows and columns of the matrices of the first layer.
    task: what the model is trained for, by name. row_shape: of what it reads of a row, where that is fixed, and
    num_tokens: the positions (T) of its hidden states then. returned: what modules before the layers return, of a fixed
    row also those behind them, as `observation.pattern` has it. products: multiplications that a fixed row takes
    before the layers, in a layer on average, and behind them. grid: height and width of hidden states (B, D, H, W),
    which are (B, H*W, D) outside the model; () where they are that inside it; keeps_channels_last: how their numbers
    lie in memory. fresh: parameters that the run makes anew, whatever a checkpoint has (model/classes.py).
    adapted: matrices beside which adapters train (model/lora.py).
    """

    layers: str
    num_layers: int
    argument: int | str
    output_length: int | None
    embedding: str
    before: tuple[str, ...]
    after: tuple[str, ...]
    hidden_size: int
    layer_parameters: int
    active_layer_parameters: int
    head_parameters: int
    tied: bool
    layer_matrices: tuple[tuple[int, int], ...] = ()
    task: str = "causal-lm"
    row_shape: tuple[int, ...] = ()
    num_tokens: int = 0
    returned: dict[str, JsonValue] = field(default_factory=dict, hash=False)  # the planner keeps cuts by anatomy
    products: tuple[int, int, int] = (0, 0, 0)
    grid: tuple[int, ...] = ()
    keeps_channels_last: bool = False
    fresh: tuple[str, ...] = ()
    adapted: tuple[str, ...] = ()

    @property
    def base(self) -> str:
        """The model below the output matrix. Not base_model_prefix: that of Llama 4 names no module of it."""
        return self.layers.partition(".")[0]

    def layers_in(self, model: nn.Module) -> nn.ModuleList:
        """Those that are cut."""
        layers = model.get_submodule(self.layers)
        assert isinstance(layers, nn.ModuleList)
        return layers

    def outside(self, hidden: torch.Tensor) -> torch.Tensor:
        """Hidden states as the model has them → (B, T, D)."""
        return hidden.flatten(2).transpose(1, 2).contiguous() if self.grid else hidden

    def inside(self, hidden: torch.Tensor) -> torch.Tensor:
        """Hidden states (B, T, D) as the model has them, in memory, too: kernels round by that."""
        if not self.grid:
            return hidden
        found = hidden.transpose(1, 2).unflatten(2, self.grid)
        return found if self.keeps_channels_last else found.contiguous()


def attention_kernel(model: ModelArguments, config: PretrainedConfig) -> str | None:
    """The attention kernel of the run: the flag's, else the config's own; None leaves the choice to the class."""
    return model.attn_implementation or attention_kernel_of(text_config(config)) or attention_kernel_of(config)


def probe(
    config: PretrainedConfig,
    model: ModelArguments,
    trial: Trial | None = None,
    row_shape: tuple[int, ...] | None = None,
) -> Anatomy:
    """As probe_and, without what comes of a trial."""
    return probe_and(trial or _nothing, config, model, row_shape)[0]


def probe_and(
    trial: Callable[[PreTrainedModel, Anatomy], Found],
    config: PretrainedConfig,
    model: ModelArguments,
    row_shape: tuple[int, ...] | None = None,
) -> tuple[Anatomy, Found]:
    """Watches the model that `config` describes, and has `trial` do something to it before it is thrown away: once in a
    process for the same config and trial, if its classes are transformers' own. row_shape: of what it is fed
    (Task.row_shape), by default as the config says.

    Raises SliceError saying why it cannot be cut, or with which of the config's values there is no such model.
    """
    name, shape = config.model_type, TASKS[model.task].row_shape(config) if row_shape is None else row_shape
    try:
        if model.trust_remote_code or not TASKS[model.task].is_of_transformers(config):
            return _watched(config, model, trial, shape)
        nameless = copy.copy(config)
        nameless.name_or_path = ""
        return _watched_once(pickle.dumps(nameless), model.task, attention_kernel(model, config), trial, shape)
    except SliceError as error:
        raise SliceError(f"model type {name!r} cannot be cut into stages: {error}") from error
    except Exception as error:
        if not TASKS[model.task].has_class(config):
            raise SliceError(_no_class(config, TASKS[model.task])) from error
        reason = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        if not isinstance(error, ImportError) and (blamed := _blamed(config, model, shape)):
            raise SliceError(
                f"no {name!r} model runs with {blamed}: change that, or what contradicts it ({reason})"
            ) from error
        raise SliceError(f"model type {name!r} cannot be cut into stages: its forward failed ({reason})") from error


def _no_class(config: PretrainedConfig, task: Task) -> str:
    others = [f"task={name}" for name, other in TASKS.items() if other.has_class(config)]
    repair = f"train it with {' or '.join(others)}" if others else "use another model"
    return f"task={task.name}: transformers has no {task.title} of model type {config.model_type!r}; {repair}"


def _nothing(_model: PreTrainedModel, _anatomy: Anatomy) -> None:
    pass


@lru_cache(maxsize=64)
def _watched_once(
    config: bytes, task: str, kernel: str | None, trial: Trial, row_shape: tuple[int, ...]
) -> tuple[Anatomy, Any]:
    return _watched(pickle.loads(config), ModelArguments(task=task, attn_implementation=kernel), trial, row_shape)


def _watched(
    config: PretrainedConfig,
    model: ModelArguments,
    trial: Callable[[PreTrainedModel, Anatomy], Found],
    row_shape: tuple[int, ...],
) -> tuple[Anatomy, Found]:
    from transformers.initialization import no_init_weights

    task: Task = TASKS[model.task]
    logging.getLogger("torch._subclasses.fake_tensor").setLevel(logging.CRITICAL)
    make = partial(
        task.make,
        _without_dynamic_rope(copy.deepcopy(config)),
        dtype=torch.float32,
        attn_implementation="eager",
        trust_remote_code=model.trust_remote_code,
    )
    fake: Any = None
    if row_shape:  # some classes read a drop rate of each layer while they are made, which a fake tensor has not
        with torch.device("meta"), no_init_weights():
            fake = make()
    with fake_tensors(), _unchanged_parameters_stay(), nothing_kept():
        if fake is not None:
            _materialise(fake)
        else:
            with no_init_weights():
                fake = make()
        fake.tie_weights()  # not done without initialisation
        if kernel := attention_kernel(model, config):
            fake.set_attn_implementation(kernel)
            fake.set_attn_implementation("eager")
        if can_choose_experts_kernel(fake):
            fake.set_experts_implementation("batched_mm")  # the grouped kernel has no fake float32 version
        anatomy = _observe(fake, task, row_shape)
        return anatomy, trial(fake, anatomy)


def _materialise(model: PreTrainedModel) -> None:
    """Gives what lies on the meta device a place among the fake tensors."""
    for module in model.modules():
        for name, parameter in parameters_of(module).items():
            if parameter is not None:
                parameters_of(module)[name] = nn.Parameter(torch.empty_like(parameter, device="cpu"))
        for name, buffer in buffers_of(module).items():
            if buffer is not None and buffer.is_meta:
                buffers_of(module)[name] = torch.empty_like(buffer, device="cpu")


@contextmanager
def _unchanged_parameters_stay() -> Iterator[None]:
    """Lets a model class convert fake parameters to the dtype that they have: torch would swap them, and cannot."""
    swap = torch.utils.swap_tensors
    torch.utils.swap_tensors = lambda old, new: None if old.dtype == new.dtype else swap(old, new)
    try:
        yield
    finally:
        torch.utils.swap_tensors = swap


def _without_dynamic_rope(config: PretrainedConfig) -> PretrainedConfig:
    """Angles that are computed anew for longer rows depend on position numbers, which a watched model has none of."""
    for part in (config, text_config(config)):
        rope: dict[str, Any] = getattr(part, "rope_parameters", None) or {}
        for values in (rope, *(rope[kind] for kind in rope_kinds(part, rope))):
            if values and "dynamic" in str(values.get("rope_type")):
                values["rope_type"] = "default"
    return config


def _blamed(config: PretrainedConfig, model: ModelArguments, row_shape: tuple[int, ...]) -> str:
    """What the model does not run with: values of the config, each of which its type has otherwise by default, or the
    shape of what it is fed, where the config has another."""
    own, found = TASKS[model.task].row_shape(config), []
    if row_shape != own and _runs(config, model, own):
        fed, asked = (" x ".join(map(str, shape)) for shape in (row_shape, own))
        return f"images of {fed}, as its image processor (image_processor_name) makes them; its config has {asked}"
    for name, value, default, values in _with_a_default(config):
        if _runs(config, model, row_shape, values):
            found.append(f"{name}={shorten(str(value), 60)} (the type's own is {shorten(str(default), 60)})")
    return some_of(found) if found else ""


def _runs(
    config: PretrainedConfig, model: ModelArguments, row_shape: tuple[int, ...], values: dict[str, Any] | None = None
) -> bool:
    """Whether there is a forward pass with the config, or with other values of its type."""
    try:
        _watched(config if values is None else type(config).from_dict(values), model, _nothing, row_shape)
    except Exception:  # of whatever kind
        return False
    return True


def _with_a_default(config: PretrainedConfig) -> Iterator[tuple[str, Any, Any, dict[str, Any]]]:
    """Each value that is not the type's default: name, value, default, and all values with the default in its place."""
    values = config.to_dict()
    for name, default in {each.name: each.default for each in fields(type(config))}.items():
        part = vars(config).get(name)  # one with values by layer refuses to be asked
        if isinstance(part, PretrainedConfig):
            for inner, value, own, changed in _with_a_default(part):
                yield f"{name}.{inner}", value, own, copy.deepcopy(values) | {name: changed}
        elif default is not MISSING and name in values and values[name] != default:
            yield name, values[name], default, copy.deepcopy(values) | {name: default}


def _observe(model: PreTrainedModel, task: Task, row_shape: tuple[int, ...]) -> Anatomy:
    inputs = {**example(task, row_shape), **task.options}
    name, layers = find_layers(model, task, inputs)
    events = watch(model, layers, inputs)
    ran = [int(what) for kind, what in events.order if kind == "layer"]
    if ran != list(range(len(layers))):
        raise SliceError(f"its layers are not called once each and in order, but {ran}")
    first = events.order.index(("layer", "0"))
    last = max(i for i, event in enumerate(events.order) if event[0] == "layer")
    before, between, after = (
        tuple(dict.fromkeys(what for kind, what in part if kind == "module"))
        for part in (events.order[:first], events.order[first : last + 1], events.order[last + 1 :])
    )
    if between:
        raise SliceError(f"modules with parameters run between its layers: {', '.join(between)}")
    check_parameters(model, name, layers, events)
    if row_shape:  # some classes also pool for others
        after = tuple(each for each in after if is_used(model.get_submodule(each), events))
    if getattr(text_config(model.config), "num_kv_shared_layers", 0):
        raise SliceError("its layers share keys and values (num_kv_shared_layers)")
    output_length = find_output_length(events)
    argument = find_argument(events)
    shape, *others = [tuple(first_tensor(events.outputs[index]).shape) for index in range(len(layers))]
    if other := next((other for other in others if other != shape), None):
        raise SliceError(f"its hidden states change from shape {shape} to {other}, and a stage's border has one")
    leaving, is_map = first_tensor(events.outputs[0]), len(shape) == 4 and bool(row_shape)
    if (len(shape) != 3 and not is_map) or shape[: 1 if row_shape else 2] != (ROWS, TOKENS)[: 1 if row_shape else 2]:
        raise SliceError(f"its hidden states have shape {shape}, not (batch, sequence, hidden)")
    mixing = [*layers.modules(), *(model.get_submodule(each) for each in (*before, *after))]
    if any(isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)) for module in mixing):
        raise SliceError("its BatchNorm has each row depend on the others of its micro-batch, and so on the layout")
    again, products = [each for each in before if isinstance(events.returned.get(each), list)], (0, 0, 0)
    if row_shape:
        again = modules_beside(model, name, before, after, events)
        products = count_products(model, layers, inputs)
    embedding = "" if row_shape else name_of(model, model.get_input_embeddings())
    head = model.get_output_embeddings()
    heads = [head] if head is not None else [model.get_submodule(each) for each in after] if row_shape else []
    return Anatomy(
        layers=name,
        num_layers=len(layers),
        argument=argument,
        output_length=output_length,
        embedding=embedding,
        before=before,
        after=after,
        hidden_size=int(shape[1 if is_map else -1]),
        layer_parameters=sum(p.numel() for p in layers.parameters()) // len(layers),
        active_layer_parameters=_count_active(layers, text_config(model.config)) // len(layers),
        head_parameters=sum(p.numel() for each in heads for p in each.parameters(recurse=head is not None)),
        tied=head is not None and head.weight is model.get_input_embeddings().weight,
        layer_matrices=tuple((m.out_features, m.in_features) for m in layers[0].modules() if isinstance(m, nn.Linear)),
        task=task.name,
        row_shape=row_shape,
        num_tokens=0 if not row_shape else prod(shape[2:]) if is_map else shape[1],
        returned={each: events.returned[each] for each in again},
        products=products,
        grid=shape[2:] if is_map else (),
        keeps_channels_last=is_map and not leaving.is_contiguous(),
    )


def experts_of(text: Any) -> tuple[int, int]:
    """How many experts a layer has by the text config, and how many of them a token passes; (1, 1) without any."""
    names = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
    total = next((int(n) for name in names if (n := getattr(text, name, None))), 1)
    names = ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "top_k_experts", "moe_k")
    used = next((int(n) for name in names if (n := getattr(text, name, None))), total)
    return total, min(used, total)


def _count_active(layers: nn.Module, text: Any) -> int:
    """Parameters of the layers that one token passes: not those of the experts that it is not sent to."""
    total, used = experts_of(text)
    routed = sum(p.numel() for name, p in layers.named_parameters() if "experts" in name and "shared" not in name)
    return sum(p.numel() for p in layers.parameters()) - routed * (total - used) // total
