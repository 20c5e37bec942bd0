"""Models stop where their texts did: EOS, BOS and padding are the tokenizer's; a pretrained model's settings stay."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TINY, Trainer
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from llm_local.config import Config, ConfigError, parse
from llm_local.data.special_tokens import generation_values, run_model_config, token_warnings
from llm_local.data.tokenizer import load_tokenizer
from llm_local.model.token_ids import token_id

WORDS = ["[unk]", "[pad]", "[bos]", "[eos]", *(f"w{number}" for number in range(12))]
LLAMA = {k: v for k, v in TINY.items() if not k.endswith("_token_id")} | {"vocab_size": 16}
GPT2 = {"model_type": "gpt2", "vocab_size": 16, "n_embd": 32, "n_head": 4, "n_layer": 2, "n_positions": 32}


def ids_of(config: Any) -> tuple[Any, Any, Any]:
    return token_id(config, "eos_token_id"), token_id(config, "bos_token_id"), token_id(config, "pad_token_id")


@pytest.fixture
def run(tmp_path: Path):
    """run(model's JSON, tokens by name, flags) → the flags of a run with such a tokenizer."""

    def run(model: dict[str, Any], tokens: dict[str, str], **flags: Any) -> Config:
        words = Tokenizer(WordLevel({word: n for n, word in enumerate(WORDS)}, unk_token="[unk]"))
        words.pre_tokenizer = Whitespace()  # pyright: ignore[reportAttributeAccessIssue]
        made = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="[unk]", **tokens)
        made.save_pretrained(tmp_path / "tokenizer")
        (tmp_path / "model.json").write_text(json.dumps(model))
        given = {"config_name": tmp_path / "model.json", "tokenizer_name": tmp_path / "tokenizer"} | flags
        given["output_dir"] = tmp_path / "run"
        return parse([part for name, value in given.items() if value for part in (f"--{name}", str(value))])

    return run


ALL = {"eos_token": "[eos]", "bos_token": "[bos]", "pad_token": "[pad]"}


@pytest.mark.parametrize(
    ("model", "tokens", "wanted"),
    [
        (LLAMA, ALL, (3, 2, 1)),
        (GPT2, {"eos_token": "[eos]"}, (3, None, None)),  # by itself 50256
        (LLAMA | {"model_type": "phi3"}, {"eos_token": "[eos]"}, (3, None, None)),  # its padding would be 32000
        (LLAMA | {"eos_token_id": 9, "bos_token_id": 99, "pad_token_id": 99}, ALL, (3, 2, 1)),
        (LLAMA | {"eos_token_id": [3, 5]}, ALL, ([3, 5], 2, 1)),
        (LLAMA, ALL | {"pad_token": "[eos]"}, (3, 2, None)),  # an embedding of padding is not trained
        ({"model_type": "gemma3", "text_config": LLAMA | {"head_dim": 8}}, ALL, (3, 2, 1)),
    ],
    ids=["llama", "gpt2", "phi3", "json", "several", "padded-with-eos", "nested"],
)
def test_a_new_model_has_the_tokenizers_ids(run, model: dict[str, Any], tokens: dict[str, str], wanted: tuple):
    config = run(model, tokens)
    tokenizer = load_tokenizer(config)
    made = run_model_config(config, tokenizer)
    assert ids_of(made) == ids_of(made.get_text_config(decoder=True)) == wanted
    values = generation_values(config, made, tokenizer)
    assert values["eos_token_id"] == wanted[0]
    assert values.get("pad_token_id") == tokenizer.pad_token_id


def test_ids_that_contradict_the_tokenizer(run):
    config = run(LLAMA | {"eos_token_id": 9, "pad_token_id": 1}, ALL)
    tokenizer = load_tokenizer(config)
    assert token_warnings(config, run_model_config(config, tokenizer), tokenizer) == (
        f"the tokenizer's ids replace those of config_name={config.model.config_name}: eos_token_id 9 → 3; "
        "config_overrides would win",
    )
    config = run(LLAMA | {"eos_token_id": 9}, ALL, config_overrides="eos_token_id=5,pad_token_id=null")
    made = run_model_config(config, tokenizer)
    assert ids_of(made) == (5, 2, None)
    assert token_warnings(config, made, tokenizer) == (
        "eos_token_id=5 in config_overrides, but the data's documents end with 3: generate() runs on",
    )
    with pytest.raises(ConfigError, match="eos_token_id=16 is outside the vocabulary of 16; set eos_token_id to an id"):
        run_model_config(run(LLAMA, ALL, config_overrides="eos_token_id=16"), tokenizer)


class TestPretrained:
    @pytest.fixture
    def folder(self, tmp_path: Path) -> Path:
        """A pretrained model's config; its EOS is not the tokenizer's."""
        AutoConfig.for_model(**LLAMA | {"eos_token_id": 7, "pad_token_id": 0}).save_pretrained(tmp_path / "model")
        return tmp_path / "model"

    def values(self, run, folder: Path, **flags: Any) -> dict[str, Any]:
        config = run({}, ALL, config_name=None, model_name_or_path=folder, **flags)
        tokenizer = load_tokenizer(config)
        made = run_model_config(config, tokenizer)
        assert ids_of(made)[2] == 0
        assert token_warnings(config, made, tokenizer) == ()
        return generation_values(config, made, tokenizer)

    def test_its_own_settings_stay_and_the_tokenizers_eos_stops_it_too(self, run, folder: Path):
        own = {"eos_token_id": [7, 3, 9], "top_p": 0.9, "temperature": 0.6, "max_length": 77, "of_its_own": 1}
        (folder / "generation_config.json").write_text(json.dumps(own))
        assert self.values(run, folder) == own
        (folder / "generation_config.json").write_text(json.dumps(own | {"eos_token_id": 7}))
        assert self.values(run, folder) == own | {"eos_token_id": [3, 7]}
        assert self.values(run, folder, config_overrides="eos_token_id=3")["eos_token_id"] == 3

    def test_one_without_such_a_file(self, run, folder: Path):
        values = self.values(run, folder)
        assert (values["eos_token_id"], values["pad_token_id"]) == ([3, 7], 0)

    def test_a_file_that_is_damaged(self, run, folder: Path):
        (folder / "generation_config.json").write_text("{,")
        with pytest.raises(ConfigError, match=r"generation_config\.json cannot be read \(.*copy it again"):
            self.values(run, folder)

    def test_a_padding_id_without_an_embedding(self, run, folder: Path):
        AutoConfig.for_model(**LLAMA | {"pad_token_id": 99}).save_pretrained(folder)
        with pytest.raises(
            ConfigError, match="pad_token_id=99 is outside the vocabulary of 16; set pad_token_id to an"
        ):
            self.values(run, folder)


@pytest.mark.processes
def test_what_an_export_writes_ends_with_its_eos(trainer: Trainer, monkeypatch: pytest.MonkeyPatch):
    """A new model of a type whose own EOS is another: whole, exit, and made of the checkpoint, without any argument."""
    monkeypatch.syspath_prepend(str(Path(__file__).parent.parent / "scripts"))
    monkeypatch.delitem(sys.modules, "export", raising=False)
    import export

    data = trainer.folder / "short.jsonl"
    data.write_text((json.dumps({"text": "import os"}) + "\n") * 60)
    model = trainer.model(LLAMA | {"model_type": "phi3", "vocab_size": 4096, "num_hidden_layers": 2})
    flags = {"config_name": model, "train_file": data, "validation_file": data, "learning_rate": 2e-2, "max_steps": 40}
    output = trainer.run("run", 2, num_stages=2, save_steps=40, eval_batches=1, **flags)
    offline = trainer.folder / "offline"
    assert export.main([str(output / "checkpoints/step-00000040"), str(offline)]) == 0
    for folder in (output / "export", output / "export/exits/stage-00", offline):
        tokenizer: Any = AutoTokenizer.from_pretrained(folder)
        loaded: Any = AutoModelForCausalLM.from_pretrained(folder)
        assert ids_of(loaded.config) == (tokenizer.eos_token_id, tokenizer.bos_token_id, None)
        ids = tokenizer("import", return_tensors="pt", add_special_tokens=False).input_ids
        written = loaded.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=20)[0].tolist()
        assert written == [*tokenizer("import os", add_special_tokens=False).input_ids, tokenizer.eos_token_id]

    own = {"eos_token_id": [tokenizer.eos_token_id, 9], "do_sample": True, "temperature": 0.6, "max_length": 20}
    (offline / "generation_config.json").write_text(json.dumps(own))
    flags |= {"config_name": None, "model_name_or_path": offline, "max_steps": 1}
    output = trainer.run("second", 1, save_steps=1, eval_batches=1, **flags)
    assert export.main([str(output / "checkpoints/step-00000001"), str(trainer.folder / "again")]) == 0
    for folder in (output / "export", trainer.folder / "again"):
        assert json.loads((folder / "generation_config.json").read_text()) == own
