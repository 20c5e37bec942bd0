"""Inside a trained run: exit losses as recorded, gradients as autograd has them, readouts that learn."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import asdict, fields
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from conftest import Trainer, records
from transformers import AutoModelForCausalLM

from llm_local.checkpoint.manifest import BrokenCheckpoint, Layout, Manifest
from llm_local.commands import probe
from llm_local.data.sets import prepare
from llm_local.data.tokenizer import load_tokenizer
from llm_local.examine import compare_gradients, find_committed, linear_losses, load_run

SAVED = {"num_stages": 2, "max_steps": 6, "save_steps": 3}
CPU = torch.device("cpu")


@pytest.fixture
def script() -> ModuleType:
    return probe


@pytest.fixture(scope="module")
def train(tmp_path_factory: pytest.TempPathFactory, cache: Path) -> Callable[..., Path]:
    """Runs of a model of four layers on two stages, each trained once."""
    trainer = Trainer(tmp_path_factory.mktemp("runs"), cache)
    done: dict[str, Path] = {}

    def run(name: str, **settings: Any) -> Path:
        if name not in done:
            done[name] = trainer.run(name, 2, **SAVED | settings)
        return done[name]

    return run


@pytest.fixture
def greedy(train: Callable[..., Path]) -> Path:
    return train("greedy", method="greedy")


def write_run(folder: Path, layout: dict[str, Any] | None) -> Path:
    """A folder as a run leaves it, with a manifest and nothing behind it."""
    (folder / "run.yaml").write_text("config_name: none.json\n")
    if layout is not None:
        step = folder / "checkpoints/step-00000003"
        step.mkdir(parents=True)
        nothing = dict.fromkeys(field.name for field in fields(Layout))
        manifest = Manifest(3, 0, Layout(**nothing | layout), {}, {})
        (step / "manifest.json").write_text(json.dumps(asdict(manifest)))
    return folder


def change_flags(checkpoint: Path, **flags: Any) -> None:
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    manifest["flags"] |= flags
    (checkpoint / "manifest.json").write_text(json.dumps(manifest))


def body_gradient(model: Any, layers: tuple[int, int]) -> torch.Tensor:
    """Of so many layers of a Llama, and of the embedding with the first."""
    modules = [model.model.embed_tokens] if layers[0] == 0 else []
    modules += [model.model.layers[index] for index in layers]
    return torch.cat([p.grad.flatten() for module in modules for p in module.parameters()])


def norm(tensors: list[torch.Tensor] | tuple[torch.Tensor, ...]) -> float:
    return float(torch.cat([t.flatten() for t in tensors]).norm())


@pytest.mark.processes
class TestOfARun:
    def test_the_command_writes_what_it_shows(
        self, script: ModuleType, greedy: Path, capsys: pytest.CaptureFixture[str]
    ):
        """The rows are those of the run's own evaluations, so its exits have the losses that were recorded."""
        assert script.main([str(greedy), "--rows", "4", "--readout_steps", "20"]) == 0
        found = json.loads((greedy / "metrics/probe.json").read_text())
        assert (greedy / "metrics/probe.png").read_bytes().startswith(b"\x89PNG")
        assert found["step"] == 6
        blocks = found["blocks"]
        assert [(b["block"], b["stage"], b["layers"]) for b in blocks] == [
            (0, 0, "0"),
            (1, 0, "1"),
            (2, 1, "2"),
            (3, 1, "3"),
        ]
        recorded = [loss for stage in (0, 1) for loss in records(greedy, stage, "eval")[-1]["block_losses"]]
        assert [b["loss"] for b in blocks] == pytest.approx(recorded, rel=1e-5)
        assert blocks[3]["cosine"] == pytest.approx(1.0, abs=1e-6)
        assert blocks[3]["local_norm"] == pytest.approx(blocks[3]["true_norm"], rel=1e-6)
        assert all(-1.0 <= b["cosine"] < 0.9999 for b in blocks[:3])
        lines = capsys.readouterr().out.splitlines()
        assert lines[0].split() == script.table({"blocks": []}).split()
        assert len(lines) == 6

    def test_the_true_gradient_is_that_of_the_exported_model(self, train: Callable[..., Path]):
        """Of the whole model, in plain transformers; and the local one is that of the exit."""
        output = train("chunked", max_steps=6, save_steps=6)
        run = load_run(output, None, CPU)
        _, validation = prepare(run.config, load_tokenizer(run.config))
        ids = validation.batch(0, 3)  # not a multiple of the micro-batch of 2
        found = compare_gradients(run, ids)
        exits = (output / "export/exits/stage-00", output / "export")
        gradients = []
        for folder, mine in zip(exits, found, strict=True):
            model: Any = AutoModelForCausalLM.from_pretrained(folder)
            loss = model(input_ids=ids, labels=ids, use_cache=False).loss
            assert mine.loss == pytest.approx(float(loss.detach()), rel=1e-5)
            loss.backward()
            spans = [(0, 1), (2, 3)][: len(gradients) + 1]  # the exit has no second block
            gradients.append([body_gradient(model, layers) for layers in spans])
        local, true = gradients[0][0], gradients[1][0]
        assert found[0].local_norm == pytest.approx(float(local.norm()), rel=1e-4)
        assert found[0].true_norm == pytest.approx(float(true.norm()), rel=1e-4)
        assert found[0].cosine == pytest.approx(float(torch.cosine_similarity(local, true, dim=0)), abs=1e-4)
        assert found[1].true_norm == pytest.approx(float(gradients[1][1].norm()), rel=1e-4)

    def test_overlapping_blocks_hear_the_block_above(self, train: Callable[..., Path]):
        """Windows of two layers, blocks 0-1, 2 and 3: layer 1 hears losses 0 and 1, layer 2 losses 1 and 2."""
        run = load_run(train("overlapping", method="overlapping", layers_per_block=2, block_stride=1), None, CPU)
        ids = torch.arange(64).reshape(2, 32)
        found = compare_gradients(run, ids)
        low, middle, high = run.blocks
        hidden = low.features(ids, None)
        seam = low.body.border.take_seam()
        assert seam is not None
        loss = low.readout(hidden, ids)
        layer = list(low.body_model.model.layers[1].parameters())
        upper = torch.autograd.grad(loss + middle.readout(middle.features(ids, hidden), ids), layer, retain_graph=True)
        own = torch.autograd.grad(loss, seam.above)
        below = [*low.body_model.model.embed_tokens.parameters(), *low.body_model.model.layers[0].parameters()]
        lower = torch.autograd.grad(seam.below, below, own)
        assert found[0].local_norm == pytest.approx(norm([*upper, *lower]), rel=1e-5)
        hidden = middle.features(ids, hidden.detach())
        last = high.readout(high.features(ids, hidden), ids)
        layer = list(middle.body_model.model.layers[2].parameters())
        true = torch.autograd.grad(last, layer, retain_graph=True)
        local = torch.autograd.grad(middle.readout(hidden, ids) + last, layer)
        assert (found[1].local_norm, found[1].true_norm) == pytest.approx((norm(local), norm(true)), rel=1e-5)
        assert found[2].cosine == pytest.approx(1.0, abs=1e-6)

    def test_shared_heads_have_the_matrix_of_their_time(self, train: Callable[..., Path]):
        output = train("shared", method="greedy", head="shared", head_layers=1, head_refresh_steps=2)
        run = load_run(output, None, CPU)
        _, validation = prepare(run.config, load_tokenizer(run.config))
        found = compare_gradients(run, validation.batch(0, 4))
        recorded = [loss for stage in (0, 1) for loss in records(output, stage, "eval")[-1]["block_losses"]]
        assert [b.loss for b in found] == pytest.approx(recorded, rel=1e-5)

    def test_a_tied_head_is_no_part_of_the_body(self, train: Callable[..., Path]):
        run = load_run(train("tied", config_overrides="tie_word_embeddings=true"), None, CPU)
        block = run.blocks[0]
        table = block.body_model.get_input_embeddings().weight
        assert table is block.head_model.get_output_embeddings().weight
        found = compare_gradients(run, torch.arange(32)[None])
        whole = torch.autograd.grad(block(torch.arange(32)[None], None)[0], table)[0].norm()
        assert found[0].local_norm < float(whole)

    def test_readouts_learn_and_the_blocks_stay(self, greedy: Path):
        run = load_run(greedy, None, CPU)
        before = {name: p.clone() for name, p in run.blocks[1].named_parameters()}
        train, validation = prepare(run.config, load_tokenizer(run.config))
        ids = validation.batch(0, 3)
        few, more = (linear_losses(run, train, ids, steps) for steps in (5, 40))
        assert linear_losses(run, train, ids, 5) == few
        assert all(b < a < 8.318 for a, b in zip(few, more, strict=True))  # nothing learned: log 4096
        assert all(torch.equal(p, before[name]) for name, p in run.blocks[1].named_parameters())

    def test_checkpoints_by_name(self, train: Callable[..., Path]):
        output = train("chunked", max_steps=6, save_steps=6)
        assert load_run(output, None, CPU).step == 6
        assert load_run(output, str(output / "checkpoints/step-00000006"), CPU).step == 6
        with pytest.raises(ValueError, match=r"no complete checkpoint step-00000009 \(it has step-00000006\)"):
            find_committed(output, "step-00000009")

    def test_a_damaged_file_is_named(
        self, script: ModuleType, greedy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ):
        copy = tmp_path / "step-00000006"
        shutil.copytree(greedy / "checkpoints/step-00000006", copy)
        state = copy / "stage-01/replica-00.safetensors"
        state.write_bytes(state.read_bytes()[:99])
        assert script.main([str(greedy), "--checkpoint", str(copy)]) == 2
        assert str(state) in capsys.readouterr().err

    def test_another_model_than_the_checkpoints_is_refused(self, greedy: Path, tmp_path: Path):
        copy = tmp_path / "checkpoints/step-00000006"
        shutil.copytree(greedy / "checkpoints/step-00000006", copy)
        change_flags(copy, config_overrides="hidden_size=64")
        (tmp_path / "run.yaml").write_text((greedy / "run.yaml").read_text())
        with pytest.raises(
            BrokenCheckpoint,
            match=r"step-00000006: it has no model.embed_tokens.weight of that size",
        ):
            load_run(tmp_path, None, CPU)

    def test_the_flags_are_those_that_the_checkpoint_was_written_with(self, greedy: Path, tmp_path: Path):
        """run.yaml may be of today's run, which went on from it with others."""
        (tmp_path / "run.yaml").write_text("config_overrides: hidden_size=64\nnum_stages: 1\n")
        run = load_run(tmp_path, str(greedy / "checkpoints/step-00000006"), CPU)
        assert (run.config.local.num_stages, len(run.blocks)) == (2, 4)


class TestRefusals:
    @pytest.mark.parametrize(
        ("layout", "message"),
        [
            (None, "has no complete checkpoint to look into; train with --save_steps"),
            ({"method": "backprop", "zero_stage": 0}, "was trained with method=backprop: one loss for all layers, .*"),
        ],
    )
    def test_a_run_without_blocks_to_read(
        self,
        script: ModuleType,
        tmp_path: Path,
        capsys: pytest.CaptureFixture[str],
        layout: dict[str, Any] | None,
        message: str,
    ):
        assert script.main([str(write_run(tmp_path, layout))]) == 2
        assert re.fullmatch(rf"probe.py: {tmp_path}\S* {message}\n", capsys.readouterr().err)
        assert not (tmp_path / "metrics").exists()

    def test_no_run(self, script: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
        assert script.main([str(tmp_path)]) == 2
        assert capsys.readouterr().err == f"probe.py: {tmp_path} has no run.yaml; name the --output_dir of a run\n"
        assert script.main([str(tmp_path), "--rows", "0"]) == 2
        assert capsys.readouterr().err == "probe.py: --rows 0 is less than 1\n"

    def test_a_setting_that_is_unknown_is_one_line(
        self, script: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ):
        write_run(tmp_path, {"method": "chunked"})
        change_flags(tmp_path / "checkpoints/step-00000003", num_stagez=2, num_steps="x")
        assert script.main([str(tmp_path)]) == 2
        assert re.fullmatch(r"probe.py: .*num_stagez.*; .*num_steps.*\n", capsys.readouterr().err)
