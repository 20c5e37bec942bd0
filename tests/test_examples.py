"""The examples of docs/examples, as a reader starts them."""

from __future__ import annotations

import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
from ranks import run_ranks
from transformers import AutoModelForCausalLM

import llm_local as ll

EXAMPLES = Path(__file__).parent.parent / "docs/examples"


def _read(path: Path, output: Path, cache: Path) -> None:
    os.environ["XDG_CACHE_HOME"], sys.argv = str(cache), [str(path), str(output)]
    runpy.run_path(str(path), run_name="__main__")


@pytest.mark.processes
@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("own_model_and_data", "load it with AutoModelForCausalLM.from_pretrained("),
        ("own_loop", "step 30: validation "),
        ("adding_a_method", "stage 1: loss "),
    ],
)
def test_an_example_trains_and_its_model_loads(
    tmp_path: Path, cache: Path, name: str, says: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
):
    """One of them under the launcher that all name."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    path, output = EXAMPLES / f"{name}.py", tmp_path / "run"
    if name == "own_loop":
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
        ended = subprocess.run([*launcher, path, output], capture_output=True, text=True, timeout=240, check=False)
        assert ended.returncode == 0, ended.stderr[-3000:]
        said = ended.stdout
    else:
        run_ranks(_read, 2, path, output, cache)
        said = capfd.readouterr().out
    assert says in said
    assert AutoModelForCausalLM.from_pretrained(output / "export").config.num_hidden_layers == 4


def test_each_example_is_tested():
    source = Path(__file__).read_text()
    assert all(f'"{path.stem}"' in source for path in EXAMPLES.glob("*.py"))


@pytest.mark.processes
def test_the_pages_are_built_without_a_warning_and_have_all_public_names(tmp_path: Path):
    pytest.importorskip("mkdocstrings", reason="needs the extra docs")
    config = EXAMPLES.parent.parent / "configs/mkdocs.yml"
    command = [sys.executable, "-m", "mkdocs", "build", "--quiet", "--strict", "-f", config, "-d", tmp_path / "pages"]
    environ = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    ended = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, env=environ)
    assert (ended.returncode, ended.stderr) == (0, "")
    examples = (tmp_path / "pages/examples/index.html").read_text()
    assert examples.count("prepare") >= len([*EXAMPLES.glob("*.py")]), "the programs are in their page"
    page = (tmp_path / "pages/api/index.html").read_text()
    assert all(f'id="llm_local.{name}"' in page for name in ll.__all__ if name != "LocalTrainingArguments")
