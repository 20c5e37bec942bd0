"""A pretrained model read by slices: what is read, and that nothing else needs to be there."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TINY, Trainer, weights
from ranks import run_ranks
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME

from llm_local.checks.weight_problems import weight_problems
from llm_local.config import ConfigError, from_flat
from llm_local.data.tokenizer import builtin_tokenizer_dir
from llm_local.export.stages import collect
from llm_local.flags import ModelArguments
from llm_local.model.anatomy import probe
from llm_local.model.block import Block
from llm_local.model.model_config import load_model_config
from llm_local.model.pretrained import load_slice, tensor_files
from llm_local.model.stage import Blueprint, build_block
from llm_local.partition import Partition, Span

IDS = torch.arange(16)[None]

SHAPE = {k: v for k, v in TINY.items() if k != "model_type"} | {"vocab_size": 256}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama-tied": ("llama", {"tie_word_embeddings": True}),
    "gpt2-tied": ("gpt2", {}),
    "bloom-tied": ("bloom", {}),
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
            collected = collect([part], None, keep=True, folded={})
            tensors |= collected.body | collected.head
        output: Any = parts[-1].model.get_output_embeddings()
        assert torch.equal(output(normed), model(input_ids=ids).logits)
    again = AutoModelForCausalLM.from_pretrained(tmp_path).state_dict()
    assert set(tensors) >= set(tensor_files(str(tmp_path)))
    assert all(torch.equal(again[name], tensors[name]) for name in again if name in tensors)


def in_two_stages(folder: Path, **flags: Any) -> list[Block]:
    """The blocks that a run on two stages makes of the folder, once its start has found nothing wrong."""
    run = from_flat({"model_name_or_path": str(folder), "num_stages": 2, **flags})
    config = load_model_config(run.model)
    problems, _ = weight_problems(run, config)
    assert problems == []
    halves = Partition((Span(0, 2), Span(2, 4)), (Span(0, 1), Span(1, 2)))
    return [build_block(Blueprint(run, config, probe(config, run.model), halves), index).eval() for index in range(2)]


@torch.no_grad()
def logits_and_loss(blocks: list[Block]) -> tuple[torch.Tensor, torch.Tensor]:
    hidden, logits, loss = None, torch.empty(0), torch.empty(0)
    for block in blocks:
        entering = hidden
        logits, _, _ = block(IDS, entering, return_logits=True)
        loss, hidden, _ = block(IDS, entering)
    return logits, loss


def assert_equal_to_transformers(folder: Path, blocks: list[Block]) -> Any:
    """Logits bit for bit, the loss up to rounding; returns the model that transformers loads."""
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"]
    with torch.no_grad():
        wanted = model(input_ids=IDS, labels=IDS, use_cache=False)
    logits, loss = logits_and_loss(blocks)
    assert torch.equal(logits, wanted.logits)
    torch.testing.assert_close(loss, wanted.loss)
    return model


@pytest.mark.parametrize("name", ["gpt2-tied", "bloom-tied"])
def test_a_checkpoint_of_the_base_class(name: str, tmp_path: Path):
    """Which has no prefix before its names, and of a tied model no output matrix."""
    model, _ = saved(tmp_path, name)
    for file in tmp_path.glob("model*"):
        file.unlink()
    model.base_model.save_pretrained(tmp_path / "base", max_shard_size="20KB")
    for file in (tmp_path / "base").glob("model*"):
        file.rename(tmp_path / file.name)
    assert not any(name.startswith("transformer.") for name in tensor_files(str(tmp_path)))
    blocks = in_two_stages(tmp_path)
    assert_equal_to_transformers(tmp_path, blocks)
    first = collect([blocks[0].body], blocks[0].head, keep=True, folded={})
    assert first.body.keys() | first.head.keys() < model.state_dict().keys()


def test_a_tied_checkpoint_that_has_the_output_matrix_alone(tmp_path: Path):
    saved(tmp_path, "llama-tied", "1GB")
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["lm_head.weight"] = tensors.pop("model.embed_tokens.weight")
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    assert_equal_to_transformers(tmp_path, in_two_stages(tmp_path))


@pytest.mark.parametrize("are_equal", [True, False])
@pytest.mark.parametrize("num_blocks", [1, 2])
def test_files_that_have_both_of_what_the_config_ties(are_equal: bool, num_blocks: int, tmp_path: Path):
    _, config = saved(tmp_path, "llama-tied", "1GB")
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] + (0 if are_equal else 0.1 * torch.randn(256, 32))
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    blocks = in_two_stages(tmp_path)
    if num_blocks == 1:
        run = from_flat({"model_name_or_path": str(tmp_path)})
        whole = Partition((Span(0, 4),), (Span(0, 1),))
        blocks = [build_block(Blueprint(run, config, probe(config, run.model), whole), 0).eval()]
    reference = assert_equal_to_transformers(tmp_path, blocks)
    output: Any = blocks[0].head.model.get_output_embeddings()
    assert torch.equal(output.weight, tensors["lm_head.weight"])
    is_tied = output.weight is blocks[0].body.model.get_input_embeddings().weight
    assert is_tied is are_equal
    assert (reference.lm_head.weight is reference.model.embed_tokens.weight) is are_equal


@pytest.mark.processes
def test_what_differs_in_the_files_is_exported_untied(trainer: Trainer, tmp_path: Path):
    folder, tokenizer = tmp_path / "model", builtin_tokenizer_dir(trainer.cache)
    config = AutoConfig.for_model(**TINY, tie_word_embeddings=True)
    tensors = AutoModelForCausalLM.from_config(config).state_dict()
    tensors["lm_head.weight"] = torch.randn(4096, 32)
    config.save_pretrained(folder)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    flags = {"config_name": None, "model_name_or_path": folder, "tokenizer_name": tokenizer, "learning_rate": 1e-9}
    export = trainer.run("run", 1, num_stages=1, **flags) / "export"
    assert AutoConfig.from_pretrained(export).tie_word_embeddings is False
    torch.testing.assert_close(weights(export)["lm_head.weight"], tensors["lm_head.weight"])


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
