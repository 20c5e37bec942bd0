"""scripts/make_corpus.py: prose of installed packages, the same each time."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pyarrow
import pytest

SCRIPT = Path(__file__).parents[1] / "scripts" / "make_corpus.py"
LONG = "Words that say something about what this does, in a paragraph that is long enough to be kept. " * 3


@pytest.fixture
def main():
    spec = importlib.util.spec_from_file_location("make_corpus", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main


@pytest.fixture
def packages(tmp_path: Path) -> Path:
    folder = tmp_path / "packages"
    (folder / "one").mkdir(parents=True)
    (folder / "one" / "a.py").write_text(
        f'"""First.\n\n{LONG}"""\n\n\ndef f():\n    """Of f, {LONG}\n\n    {LONG}"""\n'
    )
    (folder / "one" / "b.py").write_text(f'"""{LONG}"""\n')
    (folder / "one" / "broken.py").write_text("def (:\n")
    (folder / "one" / "latin.py").write_bytes(b'"""\xe9"""')
    return folder


def test_a_module_is_a_document_and_no_paragraph_comes_twice(main, packages: Path, tmp_path: Path, capsys):
    output = tmp_path / "corpus.jsonl.zst"
    assert main([str(output), "--packages", str(packages)]) == 0
    first, bytes_ = capsys.readouterr().out, output.read_bytes()
    (row,) = [json.loads(line) for line in pyarrow.input_stream(str(output), compression="zstd").read().splitlines()]
    assert row == {"text": f"First.\n\n{LONG.strip()}\n\nOf f, {LONG.strip()}", "source": "one/a.py"}
    assert main([str(output), "--packages", str(packages)]) == 0
    assert (capsys.readouterr().out, output.read_bytes()) == (first, bytes_)


def test_a_folder_that_is_none(main, tmp_path: Path, capsys):
    with pytest.raises(SystemExit):
        main([str(tmp_path / "out.jsonl.zst"), "--packages", str(tmp_path / "none")])
    assert f"--packages {tmp_path / 'none'}: no such folder" in capsys.readouterr().err
