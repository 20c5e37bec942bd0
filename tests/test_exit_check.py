"""Exits that are no models of their own are found before training, by trying; and no others are."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from conftest import TINY
from test_export import MINICPM3
from transformers import AutoConfig

from llm_local.checks.exit_check import difference_at, exit_depths, exit_warnings, refused_exits
from llm_local.checks.preflight import preflight
from llm_local.config import Config, parse
from llm_local.flags import ModelArguments
from llm_local.model.anatomy import Anatomy, probe
from llm_local.partition import Partition, Span
from llm_local.setup import Setup

TWO_STAGES = Partition((Span(0, 2), Span(2, 4)), (Span(0, 1), Span(1, 2)))
JAPANESE = TINY | {"model_type": "gpt_neox_japanese"}


def look(config: Any) -> tuple[Any, Anatomy]:
    made = AutoConfig.for_model(**config) if isinstance(config, dict) else AutoConfig.for_model(config)
    return made, probe(made, ModelArguments())


@pytest.mark.processes
@pytest.mark.parametrize("model_type", ["llama", "gpt2", "mixtral", "gemma3_text", "gpt_oss"])
def test_exits_of_most_types_are_models_in_the_sizes_that_they_have(model_type: str):
    """The type's default config, of billions of parameters for some, with all of its layers."""
    config, anatomy = look(model_type)
    assert difference_at(Config(), config, anatomy, 3) == ""


def test_a_scale_by_the_number_of_layers_shows():
    config, anatomy = look(MINICPM3)
    assert difference_at(Config(), config, anatomy, 2).startswith("its logits differ by 0.")


def test_a_last_layer_unlike_the_others_shows():
    config, anatomy = look(JAPANESE)
    reason = difference_at(Config(), config, anatomy, 2)
    assert reason == "missing keys ['gpt_neox_japanese.layers.1.attention.dense_bias']"


def test_depths_count_the_layers_of_heads():
    assert exit_depths(TWO_STAGES, (0,)) == {0: 2, 1: 4}
    assert exit_depths(TWO_STAGES, (1,)) == {0: 3, 1: 4}


def refused(config: dict[str, Any], *flags: str, partition: Partition = TWO_STAGES) -> dict[str, str]:
    return refused_exits(parse(["--num_stages", "2", *flags]), *look(config), partition)


def test_exits_are_named():
    assert refused(TINY) == {}
    assert list(refused(MINICPM3)) == ["stage-00"]


@pytest.mark.parametrize("flags", [["--method", "backprop"], ["--head_features", "true"]])
def test_a_run_without_exits_tries_none(flags: list[str]):
    assert refused(MINICPM3, *flags) == {}


def test_a_head_that_has_all_layers_is_the_whole_model():
    assert refused(MINICPM3, "--head", "decoder", "--head_layers", "2") == {}


def test_a_person_is_told_once():
    assert exit_warnings("minicpm3", {}) == ()
    (line,) = exit_warnings("minicpm3", {"stage-00": "its logits differ by 0.2 of the largest", "stage-01": "more"})
    assert line == (
        "exits of model type 'minicpm3' are no models of their own (stage-00 and 1 more: its logits differ by 0.2 of "
        "the largest); they are left out, and the whole model is exported all the same"
    )


def test_the_setup_has_the_warning_and_the_exits(tmp_path: Path, cache: Path):
    path = tmp_path / "model.json"
    path.write_text(json.dumps(MINICPM3))
    flags = ["--config_name", str(path), "--num_stages", "2", "--seq_length", "32", "--cache_dir", str(cache)]
    setup = preflight(parse([*flags, "--output_dir", str(tmp_path / "run")]), 2)
    assert list(setup.refused_exits) == ["stage-00"]
    assert any("exits of model type 'minicpm3' are no models" in warning for warning in setup.warnings)
    assert Setup.from_json(setup.to_json()) == setup
