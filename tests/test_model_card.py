"""README.md of an export: what huggingface_hub reads of it, and what a person does."""

from __future__ import annotations

import json
import math
import re
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import Trainer, records
from huggingface_hub import ModelCard
from huggingface_hub.repocard_data import model_index_to_eval_results

from llm_local.config import from_flat, parse
from llm_local.data.packing import Packed, PackedSource
from llm_local.export.model_card import Training, installed_versions, model_card
from llm_local.partition import Partition, Span

PARTITION = Partition((Span(0, 2), Span(2, 4), Span(4, 6)), (Span(0, 1), Span(1, 2), Span(2, 3)))


def training(*flags: str, **facts: Any) -> Training:
    config = parse(["--config_name", "model.json", "--num_stages", "3", "--output_dir", "runs/mine", *flags])
    made = Training(
        config=config,
        partition=PARTITION,
        replicas=(2, 2, 2),
        model_type="llama",
        steps=1000,
        tokens=8_192_000,
        losses=(3.5, 3.25, 3.125),
        exits=(0, 1, 2),
        deepspeed={},
        versions={"python": "3.11.1", "torch": "2.13.0"},
    )
    return replace(made, **facts)


class TestMetadata:
    def test_the_hub_reads_it(self):
        data: Any = ModelCard(model_card(training())).data
        assert data.library_name == "transformers"
        assert data.pipeline_tag == "text-generation"
        assert data.tags == ["llm_local", "llama", "chunked"]
        assert data.language == "code", "the built-in corpus is"
        assert data.base_model is None
        assert data.datasets is None

    def test_the_results_are_those_of_the_model(self):
        for stage, loss in ((None, 3.125), (0, 3.5), (1, 3.25)):
            data: Any = ModelCard(model_card(training(), stage)).data
            results = {result.metric_type: result.metric_value for result in data.eval_results}
            assert results == {"loss": loss, "perplexity": pytest.approx(math.exp(loss), abs=1e-3)}
            assert {result.dataset_split for result in data.eval_results} == {"validation"}

    def test_a_run_without_an_evaluation_has_no_results(self):
        text = model_card(training(losses=(None, None, None)))
        data: Any = ModelCard(text).data
        assert data.eval_results is None
        assert "Validation loss" not in text

    def test_data_and_base_of_the_hub_are_linked(self):
        flags = ["--dataset_name", "HuggingFaceFW/fineweb-edu", "--dataset_config_name", "sample-10BT"]
        flags += ["--model_name_or_path", "HuggingFaceTB/SmolLM2-135M"]
        made = training(*flags)
        made = replace(made, config=replace(made.config, model=replace(made.config.model, config_name=None)))
        text = model_card(made)
        data: Any = ModelCard(text).data
        assert data.datasets == ["HuggingFaceFW/fineweb-edu"]
        assert data.base_model == "HuggingFaceTB/SmolLM2-135M"
        assert data.language is None
        assert data.eval_results[0].dataset_type == "HuggingFaceFW/fineweb-edu"
        assert data.eval_results[0].dataset_config == "sample-10BT"
        assert "| started from | HuggingFaceTB/SmolLM2-135M |" in text

    def test_folders_and_files_of_a_machine_are_not(self, tmp_path: Path):
        data: Any = ModelCard(model_card(training("--dataset_name", str(tmp_path)))).data
        assert data.datasets is None
        data = ModelCard(model_card(training("--train_file", "/data/secret/text.txt"))).data
        assert data.datasets is None
        assert data.eval_results[0].dataset_name == "text.txt"
        data = ModelCard(model_card(training("--model_name_or_path", "/no/such/folder/of/a/model"))).data
        assert data.base_model is None


class TestText:
    def test_it_says_how_the_model_was_trained(self):
        flags = ["--bf16", "true", "--export_dtype", "fp32", "--head", "decoder", "--head_layers_schedule", "2,1"]
        flags += ["--seq_length", "256", "--warmup_steps", "50", "--final_backprop_steps", "100"]
        text = model_card(training(*flags, deepspeed={"zero_optimization": {"stage": 2}}))
        for row in (
            "| method | chunked, the last 100 steps by backpropagation through all blocks |",
            "| head | decoder, private layers by block: 2, 1 |",
            "| stages × replicas | 3 × 2 |",
            "| tokens | 8,192,000 |",
            "| batch | 16 sequences of 256 tokens |",
            "| learning rate | 0.0005, linear, 50 steps of warm-up |",
            "| precision | bf16, exported as fp32 |",
            "| ZeRO stage | 2 |",
            "| versions | python 3.11.1, torch 2.13.0 |",
            "| stage 0 | 3.5000 | 33.1 |",
            "| stage 2 (the whole model) | 3.1250 | 22.8 |",
        ):
            assert row in text.splitlines()
        assert r"stage 0: layers 0-1 \| stage 1: layers 2-3" in text, "a bar would end the cell"

    def test_it_says_what_packing_made_of_each_source(self):
        mixed = (
            PackedSource("a.jsonl", 1.0, Packed("best_fit", 256, documents=2000, cut=30, rows=1000, tokens=253_440)),
            PackedSource("HuggingFaceFW/fineweb-edu", 3.0, None),
        )
        made = training("--seq_length", "256", "--packing", "best_fit", sources=mixed, places=8_192_000 * 2)
        lines = model_card(made).splitlines()
        start = lines.index("## Data")
        assert lines[start + 2] == "What there was to train on, in rows of 256 tokens."
        assert lines[start + 4 : start + 8] == [
            "| source | share of the rows | packing | documents | rows | padding | documents cut |",
            "|---|---|---|---|---|---|---|",
            "| a.jsonl | 25.0% | best_fit | 2,000 | 1,000 | 1.0% | 1.5% |",
            "| HuggingFaceFW/fineweb-edu | 75.0% | best_fit | read as a stream |  |  |  |",
        ]
        assert "| tokens | 8,192,000, and 50.0% of the rows' places padding |" in lines
        kept = [PackedSource.of(json.loads(json.dumps(asdict(source)))) for source in mixed]
        assert tuple(kept) == mixed

    def test_an_exit_is_a_draft_for_the_whole(self):
        text = model_card(training("--head", "decoder", "--head_layers", "1"), 1)
        assert "the first 4 of 6 layers of a causal language model of type `llama`" in " ".join(text.split())
        assert "with stage 1's own head (private layers: 1)" in " ".join(text.split())
        assert 'draft = AutoModelForCausalLM.from_pretrained("export/exits/stage-01")' in text
        assert "model.generate(**inputs, assistant_model=draft, max_new_tokens=64)" in text
        assert "| stage 1 (this exit) | 3.2500 | 25.8 |" in text

    def test_a_model_without_exits_shows_no_draft(self):
        assert "draft" not in model_card(training(exits=()))
        assert "draft" not in model_card(training(exits=(2,)))

    def test_the_baseline_has_one_loss(self):
        text = model_card(training("--method", "backprop", exits=()))
        assert "trained by backpropagation through all of its layers" in text
        assert text.count("the whole model") == 1
        assert "| stage 0 |" not in text

    def test_the_run_can_be_reproduced(self):
        made = training("--learning_rate", "1e-3", "--dataset_name", "builtin", "--cache_dir", "/home/somebody/cache")
        text = model_card(replace(made, deepspeed={"zero_optimization": {"stage": 1}}))
        (block,) = re.findall(r"```yaml\n(.*?)```", text, flags=re.DOTALL)
        again = from_flat(yaml.safe_load(block))
        assert again.train.learning_rate == 1e-3
        assert again == replace(
            made.config,
            train=replace(made.config.train, output_dir=again.train.output_dir),
            data=replace(made.config.data, cache_dir=None),
        )
        assert "deepspeed --num_gpus 6 scripts/pretrain.py run.yaml" in text
        (settings,) = re.findall(r"```json\n(.*?)```", text, flags=re.DOTALL)
        assert json.loads(settings) == {"zero_optimization": {"stage": 1}}
        assert "somebody" not in text


def test_versions_are_those_installed():
    versions = installed_versions()
    assert next(iter(versions)) == "python"
    assert versions["torch"] == version("torch")  # torch.__version__ may name the build as well: 2.13.0+cu130


@pytest.mark.processes
def test_every_export_of_a_run_has_a_card(trainer: Trainer):
    export = trainer.run("run", 2, num_stages=2) / "export"
    for stage, folder in ((1, export), (0, export / "exits/stage-00")):
        card = ModelCard.load(folder / "README.md")
        data: Any = card.data
        loss = next(result.metric_value for result in data.eval_results if result.metric_type == "loss")
        assert loss == pytest.approx(records(trainer.folder / "run", stage, "eval")[-1]["loss"], abs=1e-5)
        assert model_index_to_eval_results(data.to_dict()["model-index"])[0] == data.model_name
        assert f"| tokens | {4 * 2 * 32} |" in card.text
