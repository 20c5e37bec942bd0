"""Slices of Hugging Face models: exact, and refused with a reason where they could not be."""

from __future__ import annotations

import json
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TINY
from pydantic import TypeAdapter
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from llm_local.checks.class_problems import class_problems
from llm_local.checks.tiny import tiny_config
from llm_local.config import Config, ConfigError
from llm_local.flags import ModelArguments
from llm_local.model.anatomy import Anatomy, SliceError, probe
from llm_local.model.model_config import load_model_config
from llm_local.model.pretrained import load_slice
from llm_local.model.slices import Slice, check_set, new_slice
from llm_local.partition import Span

BASE = TINY | {"vocab_size": 256, "num_hidden_layers": 6}
GPT: dict[str, Any] = {"vocab_size": 256, "n_embd": 32, "n_layer": 6, "n_head": 4, "n_positions": 64}
CONFIGS: dict[str, dict[str, Any]] = {
    "llama": BASE,
    "llama-tied": BASE | {"tie_word_embeddings": True},
    "gpt2": GPT,
    "llama-dynamic": BASE | {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}, "max_position_embeddings": 8},
    "qwen3": BASE | {"head_dim": 8},
    "gemma3_text": BASE | {"head_dim": 8, "sliding_window": 4},
    "mixtral": BASE | {"num_local_experts": 4},
    "gpt_neox": BASE,
    "bloom": {"vocab_size": 256, "hidden_size": 32, "n_layer": 6, "n_head": 4},
    "opt": {
        **{"vocab_size": 256, "hidden_size": 32, "ffn_dim": 64, "num_hidden_layers": 6, "num_attention_heads": 4},
        **{"word_embed_proj_dim": 16, "max_position_embeddings": 64, "dropout": 0.0},
    },
}


def make_config(name: str) -> Any:
    kind = name.split("-")[0]
    return AutoConfig.for_model(kind, **{k: v for k, v in CONFIGS[name].items() if k != "model_type"})


def anatomy_of(config: Any) -> Anatomy:
    return probe(config, ModelArguments())


def cut(config: Any, anatomy: Anatomy, cuts: tuple[int, ...]) -> list[Slice]:
    return [new_slice(config, anatomy, Span(a, b), seed=3) for a, b in pairwise(cuts)]


def chain(parts: list[Slice], ids: torch.Tensor) -> torch.Tensor:
    """The last slice's normed output, with the graph through all of them."""
    hidden, normed = None, torch.empty(0)
    for part in parts:
        hidden, normed = part(hidden, input_ids=ids)
    return normed


@pytest.mark.parametrize("name", CONFIGS)
def test_slices_together_are_the_model(name: str):
    """Weights, output and every gradient equal the undivided model's bit for bit."""
    config = make_config(name)
    anatomy = anatomy_of(config)
    (whole,) = cut(config, anatomy, (0, 6))
    parts = cut(config, anatomy, (0, 1, 4, 6))
    ids = torch.randint(0, 256, (2, 16), generator=torch.Generator().manual_seed(0))
    for part in (whole, *parts):
        part.model.eval()
    ours, theirs = chain(parts, ids), chain([whole], ids)
    assert torch.equal(ours, theirs)
    ours.square().sum().backward()
    theirs.square().sum().backward()
    tied = config.tie_word_embeddings and name != "bloom"
    wanted = dict(whole.model.named_parameters())
    seen = set()
    for part in parts:
        heads = () if part.is_last else part.anatomy.after
        for key, parameter in part.model.named_parameters():
            if key.rpartition(".")[0] in heads or (tied and key.startswith("lm_head")):
                continue
            seen.add(key)
            assert torch.equal(parameter, wanted[key]), key
            if wanted[key].grad is not None:
                assert parameter.grad is not None, key
                assert torch.equal(parameter.grad, wanted[key].grad), key
    assert seen >= {key for key in wanted if not key.startswith("lm_head")}


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("key", ["torch_dtype", "dtype"])
def test_models_are_made_in_float32_whatever_the_config_says(tmp_path: Path, key: str, dtype: str):
    (tmp_path / "model.json").write_text(json.dumps(BASE | {key: dtype}))
    model = load_model_config(ModelArguments(config_name=str(tmp_path / "model.json")))
    assert model.dtype == getattr(torch, dtype)
    part = new_slice(model, anatomy_of(model), Span(1, 3), seed=3)
    (plain,) = cut(make_config("llama"), anatomy_of(model), (1, 3))
    for name, tensor in part.model.state_dict().items():
        assert tensor.dtype == torch.float32
        assert torch.equal(tensor, plain.model.state_dict()[name]), name
    AutoModelForCausalLM.from_config(model).save_pretrained(tmp_path)
    read = load_slice(str(tmp_path), AutoConfig.from_pretrained(tmp_path), anatomy_of(model), Span(1, 3))
    assert {tensor.dtype for tensor in read.model.state_dict().values()} == {torch.float32}


def test_the_dtype_of_a_config_in_parts_does_not_matter_either():
    config = tiny_config("gemma3")
    config.dtype = config.text_config.dtype = torch.bfloat16
    part = new_slice(config, anatomy_of(config), Span(0, 3), seed=3)
    assert {p.dtype for p in part.model.parameters()} == {torch.float32}
    assert class_problems(Config(), config, part.anatomy) == []


def test_only_the_slice_is_materialised():
    config = make_config("llama")
    part = new_slice(config, anatomy_of(config), Span(2, 4), seed=0)
    names = {key.split(".layers.")[1].split(".")[0] for key in part.model.state_dict() if ".layers." in key}
    assert names == {"2", "3"}
    assert not any("embed_tokens" in key for key in part.model.state_dict())


def test_another_seed_gives_other_weights_and_every_head_its_own():
    config = make_config("llama")
    anatomy = anatomy_of(config)
    variants = ((Span(0, 2), 0), (Span(0, 3), 0), (Span(0, 2), 1))
    heads = [new_slice(config, anatomy, span, seed).model.lm_head.weight for span, seed in variants]
    assert not torch.equal(heads[0], heads[1])
    assert not torch.equal(heads[0], heads[2])


def test_new_weights_are_distributed_as_transformers_makes_them():
    config = make_config("llama")
    part = new_slice(config, anatomy_of(config), Span(0, 6), seed=0)
    reference = AutoModelForCausalLM.from_config(config)
    for (name, ours), theirs in zip(part.model.named_parameters(), reference.parameters(), strict=True):
        assert float(ours.detach().std()) == pytest.approx(float(theirs.detach().std()), rel=0.2, abs=1e-6), name


def test_loading_reads_the_slice_of_a_saved_model(tmp_path: Path):
    config = make_config("llama-tied")
    model = AutoModelForCausalLM.from_config(config)
    model.save_pretrained(tmp_path)
    anatomy = anatomy_of(config)
    parts = [load_slice(str(tmp_path), config, anatomy, span) for span in (Span(0, 3), Span(3, 6))]
    ids = torch.arange(16)[None]
    with torch.no_grad():
        logits = parts[1].model.lm_head(chain(parts, ids))
        assert torch.equal(logits, model.eval()(input_ids=ids).logits)
    assert not any(".layers.0." in key for key in parts[1].model.state_dict())


def test_a_folder_without_the_weights_is_named(tmp_path: Path):
    config = make_config("llama")
    with pytest.raises(ConfigError, match=f"model_name_or_path={tmp_path}"):
        load_slice(str(tmp_path), config, anatomy_of(config), Span(0, 3))


def test_a_checkpoint_that_lacks_tensors_is_named(tmp_path: Path):
    AutoModelForCausalLM.from_config(AutoConfig.for_model(**{**BASE, "num_hidden_layers": 4})).save_pretrained(tmp_path)
    config = make_config("llama")
    with pytest.raises(ConfigError, match=r"lacks model\.layers\.4\.input_layernorm\.weight and \d+ more"):
        load_slice(str(tmp_path), config, anatomy_of(config), Span(3, 6))


@pytest.mark.parametrize(
    ("kind", "settings", "reason"),
    [
        ("cpmant", {"hidden_size": 32, "num_hidden_layers": 2}, "layer 1 also takes argument 2, which depends on"),
        ("prophetnet", {"hidden_size": 32}, r"it uses prophetnet\.decoder\.ngram_embeddings\.weight without"),
        (
            "gemma3n_text",
            {"num_hidden_layers": 4, "hidden_size": 32},
            r"its forward failed \(ValueError: (The set of|'sliding_attention' is not in list)",
        ),
    ],
)
def test_a_model_that_cannot_be_cut_is_refused_with_the_reason(kind: str, settings: dict, reason: str):
    config = AutoConfig.for_model(kind, **settings)
    with pytest.raises(SliceError, match=rf"model type '{kind}' cannot be cut into stages: .*{reason}"):
        probe(config, ModelArguments())


def test_weights_that_a_class_leaves_unset_are_named():
    settings = {k: v for k, v in BASE.items() if k != "model_type"}
    config = AutoConfig.for_model("apertus", **settings)
    with pytest.raises(SliceError, match=r"model type 'apertus' leaves model\.layers\.0\.mlp\.act_fn"):
        check_set(new_slice(config, anatomy_of(config), Span(0, 6), seed=0))


def test_model_config_errors_name_the_place(tmp_path: Path):
    with pytest.raises(ConfigError, match=r"config_name=nowhere\.json: no such file"):
        load_model_config(ModelArguments(config_name="nowhere.json"))
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ConfigError, match=f"no model config in {tmp_path}"):
        load_model_config(ModelArguments(model_name_or_path=str(tmp_path)))
    (tmp_path / "config.json").write_text(json.dumps(BASE | {"model_type": "qwen3", "layer_types": ["full_attention"]}))
    with pytest.raises(ConfigError, match=f"no model config in {tmp_path}: .*layer"):
        load_model_config(ModelArguments(model_name_or_path=str(tmp_path)))
    (tmp_path / "config.json").write_text(json.dumps(BASE | {"dtype": "bf16"}))
    with pytest.raises(ConfigError, match=f"no model config in {tmp_path}: .*'bf16'"):
        load_model_config(ModelArguments(model_name_or_path=str(tmp_path)))
    AutoConfig.for_model(**BASE).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="config_overrides='hidden=3': key hidden"):
        load_model_config(ModelArguments(config_name=str(tmp_path), config_overrides="hidden=3"))
    overridden = load_model_config(ModelArguments(config_name=str(tmp_path), config_overrides="hidden_size=64"))
    assert overridden.hidden_size == 64


def test_an_anatomy_survives_the_store():
    anatomy = anatomy_of(make_config("gpt2"))
    assert TypeAdapter(Anatomy).validate_python(json.loads(json.dumps(asdict(anatomy)))) == anatomy
    assert anatomy.before == ("transformer.wte", "transformer.wpe")
    assert anatomy.after == ("transformer.ln_f", "lm_head")


def test_a_class_of_ones_own_is_looked_at_as_it_stands(monkeypatch: pytest.MonkeyPatch):
    """Though one of transformers' own, for the same config, has been looked at before."""
    config = make_config("llama")
    assert probe(config, ModelArguments()).after == ("model.norm", "lm_head")

    class Mine(LlamaForCausalLM):
        def __init__(self, config: Any):
            super().__init__(config)
            self.more = torch.nn.Linear(32, 32)

        def forward(self, *args: Any, **options: Any) -> Any:
            found = super().forward(*args, **options)
            return type(found)(logits=found.logits + self.more(torch.zeros(32)).sum())

    monkeypatch.setitem(MODEL_FOR_CAUSAL_LM_MAPPING._extra_content, LlamaConfig, Mine)
    assert "more" in probe(config, ModelArguments()).after
