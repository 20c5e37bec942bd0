"""Checkpoints: resume equals never having stopped, and a half-written one is never picked."""

from __future__ import annotations

import pickle
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import TINY, Trainer, records, weights

from llm_local.checkpoint import BrokenCheckpoint, TensorsOnly, find_checkpoint, load_checkpoint, read_step
from llm_local.config import ConfigError, from_flat, parse
from llm_local.preflight import preflight
from llm_local.world import Place

CONFIGS = Path(__file__).parent.parent / "configs" / "ds"
DROPOUT = {"attention_dropout": 0.1}
WORLD: Any = SimpleNamespace(place=Place(0, 1, 1), device=torch.device("cpu"))
CHUNKED: Any = SimpleNamespace(method="chunked", num_stages=1)


def same_bits(one: Path, other: Path) -> None:
    mine, theirs = weights(one / "export"), weights(other / "export")
    assert set(mine) == set(theirs)
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)


@pytest.mark.processes
@pytest.mark.parametrize(
    ("ranks", "settings"),
    [
        (2, {"num_stages": 2}),
        (4, {"num_stages": 2, "deepspeed": CONFIGS / "zero1.json", "bf16": True}),
        (4, {"num_stages": 2, "deepspeed": CONFIGS / "zero3.json", "layers_per_block": 1}),
        (2, {"num_stages": 1, "deepspeed": CONFIGS / "zero2_offload.json"}),
        (2, {"num_stages": 1, "deepspeed": CONFIGS / "zero0.json", "bf16": True}),
        (2, {"num_stages": 2, "method": "backprop", "deepspeed": CONFIGS / "zero1.json"}),
    ],
    ids=["fp32", "zero1-bf16", "zero3-blocks", "offload", "zero0-bf16", "backprop"],
)
def test_resume_equals_never_having_stopped(trainer: Trainer, ranks: int, settings: dict):
    """Weights, optimizer, schedule, data position and dropout go on bit for bit."""
    trainer.model(TINY | DROPOUT)
    common = {**settings, "lr_scheduler_type": "cosine", "warmup_steps": 2, "save_steps": 3, "eval_batches": 1}
    straight = trainer.run("straight", ranks, max_steps=6, **common)
    resumed = trainer.folder / "resumed"
    shutil.copytree(straight, resumed, ignore=shutil.ignore_patterns("export", "step-00000006"))
    trainer.run("resumed", ranks, max_steps=6, resume_from_checkpoint="true", **common)
    same_bits(resumed, straight)
    for stage in range(settings["num_stages"]):
        for one, other in zip(records(resumed, stage), records(straight, stage), strict=True):
            assert [one[k] for k in ("step", "loss", "lr", "grad_norm")] == [
                other[k] for k in ("step", "loss", "lr", "grad_norm")
            ]


@pytest.mark.processes
def test_a_half_written_checkpoint_is_never_picked_and_old_ones_go(trainer: Trainer):
    output = trainer.run("run", 2, num_stages=2, max_steps=4, save_steps=1, save_total_limit=2)
    checkpoints = output / "checkpoints"
    assert sorted(p.name for p in checkpoints.iterdir()) == ["step-00000003", "step-00000004"]
    (checkpoints / "step-00000004" / "manifest.json").unlink()
    flat = {"output_dir": str(output), "resume_from_checkpoint": "true"}
    assert find_checkpoint(from_flat(flat)) == checkpoints / "step-00000003"
    assert find_checkpoint(from_flat(flat | {"resume_from_checkpoint": str(output)})) == checkpoints / "step-00000003"
    settings = {"num_stages": 2, "max_steps": 5, "save_steps": 1, "learning_rate": 1.0}
    again = trainer.run("run", 2, resume_from_checkpoint="last", **settings)
    assert [r["step"] for r in records(again, 1)] == [1, 2, 3, 4, 5]
    flags = trainer.flags("run", num_stages=2, resume_from_checkpoint="true", max_steps=6, learning_rate=1.0)
    (warning,) = preflight(parse(flags), 2).warnings
    assert "learning_rate=1.0 is not followed" in warning
    assert "step-00000005 goes on with 0.003" in warning
    assert (checkpoints / "step-00000004" / "manifest.json").exists(), "the half-written one was written again"


def test_a_checkpoint_that_is_not_there_is_named(tmp_path: Path):
    flat = {"output_dir": str(tmp_path), "resume_from_checkpoint": "true"}
    with pytest.raises(ConfigError, match="no complete checkpoint in"):
        find_checkpoint(from_flat(flat))
    half = tmp_path / "checkpoints" / "step-00000001"
    half.mkdir(parents=True)
    with pytest.raises(ConfigError, match=r"has no manifest.json: it is missing or half written"):
        find_checkpoint(from_flat(flat | {"resume_from_checkpoint": str(half)}))
    assert find_checkpoint(from_flat({"resume_from_checkpoint": "false"})) is None
    (half / "manifest.json").write_text('{"step": 1')
    with pytest.raises(ConfigError, match=r"manifest.json cannot be read \(.*\); name another checkpoint"):
        read_step(half)


class Intruder:
    def __reduce__(self):
        return (print, ("code from a checkpoint ran",))


def test_loading_a_checkpoint_runs_no_code(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    torch.save({"module": torch.ones(2), "more": Intruder()}, tmp_path / "state.pt")
    with pytest.raises(BrokenCheckpoint) as refusal:
        TensorsOnly().load(str(tmp_path / "state.pt"))
    assert isinstance(refusal.value.__cause__, pickle.UnpicklingError)
    assert "ran" not in capsys.readouterr().out


def test_a_damaged_file_of_a_checkpoint_is_named(tmp_path: Path):
    state = tmp_path / "mp_rank_00_model_states.pt"
    torch.save({"module": torch.ones(1000)}, state)
    state.write_bytes(state.read_bytes()[:500])
    with pytest.raises(RuntimeError, match=f"^{state}: .*; resume from an earlier checkpoint$"):
        TensorsOnly().load(str(state))


class Engine:
    """As DeepSpeed's, that finds nothing in the folder."""

    def __init__(self, by_assertion: bool):
        self._by_assertion = by_assertion

    def load_checkpoint(self, folder: str, tag: str) -> tuple[None, dict]:
        assert not self._by_assertion
        return None, {}


@pytest.mark.parametrize("by_assertion", [True, False])
def test_a_block_without_its_files_is_named(tmp_path: Path, by_assertion: bool):
    engine: Any = Engine(by_assertion)
    folder = tmp_path / "stage-00" / "block-000"
    with pytest.raises(RuntimeError, match=f"^{folder}: .* missing.*; resume from an earlier checkpoint$"):
        load_checkpoint(tmp_path, WORLD, CHUNKED, [engine])


@pytest.mark.parametrize("content", [None, b"no tensors"])
def test_random_states_that_are_missing_or_damaged_are_named(tmp_path: Path, content: bytes | None):
    rng = tmp_path / "stage-00" / "rng-00.safetensors"
    rng.parent.mkdir()
    if content is not None:
        rng.write_bytes(content)
    with pytest.raises(RuntimeError, match=f"^{rng}: .*; resume from an earlier checkpoint$"):
        load_checkpoint(tmp_path, WORLD, CHUNKED, [])
