"""What README, docs, Makefile and configs say exists and works as said."""

from __future__ import annotations

import re
import shlex
import textwrap
from dataclasses import replace
from pathlib import Path

import pytest
from transformers import LlamaConfig

import llm_local
from llm_local.config import Config, parse
from llm_local.ds_config import resolve, zero_stage
from llm_local.flags import ModelArguments
from llm_local.methods import delayed, schedule
from llm_local.problems import static_problems
from llm_local.records import Record

ROOT = Path(llm_local.__file__).parents[1]
README = (ROOT / "README.md").read_text()
# LOG.md is left out: it speaks of days gone by
PAGES = [ROOT / "README.md", *sorted(p for p in (ROOT / "docs").glob("*.md") if p.stem != "LOG")]
RUNS = sorted((ROOT / "configs").glob("*.yaml"))
DEEPSPEED = sorted((ROOT / "configs" / "ds").glob("*.json"))

OURS = {f"--{name}" for name in Config().flat()}
# of the launchers and of tools, in commands that the pages show
LAUNCHERS = set(
    """--num_gpus --hostfile --no_ssh --node_rank --master_addr --master_port --nproc_per_node --nnodes --config_file
    --max_restarts --standalone --signals_to_handle --num_processes --main_process_port --help --jobs --export --prompt
    --assistant --signal --pty --exit --dtype --model --model_args --tasks
    --steps --output --peak_tflops --devices --device --stage_replicas --memory --link --picture --json --mtbf_hours
    --kind --vocab_size --rows --megabytes
    --make_bundle --bundle --rehearse""".split()  # noqa: SIM905
)


def file_name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def flags(text: str) -> set[str]:
    return set(re.findall(r"(?<![\w-])--[a-z]\w*", text))


@pytest.fixture(autouse=True)
def _in_the_root(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(ROOT)


@pytest.mark.parametrize("page", PAGES, ids=file_name)
def test_flags_exist(page: Path):
    text = re.sub(r"<!--.*?-->", "", page.read_text(), flags=re.DOTALL)
    assert flags(text) - OURS - LAUNCHERS == set()


def test_the_table_of_flags_is_complete():
    rows = [line for line in README.splitlines() if line.startswith("| **")]
    assert flags("\n".join(rows)) == OURS


@pytest.mark.parametrize("page", PAGES, ids=file_name)
def test_paths_exist(page: Path):
    text = page.read_text()
    named = set(re.findall(r"(?:configs|scripts|llm_local|docs|tests)/[\w./-]*\w", text))
    named |= {(page.parent / link).as_posix() for link in re.findall(r"\]\((?!https?:)([^)#]+)\)", text)}
    assert {name for name in named if not Path(name).exists()} == set()


def test_commands_parse():
    """Each command that starts pretrain.py, as its ranks would read it."""
    blocks = "\n".join(re.findall(r"```sh\n(.*?)```", README, flags=re.DOTALL)).replace("\\\n", " ")
    commands = [line.partition("#")[0] for line in blocks.splitlines() if "scripts/pretrain.py" in line]
    assert len(commands) >= 8
    for command in commands:
        arguments = command.partition("scripts/pretrain.py")[2].replace("CONFIG.yaml", file_name(RUNS[0]))
        parse(shlex.split(arguments))


def test_the_readme_shows_the_schedules_own_pictures():
    def pictures(text: str) -> str:
        return textwrap.dedent("\n".join(line for line in text.splitlines() if re.match(r" +stage \d \| ", line)))

    assert pictures(README) == pictures(f"{schedule.__doc__}\n{delayed.__doc__}")


def test_every_metric_is_described():
    section = README.partition("## What is written")[2].partition("\n## ")[0]
    described = re.findall(r"^\| (`.*?) \|", section, flags=re.MULTILINE)
    assert re.findall(r"`(\w+)`", " ".join(described)) == list(Record.__dataclass_fields__)


def test_modules_on_the_ladder_are_in_both_pages():
    package = Path(llm_local.__file__).parent
    modules = [path for path in package.rglob("*.py") if path.stem != "__init__"]
    section = (ROOT / "docs/architecture.md").read_text().partition("## The ladder")[2].partition("\n## ")[0]
    names = [line.split("|")[1] for line in section.splitlines() if line.startswith("| ")]
    assert sorted(re.findall(r"`(\w+)`", "\n".join(names))) == sorted(path.stem for path in modules)
    packages = {path.parent.name for path in modules} - {package.name}
    assert set(re.findall(r"\*\*(\w+)/\*\*", "\n".join(names))) == packages
    drawn = README.partition("knows only what stands above it:\n")[2].partition("\n\n`make check`")[0]
    flat = {path.stem for path in modules if path.parent == package}
    assert flat <= set(re.findall(r"\w+", drawn))
    assert packages <= set(re.findall(r"(\w+)/", drawn))


def test_the_makefile_has_its_targets():
    text = (ROOT / "Makefile").read_text()
    rules = dict(re.findall(r"^([a-z]+):([^#\n]*)", text, flags=re.MULTILINE))
    assert {"help", "setup", "pretrain", "test", "unit", "lint", "types", "check", "clean"} <= set(rules)
    assert rules["check"].split() == ["lint", "types", "test"]
    assert all(rules[name].split() == ["setup"] for name in ("pretrain", "test", "unit", "lint", "types"))
    named = set(re.findall(r"`make (\w+)`", README)) | set(re.findall(r"^make (\w+)", README, flags=re.MULTILINE))
    assert {"pretrain", "test"} <= named <= set(rules)
    assert "make --no-print-directory check" in (ROOT / ".ci" / "run").read_text()


@pytest.mark.parametrize("path", RUNS, ids=file_name)
def test_run_configs_are_free_of_problems(path: Path):
    config = parse([file_name(path)])
    if config.model == ModelArguments():  # where a pretrained model lies is said on the command line
        config = parse([file_name(path), "--model_name_or_path", "somewhere"])
    ranks = 2 * config.local.num_stages
    assert static_problems(config, ranks, fp16_supported=True, bf16_supported=True) == []
    for name in (config.model.config_name, config.train.deepspeed):
        assert name is None or Path(name).exists()


@pytest.mark.parametrize("bf16", [False, True], ids=["fp32", "bf16"])
@pytest.mark.parametrize("path", DEEPSPEED, ids=file_name)
def test_deepspeed_configs_resolve(path: Path, bf16: bool):
    base = Config()
    config = replace(base, train=replace(base.train, deepspeed=str(path), bf16=bf16, per_device_train_batch_size=3))
    settings = resolve(config, num_replicas=2, model_config=LlamaConfig(hidden_size=64))
    assert "auto" not in str(settings)
    assert settings["bf16"]["enabled"] is bf16
    assert settings["train_micro_batch_size_per_gpu"] == 3
    assert settings["train_batch_size"] == 6
    assert f"zero{zero_stage(settings)}" in path.stem
    assert ("offload" in path.stem) == ("offload_optimizer" in settings["zero_optimization"])
