"""A GGUF file as a directory of safetensors, written once: stages read their own tensors of it.

transformers dequantises a GGUF as a whole, which takes time and the memory of the whole model, so rank 0 does it before
the ranks meet. The directory is in cache_dir under a name made of the file's path, size and time of change.
"""

from __future__ import annotations

import copy
import os
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import torch
from datasets.fingerprint import Hasher
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GgufConfig, PretrainedConfig
from transformers.utils import is_gguf_available

from llm_local.adapters.hf_internals import file_of
from llm_local.config import Config, ConfigError, from_here
from llm_local.files import writing
from llm_local.flags import ModelArguments
from llm_local.model.gguf_header import complete_config, named

REVISION = 2  # counts changes of this file that change the result


def weights_path(config: Config) -> str:
    """Where the pretrained model's safetensors and tokenizer are: model_name_or_path, or what the GGUF became."""
    model = config.model
    assert model.model_name_or_path is not None
    if model.gguf_file is None:
        return model.model_name_or_path
    return str(_target(gguf_path(model), config.cache_dir))


def gguf_path(model: ModelArguments) -> Path:
    """The GGUF file in the directory or of the hub. Raises ConfigError if it is not there or cannot be read."""
    source, name = model.model_name_or_path, model.gguf_file
    assert source is not None
    assert name is not None
    try:
        found = file_of(source, name)
    except OSError as error:
        raise ConfigError([f"model_name_or_path={source}: {str(error).splitlines()[0]}"]) from error
    if found is None:
        raise ConfigError(
            [f"gguf_file={name} is not in model_name_or_path={source}{from_here(source)}; check the name"]
        )
    path = Path(found)
    with path.open("rb") as file:
        if file.read(4) != b"GGUF":
            raise ConfigError([f"gguf_file={path} is no GGUF file; name one, or leave gguf_file out"])
    if not is_gguf_available():
        raise ConfigError([f"gguf_file={name} needs the package gguf; pip install gguf"])
    return path


def read_gguf_config(path: Path) -> PretrainedConfig:
    """The model's config. Raises ConfigError naming the file if transformers does not know the architecture."""
    try:
        return copy.deepcopy(_read_config(path, path.stat().st_mtime_ns))
    except Exception as error:
        raise ConfigError([_unreadable(path, error)]) from error


@cache
def _read_config(path: Path, _changed: int) -> PretrainedConfig:
    """Seconds: the header holds the vocabulary."""
    return complete_config(AutoConfig.from_pretrained(path.parent, gguf_file=path.name), path)


def _unreadable(path: Path, error: Exception) -> str:
    """Of an error of the readers of the format and of each architecture, which raise what they like."""
    reason = " ".join(str(error).split())
    return (
        f"gguf_file={path} cannot be read ({reason}); use a GGUF of an architecture that transformers reads, or the "
        "model's safetensors"
    )


def _target(path: Path, cache_dir: Path) -> Path:
    status = path.stat()
    key = Hasher.hash([REVISION, str(path.resolve()), status.st_size, status.st_mtime_ns])
    return cache_dir / "gguf" / f"{path.stem}-{key}"


def convert(config: Config) -> None:
    """Writes the safetensors of the run's GGUF, if it has one and they are not there yet: whole, or not at all.

    Raises ConfigError naming the file if transformers cannot read it, Unwritten where there is no room for them.
    """
    model = config.model
    if model.gguf_file is None:
        return
    path = gguf_path(model)
    target = _target(path, config.cache_dir)
    if target.is_dir():
        return
    whole = _dequantise(path)
    with writing(target):
        target.parent.mkdir(parents=True, exist_ok=True)
    with writing(target), tempfile.TemporaryDirectory(dir=target.parent, prefix=".unfinished-") as unfinished:
        folder = Path(unfinished, "model")
        for part in whole:
            part.save_pretrained(folder)
        try:
            os.rename(folder, target)
        except OSError:
            if not target.is_dir():  # else another process was faster, with the same result
                raise


def _dequantise(path: Path) -> tuple[Any, Any]:
    """The model in float32, and its tokenizer."""
    where: dict[str, Any] = {"pretrained_model_name_or_path": path.parent, "gguf_file": path.name}
    try:
        quantization = GgufConfig(dequantize=True)  # without it the result could not be saved
        loader: Any = AutoModelForCausalLM
        model, info = loader.from_pretrained(
            **where,
            config=read_gguf_config(path),
            dtype=torch.float32,
            quantization_config=quantization,
            output_loading_info=True,
        )
        if wrong := info["missing_keys"] or info["unexpected_keys"]:
            raise ValueError(f"{'lacks' if info['missing_keys'] else 'has no place for'} {named(wrong)}")
        return model, AutoTokenizer.from_pretrained(**where)
    except Exception as error:
        raise ConfigError([_unreadable(path, error)]) from error
