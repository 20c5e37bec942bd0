"""scripts/export.py: a model from a checkpoint, without the ranks that wrote it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from conftest import TINY, Trainer, weights
from transformers import AutoModelForCausalLM, AutoTokenizer

from llm_local.checkpoint import catalog as checkpoint_format
from llm_local.checkpoint.catalog import Catalog

ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.processes


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    monkeypatch.delitem(sys.modules, "export", raising=False)
    import export

    return export


SHARED = {"head": "shared", "head_layers": 1, "head_rank": 4, "layers_per_block": 1}


@pytest.mark.parametrize(
    ("ranks", "settings", "model"),
    [
        (2, {"num_stages": 2}, {}),
        (2, {"num_stages": 2, **SHARED}, {}),
        (4, {"num_stages": 2, "bf16": True, "deepspeed": ROOT / "configs/ds/zero3.json"}, {}),
        (2, {"num_stages": 2, "method": "backprop"}, {}),
        (1, {"num_stages": 1, "method": "backprop"}, {"tie_word_embeddings": True}),
        (2, {"num_stages": 2, "method": "overlapping"}, {"tie_word_embeddings": True}),
    ],
    ids=["chunked", "shared-lowrank", "zero3-bf16", "backprop", "tied", "overlapping-tied"],
)
def test_it_is_the_model_that_the_run_exports(
    trainer: Trainer, script: ModuleType, tmp_path: Path, ranks: int, settings: dict[str, Any], model: dict[str, Any]
):
    trainer.model(TINY | model)
    run = trainer.run("run", ranks, max_steps=2, save_steps=2, eval_batches=0, **settings)
    trainer.model(TINY | model | {"attn_implementation": "flash_attention_2"})  # which this machine need not have
    checkpoint = run / "checkpoints/step-00000002"
    wanted = {None: run / "export"} | {e.name: e for e in (run / "export").glob("exits/stage-00")}
    for name, folder in wanted.items():
        out = tmp_path / f"out-{name}"
        assert script.main([str(checkpoint), str(out), *(["--exit", name] if name else [])]) == 0
        mine, theirs = weights(out), weights(folder)
        assert set(mine) == set(theirs)
        assert all(torch.equal(mine[key], theirs[key]) for key in theirs)
        found = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
        assert not any(found[1].values())
        assert len(AutoTokenizer.from_pretrained(out)) == 4096
        assert "| steps | 2 |" in (out / "README.md").read_text()


@pytest.mark.parametrize("bytes_at_a_time", [1, 2**17])
def test_fp32_has_the_optimizer_s_weights(
    trainer: Trainer, script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bytes_at_a_time: int
):
    monkeypatch.setattr(checkpoint_format, "_BYTES_AT_A_TIME", bytes_at_a_time)  # a tensor by itself, or a few
    run = trainer.run("run", 1, max_steps=2, save_steps=2, bf16=True, deepspeed=ROOT / "configs/ds/zero1.json")
    checkpoint = run / "checkpoints/step-00000002"
    assert script.main([str(checkpoint), str(tmp_path / "out"), "--dtype", "fp32"]) == 0
    name, rounded = "model.layers.0.mlp.up_proj.weight", weights(run / "export")
    mine = weights(tmp_path / "out")[name]
    assert torch.equal(mine.flatten(), Catalog(checkpoint).tensor(name))
    assert not torch.equal(mine, rounded[name].float())
    assert torch.equal(mine.bfloat16(), rounded[name])


@pytest.mark.parametrize(
    ("settings", "exit", "said"),
    [
        ({}, "stage-07", "has no exit stage-07; it has stage-00, stage-01"),
        ({"method": "backprop"}, "stage-00", "has no head of its own for stage-00: method=backprop trains the last"),
        (
            {"head_features": True, "layers_per_block": 1},
            "stage-00",
            "stage-00 is no model of its own, as its head reads more (head_features)",
        ),
    ],
)
def test_an_exit_that_is_not_there_is_refused(
    trainer: Trainer, script: ModuleType, capsys: pytest.CaptureFixture[str], settings: dict, exit: str, said: str
):
    run = trainer.run("run", 2, num_stages=2, max_steps=1, save_steps=1, eval_batches=0, **settings)
    out = trainer.folder / "out"
    assert script.main([str(run / "checkpoints/step-00000001"), str(out), "--exit", exit]) == 2
    assert said in capsys.readouterr().err
    assert not out.exists()


def test_what_is_no_checkpoint_is_named(script: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert script.main([str(tmp_path), str(tmp_path / "out")]) == 2
    assert f"export.py: {tmp_path} has no manifest.json" in capsys.readouterr().err


def test_the_command_itself(trainer: Trainer):
    run = trainer.run("run", 1, max_steps=1, save_steps=1, eval_batches=0)
    command = [sys.executable, "scripts/export.py", run / "checkpoints/step-00000001", trainer.folder / "out"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stderr == f"export.py: stage 0: layers 0-3\nexport.py: model: {trainer.folder / 'out'}\n"
