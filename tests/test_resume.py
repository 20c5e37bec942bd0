"""Checkpoints: resume equals never having stopped, and a half-written one is never picked."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import MODELS, Trainer, records, weights
from launching import job

from llm_local.checkpoint.catalog import Catalog
from llm_local.checkpoint.line import committed, find_checkpoint, set_aside
from llm_local.checkpoint.manifest import read_manifest
from llm_local.checks.preflight import preflight
from llm_local.config import ConfigError, from_flat, parse

CONFIGS = Path(__file__).parent.parent / "configs" / "ds"
DROPOUT = {"attention_dropout": 0.1, "hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1}
ZERO1_BF16 = {"deepspeed": CONFIGS / "zero1.json", "bf16": True}
GREEDY = {"method": "greedy", "gradient_checkpointing": True}


def same_bits(one: Path, other: Path) -> None:
    mine, theirs = weights(one / "export"), weights(other / "export")
    assert set(mine) == set(theirs)
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)


@pytest.mark.processes
@pytest.mark.parametrize(
    ("trainer", "ranks", "settings"),
    [
        ("causal-lm", 2, {"num_stages": 2}),
        ("masked-lm", 4, {"num_stages": 2, "deepspeed": CONFIGS / "zero1.json", "bf16": True}),
        ("causal-lm", 4, {"num_stages": 2, "deepspeed": CONFIGS / "zero3.json", "layers_per_block": 1}),
        ("masked-lm", 2, {"num_stages": 1, "deepspeed": CONFIGS / "zero2_offload.json"}),
        ("causal-lm", 2, {"num_stages": 1, "deepspeed": CONFIGS / "zero0.json", "bf16": True}),
        ("causal-lm", 2, {"num_stages": 2, "method": "backprop", "deepspeed": CONFIGS / "zero1.json"}),
        ("causal-lm", 3, {"num_stages": 3, "method": "delayed", "gradient_accumulation_steps": 2, **ZERO1_BF16}),
        ("masked-lm", 2, {"num_stages": 2, "method": "delayed", "delay_correction": True}),
        ("image-classification", 4, {"num_stages": 2, "deepspeed": CONFIGS / "zero2.json", "bf16": True, **GREEDY}),
    ],
    ids=[
        "fp32",
        "masked-zero1-bf16",
        "zero3-blocks",
        "masked-offload",
        "zero0-bf16",
        "backprop",
        "delayed",
        "masked-delayed",
        "images-greedy",
    ],
    indirect=["trainer"],
)
def test_resume_equals_never_having_stopped(trainer: Trainer, ranks: int, settings: dict):
    """Weights, optimizer, schedule, data position and dropout go on bit for bit."""
    trainer.model(MODELS[trainer.task] | DROPOUT)
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
    settings = {"num_stages": 2, "max_steps": 5, "save_steps": 1, "learning_rate": 1e-4}
    again = trainer.run("run", 2, resume_from_checkpoint="last", **settings)
    assert [r["step"] for r in records(again, 1)] == [1, 2, 3, 4, 5]
    assert records(again, 1)[-1]["lr"] == pytest.approx(1e-4 / 5), "the flags of the resumed run are followed"
    assert (checkpoints / "step-00000004" / "manifest.json").exists(), "the half-written one was written again"


@pytest.mark.processes
def test_a_run_that_goes_back_keeps_both_lines(trainer: Trainer):
    """What was trained after the checkpoint is set aside whole, and none of the new line's checkpoints goes for it."""
    common = {"eval_batches": 0, "save_steps": 2}
    output = trainer.run("run", 1, max_steps=8, **common)
    folder, first = output / "checkpoints", (output / "metrics/stage-00.jsonl").read_text()
    back = {"resume_from_checkpoint": folder / "step-00000002", "save_total_limit": 2, "learning_rate": 1e-4}
    trainer.run("run", 1, max_steps=6, **common, **back)
    aside = folder / "abandoned-1"
    assert [path.name for path in committed(output)] == ["step-00000004", "step-00000006"]
    old = ("step-00000004", "step-00000006", "step-00000008")
    assert [read_manifest(aside / name).flags["learning_rate"] for name in old] == [3e-3] * 3
    assert (aside / "metrics/stage-00.jsonl").read_text() == first
    found = records(output, 0)
    assert [r["step"] for r in found] == [1, 2, 3, 4, 5, 6]
    assert found[:2] == [json.loads(line) for line in first.splitlines()[:2]]
    newest = from_flat({"output_dir": str(output), "resume_from_checkpoint": "true"})
    assert find_checkpoint(newest) == folder / "step-00000006"
    trainer.run("run", 1, max_steps=9, **common, resume_from_checkpoint=aside / "step-00000008")
    assert [r["lr"] for r in records(output, 0)[:8]] == [json.loads(line)["lr"] for line in first.splitlines()]
    assert [path.name for path in committed(output)] == ["step-00000009"], "the last step is saved, whatever its number"
    assert sorted(path.name for path in folder.iterdir()) == ["abandoned-1", "abandoned-2", "step-00000009"]


def fake_run(folder: Path, *steps: int) -> list[Path]:
    """As much of a run as is looked at before a checkpoint is read."""
    (folder / "metrics").mkdir(parents=True)
    (folder / "run.yaml").write_text("seed: 1\n")
    (folder / "metrics/stage-00.jsonl").write_text("".join(f'{{"step": {n}, "split": "train"}}\n' for n in steps))
    for step in steps:
        (folder / f"checkpoints/step-{step:08d}").mkdir(parents=True)
        (folder / f"checkpoints/step-{step:08d}/manifest.json").write_text("{}")
    return committed(folder)


class Killed(Exception):
    pass


@pytest.mark.parametrize("moves", [0, 1, 2, 3])
def test_a_kill_while_checkpoints_are_set_aside_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moves: int
):
    """At every moment the newest checkpoint is one that leads to the next; the next start finishes the work."""
    first, *later = fake_run(tmp_path, 4, 8, 12, 16)
    rename, left = os.rename, iter(range(moves))

    def until_killed(source: Path, target: Path) -> None:
        if next(left, None) is None:
            raise Killed
        rename(source, target)

    with monkeypatch.context() as patch, contextlib.suppress(Killed):
        patch.setattr(os, "rename", until_killed)
        set_aside(tmp_path, first)
    assert committed(tmp_path) == [first, *later[: 3 - moves]]
    assert len((tmp_path / "metrics/stage-00.jsonl").read_text().splitlines()) == 4
    set_aside(tmp_path, first)
    assert committed(tmp_path) == [first]
    assert sorted(path.name for path in tmp_path.glob("checkpoints/abandoned-*/step-*")) == [p.name for p in later]
    assert set_aside(tmp_path, first) is None


@pytest.mark.processes
def test_a_checkpoint_of_another_run_does_not_come_into_a_folder_with_one(trainer: Trainer):
    theirs = fake_run(trainer.folder / "theirs", 4)[0]
    ours = trainer.folder / "run"
    fake_run(ours, 2)
    others = "replace it (--overwrite_output_dir), or choose another folder"

    def problems(**settings: object) -> list[str]:
        with pytest.raises(ConfigError) as refusal:
            preflight(parse(trainer.flags("run", **settings)), 1)
        return refusal.value.problems

    assert problems(resume_from_checkpoint=theirs) == [
        f"resume_from_checkpoint={theirs} lies outside output_dir={ours}, which holds another run; go on with that one "
        f"(--resume_from_checkpoint auto), {others}"
    ]
    assert problems(resume_from_checkpoint=trainer.folder / "theirs")[0].startswith(f"resume_from_checkpoint={theirs} ")
    unreadable = f"{theirs}/manifest.json cannot be read"
    assert problems(resume_from_checkpoint=theirs, overwrite_output_dir=True)[0].startswith(unreadable)
    assert problems(resume_from_checkpoint=theirs, output_dir=trainer.folder / "new")[0].startswith(unreadable)
    shutil.rmtree(ours / "checkpoints")
    (ours / "run.yaml").write_text(f"resume_from_checkpoint: {theirs}\n")
    assert problems(resume_from_checkpoint=theirs)[0].startswith(unreadable), "the same command, killed before a save"
    (ours / "run.yaml").write_text("- a list\n")
    assert "which holds another run" in problems(resume_from_checkpoint=theirs)[0]
    (ours / "export").mkdir()
    assert problems(resume_from_checkpoint="auto") == [
        f"output_dir={ours} holds a finished run without a checkpoint to go on from; {others}"
    ]


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
        read_manifest(half)


@pytest.mark.processes
def test_a_disk_without_room_is_named_and_nothing_is_lost(trainer: Trainer):
    output = trainer.run("run", 1, max_steps=2, save_steps=2, eval_batches=0)
    trainer.text.write_text(trainer.text.read_text() + "more = 1\n" * 9)
    flags = trainer.flags("run", max_steps=6, save_steps=2, resume_from_checkpoint="true")
    small_files = ["bash", "-c", 'ulimit -f 1000; exec "$0" "$@"', sys.executable]  # of 1 MB at most
    with job(small_files, flags, trainer.folder) as run:
        assert run.wait(120) == 1, run.text
    path = output / "checkpoints/step-00000004/stage-00/replica-00.safetensors"
    assert f"{path} could not be written (" in run.text
    assert "the checkpoints before it are whole: make room, and resume" in run.text
    tokens, since = r"1 documents of [\d,]+ tokens", f"{output}/checkpoints/step-00000002"
    said = rf"warning: train_file={trainer.text} has {tokens}, and had {tokens} when {since} was"
    assert len(re.findall(said, run.text)) == 1, run.text
    assert "Traceback" not in run.text
    assert not path.parent.exists(), "what was half written takes no room"
    assert Catalog(output / "checkpoints/step-00000002").manifest.step == 2


@pytest.mark.processes
def test_a_kill_at_any_moment_leaves_whole_checkpoints(trainer: Trainer):
    flags = trainer.flags("run", max_steps=500, save_steps=1, eval_batches=0)
    folder = trainer.folder / "run" / "checkpoints"
    with job([sys.executable], flags, trainer.folder) as run:
        end = time.monotonic() + 120
        while len(list(folder.glob("*/manifest.json"))) < 3 and time.monotonic() < end:
            time.sleep(0.01)
        for process in run.processes():
            process.kill()
    whole = sorted(path.parent for path in folder.glob("*/manifest.json"))
    assert len(whole) >= 3
    for checkpoint in whole:
        catalog = Catalog(checkpoint)
        assert checkpoint.name == f"step-{catalog.manifest.step:08d}"
        assert all(catalog.tensor(name).isfinite().all() for name in catalog.weights)
