"""The classes of a classifier: those of the data, and whether a checkpoint's classifier is of the same."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import AutoConfig, PretrainedConfig

from llm_local.config import Config, some_of
from llm_local.model.gguf_cache import weights_path
from llm_local.model.slices import model_without_weights


def set_classes(config: PretrainedConfig, names: Sequence[str]) -> None:
    """Gives the model a class for each name, in their order."""
    config.id2label = dict(enumerate(names))  # and so many labels
    config.label2id = {name: number for number, name in enumerate(names)}


def new_parameters(config: Config, model_config: PretrainedConfig) -> tuple[tuple[str, ...], str]:
    """Names of the parameters that the run makes anew, as its classes are not the pretrained model's, and that in a
    line; nothing where they are the same, and of a new model."""
    if config.model.model_name_or_path is None or not config.task.answers_once:
        return (), ""
    path = weights_path(config)
    theirs = _classes(AutoConfig.from_pretrained(path, trust_remote_code=config.model.trust_remote_code))
    ours = _classes(model_config)
    if theirs == ours:
        return (), ""
    said = f"{path} has a classifier of {len(theirs)} classes ({some_of(theirs)}), and the data has {len(ours)} "
    return _of_classes(config, model_config), f"{said}({some_of(ours)}): a new one is made"


def _classes(config: PretrainedConfig) -> list[str]:
    return [str(name) for name in (config.id2label or {}).values()]


def _of_classes(config: Config, model_config: PretrainedConfig) -> tuple[str, ...]:
    """The parameters whose shapes follow the number of classes."""
    shapes = []
    for more in (0, 1):
        other = type(model_config).from_dict(model_config.to_dict())
        other.num_labels = len(_classes(model_config)) + more
        made = model_without_weights(other, config.task.name, trust_remote_code=config.model.trust_remote_code)
        shapes.append({name: parameter.shape for name, parameter in made.named_parameters()})
    return tuple(name for name, shape in shapes[0].items() if shapes[1].get(name) != shape)
