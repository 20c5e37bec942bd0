"""llm-local: its subcommands, what they are called in messages, and the quickstart from an installed wheel."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

from llm_local.cli import COMMANDS, main
from llm_local.commands import quickstart
from llm_local.config import parse

ROOT = Path(__file__).parent.parent
OUTSIDE = {"PYTHONPATH": "", "HF_HUB_OFFLINE": "1"}
OF_THE_REPOSITORY = {"coverage", "flags", "gpu_day", "gpu_report", "make_corpus"}  # and the benchmarks
OF_THE_COMMAND = {"quickstart", "configs", "doctor", "up", "key", "status", "watch"}


def run(*command: str | Path, cwd: Path = ROOT, **environ: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(part) for part in command],
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
        cwd=cwd,
        env=os.environ | environ,
    )


def test_each_script_for_users_is_a_subcommand(capsys: pytest.CaptureFixture[str]):
    scripts = {path.stem for path in (ROOT / "scripts").glob("*.py") if not path.stem.startswith("bench_")}
    modules = {path.stem for path in (ROOT / "llm_local/commands").glob("*.py")} - {"__init__"}
    names = {name.replace("-", "_") for name in COMMANDS}
    assert names == modules == scripts - OF_THE_REPOSITORY | OF_THE_COMMAND
    assert main(["--help"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines if line.startswith("  ")] == list(COMMANDS)


def test_help_imports_no_torch():
    heavy = "{'torch', 'transformers', 'deepspeed', 'datasets', 'numpy'}"
    code = "import sys; from llm_local.cli import main; main([])"
    result = run(sys.executable, "-c", f"{code}; assert not {heavy} & {{*sys.modules}}")
    assert result.returncode == 0, result.stderr


def test_an_unknown_subcommand_is_one_line(capsys: pytest.CaptureFixture[str]):
    assert main(["pretrian", "x"]) == 2
    assert capsys.readouterr().err == "llm-local: unknown subcommand 'pretrian'; did you mean pretrain?\n"
    assert main(["--frobnicate"]) == 2
    assert capsys.readouterr().err == "llm-local: unknown subcommand '--frobnicate'; see llm-local --help\n"


def test_the_version(capsys: pytest.CaptureFixture[str]):
    assert main(["--version"]) == 0
    assert f'version = "{capsys.readouterr().out.split()[1]}"' in (ROOT / "pyproject.toml").read_text()


@pytest.mark.processes
def test_messages_bear_the_name_that_was_called(tmp_path: Path):
    """Of the scripts their own tests say so."""
    result = run(sys.executable, "-m", "llm_local.cli", "plot", tmp_path)
    assert result.returncode == 2
    assert result.stderr.startswith(f"llm-local plot: {tmp_path} has no metrics")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--max_step 3", "unknown argument '--max_step'; see pretrain.py --help"),
        ("--num_stages 0", "num_stages=0 must be greater than 0"),
        ("--nproc_per_node 3", "3 ranks cannot be divided into num_stages=2 stages"),
        ("--nproc_per_node two", "argument --nproc_per_node: invalid int value: 'two'; see quickstart.py --help"),
    ],
)
def test_a_bad_quickstart_is_one_line_and_no_process(flags: str, message: str, capsys: pytest.CaptureFixture[str]):
    assert quickstart.main(flags.split()) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"quickstart.py: {message}")
    assert said.count("\n") == 1


def test_the_quickstart_overwrites_no_folder_but_its_own():
    overwrite = "--overwrite_output_dir"
    assert overwrite in quickstart.command([])
    assert overwrite not in quickstart.command(["--output_dir", "mine"])
    assert overwrite not in quickstart.command(["--resume_from_checkpoint", "auto"])


def test_copied_configurations_are_a_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.chdir(tmp_path)
    assert main(["configs"]) == 0
    config = parse(["configs/quickstart.yaml"])
    assert json.loads(Path(str(config.model.config_name)).read_text())["model_type"] == "llama"
    assert Path(str(config.train.deepspeed)).is_file()
    assert main(["configs"]) == 2
    assert capsys.readouterr().err == "configs.py: configs exists; name another folder\n"
    Path("file").touch()
    assert main(["configs", "file/configs"]) == 1
    assert "file/configs could not be written" in capsys.readouterr().err


def installed(folder: Path) -> Path:
    """The commands' folder of an environment that has the project as a wheel, and everything else as this one."""
    source, wheels = folder / "source", folder / "wheels"
    for name in ("llm_local", "configs"):
        shutil.copytree(ROOT / name, source / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, source)
    wheels.mkdir()
    build = f"from setuptools import build_meta; build_meta.build_wheel({str(wheels)!r})"
    built = run(sys.executable, "-c", build, cwd=source)
    assert built.returncode == 0, built.stderr
    venv.create(folder / "env", with_pip=True)
    commands = folder / "env/bin"
    (wheel,) = wheels.iterdir()
    pip = run(commands / "python", "-m", "pip", "install", "--no-deps", "--no-index", wheel, cwd=folder, **OUTSIDE)
    assert pip.returncode == 0, pip.stderr
    (site,) = (folder / "env/lib").glob("*/site-packages")
    (site / "others.pth").write_text(sysconfig.get_path("purelib") + "\n")  # whose own .pth files say nothing here
    return commands


@pytest.mark.processes
def test_the_quickstart_of_a_wheel(tmp_path: Path, cache: Path):
    """In an empty folder; nothing of the repository is in reach."""
    commands = installed(tmp_path)
    empty = tmp_path / "empty"
    empty.mkdir()
    found = run(commands / "python", "-c", "import llm_local; print(llm_local.__file__)", cwd=empty, **OUTSIDE)
    package = Path(found.stdout.strip()).parent
    assert package.is_relative_to(tmp_path / "env"), found.stderr
    assert {"bench", "coverage", "tests"}.isdisjoint(path.name for path in package.iterdir())
    small = "num_hidden_layers=2,hidden_size=32,intermediate_size=64,num_attention_heads=2,num_key_value_heads=2"
    few = ["--max_steps", "2", "--save_steps", "0", "--eval_batches", "1", "--seq_length", "16", "--cache_dir", cache]
    few += ["--sample_prompt", "", "--config_overrides", small]
    result = run(commands / "llm-local", "quickstart", *few, cwd=empty, **OUTSIDE)
    assert result.returncode == 0, result.stdout + result.stderr
    for folder in ("export", "export/exits/stage-00"):
        model = AutoModelForCausalLM.from_pretrained(empty / "runs/quickstart" / folder)
        assert model.config.hidden_size == 32
