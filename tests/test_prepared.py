"""Tokens on disk: made in parts that outlive a kill, the same whoever makes them, and damage is named."""

from __future__ import annotations

import itertools
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from datasets import Dataset, load_from_disk
from documents import write_jsonl

from llm_local.config import ConfigError
from llm_local.data import prepared
from llm_local.data.parts import MOST_PARTS, STATE
from llm_local.data.sets import prepare, prepare_all
from llm_local.files import Unwritten

SCRIPT = Path(__file__).parent.parent / "scripts" / "prepare_data.py"


@pytest.fixture
def small_parts(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(prepared, "PART_BYTES", 200)


@pytest.fixture
def config(settings, tmp_path, texts):
    """config(**flags) → of a file with 60 documents, and another one to validate on."""
    train, held = write_jsonl(tmp_path / "train.jsonl", texts), write_jsonl(tmp_path / "held.jsonl", texts[:20])
    return lambda **flags: settings(train_file=train, validation_file=held, **flags)


def tokens_of(data: Any) -> prepared.Prepared:
    (source,) = data.sources
    assert source.tokens is not None
    return source.tokens


def one_pass(data: Any) -> torch.Tensor:
    return data.train.batch(0, data.train.num_sequences)


@pytest.mark.usefixtures("small_parts")
def test_processes_make_what_one_makes(config, tokenizer, tmp_path):
    alone = prepare_all(config(cache_dir=str(tmp_path / "alone")), tokenizer)
    together = prepare_all(config(cache_dir=str(tmp_path / "together"), preprocessing_num_workers=3), tokenizer)
    assert len(list(tokens_of(together).folder.glob("data-*.arrow"))) > 5
    assert torch.equal(one_pass(alone), one_pass(together))
    assert tokens_of(alone).folder.name == tokens_of(together).folder.name, "the fingerprint is of the data"


@pytest.mark.usefixtures("small_parts")
def test_what_is_there_is_not_made_again(config, tokenizer):
    first = prepare_all(config(), tokenizer)
    folder = tokens_of(first).folder
    parts = sorted(folder.glob("data-*.arrow"))
    (folder / STATE).unlink()  # as if it had been killed before the end
    parts[3].unlink()
    (folder / f".{parts[3].name}.99999").write_bytes(b"half of it")
    kept = {path: path.stat().st_mtime_ns for path in folder.glob("data-*.arrow")}
    again = prepare_all(config(), tokenizer)
    assert torch.equal(one_pass(again), one_pass(first))
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    assert not list(folder.glob(".data-*")), "and what was half done is gone"


def test_the_folder_is_a_data_set_with_a_fingerprint(config, tokenizer, texts):
    folder = tokens_of(prepare_all(config(), tokenizer)).folder
    rows = load_from_disk(str(folder))
    assert isinstance(rows, Dataset)
    assert json.loads((folder / STATE).read_text())["_fingerprint"] == folder.name
    assert rows.num_rows == len(texts)
    assert tokenizer.decode(rows[7]["tokens"]) == texts[7] + tokenizer.eos_token
    assert rows[7]["bytes"] == len(texts[7].encode())
    assert rows.cache_files, "mapped, and not read"


def test_a_large_corpus_has_no_more_than_so_many_parts(monkeypatch: pytest.MonkeyPatch, tokenizer, tmp_path):
    rows = Dataset.from_dict({"text": ["some text"] * 3000})
    monkeypatch.setattr(prepared, "PART_BYTES", 1)
    assert len(prepared.Job(rows, "text", tokenizer, 2, tmp_path).starts()) == MOST_PARTS + 1
    monkeypatch.setattr(prepared, "PART_BYTES", 1 << 30)
    assert prepared.Job(rows, "text", tokenizer, 2, tmp_path).starts() == [(0, 0), (3000, 0)]


@pytest.mark.usefixtures("small_parts")
def test_a_part_that_cannot_be_written_is_named(config, tokenizer):
    folder = tokens_of(prepare_all(config(), tokenizer)).folder
    part = next(iter(folder.glob("data-*.arrow")))
    (folder / STATE).unlink()
    part.unlink()
    part.mkdir()
    for workers in (1, 2):
        with pytest.raises(Unwritten, match=r"data-.*arrow.* could not be written \(Is a directory\); make room there"):
            prepare(config(preprocessing_num_workers=workers), tokenizer)


@pytest.mark.parametrize("finished", [True, False])
def test_a_damaged_part_is_named(config, tokenizer, finished: bool):
    folder = tokens_of(prepare_all(config(), tokenizer)).folder
    (part,) = folder.glob("data-*.arrow")
    if not finished:
        (folder / STATE).unlink()
    part.write_bytes(b"no arrow")
    with pytest.raises(ConfigError, match=rf"{folder.name} is damaged \(.*\); remove it, and it is made again"):
        prepare(config(), tokenizer)


class _Fatal:
    """A tokenizer whose process does not survive a certain text, as one that runs out of memory does not."""

    def __init__(self, tokenizer: Any):
        self.tokenizer = tokenizer
        self.bos_token_id, self.eos_token_id = tokenizer.bos_token_id, tokenizer.eos_token_id

    def __call__(self, texts: list[str], **options: Any) -> Any:
        if any("document 41" in text for text in texts):
            os.kill(os.getpid(), signal.SIGKILL)
        return self.tokenizer(texts, **options)


def test_a_killed_process_is_no_endless_wait(monkeypatch: pytest.MonkeyPatch, config, tokenizer, tmp_path, texts):
    monkeypatch.setattr(prepared, "PART_BYTES", 200)
    rows, fatal = Dataset.from_dict({"text": texts}), _Fatal(tokenizer)
    job = prepared.Job(rows, "text", fatal, 2, tmp_path / "tokens")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ConfigError, match=r"a process that tokenised was killed; .* fewer preprocessing_num_workers"):
        prepared.prepare_tokens(job, "key", workers=2)
    whole = prepared.Job(rows, "text", tokenizer, 2, tmp_path / "tokens")
    assert prepared.prepare_tokens(whole, "key", workers=1).documents == len(texts)


@pytest.mark.processes
def test_a_preparation_that_is_killed_goes_on_and_leaves_no_process(tmp_path):
    text = "def alpha(x):\n    return x\n" * 4000
    train = write_jsonl(tmp_path / "train.jsonl", [f"{n} {text}" for n in range(90)])
    held = write_jsonl(tmp_path / "held.jsonl", ["some words " * 200])
    flags = ["--train_file", train, "--validation_file", held, "--cache_dir", str(tmp_path / "cache")]
    small = "import runpy; from llm_local.data import prepared; prepared.PART_BYTES = 1 << 20"
    begin = f"{small}; runpy.run_path({str(SCRIPT)!r}, run_name='__main__')"
    command = [sys.executable, "-c", begin, *flags, "--preprocessing_num_workers", "2"]
    with (tmp_path / "log.txt").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
    folder = tmp_path / "cache" / "tokens"
    end = time.monotonic() + 120
    while not any(path.name.startswith("data-00000-of-00010") for path in folder.glob("*/data-*")):
        assert process.poll() is None, (tmp_path / "log.txt").read_text()
        assert time.monotonic() < end, (tmp_path / "log.txt").read_text()
        time.sleep(0.02)
    children = psutil.Process(process.pid).children(recursive=True)
    process.kill()
    process.wait()
    kept = {path: path.stat().st_mtime_ns for path in folder.glob("*/data-*-of-00010.arrow")}
    assert 0 < len(kept) < 10
    _, alive = psutil.wait_procs(children, timeout=10)
    assert not alive
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "tokenising" in done.stderr
    assert "90 documents in" in done.stdout
    assert {path: path.stat().st_mtime_ns for path in kept} == kept


def test_rows_that_are_planned_at_the_same_time_are_the_same(config, tokenizer):
    """Another process was faster: its folder stands."""
    found = tokens_of(prepare_all(config(), tokenizer))
    pieces, packed = prepared.packed_rows(found, 16, "best_fit")
    again, counted = prepared.packed_rows(found, 16, "best_fit")
    assert packed == counted
    assert pieces is not None
    assert again is not None
    assert (pieces.starts == again.starts).all()
    assert json.loads((found.folder / "rows-best_fit-16" / prepared.COUNTS).read_text())["rows"] == packed.rows


def test_groups_are_packed_by_themselves(monkeypatch: pytest.MonkeyPatch, config, tokenizer):
    found = tokens_of(prepare_all(config(), tokenizer))
    _, together = prepared.packed_rows(found, 17, "best_fit")
    monkeypatch.setattr(prepared, "GROUP", 7)
    pieces, apart = prepared.packed_rows(found, 18, "best_fit")
    assert pieces is not None
    covered = sorted((start, start + size) for start, size in zip(pieces.starts, pieces.sizes, strict=True))
    assert covered[0][0] == 0
    assert all(a[1] == b[0] for a, b in itertools.pairwise(covered))
    assert covered[-1][1] == found.tokens == apart.tokens == together.tokens
