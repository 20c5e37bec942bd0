"""Exports are models: transformers loads them, their logits are the pipeline's, exits included."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TINY, Trainer, records, weights
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from llm_local.config import parse
from llm_local.data import prepare
from llm_local.export import StageTensors, check_export, trim_config, write_stage
from llm_local.tokenizer import load_tokenizer

SMALL: dict[str, dict[str, Any]] = {
    "gpt2": {"vocab_size": 4096, "n_embd": 32, "n_layer": 4, "n_head": 4, "n_positions": 64},
    "gemma2": {**TINY, "model_type": "gemma2", "head_dim": 8},
    "mixtral": {**TINY, "model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2},
    "opt": {
        **{"vocab_size": 4096, "hidden_size": 32, "ffn_dim": 64, "num_hidden_layers": 4, "num_attention_heads": 4},
        **{"word_embed_proj_dim": 16, "max_position_embeddings": 64, "dropout": 0.0},
    },
}
SMALL["llama4_text"] = {**TINY, "model_type": "llama4_text", "head_dim": 8, "intermediate_size_mlp": 64}
SMALL["llama4_text"] |= {"num_local_experts": 2, "num_experts_per_tok": 1, "attention_chunk_size": 64}
MODELS = {"llama-tied": TINY | {"tie_word_embeddings": True}}
MODELS |= {name: {"model_type": name, "bos_token_id": 1, "eos_token_id": 2} | config for name, config in SMALL.items()}


def validation_loss(trainer: Trainer, folder: Path) -> float:
    """What plain transformers says of the exported model, on the run's validation rows."""
    config = parse(trainer.flags("unused"))
    _, validation = prepare(config, load_tokenizer(config))
    model: Any = AutoModelForCausalLM.from_pretrained(folder).eval()
    rows = validation.batch(0, 4)
    with torch.no_grad():
        losses = [model(input_ids=row[None], labels=row[None], use_cache=False).loss for row in rows]
    return float(torch.stack(losses).mean())


@pytest.mark.processes
@pytest.mark.parametrize("name", MODELS)
def test_every_exit_is_a_model_with_the_loss_that_was_measured(trainer: Trainer, name: str):
    path = trainer.model(MODELS[name])
    output = trainer.run("run", 2, num_stages=2, config_name=path)
    for stage, folder in ((0, output / "export/exits/stage-00"), (1, output / "export")):
        _, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
        assert not info["missing_keys"]
        assert not info["unexpected_keys"]
        measured = records(output, stage, "eval")[-1]["loss"]
        assert validation_loss(trainer, folder) == pytest.approx(measured, rel=1e-5)
    assert AutoConfig.from_pretrained(output / "export/exits/stage-00").num_hidden_layers == 2


@pytest.mark.processes
def test_an_exit_assists_the_whole_model(trainer: Trainer):
    """Plain transformers: greedy text with stage 0 as the assistant equals that without."""
    export = trainer.run("run", 2, num_stages=2, deepspeed="configs/ds/zero3.json") / "export"
    tokenizer = AutoTokenizer.from_pretrained(export)
    ids = tokenizer("import ", return_tensors="pt").input_ids
    whole: Any = AutoModelForCausalLM.from_pretrained(export)
    early: Any = AutoModelForCausalLM.from_pretrained(export / "exits/stage-00")
    options = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 2}
    assert torch.equal(whole.generate(ids, **options), whole.generate(ids, assistant_model=early, **options))


@pytest.mark.processes
def test_a_pretrained_model_goes_on_from_its_weights(trainer: Trainer):
    """Continued pretraining: every slice reads its own tensors, and the learning rate 0 leaves them as they are."""
    first = trainer.run("first", 1, config_overrides="tie_word_embeddings=true") / "export"
    settings = {"config_name": None, "model_name_or_path": first, "learning_rate": 1e-30}
    second = trainer.run("second", 2, num_stages=2, **settings) / "export"
    before, after = weights(first), weights(second)
    assert set(before) == set(after)
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert records(trainer.folder / "second", 1)[0]["loss"] < 8.3  # an untrained model has log 4096 = 8.318


class TestCheckExport:
    @pytest.fixture
    def export(self, tmp_path: Path) -> Path:
        config = AutoConfig.for_model(**TINY)
        AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
        (tmp_path / "model.safetensors").rename(tmp_path / "model-00001-of-00001.safetensors")
        names = load_file(tmp_path / "model-00001-of-00001.safetensors")
        index = {"weight_map": dict.fromkeys(names, "model-00001-of-00001.safetensors")}
        import json

        (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, **index}))
        return tmp_path

    def logits(self, folder: Path, ids: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            return AutoModelForCausalLM.from_pretrained(folder)(input_ids=ids).logits

    def test_equal_logits_pass(self, export: Path):
        ids = torch.arange(8)[None]
        assert "no missing or unexpected key" in check_export(export, ids, self.logits(export, ids), 1e-4)

    def test_other_logits_are_an_error(self, export: Path):
        ids = torch.arange(8)[None]
        with pytest.raises(RuntimeError, match=r"its logits differ from the pipeline's by 0\.\d+ of the largest"):
            check_export(export, ids, self.logits(export, ids) * 1.5, 1e-4)

    def test_a_missing_tensor_is_an_error(self, export: Path):
        shard = export / "model-00001-of-00001.safetensors"
        tensors = load_file(shard)
        tensors["model.norm.wait"] = tensors.pop("model.norm.weight")
        save_file(tensors, shard, metadata={"format": "pt"})
        index = export / "model.safetensors.index.json"
        index.write_text(index.read_text().replace("model.norm.weight", "model.norm.wait"))
        with pytest.raises(RuntimeError, match=r"missing keys \['model.norm.weight'\]"):
            check_export(export, torch.arange(8)[None], torch.zeros(1), 1e-4)


def test_lists_with_an_entry_a_layer_are_trimmed():
    config = AutoConfig.for_model(
        "qwen3", num_hidden_layers=4, layer_types=["full_attention"] * 3 + ["sliding_attention"]
    )
    trimmed = trim_config(config, 2)
    assert trimmed.num_hidden_layers == 2
    assert trimmed.layer_types == ["full_attention"] * 2
    assert len(config.layer_types) == 4


@pytest.mark.parametrize("mask", [0o022, 0o077])
def test_the_umask_says_who_may_read_an_export(tmp_path: Path, mask: int):
    before = os.umask(mask)
    try:
        write_stage(tmp_path, 0, 1, StageTensors({"a": torch.ones(1)}, {"b": torch.ones(1)}), has_head=True)
    finally:
        os.umask(before)
    files = list(tmp_path.rglob("*.safetensors"))
    assert [file.stat().st_mode & 0o777 for file in files] == [0o666 & ~mask] * 2
