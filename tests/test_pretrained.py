"""A pretrained model read by slices: what is read, and that nothing else needs to be there."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TINY
from ranks import run_ranks
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME

from llm_local.config import ConfigError, ModelArguments
from llm_local.export.stages import collect
from llm_local.model.anatomy import probe
from llm_local.model.pretrained import load_slice, tensor_files
from llm_local.partition import Span

SHAPE = {k: v for k, v in TINY.items() if k != "model_type"} | {"vocab_size": 256}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama-tied": ("llama", {"tie_word_embeddings": True}),
    "gpt2-tied": ("gpt2", {}),
    "mixtral": ("mixtral", {"num_local_experts": 4}),
    "qwen2_moe": ("qwen2_moe", {"num_experts": 4, "moe_intermediate_size": 16}),
}


def saved(folder: Path, name: str = "llama", shard_size: str = "20KB") -> tuple[Any, Any]:
    """A model of the kind, with weights that no initialisation gives, written to the folder."""
    kind, more = MODELS[name]
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **SHAPE, **more)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(folder, max_shard_size=shard_size)
    return model.eval(), config


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("shard_size", ["20KB", "1GB"])
def test_slices_of_a_saved_model_are_the_model(name: str, shard_size: str, tmp_path: Path):
    """Bit for bit, and what is collected of them has the names and values of the file."""
    model, config = saved(tmp_path, name, shard_size)
    anatomy, ids = probe(config, ModelArguments()), torch.arange(16)[None]
    hidden, normed = None, torch.empty(0)
    parts = [load_slice(str(tmp_path), config, anatomy, Span(a, b), has_head=b == 4) for a, b in pairwise((0, 1, 3, 4))]
    tensors: dict[str, torch.Tensor] = {}
    with torch.no_grad():
        for part in parts:
            hidden, normed = part(hidden, input_ids=ids)
            collected = collect([part], None, zero3=False, keep=True, folded={})
            tensors |= collected.body | collected.head
        output: Any = parts[-1].model.get_output_embeddings()
        assert torch.equal(output(normed), model(input_ids=ids).logits)
    again = AutoModelForCausalLM.from_pretrained(tmp_path).state_dict()
    assert set(tensors) >= set(tensor_files(str(tmp_path)))
    assert all(torch.equal(again[name], tensors[name]) for name in again if name in tensors)


def test_only_the_files_that_hold_the_slice_are_needed(tmp_path: Path):
    model, config = saved(tmp_path)
    anatomy, files = probe(config, ModelArguments()), tensor_files(str(tmp_path))
    needed = {file for name, file in files.items() if ".layers.1." in name or ".layers.2." in name}
    others = set(files.values()) - needed
    assert others, "the shards were to be small"
    for name in others:
        (tmp_path / name).unlink()
    part = load_slice(str(tmp_path), config, anatomy, Span(1, 3), has_head=False)
    for name, tensor in part.model.state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name]), name
    with pytest.raises(ConfigError, match=rf"{SAFE_WEIGHTS_INDEX_NAME} of {tmp_path} names .* which is not there"):
        load_slice(str(tmp_path), config, anatomy, Span(3, 4))


def _read_bytes(path: str, start: int, stop: int) -> tuple[int, int]:
    """Resident bytes that a slice has added, and the size of its parameters."""
    import psutil

    config = AutoConfig.from_pretrained(path)
    anatomy = probe(config, ModelArguments())
    load_slice(path, config, anatomy, Span(0, 0), has_head=False)  # what the first load of a process costs
    before = psutil.Process().memory_info().rss
    part = load_slice(path, config, anatomy, Span(start, stop), has_head=False)
    after = psutil.Process().memory_info().rss
    return after - before, sum(p.numel() * p.element_size() for p in part.model.parameters())


@pytest.mark.processes
def test_a_slice_costs_its_own_memory_and_not_the_models(tmp_path: Path):
    config = AutoConfig.for_model("llama", **SHAPE | {"hidden_size": 512, "intermediate_size": 2048, "head_dim": 128})
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    size = (tmp_path / "model.safetensors").stat().st_size
    ((read, wanted),) = run_ranks(_read_bytes, 1, str(tmp_path), 1, 2)
    assert wanted < size / 3.5
    assert 0.5 * wanted < read < 1.5 * wanted, (read, wanted, size)


def test_a_slice_is_no_view_of_its_file(tmp_path: Path):
    """Which may be written again while a run goes on."""
    model, config = saved(tmp_path, shard_size="1GB")
    part = load_slice(str(tmp_path), config, probe(config, ModelArguments()), Span(1, 2), has_head=False)
    file = tmp_path / "model.safetensors"
    with file.open("r+b") as writer:
        writer.seek(file.stat().st_size // 4)
        writer.write(b"\0" * (file.stat().st_size * 3 // 4))
    for name, parameter in part.model.named_parameters():
        assert torch.equal(parameter, model.state_dict()[name]), name


def test_a_checkpoint_that_transformers_cannot_convert_is_named(tmp_path: Path):
    _, config = saved(tmp_path, "mixtral", "1GB")
    index = {"weight_map": {n: f for n, f in tensor_files(str(tmp_path)).items() if "experts.3.w1" not in n}}
    (tmp_path / "model.safetensors").rename(tmp_path / "all.safetensors")
    index["weight_map"] = dict.fromkeys(index["weight_map"], "all.safetensors")
    (tmp_path / SAFE_WEIGHTS_INDEX_NAME).write_text(json.dumps(index))
    with pytest.raises(ConfigError, match=f"model_name_or_path={tmp_path} cannot be loaded: .*conversion"):
        load_slice(str(tmp_path), config, probe(config, ModelArguments()), Span(0, 2))


def test_a_name_that_the_hub_could_not_have_is_refused():
    with pytest.raises(ConfigError, match=r"model_name_or_path=no/such/model: "):
        tensor_files("no/such/model")
