"""A model from parts: what each stage's job has alone becomes what one launch exports."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TINY, Trainer, weights
from pretrained import pretrained
from safetensors.torch import save_file
from test_export import MINICPM3
from test_remote_code import REPAIR, brings_code
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from llm_local.checkpoint.catalog import Catalog
from llm_local.checkpoint.line import committed
from llm_local.commands.assemble import main
from llm_local.data.tokenizer import builtin_tokenizer_dir
from llm_local.export.parts import Check, write_part
from llm_local.export.stages import exit_folder
from llm_local.offline_export import described

ROOT = Path(__file__).parent.parent
IDS = torch.arange(5, 85).view(1, -1) % 60
pytestmark = pytest.mark.processes


def job_of(checkpoint: Path, stage: int, folder: Path, **changes: Any) -> Path:
    """The checkpoint of a job that trained one stage of the run."""
    name = f"stage-{stage:02d}"
    job = folder / name / "checkpoints" / checkpoint.name
    shutil.copytree(checkpoint / name, job / name)
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    (job / "manifest.json").write_text(json.dumps(manifest | {"stages": [stage], "run": "5eed"} | changes))
    return job


def parts_of(run: Path, folder: Path, checks: bool = False) -> list[Path]:
    """What the jobs of the run's stages would have exported: the first with the model's description."""
    (checkpoint,) = committed(run)
    manifest = Catalog(checkpoint).manifest
    made, last = [], manifest.layout.num_stages - 1
    for stage in range(last + 1):
        job = job_of(checkpoint, stage, folder)
        made.append(folder / f"part-{stage}")
        model = described(manifest.config()) if stage == 0 else None
        own = run / "export" if stage == last else exit_folder(run / "export", stage)
        write_part(job, made[-1], model, Check(IDS, logits(own)) if checks else None)
    return made


def logits(folder: Path) -> torch.Tensor:
    with torch.no_grad():
        return AutoModelForCausalLM.from_pretrained(folder, dtype="auto")(input_ids=IDS).logits


def same_models(mine: Path, theirs: Path) -> None:
    """Exits, weights, their names and places, and what else the folders hold, but for the cards."""
    exits = [path.relative_to(theirs) for path in sorted(theirs.glob("exits/*"))]
    assert [path.relative_to(mine) for path in sorted(mine.glob("exits/*"))] == exits
    for one, other in ((mine / name, theirs / name) for name in (".", *exits)):
        assert sorted(path.name for path in one.iterdir()) == sorted(path.name for path in other.iterdir())
        ours, wanted = weights(one), weights(other)
        assert ours.keys() == wanted.keys()
        assert all(torch.equal(ours[name], wanted[name]) for name in wanted)
        for name in ("config.json", "generation_config.json", "model.safetensors.index.json", "tokenizer.json"):
            assert (one / name).read_text() == (other / name).read_text()


def differing_matrices(trainer: Trainer) -> dict[str, Any]:
    """A pretrained model whose config ties two matrices that differ in its files."""
    folder, config = trainer.folder / "model", AutoConfig.for_model(**TINY, tie_word_embeddings=True)
    tensors = AutoModelForCausalLM.from_config(config).state_dict()
    tensors["lm_head.weight"] = torch.randn(4096, 32)
    config.save_pretrained(folder)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "generation_config.json").write_text('{"temperature": 0.5, "do_sample": true}')
    return {"config_name": None, "model_name_or_path": folder, "tokenizer_name": builtin_tokenizer_dir(trainer.cache)}


def of_a_class_that_sets_not_all(trainer: Trainer) -> dict[str, Any]:
    """A pretrained model of a type whose new ones would have weights that nobody sets."""
    folder, sizes = trainer.folder / "model", {name: value for name, value in TINY.items() if name != "model_type"}
    AutoModelForCausalLM.from_config(AutoConfig.for_model("apertus", **sizes)).save_pretrained(folder)
    return {"config_name": None, "model_name_or_path": folder, "tokenizer_name": builtin_tokenizer_dir(trainer.cache)}


def with_peft(trainer: Trainer) -> dict[str, Any]:
    pytest.importorskip("peft")
    return {"config_name": None, "model_name_or_path": pretrained(trainer)}


SHARED = {"head": "shared", "head_layers": 1, "head_rank": 4, "layers_per_block": 1}


@pytest.mark.parametrize(
    ("ranks", "settings", "model"),
    [
        (4, {"num_stages": 2, "deepspeed": ROOT / "configs/ds/zero1.json"}, {}),
        (3, {"num_stages": 3, "bf16": True, "export_dtype": "fp32"}, {"num_hidden_layers": 6}),
        (2, {"num_stages": 2, **SHARED}, {"tie_word_embeddings": True}),
        (2, {"num_stages": 2, "head_features": True, "layers_per_block": 1}, {}),
        (2, {"num_stages": 2, "method": "overlapping"}, {"tie_word_embeddings": True}),
        (2, {"num_stages": 2}, differing_matrices),
        (2, {"num_stages": 2}, of_a_class_that_sets_not_all),
        (3, {"num_stages": 3, "freeze_stages": "0", "lora_rank": 2}, with_peft),
    ],
    ids=[
        "zero1",
        "bf16-three",
        "shared-tied",
        "no-exits",
        "overlapping-tied",
        "pretrained-untied",
        "apertus",
        "frozen-adapted",
    ],
)
def test_parts_become_what_one_launch_exports(
    trainer: Trainer, ranks: int, settings: dict[str, Any], model: dict[str, Any] | Callable
):
    """Though nothing is there that the flags name: not the config, the tokenizer, or a model to begin with."""
    named = model(trainer) if callable(model) else {"config_name": trainer.model(TINY | model)}
    cache = trainer.folder / "cache"
    run = trainer.run("run", ranks, max_steps=1, save_steps=1, eval_batches=0, cache_dir=cache, **settings, **named)
    parts = parts_of(run, trainer.folder / "jobs")
    for gone in (cache, trainer.folder / "llama.json", trainer.folder / "model", run / "checkpoints"):
        shutil.rmtree(gone, ignore_errors=True)
        gone.unlink(missing_ok=True)
    out = trainer.folder / "out"
    assert main([*map(str, reversed(parts)), str(out)]) == 0
    same_models(out, run / "export")
    for exit in out.glob("exits/*"):
        assert os.path.samefile(*(next(folder.glob("model-00001-*")) for folder in (out, exit)))
    found = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not any(found[1].values())
    assert len(AutoTokenizer.from_pretrained(out)) == 4096
    card = (out / "README.md").read_text()
    assert f"| stages × replicas | {settings['num_stages']} × {ranks // settings['num_stages']} |" in card
    assert "| steps | 1 |" in card


@pytest.mark.parametrize("trainer", ["masked-lm"], indirect=True)
def test_parts_of_another_task_become_its_model(trainer: Trainer):
    run = trainer.run("run", 2, num_stages=2, max_steps=1, save_steps=1, eval_batches=0)
    out = trainer.folder / "out"
    assert main([*map(str, parts_of(run, trainer.folder / "jobs")), str(out)]) == 0
    mine, theirs = weights(out), weights(run / "export")
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[name], theirs[name]) for name in theirs)
    assert (out / "config.json").read_text() == (run / "export/config.json").read_text()


def test_a_checkpoint_of_one_stage_is_read_alone(trainer: Trainer):
    zero1 = {"deepspeed": ROOT / "configs/ds/zero1.json"}
    run = trainer.run("run", 4, num_stages=2, max_steps=1, save_steps=1, eval_batches=0, **zero1)
    whole = Catalog(run / "checkpoints/step-00000001")
    parts = [Catalog(job_of(whole.path, stage, trainer.folder / "jobs")) for stage in (0, 1)]
    assert whole.manifest.held() == [0, 1]
    assert [part.manifest.held() for part in parts] == [[0], [1]]
    assert parts[0].manifest.run == "5eed"
    assert sorted(parts[0].weights + parts[1].weights) == sorted(whole.weights)
    for part in parts:
        assert part.weights
        assert all(part.tensor(name).equal(whole.tensor(name)) for name in part.weights)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, cache: Path) -> Path:
    trainer = Trainer(tmp_path_factory.mktemp("run"), cache)
    return trainer.run("run", 3, num_stages=3, max_steps=1, save_steps=1, eval_batches=0)


def test_each_exit_is_compared_with_its_stage(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """One that is not what the stage computes is left out; the whole model must be."""
    parts, out = parts_of(run, tmp_path, checks=True), tmp_path / "out"
    assert main([*map(str, parts), str(out)]) == 0
    equal = "loads with no missing or unexpected key, logits equal the pipeline's"
    folders = [out / "exits/stage-00", out / "exits/stage-01", out]
    assert [f"assemble.py: {folder}: {equal}" for folder in folders] == capsys.readouterr().err.splitlines()[3:-1]
    same_models(out, run / "export")
    wrong = {"row": IDS, "logits": logits(run / "export/exits/stage-00") * 2}
    save_file(wrong, parts[0] / "check.safetensors")
    assert main([*map(str, parts), str(out)]) == 0
    said = capsys.readouterr().err
    assert "no exit stage-00, as it is no model of its own: its logits differ from the pipeline's by" in said
    assert sorted(folder.name for folder in (out / "exits").iterdir()) == ["stage-01", "stage-02"]
    before = sorted(path.name for path in tmp_path.iterdir())
    shutil.copyfile(parts[0] / "check.safetensors", parts[2] / "check.safetensors")
    assert main([*map(str, parts), str(out)]) == 1
    assert "its logits differ from the pipeline's" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == before, "and what was there is as it was"
    same_models(out / "exits/stage-01", run / "export/exits/stage-01")


def test_exits_that_are_no_models_are_left_out(trainer: Trainer, capsys: pytest.CaptureFixture[str]):
    config = trainer.model(MINICPM3)
    settings = {"max_steps": 1, "save_steps": 1, "eval_batches": 0, "config_name": config}
    run = trainer.run("run", 2, num_stages=2, **settings)
    out = trainer.folder / "out"
    assert main([*map(str, parts_of(run, trainer.folder / "jobs")), str(out)]) == 0
    said = capsys.readouterr().err
    assert "no exit stage-00, as it is no model of its own: its logits differ by" in said
    assert f"{out}: not checked, as its part has no logits" in said
    same_models(out, run / "export")


def test_code_of_a_part_runs_with_the_flag_alone(trainer: Trainer, capsys: pytest.CaptureFixture[str]):
    model = brings_code(trainer.folder / "model")
    settings = {"max_steps": 1, "save_steps": 1, "eval_batches": 0, "config_name": model, "trust_remote_code": True}
    run = trainer.run("run", 2, num_stages=2, **settings)
    parts = parts_of(run, trainer.folder / "jobs")
    shutil.rmtree(model)
    out = trainer.folder / "out"
    assert main([*map(str, parts), str(out)]) == 2
    assert f"{parts[0] / 'model'} {REPAIR}" in capsys.readouterr().err
    assert main([*map(str, parts), str(out), "--trust_remote_code", "true"]) == 0
    same_models(out, run / "export")


def test_jobs_are_named_by_their_folders(run: Path, tmp_path: Path):
    """The export of one, and else its newest checkpoint, on a machine where the flags' files are."""
    (checkpoint,) = committed(run)
    jobs = [job_of(checkpoint, stage, tmp_path) for stage in range(3)]
    folders = [tmp_path / f"stage-{stage:02d}" for stage in range(3)]
    write_part(jobs[1], folders[1] / "export")
    shutil.rmtree(jobs[1])
    older = shutil.copytree(jobs[2], jobs[2].with_name("step-00000000"))
    (older / "manifest.json").write_text("{}")
    out = tmp_path / "out"
    out.mkdir()
    assert main([str(folders[2]), str(folders[1]), str(jobs[0]), str(out), "--export_dtype", "bf16"]) == 0
    assert {tensor.dtype for tensor in weights(out).values()} == {torch.bfloat16}
    theirs = weights(run / "export")
    assert all(torch.equal(tensor, theirs[name].bfloat16()) for name, tensor in weights(out).items())
    assert "exported as bf16" in (out / "README.md").read_text()


def changed(part: Path, **changes: Any) -> None:
    """Other values in a manifest, of its own or of the layout that it names."""
    path = part / "manifest.json"
    manifest = json.loads(path.read_text())
    layout = manifest["layout"] | {name: changes.pop(name) for name in manifest["layout"].keys() & changes.keys()}
    path.write_text(json.dumps(manifest | changes | {"layout": layout}))


def again(part: Path) -> Path:
    return Path(shutil.copytree(part, part.with_name("again")))


def other_model(part: Path) -> dict[str, Any]:
    return json.loads((part / "manifest.json").read_text())["layout"]["model"] | {"hidden_size": 64}


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda p: p.pop(1), ["stage 1 of 3 is missing beside {0} and {2}; name its part, too"]),
        (lambda p: p.pop(0), ["stage 0 of 3 is missing beside {1}; name its part, too"]),
        (lambda p: p.append(p[0]), ["{0} is named twice, as {0}; name it once"]),
        (lambda p: p.append(again(p[1])), ["stage 1 is in {1} and in {again}; name one of them"]),
        (lambda p: changed(p[1], step=7), ["{1} has step=7, {0} has step=1; name checkpoints of one step"]),
        (lambda p: changed(p[2], run="0ther"), ["{2} has run=0ther, {0} has run=5eed; name parts of one run"]),
        (
            lambda p: changed(p[2], blocks=[[0, 1], [1, 2], [2, 4]]),
            ["{2} has blocks=[[0, 1], [1, 2], [2, 4]], {0} has blocks=[[0, 2], [2, 3], [3, 4]]; all jobs"],
        ),
        (
            lambda p: changed(p[1], model=other_model(p[1])),
            ["{1} is of another model (hidden_size=64) than {0} (hidden_size=32); name parts of one run"],
        ),
        (
            lambda p: (changed(p[1], step=7, run="0ther"), p.pop(2), p.append(p[0].parent)),
            [
                "{parts} is no part: it has no manifest.json, no export/manifest.json and no complete checkpoint; name",
                "{1} has step=7, {0} has step=1; name",
                "{1} has run=0ther, {0} has run=5eed; name",
                "stage 2 of 3 is missing beside {1}; name",
            ],
        ),
        (
            lambda p: (p[1] / "manifest.json").write_text("{"),
            ["{1}/manifest.json cannot be read (", "stage 1 of 3 is missing beside"],
        ),
    ],
    ids=["gap", "no-first", "named-twice", "twice", "step", "run", "cut", "model", "all-at-once", "no-manifest"],
)
def test_parts_that_do_not_fit_are_named(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], spoil: Callable, said: list[str]
):
    parts = parts_of(run, tmp_path / "parts")
    names: dict[str, Any] = {"again": parts[0].with_name("again"), "parts": parts[0].parent}
    wanted = [line.format(*parts, **names) for line in said]
    spoil(parts)
    assert main([*map(str, parts), str(tmp_path / "out")]) == 2
    found = capsys.readouterr().err.splitlines()
    assert len(found) == len(wanted)
    assert all(line.startswith(f"assemble.py: {start}") for line, start in zip(found, wanted, strict=True))
    assert [path.name for path in tmp_path.iterdir()] == ["parts"]


@pytest.mark.parametrize("file", ["stage-01/replica-00.safetensors", "stage-01/state.json", "check.safetensors"])
def test_a_damaged_file_is_named(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], file: str):
    parts = parts_of(run, tmp_path / "parts", checks=True)
    path = parts[1] / file
    path.write_bytes(path.read_bytes()[:-9])
    assert main([*map(str, parts), str(tmp_path / "out")]) == 1
    said = capsys.readouterr().err
    assert said.startswith(f"assemble.py: {path}: ")
    assert said.endswith("; copy the part again, or name an earlier checkpoint of each job\n")
    assert [each.name for each in tmp_path.iterdir()] == ["parts"]


def test_a_folder_that_is_no_model_is_not_replaced(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """As the last part is, where the new folder's name is left out."""
    parts = parts_of(run, tmp_path)
    assert main([*map(str, parts)]) == 2
    assert f"{parts[2]} is there, and is no model to replace; name a new folder" in capsys.readouterr().err
    assert (parts[2] / "manifest.json").is_file()


# not ru_maxrss, which begins with that of the process that starts this one
PEAKS = r"""
import re, sys
from llm_local.commands.assemble import main
for first in (1, len(sys.argv) // 2 + 1):
    assert main(sys.argv[first : first + len(sys.argv) // 2]) == 0
    print(1024 * int(re.search(r"VmHWM:\s+(\d+)", open("/proc/self/status").read())[1]))
"""


def test_memory_is_that_of_about_one_stage(trainer: Trainer):
    """Of four; what a tiny model takes has been taken before."""
    wide = {"hidden_size": 768, "intermediate_size": 2048, "num_attention_heads": 12, "num_hidden_layers": 12}
    settings = {"num_stages": 4, "max_steps": 1, "save_steps": 1, "eval_batches": 0}
    arguments: list[str | Path] = []
    for name, model in (("small", TINY), ("large", TINY | wide)):
        trainer.model(model)
        parts = parts_of(trainer.run(name, 4, **settings), trainer.folder / f"jobs-{name}")
        arguments += [*parts, trainer.folder / f"out-{name}"]
    done = subprocess.run([sys.executable, "-c", PEAKS, *arguments], capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    small, large = map(int, done.stdout.split())
    size = sum(file.stat().st_size for file in (trainer.folder / "out-large").glob("model-*.safetensors"))
    assert size > 300e6
    assert large - small < 0.6 * size
