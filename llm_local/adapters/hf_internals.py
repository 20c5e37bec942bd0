"""The private parts of transformers and datasets that the library relies on, a function for each need. USED: their
names, by module."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from datasets import Dataset
from torch import Tensor, nn
from transformers import GenerationConfig, PretrainedConfig, PreTrainedModel, masking_utils, pytorch_utils
from transformers.utils import CONFIG_NAME
from transformers.utils.hub import cached_file

USED = {
    "transformers.configuration_utils": ("_attn_implementation", "_name_or_path"),
    "transformers.modeling_utils": (
        "_can_set_experts_implementation",
        "_no_split_modules",
        "_keys_to_ignore_on_save",
        "_from_config",
        "_initialize_weights",
        "_is_hf_initialized",
        "_tied_weights_keys",
    ),
    "transformers.masking_utils": ("find_packed_sequence_indices",),
    "transformers.pytorch_utils": ("is_torchdynamo_compiling",),
    "transformers.utils.hub": ("_raise_exceptions_for_missing_entries",),
    "transformers.generation.configuration_utils": ("_from_model_config",),
    "transformers.modeling_rope_utils": ("_rope_type_labels",),
    "datasets.arrow_dataset": (
        "_data_files",
        "_fingerprint",
        "_format_columns",
        "_format_kwargs",
        "_format_type",
        "_output_all_columns",
        "_split",
    ),
}
NAME_OR_PATH = "_name_or_path"  # of a config: where it is from. transformers/configuration_utils.py


def attention_kernel_of(config: PretrainedConfig) -> str | None:
    """transformers/configuration_utils.py"""
    return config._attn_implementation


@contextmanager
def rows_as_they_stand() -> Iterator[None]:
    """Lets models take rows whose positions nobody has given for one sequence each, which they would ask the device
    for, and wait, in each forward pass. transformers/masking_utils.py"""
    look, masking_utils.find_packed_sequence_indices = masking_utils.find_packed_sequence_indices, not_packed
    try:
        yield
    finally:
        masking_utils.find_packed_sequence_indices = look


def not_packed(position_ids: Tensor) -> None:
    return None


@contextmanager
def nothing_kept() -> Iterator[None]:
    """Lets models compute anew what they keep for all models of a size: tensors without numbers are no use to others.
    transformers/pytorch_utils.py"""
    asked, pytorch_utils.is_torchdynamo_compiling = pytorch_utils.is_torchdynamo_compiling, lambda: True
    try:
        yield
    finally:
        pytorch_utils.is_torchdynamo_compiling = asked


def file_of(source: str, name: str, **options: Any) -> str | None:
    """A file of a directory, or of the hub, which then lies in its cache; None if there is none.
    transformers/utils/hub.py"""
    return cached_file(source, name, _raise_exceptions_for_missing_entries=False, **options)


def generation_settings(path: str) -> dict[str, Any]:
    """Those of a model that has them in its config. transformers/generation/configuration_utils.py"""
    return GenerationConfig.from_pretrained(path, CONFIG_NAME, _from_model_config=True).to_diff_dict()


def rope_kinds(config: PretrainedConfig, rope: dict[str, Any]) -> list[str]:
    """The kinds of layers that have rotary values of their own; none if all have the same.
    transformers/modeling_rope_utils.py, where since 5.18 a method says so"""
    kinds = getattr(config, "_rope_type_labels", None) or getattr(config, "layer_types", None) or ()
    return [name for name in rope if name in kinds]


def can_choose_experts_kernel(model: PreTrainedModel) -> bool:
    """transformers/modeling_utils.py"""
    return model._can_set_experts_implementation()


def layer_classes(model: PreTrainedModel) -> set[str]:
    """Names of the classes of decoder layers, as far as the model says. transformers/modeling_utils.py"""
    return set(model._no_split_modules or [])


def unsaved(model: PreTrainedModel) -> set[str]:
    """Names of the tensors that `save_pretrained` leaves out. transformers/modeling_utils.py"""
    return set(model._keys_to_ignore_on_save or [])


def model_of_class(kind: Any, config: PretrainedConfig, **options: Any) -> Any:
    """A new model of that class. transformers/modeling_utils.py"""
    return kind._from_config(config, **options)


def initialise(owner: PreTrainedModel, module: nn.Module) -> None:
    """Draws the module's own weights as the class of `owner` does. transformers/modeling_utils.py"""
    owner._initialize_weights(module)


def forget_initialised(module: nn.Module) -> None:
    """Lets the module be initialised again. transformers/modeling_utils.py"""
    module.__dict__.pop("_is_hf_initialized", None)


def untie(model: PreTrainedModel) -> None:
    """Makes transformers forget which weights are tied. transformers/modeling_utils.py"""
    model.all_tied_weights_keys = {}
    model.__dict__["_tied_weights_keys"] = None


def fingerprint_of(rows: Dataset) -> str:
    """datasets/arrow_dataset.py"""
    return rows._fingerprint


def saved_state(files: list[Path], fingerprint: str) -> dict[str, Any]:
    """What lies beside a saved data set's files. datasets/arrow_dataset.py"""
    return {
        "_data_files": [{"filename": file.name} for file in files],
        "_fingerprint": fingerprint,
        "_format_columns": None,
        "_format_kwargs": {},
        "_format_type": None,
        "_output_all_columns": False,
        "_split": None,
    }


def saved_fingerprint(state: dict[str, Any]) -> str:
    """That of a `saved_state`. datasets/arrow_dataset.py"""
    return state["_fingerprint"]
