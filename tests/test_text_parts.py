"""Text files become documents on disk: in parts, the same whoever makes them, and what is finished is kept."""

from __future__ import annotations

import gzip
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from datasets import Dataset, Features, Value
from documents import write_jsonl

from llm_local.config import ConfigError
from llm_local.data import text_parts
from llm_local.data.mixture import training_sources
from llm_local.data.parts import STATE, Parts, make, read
from llm_local.data.sources import load_training
from llm_local.files import Unwritten


@pytest.fixture
def small_parts(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(text_parts, "PART_BYTES", 500)


@pytest.fixture
def documents(settings) -> Callable[..., Dataset]:
    """documents(path, **flags) → all of its rows, converted."""

    def convert(path: Path | str, **flags: Any) -> Dataset:
        config = settings(train_file=str(path), **flags)
        (source,) = training_sources(config)
        rows = load_training(config, source, divide=False)[0].rows
        assert isinstance(rows, Dataset)
        return rows

    return convert


def folder_of(rows: Dataset) -> Path:
    return Path(rows.cache_files[0]["filename"]).parent


def parts_of(folder: Path) -> list[Path]:
    return sorted(folder.glob("data-*.arrow"))


def stamps(paths: list[Path]) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in paths}


@pytest.mark.usefixtures("small_parts")
@pytest.mark.parametrize("suffix", ["jsonl", "jsonl.gz", "csv", "txt"])
def test_processes_make_what_one_makes_in_the_order_of_the_files(documents, tmp_path, texts, suffix: str):
    folder, expected = tmp_path / "text", []
    folder.mkdir()
    for n in range(6):
        content = "".join(json.dumps({"text": text}) + "\n" for text in texts[n * 10 : n * 10 + 10])
        if suffix == "csv":
            content = "text\n" + "".join(f'"{text}"\n' for text in texts[n * 10 : n * 10 + 10])
        path, raw = folder / f"{n}.{suffix}", content.encode()
        path.write_bytes(gzip.compress(raw) if suffix.endswith("gz") else raw)
        expected += [content] if suffix == "txt" else texts[n * 10 : n * 10 + 10]
    alone = documents(folder, cache_dir=str(tmp_path / "alone"))
    together = documents(folder, cache_dir=str(tmp_path / "together"), preprocessing_num_workers=3)
    assert alone["text"][:] == together["text"][:] == expected
    assert alone._fingerprint == together._fingerprint
    assert len(parts_of(folder_of(together))) > 1


@pytest.mark.usefixtures("small_parts")
def test_a_file_is_read_in_pieces_and_its_order_is_kept(documents, jsonl, texts):
    rows = documents(jsonl, preprocessing_num_workers=2)
    assert rows["text"][:] == texts
    assert len(parts_of(folder_of(rows))) > 3


def test_many_small_files_are_few_parts(documents, tmp_path):
    folder = tmp_path / "many"
    folder.mkdir()
    for n in range(300):
        (folder / f"{n:03}.txt").write_text(f"document {n}")
    rows = documents(folder)
    assert rows["text"][:] == [f"document {n}" for n in range(300)]
    assert len(parts_of(folder_of(rows))) == 1


def test_a_large_source_has_no_more_than_so_many_parts(monkeypatch: pytest.MonkeyPatch, tmp_path):
    (tmp_path / "a").write_bytes(bytes(5000))
    pieces = [(str(tmp_path / "a"), n, n + 1) for n in range(5000)]
    monkeypatch.setattr(text_parts, "PART_BYTES", 1)
    groups = text_parts.grouped(pieces)
    assert len(groups) == 1000
    assert [piece for group in groups for piece in group] == pieces


@pytest.mark.usefixtures("small_parts")
def test_what_is_there_is_not_made_again_whatever_the_number_of_processes(documents, jsonl, texts):
    folder = folder_of(documents(jsonl))
    parts = parts_of(folder)
    (folder / STATE).unlink()  # as if it had been killed before the end
    parts[1].unlink()
    (folder / f".{parts[1].name}.99999").write_bytes(b"half of it")
    kept = stamps(parts_of(folder))
    assert documents(jsonl, preprocessing_num_workers=2)["text"][:] == texts
    assert stamps(list(kept)) == kept
    assert not list(folder.glob(".data-*")), "and what was half done is gone"


def test_a_changed_file_is_read_again(documents, jsonl, tmp_path, texts):
    before = documents(jsonl)
    write_jsonl(Path(jsonl), [*texts, "one more"])
    after = documents(jsonl)
    assert after["text"][:] == [*texts, "one more"]
    assert after._fingerprint != before._fingerprint


@pytest.mark.usefixtures("small_parts")
@pytest.mark.parametrize("workers", [1, 3])
def test_the_first_wrong_line_is_named_whoever_meets_it(documents, tmp_path, texts, workers: int):
    lines = [json.dumps({"text": text}) + "\n" for text in texts]
    lines[25], lines[50] = "no JSON\n", '{"text": 7}\n'
    path = tmp_path / "a.jsonl"
    path.write_text("".join(lines))
    with pytest.raises(ConfigError, match=rf"train_file={path}, line 26: not JSON"):
        documents(path, preprocessing_num_workers=workers)
    assert not list((tmp_path / "cache" / "texts").iterdir()), "mended, it is another file"


def test_a_packed_file_without_a_document_has_no_rows(documents, tmp_path):
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(b"\n\n"))
    assert documents(tmp_path / "a.jsonl.gz").num_rows == 0


@pytest.mark.usefixtures("small_parts")
def test_a_part_that_cannot_be_written_is_named(documents, jsonl):
    folder = folder_of(documents(jsonl))
    (folder / STATE).unlink()
    part = parts_of(folder)[0]
    part.unlink()
    part.mkdir()
    for workers in (1, 2):
        with pytest.raises(Unwritten, match=r"data-.*arrow.* could not be written \(Is a directory\); make room there"):
            documents(jsonl, preprocessing_num_workers=workers)


def test_damaged_documents_are_named(documents, jsonl):
    folder = folder_of(documents(jsonl))
    parts_of(folder)[0].write_bytes(b"no arrow")
    with pytest.raises(ConfigError, match=rf"{folder.name} is damaged \(.*\); remove it, and it is made again"):
        documents(jsonl)


def numbers(folder: Path, fatal: int | None = None) -> Parts:
    """Five parts of ten numbers each; the process that makes the fatal one does not survive."""

    def write(number: int, writer: Any) -> Iterator[int]:
        if number == fatal:
            os.kill(os.getpid(), signal.SIGKILL)
        ids = list(range(number * 10, number * 10 + 10))
        writer.write_table(Dataset.from_dict({"id": ids}).data.table)
        yield 10

    return Parts(folder, Features({"id": Value("int64")}), [10] * 5, "numbers", write, "counted")


def test_a_killed_process_is_no_endless_wait(tmp_path):
    with pytest.raises(ConfigError, match=r"a process that counted was killed; finished parts are kept: start again"):
        make(numbers(tmp_path / "made", fatal=3), "key", 2, None)
    assert not (tmp_path / "made" / STATE).exists()
    make(numbers(tmp_path / "made"), "key", 2, None)
    assert read(tmp_path / "made")["id"][:] == list(range(50))


def test_a_folder_that_another_start_has_finished_meanwhile_is_taken(tmp_path):
    folder = tmp_path / "made"
    parts = numbers(folder)

    def overtaken(number: int, writer: Any) -> Iterator[int]:
        if not (folder / STATE).exists():
            make(parts, "key", 1, None)  # which tidies up the drafts of all
        yield from parts.write(number, writer)

    make(Parts(folder, parts.features, parts.sizes, parts.unit, overtaken, parts.doing), "key", 1, None)
    assert read(folder)["id"][:] == list(range(50))


def test_progress_is_shown_in_bytes(settings, tokenizer, jsonl, tmp_path, capfd):
    from llm_local.data.sets import prepare

    prepare(settings(train_file=jsonl), tokenizer, progress=True)
    assert f"reading train_file={jsonl}: 100%" in capfd.readouterr().err


READ = """
import sys
from llm_local.data import text_parts
from llm_local.config import parse
from llm_local.data.mixture import training_sources
from llm_local.data.sources import load_training
from llm_local.files import Unwritten
text_parts.PART_BYTES = 1 << 20
config = parse(sys.argv[1:])
documents, _ = load_training(config, training_sources(config)[0], divide=False)
print(documents.rows.num_rows)
"""


@pytest.mark.processes
def test_a_conversion_that_is_killed_goes_on_and_leaves_no_process(tmp_path):
    train = write_jsonl(tmp_path / "train.jsonl", [f"{n} " + "word " * 60 for n in range(150_000)])
    flags = ["--train_file", train, "--cache_dir", str(tmp_path / "cache"), "--preprocessing_num_workers"]
    command = [sys.executable, "-c", READ, *flags]
    with (tmp_path / "log.txt").open("wb") as log:
        process = subprocess.Popen([*command, "2"], stdout=log, stderr=log)
    folder = tmp_path / "cache" / "texts"
    end = time.monotonic() + 120
    while not any(folder.glob("*/data-00005-of-*")):
        assert process.poll() is None, (tmp_path / "log.txt").read_text()
        assert time.monotonic() < end, (tmp_path / "log.txt").read_text()
        time.sleep(0.005)
    children = psutil.Process(process.pid).children(recursive=True)
    process.kill()
    process.wait()
    kept = stamps(list(folder.glob("*/data-*.arrow")))
    whole = int(next(iter(kept)).stem.rpartition("-")[2])
    assert 0 < len(kept) < whole
    _, alive = psutil.wait_procs(children, timeout=10)
    assert not alive
    done = subprocess.run([*command, "1"], capture_output=True, text=True, check=True)  # another number of processes
    assert done.stdout.split() == ["150000"]
    assert stamps(list(kept)) == kept
