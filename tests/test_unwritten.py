"""A full disk is one line that names the file, whatever a run or a script writes, and what was whole stays so."""

from __future__ import annotations

import json
import re
import resource
import signal
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Trainer
from documents import write_jsonl
from launching import START_SECONDS, Rank, by_hand, ending, until_step
from ranks import free_port
from safetensors.torch import save_file

from llm_local.checkpoint.catalog import Catalog
from llm_local.config import parse
from llm_local.data.tokenizer import builtin_tokenizer_dir
from llm_local.export.model_folder import draft_of, predecessor_of, put_in_place
from llm_local.files import Unwritten, unwritten, write_whole, writing
from llm_local.launch import Launch
from llm_local.metrics import MetricsFile
from llm_local.owner import claim_folder
from llm_local.rank import check
from llm_local.records import Record

Full = Callable[..., Path]
FULL = r"could not be written \(No space left on device\); "


@contextmanager
def full_disk() -> Iterator[None]:
    """No file can grow meanwhile."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.fixture
def full() -> Iterator[Full]:
    """Makes a folder a disk of its own that has no room: for one inode, its own, if nothing else is said."""
    mounted: list[Path] = []

    def mount(folder: Path, room: str = "nr_inodes=1") -> Path:
        folder.mkdir(parents=True, exist_ok=True)
        command = ["mount", "-t", "tmpfs", "-o", room, "tmpfs", str(folder)]
        try:
            subprocess.run(command, check=True, capture_output=True, text=True)
        except FileNotFoundError:
            pytest.skip("there is no mount, and so no small disk to fill")
        except subprocess.CalledProcessError as error:
            pytest.skip(f"no small disk can be mounted here: {error.stderr.strip()}")
        mounted.append(folder)
        return folder

    yield mount
    for folder in mounted:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_folder_and_metrics(tmp_path: Path):
    with (
        pytest.raises(Unwritten, match=r"/new/run.lock could not be written \(File too large\); make"),
        full_disk(),
    ):
        claim_folder(tmp_path / "new")
    metrics = MetricsFile(tmp_path, 0, None)
    with pytest.raises(Unwritten, match=r"metrics/stage-00.jsonl could not be written"), full_disk():
        metrics.write(Record(1, "train", 0, 1.0, [1.0], 1))
    with pytest.raises(Unwritten, match=r"/one.json could not be written \(File too large\)"), full_disk():
        write_whole(tmp_path / "one.json", "text")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["metrics", "new"], "a draft takes room"


def test_an_error_of_reading_is_none_of_writing(tmp_path: Path):
    with pytest.raises(FileNotFoundError), writing(tmp_path, reads=True):
        (tmp_path / "missing").read_text()


def test_what_a_library_makes_of_a_full_disk_is_one(full: Full, tmp_path: Path):
    disk = full(tmp_path / "disk")

    def refused() -> None:
        try:
            (disk / "cache").mkdir()
        except OSError as error:
            raise ValueError("the data cannot be read") from error

    with pytest.raises(Unwritten, match=rf"disk/cache {FULL}"), writing(tmp_path, reads=True):
        refused()


def test_what_reads_may_not_have_a_file_in_the_way(tmp_path: Path):
    (tmp_path / "csv").touch()
    with pytest.raises(Unwritten, match=r"csv could not be written \(File exists\)"), writing(tmp_path, reads=True):
        (tmp_path / "csv").mkdir()
    with pytest.raises(FileExistsError), writing(tmp_path / "elsewhere", reads=True):
        (tmp_path / "csv").mkdir()


def test_an_export_that_cannot_have_its_name_leaves_the_one_before(full: Full, tmp_path: Path):
    model = tmp_path / "model"
    for folder, text in ((model, "old"), (draft_of(model), "new")):
        folder.mkdir()
        (folder / "config.json").write_text(text)
    full(predecessor_of(model))  # a disk cannot be replaced
    with pytest.raises(
        Unwritten, match=r"model.before could not be written \(.*busy\); what was exported before is as it was"
    ):
        put_in_place(model)
    assert (model / "config.json").read_text() == "old"


def test_an_export_without_a_draft_leaves_the_one_before(tmp_path: Path):
    (tmp_path / "model").mkdir()
    with pytest.raises(Unwritten, match=r"/model could not be written \(No such") as caught:
        put_in_place(tmp_path / "model")
    assert caught.value.is_gone
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_run_yaml(trainer: Trainer, tmp_path: Path):
    """A directory in its place: a write of any file may fail for another reason than want of space."""
    config = parse(trainer.flags("run", resume_from_checkpoint="auto"))
    (tmp_path / "run" / "run.yaml").mkdir(parents=True)
    with pytest.raises(Unwritten, match=r"run/run.yaml could not be written \(Is a directory\)"):
        check(config, Launch(0, 1, 0, 1, 0))


def assert_said(ranks: list[Rank], file: str, *others: int) -> None:
    """All have ended with 1, those behind the first perhaps with another status, and one line names the file."""
    codes = [rank.wait(START_SECONDS) for rank in ranks]
    texts = [rank.text for rank in ranks]
    assert codes[0] == 1, texts
    assert all(code in (1, *others) for code in codes), texts
    for text in texts:
        said = [line for line in text.splitlines() if "could not be written" in line]
        assert len(said) == 1, text
        assert re.search(rf"{file} could not be written \(No space left on device\); ", said[0]), text
        assert "Traceback" not in text


@pytest.mark.processes
@pytest.mark.parametrize(
    ("folder", "room", "file", "settings"),
    [
        ("csv", "nr_inodes=1", "run/csv/stage-00", {"report_to": "csv", "num_stages": 1}),
        ("tensorboard", "nr_inodes=1", "run/tensorboard/stage-00", {"report_to": "tensorboard", "num_stages": 1}),
        # a page for the first event file: the thread that writes the other one fails
        ("tensorboard", "size=4k", "run/tensorboard/stage-0[01]", {"report_to": "tensorboard", "num_stages": 2}),
        ("checkpoints", "nr_inodes=1", "run/checkpoints/step-00000002", {"save_steps": 2, "num_stages": 2}),
    ],
)
def test_a_disk_without_room_ends_all_ranks(
    trainer: Trainer, tmp_path: Path, full: Full, folder: str, room: str, file: str, settings: dict[str, Any]
):
    full(tmp_path / "run" / folder, room)
    with by_hand(2, trainer.flags("run", **settings), tmp_path) as ranks:
        assert_said(ranks, file)


@pytest.mark.processes
def test_a_checkpoint_that_cannot_be_removed_costs_no_other(trainer: Trainer, tmp_path: Path, full: Full):
    settings = {"save_steps": 2, "save_total_limit": 1, "eval_batches": 0}
    saved = trainer.run("run", 1, max_steps=2, **settings) / "checkpoints"
    stuck = full(saved / "step-00000002/stage-00/disk")
    flags = trainer.flags("run", max_steps=4, resume_from_checkpoint="true", **settings)
    with by_hand(1, flags, tmp_path) as ranks:
        assert ranks[0].wait(START_SECONDS) == 1
    assert f"{stuck.name} could not be written (Device or resource busy); the checkpoints before" in ranks[0].text
    catalog = Catalog(saved / "step-00000004")
    assert all(catalog.tensor(name).isfinite().all() for name in catalog.weights)


@pytest.mark.processes
def test_each_host_has_a_cache_that_may_be_full(trainer: Trainer, tmp_path: Path, full: Full):
    port, hosts = free_port(), [tmp_path / name for name in ("here", "there")]
    for host in hosts:
        host.mkdir()
    full(hosts[1] / "cache", "nr_inodes=2")
    flags = trainer.flags("run", cache_dir="cache", tokenizer_name=builtin_tokenizer_dir(trainer.cache))
    with ending([Rank(n, 2, port, flags, tmp_path / f"rank-{n}.txt", host) for n, host in enumerate(hosts)]) as ranks:
        codes = [rank.wait(START_SECONDS) for rank in ranks]
    said = [[line for line in rank.text.splitlines() if "could not be written" in line] for rank in ranks]
    assert codes == [1, 1], [rank.text for rank in ranks]
    assert all(len(lines) == 1 and "cache/texts" in lines[0] for lines in said), said
    assert not any("Traceback" in rank.text for rank in ranks)


@pytest.mark.processes
def test_a_cache_without_room_refuses_the_start(trainer: Trainer, tmp_path: Path, full: Full):
    cache = full(tmp_path / "cache", "nr_inodes=2")
    with by_hand(1, trainer.flags("run", cache_dir=cache), tmp_path) as ranks:
        assert ranks[0].wait(START_SECONDS) == 1
    last = ranks[0].text.strip().splitlines()[-1]
    assert last.startswith(f"llm_local: {cache}/tokenizer/"), ranks[0].text
    assert "could not be written (No space left on device); make room there" in last
    assert not (tmp_path / "run").exists()


@pytest.mark.processes
@pytest.mark.parametrize("file", ["metrics/stage-01.jsonl", "trace/trace.json"])
def test_a_disk_that_becomes_full_ends_the_run_with_one_line(trainer: Trainer, tmp_path: Path, file: str):
    flags = trainer.flags("run", num_stages=2, max_steps=1_000_000, save_steps=1_000_000, trace=True)
    with by_hand(2, flags, tmp_path) as ranks:
        until_step(2, tmp_path / "run", 2, lambda: "\n".join(rank.text for rank in ranks))
        (tmp_path / "full").symlink_to("/dev/full")
        (tmp_path / "full").replace(tmp_path / "run" / file)
        if file.startswith("trace"):  # it is written at the end
            ranks[0].send(signal.SIGTERM)
        assert_said(ranks, file, 128 + signal.SIGTERM)


@pytest.mark.processes
@pytest.mark.parametrize("silent", [0, 1])
def test_a_log_on_a_full_disk_keeps_no_rank_from_ending(trainer: Trainer, tmp_path: Path, silent: int):
    """Rank 0 has something to say at the start, rank 1 when it has lost rank 0."""
    flags, port = trainer.flags("run", num_stages=2, max_steps=1_000_000), free_port()
    logs = [Path("/dev/full") if n == silent else tmp_path / f"rank-{n}.txt" for n in range(2)]
    with ending([Rank(n, 2, port, flags, logs[n]) for n in range(2)]) as ranks:
        if silent == 1:
            until_step(2, tmp_path / "run", 2, lambda: ranks[0].text)
            ranks[0].send(signal.SIGKILL)
        assert ranks[silent].wait(START_SECONDS) == 1
        assert ranks[1 - silent].wait(START_SECONDS) not in (None, 0)


@pytest.fixture
def losses(tmp_path: Path) -> Path:
    record = {"split": "train", "step": 1, "loss": 2.0}
    (tmp_path / "metrics").mkdir()
    (tmp_path / "metrics" / "stage-00.jsonl").write_text(json.dumps(record) + "\n")
    return tmp_path


@pytest.mark.parametrize("name", ["plot", "plan", "prepare_data", "train_tokenizer"])
def test_a_script_names_what_it_cannot_write(
    script: Any, trainer: Trainer, losses: Path, full: Full, texts: list[str], capsys, name: str
):
    disk, cache = full(losses / "disk"), ["--cache_dir", str(trainer.cache)]
    text = ["--train_file", str(write_jsonl(losses / "train.jsonl", texts)), *cache]
    model = ["--model", str(trainer.folder / "llama.json"), "--devices", "2", "--seq_length", "32"]
    given = {
        "plot": [str(losses), "--output", str(disk / "loss.png")],
        "plan": [*model, "--json", str(disk / "plan.json")],
        "prepare_data": [*text, "--seq_length", "40", "--output", str(disk / "tokens")],
        "train_tokenizer": [*text, "--kind", "byte_bpe", "--vocab_size", "300", "--output", str(disk / "tokenizer")],
    }
    assert script(name).main(given[name]) == 1
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith(f"{name}.py: ")]
    assert len(said) == 1
    assert f"{name}.py: {disk}/" in said[0]
    assert "could not be written (No space left on device); make room there" in said[0]


def test_an_error_of_no_system_is_none_of_writing():
    assert unwritten(RuntimeError("size mismatch (os error)"), Path()) is None
    assert unwritten(None, Path()) is None


def test_safetensors_says_it_in_words(tmp_path: Path):
    with (
        pytest.raises(Unwritten, match=r"/model could not be written \(File too large\); again"),
        writing(tmp_path / "model", repair="again"),
        full_disk(),
    ):
        save_file({"a": torch.zeros(99)}, tmp_path / "a.safetensors")


@pytest.mark.processes
def test_a_script_about_a_run_names_what_it_cannot_write(script: Any, trainer: Trainer, full: Full, capsys):
    run = trainer.run("run", 1, max_steps=2, save_steps=2, trace=True)
    disk, checkpoint = full(trainer.folder / "disk"), run / "checkpoints/step-00000002"
    few = ["--rows", "1", "--readout_steps", "1"]
    given = {
        "timeline": ([str(run), "--output", str(disk / "timeline.svg")], "timeline.svg"),
        "probe": ([str(run), *few, "--output", str(disk)], "probe.json"),
        "export": ([str(checkpoint), str(disk / "model")], "model.unfinished"),
    }
    for name, (arguments, file) in given.items():
        assert script(name).main(arguments) == 1, name
        last = capsys.readouterr().err.strip().splitlines()[-1]
        assert last.startswith(f"{name}.py: {disk}/{file}"), last
        assert "could not be written (No space left on device); " in last
