"""Exports are models: transformers loads them, their logits are the pipeline's, exits included."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import MODELS, TINY, Trainer, records, weights
from launching import START_SECONDS, job
from ranks import run_ranks
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, pipeline

from llm_local.checks.output_folder import open_output
from llm_local.config import parse
from llm_local.data.feed import BatchSize, Feed, RowUse
from llm_local.data.sets import load_processing_class, prepare_all
from llm_local.export.model_folder import WrongExport
from llm_local.export.stages import StageTensors, write_stage
from llm_local.finish import check_stage
from llm_local.links.packet import EVAL
from llm_local.model.anatomy import probe
from llm_local.model.levels import num_layers_of
from llm_local.partition import Partition, Span
from llm_local.place import Place
from llm_local.registry import TASKS
from llm_local.setup import Setup

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
MINICPM3 = TINY | {
    **{
        "model_type": "minicpm3",
        "num_key_value_heads": 4,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 8,
        "v_head_dim": 8,
    },
    **{"q_lora_rank": 16, "kv_lora_rank": 16, "scale_depth": 1.4, "dim_model_base": 32},
}
CONVNEXT = {"model_type": "convnext", "depths": [1, 4, 1], "hidden_sizes": [8, 16, 32], "num_stages": 3}
CONVNEXT |= {"image_size": 16, "patch_size": 2, "num_channels": 3}
EXPORTED = [
    ("causal-lm", TINY | {"tie_word_embeddings": True}),
    *(("causal-lm", {"model_type": name, "bos_token_id": 1, "eos_token_id": 2} | SMALL[name]) for name in SMALL),
    *((task, model) for task, model in MODELS.items() if task != "causal-lm"),
    ("image-classification", CONVNEXT),
]
TYPES = [model["model_type"] for _, model in EXPORTED]


def validation_loss(trainer: Trainer, folder: Path) -> float:
    """What transformers' pipeline of the exported model says of the run's validation rows."""
    config = parse(trainer.flags("unused"))
    processing = load_processing_class(config, AutoConfig.from_pretrained(folder))
    data = prepare_all(config, processing)
    held_out, ask = [data.validation[0].sequences], data.asker(config, processing)
    feed = Feed(data.train, held_out, Place(0, (1,)), BatchSize(4, 1, 1), use=RowUse(trainer.task, ask))
    parts = feed(EVAL, 0, 0).inputs()
    make: Any = pipeline
    with torch.no_grad():
        model = make(config.task.pipeline_tag, model=str(folder)).model.eval()
        return float(model(**{"labels": parts.get("input_ids"), **config.task.options, **parts}).loss)


@pytest.mark.processes
@pytest.mark.parametrize(
    ("trainer", "model"), EXPORTED, ids=[m["model_type"] for _, m in EXPORTED], indirect=["trainer"]
)
def test_every_exit_is_a_model_with_the_loss_that_was_measured(trainer: Trainer, model: dict[str, Any]):
    output = trainer.run("run", 2, num_stages=2, stage_layers="2,2", config_name=trainer.model(model))
    for stage, folder in ((0, output / "export/exits/stage-00"), (1, output / "export")):
        _, info = TASKS[trainer.task].loader.from_pretrained(folder, output_loading_info=True)
        assert not info["missing_keys"]
        assert not info["unexpected_keys"]
        measured = records(output, stage, "eval")[-1]["loss"]
        assert validation_loss(trainer, folder) == pytest.approx(measured, rel=1e-5)
    assert num_layers_of(AutoConfig.from_pretrained(output / "export/exits/stage-00")) == 2
    if model["model_type"] == "llama":  # stage 0's head reads its own embedding; the last stage has another matrix
        assert AutoConfig.from_pretrained(output / "export/exits/stage-00").tie_word_embeddings
        assert not AutoConfig.from_pretrained(output / "export").tie_word_embeddings


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
    assert "lm_head.weight" not in before, "one block: the matrix is the embedding"
    assert set(before) == set(after)
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert records(trainer.folder / "second", 1)[0]["loss"] < 8.3  # an untrained model has log 4096 = 8.318


@pytest.mark.processes
def test_an_exit_that_is_no_model_is_left_out_and_the_run_succeeds(trainer: Trainer):
    """MiniCPM3 scales its residual stream by the number of layers: in bf16 too little for the last check to see."""
    output = trainer.run("run", 2, num_stages=2, config_name=trainer.model(MINICPM3), bf16=True)
    export = output / "export"
    assert [path.name for path in (export / "exits").iterdir()] == ["stage-01"]
    assert AutoModelForCausalLM.from_pretrained(export).config.num_hidden_layers == 4
    assert "stage-00" not in (export / "README.md").read_text()


class TestCheckStage:
    """What becomes of an export whose logits are not the pipeline's."""

    def export(self, tmp_path: Path) -> tuple[Setup, Path, torch.Tensor]:
        path = tmp_path / "llama.json"
        path.write_text(json.dumps(TINY))
        config = parse(["--config_name", str(path), "--output_dir", str(tmp_path), "--num_stages", "2"])
        model: Any = AutoModelForCausalLM.from_config(AutoConfig.for_model(**TINY)).eval()
        export = tmp_path / "export.unfinished"
        for folder in (export, export / "exits/stage-00"):
            model.save_pretrained(folder)
        ids = torch.arange(8)[None]
        save_file({"input_ids": ids}, export / "check.safetensors")
        anatomy = probe(model.config, config.model)
        partition = Partition((Span(0, 2), Span(2, 4)), (Span(0, 1), Span(1, 2)))
        setup = Setup(config, {}, {}, {}, anatomy, partition)
        with torch.no_grad():
            return setup, export, model(input_ids=ids).logits

    def test_an_exit_is_removed_with_a_line(self, tmp_path: Path):
        setup, export, logits = self.export(tmp_path)
        line = check_stage(setup, Place(0, (1, 1)), export, logits)
        loads = "loads with no missing or unexpected key, logits equal the pipeline's"
        assert line == f"{tmp_path}/export/exits/stage-00: {loads}"
        line = check_stage(setup, Place(0, (1, 1)), export, logits * 2)
        reason = "its logits differ from the pipeline's by 0.5 of the largest"
        assert line == f"no exit stage-00, as it is no model of its own: {reason}"
        assert list((export / "exits").iterdir()) == []

    def test_one_that_was_refused_before_training_is_not_tried(self, tmp_path: Path):
        setup, export, logits = self.export(tmp_path)
        line = check_stage(replace(setup, refused_exits={"stage-00": "why"}), Place(0, (1, 1)), export, logits)
        assert line == "no exit stage-00, as it is no model of its own: why"
        assert list((export / "exits").iterdir()) == []

    def test_the_whole_model_must_be_the_pipelines(self, tmp_path: Path):
        setup, export, logits = self.export(tmp_path)
        assert "logits equal" in check_stage(setup, Place(1, (1, 1)), export, logits)
        with pytest.raises(WrongExport, match=r"export\.unfinished: its logits differ from the pipeline's by 0\.5 of"):
            check_stage(setup, Place(1, (1, 1)), export, logits * 2)
        assert (export / "config.json").exists()


@pytest.mark.processes
def test_a_full_disk_ends_the_run_with_one_line_and_loses_nothing(trainer: Trainer):
    """The second run may write no file as large as a shard; the first one's model and checkpoint stay."""
    settings = {"config_overrides": "hidden_size=64", "output_dir": trainer.folder / "run"}
    output = trainer.run("run", 1, max_steps=2, save_steps=2, **settings)
    before, saved = weights(output / "export"), output / "checkpoints/step-00000002"
    flags = trainer.flags("run", resume_from_checkpoint=True, **settings)
    with job(["bash", "-c", 'ulimit -f 900; exec "$@"', "bash", sys.executable], flags, trainer.folder) as limited:
        assert limited.wait(START_SECONDS) == 1
    shard = output / "export.unfinished/model-00001-of-00002.safetensors"
    (line,) = [line for line in limited.text.splitlines() if "could not be written" in line]
    assert f"{shard} could not be written (" in line
    assert line.endswith(f"make room and export again, from the checkpoint {saved} (--resume_from_checkpoint true)")
    assert "Traceback" not in limited.text
    after = weights(output / "export")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert not shard.parent.exists()
    trainer.run("run", 1, resume_from_checkpoint=True, **settings)
    assert not torch.equal(weights(output / "export")["lm_head.weight"], before["lm_head.weight"])


def test_what_a_killed_run_left_of_its_export_goes_at_the_next_start(tmp_path: Path):
    for name in ("export", "export.unfinished"):
        (tmp_path / name).mkdir()
    config = parse(["--config_name", "model.json", "--output_dir", str(tmp_path)])
    anatomy = probe(AutoConfig.for_model(**TINY), config.model)
    open_output(Setup(config, {}, {}, {}, anatomy, Partition((Span(0, 4),), (Span(0, 1),))))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["export", "run.yaml"]


@pytest.mark.processes
@pytest.mark.parametrize("mask", [0o022, 0o077])
def test_the_umask_says_who_may_read_an_export(tmp_path: Path, mask: int):
    run_ranks(_write_under, 1, tmp_path, mask)
    files = list(tmp_path.rglob("*.safetensors"))
    assert [file.stat().st_mode & 0o777 for file in files] == [0o666 & ~mask] * 2


def _write_under(folder: Path, mask: int) -> None:
    os.umask(mask)
    write_stage(folder, 0, 1, StageTensors({"a": torch.ones(1)}, {"b": torch.ones(1)}), has_head=True)
