"""prepare_data.py and inspect_data.py as a person uses them, and what they say of bad input."""

from __future__ import annotations

import pytest
import torch
from conftest import Trainer
from documents import write_jsonl

from llm_local.commands import inspect_data


@pytest.fixture
def data(tmp_path, texts, cache) -> list[str]:
    train, held = write_jsonl(tmp_path / "train.jsonl", texts), write_jsonl(tmp_path / "held.jsonl", texts)
    return ["--train_file", train, "--validation_file", held, "--cache_dir", str(cache), "--seq_length", "40"]


@pytest.mark.processes
def test_what_was_prepared_is_what_a_run_reads(script, trainer: Trainer, capsys):
    flags = trainer.flags("run", max_steps=1)
    where = flags.index("--output_dir")
    assert script("prepare_data").main(flags[:where] + flags[where + 2 :]) == 0
    said = capsys.readouterr()
    assert "pretrain.py with these flags trains on it" in said.out
    made = {path: path.stat().st_mtime_ns for path in (trainer.cache / "tokens").rglob("*") if path.is_file()}
    trainer.run("run", 1, max_steps=1)
    found = {path: path.stat().st_mtime_ns for path in (trainer.cache / "tokens").rglob("*") if path.is_file()}
    assert made == found


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (
            ["--streaming", "true"],
            "is a stream (streaming=True), which is tokenised as it is read; leave streaming out",
        ),
        (["--packing", "tight"], "packing='tight' is unknown; choose one of concat, best_fit, none"),
        (["--seq_length", "0"], "seq_length=0 must be greater than 0"),
        (["--seq_length", "4000000"], "one sequence needs 4000000; give more text or lower seq_length"),
        (["--train_file", "missing.jsonl"], "train_file=missing.jsonl does not exist; check the path"),
        (["--tokenizer_name", "/no/such"], "tokenizer_name='/no/such' has no tokenizer that can be loaded"),
        (["--tokenizer_name", "."], "tokenizer_name='.' has a broken file: tokenizer.json cannot be read (Expecting"),
        (["--what", "1"], "unknown argument '--what'"),
    ],
)
@pytest.mark.parametrize("name", ["prepare_data", "inspect_data"])
def test_bad_input_is_one_line(script, data, capsys, tmp_path, monkeypatch, name: str, flags: list[str], said: str):
    if name == "inspect_data" and "--streaming" in flags:
        pytest.skip("streams are shown, too")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    assert script(name).main([*data, *flags]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert len([line for line in error.splitlines() if line.startswith(f"{name}.py: ")]) == 1
    assert "Traceback" not in error
    assert not (tmp_path / "lengths.png").exists()


@pytest.mark.processes
@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--output", "lengths.txt"], "output=lengths.txt: end the name in one of .png, .svg, .pdf"),
        (["--rows", "0"], "rows=0 must be greater than 0"),
        (["--rows", "two"], "argument --rows: invalid int value: 'two'; see inspect_data.py --help"),
        (["--output", "no/such/folder.png"], "no/such/folder.png: No such file or directory"),
    ],
)
def test_bad_flags_of_the_inspection(script, data, capsys, flags: list[str], said: str):
    assert script("inspect_data").main([*data, *flags]) == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("packing", ["concat", "best_fit", "none"])
def test_rows_are_shown_with_their_borders(script, data, tmp_path, capsys, texts, packing: str):
    picture = tmp_path / "lengths.svg"
    assert script("inspect_data").main([*data, "--packing", packing, "--rows", "20", "--output", str(picture)]) == 0
    said = capsys.readouterr().out
    assert "row 19" in said
    assert "⟨end of document⟩" in said
    assert ("of padding⟩" in said) == (packing != "concat")
    assert any(f"{text}⟨end of document⟩" in said for text in texts)
    assert f"({packing}): " in said
    assert "100.0% of what is read" in said
    assert "tokens of a document: shortest " in said
    assert "tokens/s in micro-batches of 8 rows" in said
    assert picture.read_text().startswith("<?xml")


def test_a_stream_is_shown_as_far_as_it_is_known(script, data, tmp_path, capsys):
    picture = str(tmp_path / "lengths.png")
    assert script("inspect_data").main([*data, "--streaming", "true", "--output", picture]) == 0
    said = capsys.readouterr().out
    assert "a stream, packed as it is read; tokens unknown, 100.0% of what is read" in said


def test_a_cut_document_and_a_long_one(tokenizer):
    ids = tokenizer.encode("alpha beta gamma delta " * 30)
    (line,) = inspect_data.describe_row(torch.tensor(ids), tokenizer, 40)
    assert line.startswith("alpha beta gamma del")
    assert "⟨..." in line
    assert line.endswith("⟨cut⟩")


def test_help_is_shown(script, capsys):
    assert script("prepare_data").main(["--help"]) == 0
    assert "goes on\nwhere it was" in capsys.readouterr().out
