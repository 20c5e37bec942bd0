"""llm-local predict: what transformers' pipeline answers."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import TINY, TINY_BERT, Trainer
from launching import runs_with_transformers_alone
from PIL import ExifTags, Image
from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessor, pipeline

from llm_local.commands import generate, predict

SMALL_VIT: dict[str, Any] = {
    **{"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4},
    **{"image_size": 16, "patch_size": 4},
}


@pytest.fixture(scope="module")
def export(tmp_path_factory: pytest.TempPathFactory, cache: Path) -> Path:
    """Of a run of two stages."""
    trainer = Trainer(tmp_path_factory.mktemp("predict"), cache, "masked-lm")
    return trainer.run("run", 2, num_stages=2) / "export"


def answered(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> list[dict[str, Any]]:
    assert predict.main([*map(str, arguments), "--json"]) == 0
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


@pytest.mark.processes
class TestMaskedSentences:
    def test_it_answers_as_the_pipeline_does(self, export: Path, capsys: pytest.CaptureFixture[str]):
        loaded: Any = pipeline("fill-mask", model=str(export))
        one, two = answered(capsys, "--export", export, "import [MASK]", "def <mask>(<mask>):", "--top_k", "3")
        for found, asked in ((one, "import <mask>"), (two, "def <mask>(<mask>):")):
            assert found["predictions"] == loaded(asked, top_k=3)
        assert one["input"] == "import [MASK]"
        (other,) = answered(capsys, "--export", export, "import [MASK]", "--top_k", "3", "--exit", "stage-00")
        assert other["predictions"] != one["predictions"]

    def test_lines_of_standard_input(
        self, export: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ):
        monkeypatch.setattr(sys, "stdin", io.StringIO("a <mask>\n<mask> [MASK]\n"))
        assert predict.main(["--export", str(export), "--top_k", "2"]) == 0
        printed = [line for line in capsys.readouterr().out.splitlines() if not line.startswith("  0.")]
        assert printed == ["a <mask>", "<mask> [MASK]"]

    @pytest.mark.parametrize(
        ("arguments", "said"),
        [
            (["import os"], "'import os' has no <mask>; write it, or [MASK], where a token is missing"),
            (["[MASK]" + " x" * 99], "' cannot be read by the model: "),
            (["[MASK]", "--exit", "stage-07"], "--exit stage-07 is no exit of "),
            (["[MASK]", "--device", "nowhere"], "--device nowhere: "),
        ],
    )
    def test_what_cannot_be_asked_is_one_line(
        self, export: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], said: str
    ):
        assert predict.main(["--export", str(export), *arguments]) == 2
        error = capsys.readouterr().err
        assert error.startswith("predict.py: ")
        assert said in error
        assert error.count("\n") == 1

    def test_it_needs_transformers_alone(self, export: Path):
        runs_with_transformers_alone("predict", "--export", str(export), "[MASK]")


def test_an_image_is_what_the_pipeline_says(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    config = ViTConfig(**SMALL_VIT, id2label={0: "cat", 1: "dog", 2: "owl"})
    ViTForImageClassification(config).save_pretrained(tmp_path)
    ViTImageProcessor(size={"height": 16, "width": 16}).save_pretrained(tmp_path)
    picture, text = tmp_path / "a.png", tmp_path / "b.png"
    turned = Image.Exif()
    turned[ExifTags.Base.Orientation] = 6  # as a phone held upright has it
    Image.linear_gradient("L").save(picture, exif=turned)
    text.write_text("no image")
    (found,) = answered(capsys, "--export", tmp_path, picture, "--top_k", "2")
    loaded: Any = pipeline("image-classification", model=str(tmp_path))
    assert found["predictions"] == loaded(str(picture), top_k=2)
    assert predict.main(["--export", str(tmp_path), str(picture)]) == 0
    assert "  cat\n" in capsys.readouterr().out
    for path, said in ((text, "is no image that Pillow reads"), (tmp_path / "c.png", "does not exist; put it back")):
        assert predict.main(["--export", str(tmp_path), str(path)]) == 2
        assert f"predict.py: {path} {said}" in capsys.readouterr().err
    (tmp_path / "preprocessor_config.json").unlink()
    assert predict.main(["--export", str(tmp_path), str(picture)]) == 2
    assert f"predict.py: {tmp_path} has no image processor: " in capsys.readouterr().err


def test_each_command_names_the_one_for_other_models(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    for config, name, script, arguments, said in (
        (TINY, "LlamaForCausalLM", predict, ["x"], "writes text; use llm-local generate"),
        (TINY_BERT, "BertForMaskedLM", generate, ["--prompt", "x"], "writes no text; use llm-local predict"),
        (TINY_BERT, "BertModel", predict, ["x"], "predict.py knows no pipeline for"),
    ):
        (tmp_path / "config.json").write_text(json.dumps(config | {"architectures": [name]}))
        assert script.main(["--export", str(tmp_path), *arguments]) == 2
        assert capsys.readouterr().err.endswith(f"--export {tmp_path} is a {name}, which {said}\n")


def test_bad_flags_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert predict.main(["--export", "nowhere", "x"]) == 2
    assert capsys.readouterr().err == "predict.py: --export nowhere does not exist\n"
    assert predict.main(["--export", "nowhere", "x", "--top_k", "0"]) == 2
    assert capsys.readouterr().err == "predict.py: --top_k 0 is less than 1\n"
