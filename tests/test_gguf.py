"""A model from a GGUF file: dequantised once into safetensors, and refused with the file's name where it cannot be."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TINY, Trainer, records, weights
from gguf_files import write_gguf
from ranks import run_ranks
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from llm_local.checks.preflight import preflight
from llm_local.config import ConfigError, from_flat, parse
from llm_local.data.tokenizer import load_tokenizer
from llm_local.files import Unwritten
from llm_local.model.gguf_cache import convert, gguf_path, weights_path
from llm_local.model.model_config import load_model_config
from llm_local.problems import static_problems


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with model.gguf: the tiny Llama, its MLPs in 8 bits, and a tokenizer of single bytes."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**TINY))
    path = tmp_path / "weights" / "model.gguf"
    path.parent.mkdir()
    write_gguf(path, model, "llama", {}, quantized=".mlp.")
    return path.parent


def settings(folder: Path, cache_dir: Path, name: str = "model.gguf", **more: Any) -> Any:
    return from_flat({"model_name_or_path": str(folder), "gguf_file": name, "cache_dir": str(cache_dir), **more})


def test_it_is_converted_once(folder: Path, tmp_path: Path):
    config = settings(folder, tmp_path / "cache")
    assert load_model_config(config.model).hidden_size == TINY["hidden_size"]
    convert(config)
    target = Path(weights_path(config))
    assert target.parent == tmp_path / "cache" / "gguf"
    written = (target / "model.safetensors").stat().st_mtime_ns
    convert(config)
    assert (target / "model.safetensors").stat().st_mtime_ns == written
    assert [path.name for path in target.parent.iterdir()] == [target.name], "nothing unfinished is left"
    theirs = AutoModelForCausalLM.from_pretrained(folder, gguf_file="model.gguf").state_dict()
    ours = load_file(target / "model.safetensors")
    assert set(ours) == set(theirs)
    assert all(torch.equal(ours[name], theirs[name].float()) for name in ours)
    tokenizer = load_tokenizer(config)
    assert len(tokenizer) == TINY["vocab_size"]
    assert tokenizer.convert_ids_to_tokens(tokenizer("the").input_ids)[-2:] == ["th", "e"]
    os.utime(folder / "model.gguf", (1, 1))
    assert Path(weights_path(config)) != target, "a file that has changed is another one"


@pytest.mark.processes
def test_two_at_a_time_get_the_same(folder: Path, tmp_path: Path):
    config = settings(folder, tmp_path / "cache")
    # processes: from_pretrained swaps PreTrainedModel.tie_weights while it loads, and two threads leave it swapped
    assert run_ranks(convert, 2, config) == [None, None]
    assert [str(path) for path in (tmp_path / "cache" / "gguf").iterdir()] == [weights_path(config)]


def test_a_directory_that_cannot_be_put_in_place_is_an_error(folder: Path, tmp_path: Path):
    config = settings(folder, tmp_path / "cache")
    target = Path(weights_path(config))
    target.parent.mkdir(parents=True)
    target.write_text("in the way")
    with pytest.raises(Unwritten, match="could not be written"):
        convert(config)


def refusal(config: Any, step: Any = convert) -> str:
    with pytest.raises(ConfigError) as refused:
        step(config)
    (problem,) = refused.value.problems
    assert "\n" not in problem
    return problem


def test_a_file_that_will_not_do_is_named(folder: Path, tmp_path: Path):
    named = f"gguf_file={folder}"
    said = f"gguf_file=no.gguf is not in model_name_or_path={folder}; check the name"
    assert refusal(settings(folder, tmp_path, "no.gguf")) == said
    assert refusal(settings(Path("no/such/model"), tmp_path)).startswith("model_name_or_path=no/such/model: ")
    (folder / "text.gguf").write_text("no weights")
    said = f"{named}/text.gguf is no GGUF file; name one, or leave gguf_file out"
    assert refusal(settings(folder, tmp_path, "text.gguf")) == said
    whole = (folder / "model.gguf").read_bytes()
    (folder / "half.gguf").write_bytes(whole[: len(whole) // 2])
    assert refusal(settings(folder, tmp_path, "half.gguf")).startswith(f"{named}/half.gguf cannot be read (")
    (folder / "other.gguf").write_bytes(whole.replace(b"llama", b"lhama"))
    other = settings(folder, tmp_path, "other.gguf")
    said = f"{named}/other.gguf cannot be read ("
    assert refusal(other, lambda config: load_model_config(config.model)).startswith(said)
    model = settings(folder / "model.gguf", tmp_path).model
    said = f"model_name_or_path={folder}/model.gguf is a file; use model_name_or_path={folder} and gguf_file=model.gguf"
    assert refusal(model, load_model_config) == said


def test_flags_that_do_not_go_with_it():
    config = from_flat({"config_name": "c", "gguf_file": "x.gguf"})
    said = "gguf_file=x.gguf needs model_name_or_path, the directory that it is in"
    assert said in static_problems(config, 1, True, True)


def test_without_the_package(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("llm_local.model.gguf_cache.is_gguf_available", lambda: False)
    with pytest.raises(ConfigError, match=r"gguf_file=model\.gguf needs the package gguf; pip install gguf"):
        gguf_path(settings(folder, tmp_path).model)


@pytest.mark.processes
def test_stages_train_from_it(trainer: Trainer, folder: Path):
    """As from the safetensors that it became; run.yaml keeps the file's name."""
    common = {"config_name": None, "num_stages": 2, "max_steps": 1, "eval_on_start": True}
    output = trainer.run("run", 2, model_name_or_path=folder, gguf_file="model.gguf", **common)
    config = parse(trainer.flags("run", model_name_or_path=folder, gguf_file="model.gguf", **common))
    again = trainer.run("again", 2, model_name_or_path=weights_path(config), **common)
    assert [r["loss"] for r in records(output, 1, "eval")] == [r["loss"] for r in records(again, 1, "eval")]
    mine, theirs = weights(output / "export"), weights(again / "export")
    assert all(torch.equal(mine[name], theirs[name]) for name in theirs)
    assert len(AutoTokenizer.from_pretrained(output / "export")) == TINY["vocab_size"]
    assert "gguf_file: model.gguf" in (output / "run.yaml").read_text()


def test_overrides_that_make_another_model_are_refused(trainer: Trainer, folder: Path):
    flags = {"config_name": None, "model_name_or_path": folder, "gguf_file": "model.gguf"}
    with pytest.raises(ConfigError, match="in shape 32x64, its config with config_overrides='intermediate_size=128'"):
        preflight(parse(trainer.flags("run", **flags, config_overrides="intermediate_size=128")), 1)
