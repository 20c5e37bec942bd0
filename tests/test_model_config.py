"""The config of the model to train: overrides reach what follows from them, and a wrong one is named."""

from __future__ import annotations

import json
import socket
from pathlib import Path
from typing import Any

import pytest
from conftest import TINY

from llm_local.checks.weight_problems import weight_problems
from llm_local.config import ConfigError, from_flat
from llm_local.flags import ModelArguments
from llm_local.model.anatomy import SliceError, probe
from llm_local.model.model_config import load_model_config

GPT2 = {"model_type": "gpt2", "n_embd": 32, "n_head": 4, "n_layer": 2}


@pytest.fixture
def load(tmp_path: Path):
    """load(model's JSON, overrides) → its config."""

    def load(values: dict[str, Any], overrides: str | None = None):
        path = tmp_path / "model.json"
        path.write_text(json.dumps(values))
        return load_model_config(ModelArguments(config_name=str(path), config_overrides=overrides))

    return load


def refusal(*arguments: Any, **named: Any) -> str:
    with pytest.raises(ConfigError) as refused:
        load_model_config(ModelArguments(*arguments, **named))
    (problem,) = refused.value.problems
    return problem


def test_values_that_follow_from_others_follow_the_overrides(load):
    assert load(TINY).head_dim == 8
    config = load(TINY, "hidden_size=64,num_hidden_layers=6")
    assert (config.hidden_size, config.num_hidden_layers, config.head_dim) == (64, 6, 16)
    assert load(TINY, "head_dim=16").head_dim == 16
    assert load(TINY, "tie_word_embeddings=true").tie_word_embeddings is True
    assert load({**TINY, "head_dim": 8}, "hidden_size=64").head_dim == 8, "what the JSON says stays"


@pytest.mark.parametrize("values", [GPT2, {"hidden_size" if k == "n_embd" else k: v for k, v in GPT2.items()}])
@pytest.mark.parametrize("overrides", ["n_embd=64,n_layer=6", "hidden_size=64,num_hidden_layers=6"])
def test_both_names_of_a_value_mean_the_same(load, values: dict[str, Any], overrides: str):
    config = load(values, overrides)
    assert (config.n_embd, config.hidden_size, config.n_layer) == (64, 64, 6)


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        ("no_such=1", "key no_such isn't in the original config dict"),
        ("hidden_size=big", "invalid literal for int() with base 10: 'big'"),
        ("hidden_size", "'hidden_size' is not name=value"),
        ("rope_parameters=3", "rope_parameters is a dictionary; give it as JSON, as rope_parameters={...}"),
        ("hidden_size=65", "The hidden size (65) is not a multiple of the number of attention heads (4)."),
        ("num_attention_heads=0", "integer division or modulo by zero"),
    ],
)
def test_an_override_that_is_wrong(load, overrides: str, said: str):
    with pytest.raises(ConfigError) as refused:
        load(TINY, overrides)
    (problem,) = refused.value.problems
    assert problem.startswith(f"config_overrides={overrides!r}: ")
    assert said in problem


QWEN2 = TINY | {"model_type": "qwen2", "layer_types": ["full_attention"] * 4}
GEMMA2 = TINY | {"model_type": "gemma2", "head_dim": 8}


@pytest.mark.parametrize(
    ("values", "overrides", "wanted"),
    [
        (QWEN2, "num_hidden_layers=2", ["full_attention"] * 2),
        (QWEN2, "num_hidden_layers=6", ["full_attention"] * 6),
        (QWEN2, 'layer_types=["full_attention","full_attention"],num_hidden_layers=2', ["full_attention"] * 2),
        (GEMMA2 | {"layer_types": ["sliding_attention", "full_attention"] * 2}, "num_hidden_layers=5", None),
        (
            GEMMA2 | {"layer_types": ["full_attention"] * 3 + ["sliding_attention"]},
            "num_hidden_layers=2",
            ["full_attention"] * 2,
        ),
    ],
    ids=["cut", "longer", "given", "the type's own pattern", "a pattern of the JSON"],
)
def test_lists_with_an_entry_a_layer_follow_the_number_of_layers(load, values, overrides: str, wanted):
    found = load(values, overrides).layer_types
    assert found == (
        wanted or ["sliding_attention", "full_attention", "sliding_attention", "full_attention", "sliding_attention"]
    )


SCALED = {"rope_type": "linear", "factor": 2.0}


@pytest.mark.parametrize(
    ("values", "overrides", "wanted"),
    [
        ({}, "rope_theta=500000", {"rope_type": "default", "rope_theta": 500000}),
        ({}, f"rope_scaling={json.dumps(SCALED)},hidden_size=64", SCALED | {"rope_theta": 10000.0}),
        ({"rope_theta": 5e5}, f"rope_parameters={json.dumps(SCALED)}", SCALED | {"rope_theta": 5e5}),
        ({"rope_scaling": SCALED}, "rope_theta=7", SCALED | {"rope_theta": 7}),
        ({"rope_scaling": SCALED}, "rope_scaling=null", {"rope_type": "default", "rope_theta": 10000.0}),
    ],
)
def test_rotary_values_have_their_old_names_too(load, values: dict[str, Any], overrides: str, wanted: dict[str, Any]):
    assert load(TINY | values, overrides).rope_parameters == wanted


def test_lists_and_parts_of_a_config(load):
    assert load(TINY, "eos_token_id=[1,2],bos_token_id=null").eos_token_id == [1, 2]
    nested = {"model_type": "gemma3", "text_config": TINY | {"model_type": "gemma3_text", "head_dim": 8}}
    text = load(nested, 'text_config={"num_hidden_layers":2}').text_config
    assert (text.num_hidden_layers, text.hidden_size, len(text.layer_types)) == (2, 32, 2)


@pytest.mark.parametrize(
    ("values", "overrides", "said"),
    [
        (
            QWEN2,
            "layer_types=[full_attention]",
            "the value of layer_types is not JSON (Expecting value at 'full_attention]'",
        ),
        (QWEN2, "layer_types=full", "layer_types is a list; give it as JSON, as layer_types=[...]"),
        (TINY, "rope_scaling=[1]", "rope_scaling is a dictionary; give it as JSON, as rope_scaling={...}"),
        (
            TINY,
            "eos_token_id=[1]hidden_size=64",
            "after the value of eos_token_id stands 'hidden_size=64', not a comma",
        ),
        (GPT2, "rope_theta=5", "key rope_theta isn't in the original config dict"),
        (
            GEMMA2 | {"layer_types": ["full_attention"] * 3 + ["sliding_attention"]},
            "num_hidden_layers=6",
            "layer_types has 4 entries and num_hidden_layers is 6; give layer_types=[...], too",
        ),
        (
            TINY | {"model_type": "gemma3_text", "head_dim": 8},
            "rope_theta=5",
            'layers differ in their rotary values; give all of them, as rope_parameters={"sliding_attention":{...}}',
        ),
        ({"model_type": "gemma3"}, 'text_config={"no_such":2}', "key no_such isn't in the original config dict"),
    ],
)
def test_a_list_or_dictionary_that_is_wrong(load, values: dict[str, Any], overrides: str, said: str):
    with pytest.raises(ConfigError) as refused:
        load(values, overrides)
    assert refused.value.problems[0].startswith(f"config_overrides={overrides!r}: ")
    assert said in refused.value.problems[0]


@pytest.mark.processes
@pytest.mark.parametrize(
    ("values", "said"),
    [
        (
            {"hidden_act": "no_such"},
            "no 'llama' model runs with hidden_act=no_such (the type's own is silu): change that",
        ),
        ({"num_key_value_heads": 3}, "no 'llama' model runs with num_key_value_heads=3 (the type's own is "),
        (
            {"rope_scaling": {"rope_type": "no_such"}},
            "no 'llama' model runs with rope_parameters={'rope_type': 'no_such'",
        ),
        ({"num_hidden_layers": 0}, "no 'llama' model runs with num_hidden_layers=0 (the type's own is 32)"),
        (
            {"model_type": "mixtral", "num_local_experts": 2, "num_experts_per_tok": 4},
            "no 'mixtral' model runs with num_experts_per_tok=4 (the type's own is 2)",
        ),
        (
            {"model_type": "camembert", "is_decoder": True, "pad_token_id": None},
            "pad_token_id=None (the type's own is 1)",
        ),
        (
            {"model_type": "gemma3", "text_config": TINY | {"head_dim": 8, "hidden_activation": "no_such"}},
            "no 'gemma3' model runs with text_config.hidden_activation=no_such (the type's own is gelu_pytorch_tanh)",
        ),
    ],
)
def test_a_value_that_no_model_runs_with_is_named_and_not_the_type(load, values: dict[str, Any], said: str):
    with pytest.raises(SliceError) as refused:
        probe(load(TINY | values), ModelArguments())
    assert said in str(refused.value)


def test_a_padding_id_of_the_type_that_is_outside_the_vocabulary(load):
    """phi3's own is 32000; a new model does without, and one that somebody sets is refused."""
    assert load(TINY | {"model_type": "phi3"}).pad_token_id is None
    with pytest.raises(
        ConfigError, match="pad_token_id=4096 is outside the vocabulary of 4096; set pad_token_id to an"
    ):
        load(TINY | {"model_type": "phi3"}, "pad_token_id=4096")


def test_an_override_that_the_config_works_out_by_itself(load):
    with pytest.raises(ConfigError, match="head_dim is 64 whatever is set: it follows from other values"):
        load({"model_type": "deepseek_v2"}, "head_dim=128")


def test_a_config_that_contradicts_itself(load):
    with pytest.raises(
        ConfigError, match=r"no model config in .*The hidden size \(65\) is not a multiple of the number"
    ):
        load(TINY | {"hidden_size": 65})
    with pytest.raises(ConfigError, match=r"no model config in .*model\.json: integer division"):
        load(TINY | {"num_attention_heads": 0})


def test_a_types_default_config_and_changes_to_it():
    """What the type derives from a value follows the value; nothing else is made up."""
    assert load_model_config(ModelArguments(model_type="gpt2")).n_layer == 12
    overrides = "hidden_size=64,num_attention_heads=4,num_hidden_layers=3"
    config = load_model_config(ModelArguments(model_type="llama", config_overrides=overrides))
    assert (config.head_dim, config.num_key_value_heads, config.num_hidden_layers) == (16, 4, 3)
    assert config.vocab_size == 32000


def test_a_type_that_is_none():
    assert refusal(model_type="lama").startswith(
        "model_type='lama' is unknown to transformers; did you mean one of llama"
    )
    assert refusal(model_type="llama", config_overrides="hidden_size=30").startswith(
        "config_overrides='hidden_size=30': Class validation error for validator 'validate_architecture': "
        "ValueError: The hidden size (30) is not a multiple of the number of attention heads"
    )


def test_an_adapter_is_no_model(tmp_path: Path):
    """As PEFT saves one; with a config beside it, transformers would load the base model and the adapter."""
    (tmp_path / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "some/base", "r": 8}))
    said = (
        f"{tmp_path} is a PEFT adapter of some/base, not a whole model; merge them "
        f"(AutoPeftModelForCausalLM.from_pretrained('{tmp_path}').merge_and_unload().save_pretrained(FOLDER)) and name "
        "FOLDER"
    )
    assert refusal(model_name_or_path=str(tmp_path)) == f"model_name_or_path={said}"
    assert refusal(config_name=str(tmp_path)) == f"config_name={said}"
    assert refusal(config_name=f"{tmp_path}/adapter_config.json") == f"config_name={said}".replace(
        " is a", "/adapter_config.json is a", 1
    )
    (tmp_path / "config.json").write_text(json.dumps(TINY))
    assert load_model_config(ModelArguments(config_name=str(tmp_path))).hidden_size == 32
    run = from_flat({"model_name_or_path": str(tmp_path)})
    assert weight_problems(run, load_model_config(run.model)) == ([f"model_name_or_path={said}"], ())


def test_the_folder_of_a_run_is_no_model(tmp_path: Path):
    (tmp_path / "run" / "export").mkdir(parents=True)
    (tmp_path / "run" / "export" / "config.json").write_text("{}")
    run = str(tmp_path / "run")
    assert refusal(model_name_or_path=run) == (
        f"model_name_or_path={run} is the folder of a run, not a model; did you mean {run}/export?"
    )


def test_a_relative_path_that_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    assert refusal(config_name="no.json") == f"config_name=no.json: no such file (relative to {tmp_path})"
    assert refusal(model_name_or_path="no/such/model").startswith(
        f"no model config in no/such/model (relative to {tmp_path}): "
    )


def test_a_config_file_by_a_relative_path_is_no_name_on_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Nothing is asked of the network, where 'configs/tiny.json' would be a repository's name."""
    asked: list[object] = []

    def look_up(*place: object, **_: object) -> None:
        asked.append(place)
        raise OSError("no network")

    (tmp_path / "configs").mkdir()
    (tmp_path / "configs/tiny.json").write_text(json.dumps(TINY))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    assert load_model_config(ModelArguments(config_name="configs/tiny.json")).num_hidden_layers == 4
    assert not asked
