"""How a Hugging Face causal LM is put together, found out by watching one forward pass.

`probe` runs the real model class under FakeTensorMode: no weights, no memory, seconds even for a 70B config. It sees
which module list holds the layers, through which argument hidden states pass from layer to layer, and which modules
with parameters run before and after them. A model whose layers exchange anything else is refused with the reason.
"""

from __future__ import annotations

import copy
import json
import logging
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from llm_local.config import ConfigError, ModelArguments, from_here

_ROWS, _TOKENS = 2, 8


class SliceError(ValueError):
    """The model cannot be cut into stages; the message says why."""


@dataclass(frozen=True)
class Anatomy:
    """What cutting a model needs to know of it.

    layers: dotted name of the layer list. argument: position or name of the hidden states among a layer's arguments.
    output_length: None where a layer returns the hidden states alone, else the length of the tuple that they lead.
    embedding, before, after: modules with parameters of their own, by dotted name; before and after the layers.
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
    head_parameters: int

    @property
    def base(self) -> str:
        """The model below the output matrix. Not base_model_prefix: that of Llama 4 names no module of it."""
        return self.layers.partition(".")[0]

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @staticmethod
    def from_json(text: str) -> Anatomy:
        values: dict[str, Any] = json.loads(text)
        lists = {name: tuple(values.pop(name)) for name in ("before", "after")}
        return Anatomy(**lists, **values)


def load_model_config(model: ModelArguments) -> PretrainedConfig:
    """The config of the model to train. Raises ConfigError naming the file, the value or the override that is wrong."""
    source = model.model_name_or_path or model.config_name
    assert source is not None, "checked in problems.py"
    path, named = Path(source), f"{'model_name_or_path' if model.model_name_or_path else 'config_name'}={source}"
    where = "" if path.exists() else from_here(path)
    if not path.exists() and source.endswith(".json"):
        raise ConfigError([f"{named}: no such file{where}"])
    if path.is_dir() and not (path / "config.json").exists() and (path / "export" / "config.json").exists():
        raise ConfigError([f"{named} is the folder of a run, not a model; did you mean {path / 'export'}?"])
    try:
        config = AutoConfig.from_pretrained(source, trust_remote_code=model.trust_remote_code)
    except StrictDataclassError as error:  # says in its second line what is wrong
        raise ConfigError([f"no model config in {source}: {' '.join(str(error).split())}"]) from error
    except (OSError, ValueError, KeyError, TypeError, ArithmeticError) as error:
        raise ConfigError([f"no model config in {source}{where}: {str(error).splitlines()[0]}"]) from error
    try:
        return _overridden(config, source, model.config_overrides) if model.config_overrides else config
    except (ValueError, TypeError, AttributeError, ArithmeticError, StrictDataclassError) as error:
        reason = " ".join(str(error).split())
        raise ConfigError([f"config_overrides={model.config_overrides!r}: {reason}"]) from error


def _overridden(config: PretrainedConfig, source: str, overrides: str) -> PretrainedConfig:
    """The config made again from its JSON with the overrides in it, so that what it derives from them follows.

    Raises ValueError, as update_from_string does, and for a name whose value the config works out from others.
    """
    typed = copy.deepcopy(config)
    typed.update_from_string(overrides)
    values: dict[str, Any] = PretrainedConfig.get_config_dict(source)[0] | {"model_type": config.model_type}
    original = type(config).attribute_map  # GPT-2's JSON may say n_embd or hidden_size
    names = [part.partition("=")[0] for part in overrides.split(",")]
    for name in names:
        key = original.get(name, name)
        values = {k: v for k, v in values.items() if original.get(k, k) != key} | {key: getattr(typed, name)}
    made = type(config).from_dict(values, name_or_path=source)
    for name in names:
        if getattr(made, name) != getattr(typed, name):
            raise ValueError(f"{name} is {getattr(made, name)} whatever is set: it follows from other values")
    return made


def text_config(config: PretrainedConfig) -> PretrainedConfig:
    """The part that describes the decoder, where a config has several."""
    return config.get_text_config(decoder=True)


def probe(config: PretrainedConfig, model: ModelArguments) -> Anatomy:
    """Watches the model that `config` describes. Raises SliceError saying why it cannot be cut."""
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx.experimental.symbolic_shapes import ShapeEnv
    from transformers.initialization import no_init_weights

    name = config.model_type
    logging.getLogger("torch._subclasses.fake_tensor").setLevel(logging.CRITICAL)
    try:
        with FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True):
            with no_init_weights():
                fake = AutoModelForCausalLM.from_config(
                    copy.deepcopy(config), attn_implementation="eager", trust_remote_code=model.trust_remote_code
                )
            if model.attn_implementation:
                fake.set_attn_implementation(model.attn_implementation)
                fake.set_attn_implementation("eager")
            if fake._can_set_experts_implementation():
                fake.set_experts_implementation("batched_mm")  # the grouped kernel has no fake float32 version
            return _observe(fake)
    except SliceError as error:
        raise SliceError(f"model type {name!r} cannot be cut into stages: {error}") from error
    except Exception as error:
        reason = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        raise SliceError(f"model type {name!r} cannot be cut into stages: its forward failed ({reason})") from error


@dataclass
class _Events:
    """What the hooks saw, in order."""

    order: list[tuple[str, str]] = field(default_factory=list)
    inputs: dict[int, tuple[tuple, dict, dict]] = field(default_factory=dict)
    outputs: dict[int, Any] = field(default_factory=dict)


def _observe(model: PreTrainedModel) -> Anatomy:
    name, layers = _find_layers(model)
    events = _watch(model, layers)
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
    if getattr(text_config(model.config), "num_kv_shared_layers", 0):
        raise SliceError("its layers share keys and values (num_kv_shared_layers)")
    output_length = _output_length(events)
    argument = _argument(events)
    shape = tuple(_hidden(events.outputs[0]).shape)
    if len(shape) != 3 or shape[:2] != (_ROWS, _TOKENS):
        raise SliceError(f"its hidden states have shape {shape}, not (batch, sequence, hidden)")
    embedding = next(key for key, module in model.named_modules() if module is model.get_input_embeddings())
    head = model.get_output_embeddings()
    return Anatomy(
        layers=name,
        num_layers=len(layers),
        argument=argument,
        output_length=output_length,
        embedding=embedding,
        before=before,
        after=after,
        hidden_size=int(shape[-1]),
        layer_parameters=sum(p.numel() for p in layers.parameters()) // len(layers),
        head_parameters=sum(p.numel() for p in head.parameters()) if head is not None else 0,
    )


def _find_layers(model: PreTrainedModel) -> tuple[str, nn.ModuleList]:
    """The outermost module list with num_hidden_layers entries."""
    wanted = getattr(text_config(model.config), "num_hidden_layers", None)
    found = [(k, m) for k, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m) == wanted]
    outer = [(k, m) for k, m in found if not any(k.startswith(f"{other}.") for other, _ in found)]
    if len(outer) > 1:
        decoder_layers = set(model._no_split_modules or [])
        outer = [(k, m) for k, m in outer if any(type(layer).__name__ in decoder_layers for layer in m)]
    if len(outer) != 1:
        names = ", ".join(k for k, _ in found) or "none"
        raise SliceError(f"there is not one list of num_hidden_layers={wanted} layers (found: {names})")
    return outer[0]


def _watch(model: PreTrainedModel, layers: nn.ModuleList) -> _Events:
    events = _Events()
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

    for index, layer in enumerate(layers):
        handles.append(layer.register_forward_pre_hook(enter_layer(index), with_kwargs=True))
        handles.append(layer.register_forward_hook(leave_layer(index)))
    for name, module in model.named_modules():
        if id(module) not in inside and next(module.parameters(recurse=False), None) is not None:
            handles.append(module.register_forward_pre_hook(enter_module(name)))
    model.eval()
    with torch.enable_grad():  # side inputs that depend on parameters show by requires_grad
        model(input_ids=torch.full((_ROWS, _TOKENS), 3, dtype=torch.long), use_cache=False)
    for handle in handles:
        handle.remove()
    return events


def _hidden(output: Any) -> torch.Tensor:
    return output if isinstance(output, torch.Tensor) else output[0]


def _output_length(events: _Events) -> int | None:
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


def _argument(events: _Events) -> int | str:
    """Where each layer takes the one before's output, unchanged and as the only thing that links them."""
    found: set[int | str] = set()
    side_outputs: list[torch.Tensor] = []
    for index in range(1, len(events.inputs)):
        output = events.outputs[index - 1]
        previous = _hidden(output)
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
