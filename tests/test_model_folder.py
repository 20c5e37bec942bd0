"""A folder of one model: written whole or not at all, tied where it can be, and checked."""

from __future__ import annotations

import json
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TINY, weights
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from llm_local.checks.tiny import tiny_config
from llm_local.export.model_folder import (
    Description,
    WrongExport,
    check_export,
    complete,
    draft_of,
    model_without_memory,
    original_names,
    put_in_place,
    replaced,
    shard_name,
    tied_names,
    write_shard,
    write_text,
)
from llm_local.export.stages import trim_config
from llm_local.files import Unwritten
from llm_local.tasks.causal_lm import CausalLM

IDS = torch.arange(8)[None]
MIXTRAL = {**TINY, "model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2, "vocab_size": 64}


def tokenizer(num_words: int = 64) -> Any:
    words = {f"word{number}": number for number in range(num_words)}
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel(words, unk_token="word0")))


def made(config: dict[str, Any]) -> Any:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(**config)).eval()


def parts(model: Any) -> list[dict[str, torch.Tensor]]:
    """The model's tensors in two parts, the output matrix a tensor of its own."""
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    head = {name: state.pop(name) for name in ("lm_head.weight", "model.norm.weight")}
    return [original_names(model, state), head]


def written(folder: Path, model: Any, **options: Any) -> Path:
    """As a run writes it: beside its place first."""
    tensors, config = options.get("parts", parts(model)), options.get("config", model.config)
    described = Description(config, type(model).__name__, options.get("tokenizer", tokenizer()))
    with replaced(folder) as draft:
        shards = [draft / shard_name(index, len(tensors)) for index in range(len(tensors))]
        for shard, part in zip(shards, tensors, strict=True):
            write_shard(shard, part)
        complete(draft, shards, described, tied_names(config, "causal-lm"))
    return folder


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model(input_ids=IDS, use_cache=False).logits


@contextmanager
def small_files(num_bytes: int) -> Iterator[None]:
    """No file of this process may be larger: what a full disk is to a writer."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


class TestWriteModel:
    @pytest.mark.parametrize("config", [TINY, MIXTRAL], ids=["llama", "mixtral"])
    def test_transformers_reads_it(self, tmp_path: Path, config: dict[str, Any]):
        model = made(config)
        folder = written(tmp_path / "model", model)
        assert check_export(folder, IDS, logits(model), 0.0, CausalLM()).endswith("logits equal the pipeline's")
        assert len(AutoTokenizer.from_pretrained(folder)) == 64
        assert json.loads((folder / "config.json").read_text())["architectures"] == [type(model).__name__]
        assert [path.name for path in tmp_path.iterdir()] == ["model"]

    def test_names_are_those_of_a_checkpoint(self):
        model = made(MIXTRAL)
        names = original_names(model, model.state_dict())
        assert "model.layers.0.mlp.experts.gate_up_proj" in model.state_dict()
        assert "model.layers.0.block_sparse_moe.experts.3.w1.weight" in names
        assert original_names(model, {}) == {}
        again = original_names(model_without_memory(model.config, "causal-lm"), model.state_dict())
        assert again.keys() == names.keys()
        assert all(torch.equal(again[name], names[name]) for name in names)

    def test_parts_of_the_config_have_the_dtype_of_the_whole(self, tmp_path: Path):
        config = tiny_config("gemma3")
        config.text_config.dtype, config.dtype = torch.float16, torch.bfloat16
        complete(tmp_path, [], Description(config, "Gemma3ForConditionalGeneration", tokenizer()), {})
        values = json.loads((tmp_path / "config.json").read_text())
        assert [values["dtype"], values["text_config"]["dtype"], values["vision_config"]["dtype"]] == ["bfloat16"] * 3

    def test_a_folder_is_replaced_as_a_whole(self, tmp_path: Path):
        folder = written(tmp_path / "model", made(TINY))
        (folder / "old").touch()
        draft_of(folder).mkdir()
        (draft_of(folder) / "of a run that was killed").touch()
        written(folder, made(MIXTRAL))
        assert AutoConfig.from_pretrained(folder).model_type == "mixtral"
        assert not (folder / "old").exists()
        assert [path.name for path in tmp_path.iterdir()] == ["model"]

    @pytest.mark.parametrize(
        ("limit", "words", "file"),
        [(100_000, 64, "model-00001-of-00002.safetensors"), (700_000, 40_000, "tokenizer.json")],
    )
    def test_a_full_disk_is_named_and_leaves_what_was_there(self, tmp_path: Path, limit: int, words: int, file: str):
        model = made(TINY)
        folder = written(tmp_path / "model", model)
        with small_files(limit), pytest.raises(Unwritten) as caught:
            written(folder, made(TINY), tokenizer=tokenizer(words))
        message = str(caught.value)
        assert message.startswith(f"{draft_of(folder) / file} could not be written (")
        assert "File too large" in message
        assert "\n" not in message
        assert [path.name for path in tmp_path.iterdir()] == ["model"]
        check_export(folder, IDS, logits(model), 0.0, CausalLM())

    def test_an_error_that_is_not_the_disks_is_not_said_to_be(self, tmp_path: Path):
        class Broken:
            def save_pretrained(self, folder: Path) -> None:
                raise KeyError("vocab")

        with pytest.raises(KeyError, match="vocab"):
            written(tmp_path / "model", made(TINY), tokenizer=Broken())
        assert list(tmp_path.iterdir()) == []

    def test_a_text_that_cannot_be_written_is_named(self, tmp_path: Path):
        with pytest.raises(Unwritten, match=r"README.md could not be written \(No such file or directory\)"):
            write_text(tmp_path / "nowhere" / "README.md", "text")

    def test_the_predecessor_of_a_killed_run_does_not_stay(self, tmp_path: Path):
        folder = tmp_path / "model"
        for path in (draft_of(folder), tmp_path / "model.before"):
            path.mkdir()
        (draft_of(folder) / "new").touch()
        put_in_place(folder)
        assert [path.name for path in tmp_path.iterdir()] == ["model"]
        assert (folder / "new").exists()


class TestTied:
    def test_an_equal_matrix_is_written_once(self, tmp_path: Path):
        model = made(TINY | {"tie_word_embeddings": True})
        folder = written(tmp_path / "model", model)
        assert "lm_head.weight" not in weights(folder)
        again = AutoModelForCausalLM.from_pretrained(folder)
        assert again.config.tie_word_embeddings
        assert again.lm_head.weight is again.model.embed_tokens.weight
        check_export(folder, IDS, logits(model), 0.0, CausalLM())

    def test_another_matrix_unties_the_model(self, tmp_path: Path):
        model = made(TINY | {"tie_word_embeddings": True})
        body, head = parts(model)
        head["lm_head.weight"][0, 0] += 1
        folder = written(tmp_path / "model", model, parts=[body, head])
        again: Any = AutoModelForCausalLM.from_pretrained(folder)
        assert not again.config.tie_word_embeddings
        assert torch.equal(again.lm_head.weight, head["lm_head.weight"])
        assert torch.equal(again.model.embed_tokens.weight, body["model.embed_tokens.weight"])

    def test_an_untied_config_stays_untied(self, tmp_path: Path):
        model = made(TINY)
        model.lm_head.weight = torch.nn.Parameter(model.model.embed_tokens.weight.detach().clone())
        folder = written(tmp_path / "model", model)
        assert "lm_head.weight" in weights(folder)
        assert not AutoConfig.from_pretrained(folder).tie_word_embeddings

    def test_names_are_the_checkpoints(self):
        assert tied_names(AutoConfig.for_model(**TINY), "causal-lm") == {}
        gpt2 = AutoConfig.for_model("gpt2", n_embd=32, n_layer=2, n_head=4)
        assert tied_names(gpt2, "causal-lm") == {"lm_head.weight": "transformer.wte.weight"}
        deep = AutoConfig.for_model("gemma3", text_config={"hidden_size": 32, "num_hidden_layers": 1})
        assert list(tied_names(deep, "causal-lm").values()) == ["language_model.model.embed_tokens.weight"]


class TestCheckExport:
    @pytest.fixture
    def model(self) -> Any:
        return made(TINY)

    @pytest.fixture
    def export(self, model: Any, tmp_path: Path) -> Path:
        return written(tmp_path / "model", model)

    def test_equal_logits_pass(self, export: Path, model: Any):
        assert "no missing or unexpected key" in check_export(export, IDS, logits(model), 1e-4, CausalLM())

    def test_other_logits_are_an_error(self, export: Path, model: Any):
        with pytest.raises(WrongExport, match=r"its logits differ from the pipeline's by 0\.\d+ of the largest"):
            check_export(export, IDS, logits(model) * 1.5, 1e-4, CausalLM())

    def test_what_bf16_rounds_away_is_no_error(self, tmp_path: Path):
        """Another kernel, as a GPU's, computes a deep model otherwise; a tensor that is wrong shows all the same."""
        deep = made({**TINY, "num_hidden_layers": 32})
        with torch.no_grad():
            for parameter in deep.parameters():
                parameter.mul_(6.0 if parameter.dim() > 1 else 1.0)
        deep = deep.bfloat16()
        folder = written(tmp_path / "deep", deep)
        deep.set_attn_implementation("eager")
        elsewhere = logits(deep)
        said = check_export(folder, IDS, elsewhere, 1e-4, CausalLM())
        assert "logits differ from the pipeline's by" in said
        with torch.no_grad():
            deep.model.layers[30].mlp.down_proj.weight.mul_(-1)
        with pytest.raises(WrongExport, match=r"its logits differ from the pipeline's"):
            check_export(folder, IDS, logits(deep), 1e-4, CausalLM())

    def test_a_missing_tensor_is_an_error(self, export: Path):
        shard = export / "model-00002-of-00002.safetensors"
        tensors = load_file(shard)
        tensors["model.norm.wait"] = tensors.pop("model.norm.weight")
        save_file(tensors, shard, metadata={"format": "pt"})
        index = export / "model.safetensors.index.json"
        index.write_text(index.read_text().replace("model.norm.weight", "model.norm.wait"))
        with pytest.raises(WrongExport, match=r"missing keys \['model.norm.weight'\]"):
            check_export(export, IDS, torch.zeros(1), 1e-4, CausalLM())

    def test_a_config_that_makes_no_model_is_an_error(self, export: Path):
        config = export / "config.json"
        config.write_text(config.read_text().replace('"silu"', '"nonsense"'))
        with pytest.raises(WrongExport, match=r"does not load \(\w+: .*nonsense") as caught:
            check_export(export, IDS, torch.zeros(1), 1e-4, CausalLM())
        assert caught.value.reason.startswith("does not load")

    def test_a_file_that_cannot_be_read_is_the_machines_fault(self, export: Path):
        (export / "model-00002-of-00002.safetensors").unlink()
        with pytest.raises(OSError, match=r"model-00002-of-00002\.safetensors"):
            check_export(export, IDS, torch.zeros(1), 1e-4, CausalLM())


def test_lists_with_an_entry_a_layer_are_trimmed():
    types = ["full_attention"] * 3 + ["sliding_attention"]
    config = AutoConfig.for_model("qwen3", num_hidden_layers=4, layer_types=types)
    trimmed = trim_config(config, 2)
    assert trimmed.num_hidden_layers == 2
    assert trimmed.layer_types == ["full_attention"] * 2
    assert len(config.layer_types) == 4
