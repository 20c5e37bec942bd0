"""A pretrained model's files that will not do are refused before the start, by what their headers say."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import Trainer
from safetensors.torch import save_file
from test_pretrained import SHAPE, saved
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, WEIGHTS_NAME

from llm_local.checks.preflight import preflight
from llm_local.checks.weight_problems import weight_problems
from llm_local.config import ConfigError, from_flat, parse
from llm_local.data.tokenizer import builtin_tokenizer_dir
from llm_local.model.model_config import load_model_config
from llm_local.model.pretrained import tensor_files

AGAIN = "copy it again from where it came"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    saved(tmp_path / "model")
    return tmp_path / "model"


def look(folder: Path, **flags: Any) -> tuple[list[str], tuple[str, ...]]:
    config = from_flat({"model_name_or_path": str(folder), **flags})
    return weight_problems(config, load_model_config(config.model))


def the_problem(folder: Path, **flags: Any) -> str:
    (problem,), warnings = look(folder, **flags)
    assert not warnings
    assert "\n" not in problem
    return problem


def edit(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))


def shard_of(folder: Path, tensor: str) -> Path:
    return folder / tensor_files(str(folder))[tensor]


def test_a_good_model_is_not_refused(folder: Path):
    assert look(folder) == ([], ())
    config = from_flat({"config_name": str(folder)})
    assert weight_problems(config, load_model_config(config.model)) == ([], ())


def test_a_directory_without_weights(folder: Path):
    for path in folder.glob("model*"):
        path.unlink()
    assert the_problem(folder) == (
        f"model_name_or_path={folder} holds no model.safetensors and no model.safetensors.index.json; "
        "name the directory that save_pretrained wrote, or use config_name for a new model"
    )
    (folder / WEIGHTS_NAME).write_bytes(b"pickled")
    assert the_problem(folder).endswith(
        "; pytorch_model.bin cannot be read by slices: load it with transformers once and save_pretrained it"
    )


def test_a_file_that_is_cut_short(folder: Path):
    shard = shard_of(folder, "model.layers.1.mlp.up_proj.weight")
    shard.write_bytes(shard.read_bytes()[:-4])
    size = shard.stat().st_size
    said = the_problem(folder)
    assert said.startswith(f"{shard}, {size} bytes, cannot be read (")
    assert "file not fully covered" in said
    assert said.endswith(f"; {AGAIN}")


def test_a_header_that_is_none(folder: Path):
    shard = shard_of(folder, "model.layers.1.mlp.up_proj.weight")
    shard.write_bytes(b"\xff" * 1000)
    assert the_problem(folder) == (
        f"{shard}, 1000 bytes, cannot be read (Error while deserializing header: header too large); {AGAIN}"
    )


def test_an_index_that_names_a_file_that_is_not_there(folder: Path):
    shard = shard_of(folder, "model.layers.1.mlp.up_proj.weight")
    shard.unlink()
    assert the_problem(folder) == f"{folder / SAFE_WEIGHTS_INDEX_NAME} names {shard.name}, which is not there; {AGAIN}"


@pytest.mark.parametrize(
    ("text", "reason"),
    [('{"weight_map": {', "line 1: Expecting property name"), ("{}", "no weight_map"), ("[]", "no weight_map")],
)
def test_an_index_that_is_none(folder: Path, text: str, reason: str):
    index = folder / SAFE_WEIGHTS_INDEX_NAME
    index.write_text(text)
    said = the_problem(folder)
    assert said.startswith(f"{index} is no index of weights ({reason}")
    assert said.endswith(f"; {AGAIN}")


def test_a_tensor_that_is_not_where_the_index_says(folder: Path):
    index, name = folder / SAFE_WEIGHTS_INDEX_NAME, "model.layers.1.mlp.up_proj.weight"
    other = next(file for file in sorted(folder.glob("model-*")) if file != shard_of(folder, name)).name
    edit(index, lambda values: values["weight_map"].update({name: other}))
    assert the_problem(folder) == f"{index} names {name} of {other}, which does not hold it; {AGAIN}"


def test_a_tensor_that_is_missing(folder: Path):
    names = ("model.layers.1.mlp.up_proj.weight", "model.norm.weight")
    edit(folder / SAFE_WEIGHTS_INDEX_NAME, lambda values: [values["weight_map"].pop(name) for name in names])
    assert the_problem(folder) == (
        f"{folder} lacks {names[0]} and 1 more that its config (model_type 'llama') has; "
        "use the config that was saved with the weights"
    )


def test_an_expert_that_is_missing(tmp_path: Path):
    """transformers cannot fuse those that are there, and would say so much later."""
    saved(tmp_path, "mixtral")
    name = "model.layers.2.block_sparse_moe.experts.3.w1.weight"
    edit(tmp_path / SAFE_WEIGHTS_INDEX_NAME, lambda values: values["weight_map"].pop(name))
    assert the_problem(tmp_path).startswith(f"{tmp_path} lacks {name} that its config (model_type 'mixtral') has; ")


def test_a_config_that_disagrees_with_the_weights(folder: Path):
    edit(folder / "config.json", lambda values: values.update(intermediate_size=128))
    shard = shard_of(folder, "model.layers.0.mlp.down_proj.weight")
    assert the_problem(folder) == (
        f"{shard} has model.layers.0.mlp.down_proj.weight in shape 32x64, its config (model_type 'llama') in 32x128 "
        "(and 11 more differ); use the config that was saved with the weights"
    )


def test_overrides_that_make_another_model(folder: Path):
    said = "its config with config_overrides='vocab_size=300' in 300x32"
    assert said in the_problem(folder, config_overrides="vocab_size=300")
    (folder / "model").mkdir()
    said = the_problem(folder, config_overrides="num_hidden_layers=6")
    assert said == (
        f"{folder} lacks model.layers.4.input_layernorm.weight and 17 more that its config with "
        "config_overrides='num_hidden_layers=6' has; leave out overrides that change what is loaded"
    )


def test_the_weights_of_another_type(folder: Path):
    gpt2 = {"model_type": "gpt2", "n_embd": 32, "n_layer": 4, "n_head": 4, "vocab_size": 256}
    (folder / "config.json").write_text(json.dumps(gpt2))
    assert the_problem(folder) == (
        f"{folder} lacks transformer.h.0.attn.c_attn.bias and 50 more that its config (model_type 'gpt2') has, and has "
        "model.embed_tokens.weight and 37 more instead; use the config that was saved with the weights"
    )


def test_layers_that_are_left_out_are_a_warning(folder: Path):
    problems, warnings = look(folder, config_overrides="num_hidden_layers=3")
    assert not problems
    left = "model.layers.3.input_layernorm.weight and 8 more"
    assert warnings == (f"{folder} has more than the model, and it is left out: {left}",)


def test_two_tensors_that_the_config_ties_and_that_differ_are_a_warning(tmp_path: Path):
    model, _ = saved(tmp_path, "llama-tied", "1GB")
    tensors = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    assert look(tmp_path) == ([], ())
    tensors["lm_head.weight"][200] += 1
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    assert look(tmp_path) == (
        [],
        (
            f"{tmp_path} has lm_head.weight and model.embed_tokens.weight that differ, though its config ties them: "
            "the model is trained untied",
        ),
    )


def test_quantised_weights(folder: Path):
    edit(folder / "config.json", lambda values: values.update(quantization_config={"quant_method": "gptq"}))
    assert the_problem(folder) == (
        f"{folder} has quantised weights (gptq), which cannot be trained; use the model they were made of"
    )


def test_the_refusal_of_a_start(trainer: Trainer, folder: Path):
    """Together with what else is wrong, and before anything is written."""
    AutoTokenizer.from_pretrained(builtin_tokenizer_dir(trainer.cache)).save_pretrained(folder)
    shard = shard_of(folder, "model.norm.weight")
    shard.write_bytes(shard.read_bytes()[:-4])
    flags = trainer.flags("run", config_name=None, model_name_or_path=folder, method="layerwise")
    with pytest.raises(ConfigError) as refusal:
        preflight(parse(flags), 1)
    choice, damaged, vocabulary = refusal.value.problems
    assert choice.startswith("method='layerwise'")
    assert damaged.startswith(f"{shard}, ")
    assert vocabulary.startswith("the model's vocabulary of 256 has no row for the tokenizer's highest id 4095; ")
    assert not (trainer.folder / "run").exists()


def test_the_models_own_tokenizer_with_too_many_tokens(trainer: Trainer, folder: Path):
    """New rows would be needed, which a pretrained model has no weights for."""
    AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **SHAPE)).save_pretrained(folder)
    AutoTokenizer.from_pretrained(builtin_tokenizer_dir(trainer.cache)).save_pretrained(folder)
    with pytest.raises(ConfigError) as refusal:
        preflight(parse(trainer.flags("run", config_name=None, model_name_or_path=folder)), 1)
    (problem,) = refusal.value.problems
    assert problem == (
        "the model's vocabulary of 256 has no row for the tokenizer's highest id 4095; choose another tokenizer "
        "(--tokenizer_name): a pretrained model has weights for no more tokens"
    )
