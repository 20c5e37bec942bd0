"""A start: rank 0 reads the data before anything is written, calls the run off for all, or hands the data on."""

from __future__ import annotations

import gc
import json
import os
import resource
import socket
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import pytest
import torch
from conftest import Trainer
from launching import by_hand
from ranks import run_ranks
from transformers import AutoTokenizer

import llm_local as ll
from llm_local.checks.preflight import preflight
from llm_local.commands import pretrain
from llm_local.config import ConfigError, parse
from llm_local.data.sets import Data, ValidationSet
from llm_local.data.tokenizer import builtin_tokenizer_dir, load_tokenizer
from llm_local.launch import Launch
from llm_local.links.packet import TRAIN
from llm_local.place import Place
from llm_local.rank import _make_feed
from llm_local.rendezvous import open_store
from llm_local.setup import Setup
from llm_local.start import prepare
from llm_local.train import REFUSED, main
from llm_local.watchdog import Watchdog


@pytest.fixture(autouse=True)
def _no_launcher(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("RANK", raising=False)


CODE = """from transformers import PreTrainedTokenizerFast


class OddTokenizer(PreTrainedTokenizerFast):
    def __call__(self, text=None, *args, **kwargs):
        if isinstance(text, list):
            raise RuntimeError("of many texts at once")
        return super().__call__(text, *args, **kwargs)
"""


def defect(trainer: Trainer) -> dict[str, Any]:
    """Flags of a tokenizer whose own code raises what nobody expects, once documents are read."""
    folder = trainer.folder / "tokenizer"
    AutoTokenizer.from_pretrained(builtin_tokenizer_dir(trainer.cache)).save_pretrained(folder)
    path = folder / "tokenizer_config.json"
    code = {"tokenizer_class": "OddTokenizer", "auto_map": {"AutoTokenizer": [None, "odd.OddTokenizer"]}}
    path.write_text(json.dumps(json.loads(path.read_text()) | code))
    (folder / "odd.py").write_text(CODE)
    return {"tokenizer_name": folder, "trust_remote_code": True}


def without_eos(trainer: Trainer) -> Path:
    folder = trainer.folder / "tokenizer"
    tokenizer = AutoTokenizer.from_pretrained(builtin_tokenizer_dir(trainer.cache))
    tokenizer.eos_token = None
    tokenizer.save_pretrained(folder)
    return folder


def _command() -> tuple[int, bool]:
    return pretrain.main(["nowhere.yaml"]), gc.isenabled()


@pytest.mark.processes
def test_a_name_of_the_library_that_is_used_again_keeps_no_garbage():
    assert ll.prepare is prepare
    kept = gc.get_freeze_count()
    garbage = [object()]
    assert ll.prepare is prepare
    assert gc.get_freeze_count() == kept, garbage


def test_garbage_is_collected_once_all_is_imported():
    assert run_ranks(_command, 1) == [(REFUSED, True)]


class TestDataThatIsRefused:
    @pytest.fixture
    def refused(self, trainer: Trainer, capsys: pytest.CaptureFixture[str]):
        """refused(**flags) → what rank 0 says of a run that would replace another one; asserts that that one stays."""

        def refused(**settings: Any) -> str:
            old = trainer.folder / "run" / "run.yaml"
            old.parent.mkdir()
            old.write_text("seed: 1\n")
            assert main(trainer.flags("run", overwrite_output_dir=True, **settings)) == REFUSED
            assert old.read_text() == "seed: 1\n"
            said = capsys.readouterr().err
            assert "Traceback" not in said
            assert "1 problem:" in said
            return said

        return refused

    def test_one_document(self, refused, trainer: Trainer):
        path = trainer.folder / "one.jsonl"
        path.write_text(json.dumps({"text": "alone " * 200}))
        assert "holds 1 document, which cannot be divided; add validation text" in refused(train_file=path)

    def test_less_than_a_sequence(self, refused, trainer: Trainer):
        path = trainer.folder / "short.txt"
        path.write_text("a\nb\n")
        assert "one sequence needs 32; give more text or lower seq_length" in refused(train_file=path)

    def test_a_tokenizer_without_eos(self, refused, trainer: Trainer):
        assert "has no EOS token to end a document" in refused(tokenizer_name=without_eos(trainer))

    def test_a_hub_that_cannot_be_reached(self, refused, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
        assert "dataset_name=owner/name cannot be loaded (" in refused(train_file=None, dataset_name="owner/name")


def test_a_start_that_is_refused_leaves_no_thread_and_no_open_file(trainer: Trainer):
    """A program may try again, and again."""

    def left() -> tuple[list[str], int]:
        return [thread.name for thread in threading.enumerate()], len(os.listdir("/proc/self/fd"))

    assert main(trainer.flags("run", seq_length=0)) == REFUSED
    before = left()
    assert main(trainer.flags("run", seq_length=0)) == REFUSED
    with pytest.raises(ConfigError):
        prepare(parse(trainer.flags("run", seq_length=0)))
    assert left() == before


def _watches_in_a_crowd() -> tuple[bool, bool]:
    """Whether a watchdog lives where many files are open, and whether it has ended once it is called off."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    for _ in range(1100):
        os.dup(0)
    watchdog = Watchdog(0)
    watchdog.start()
    time.sleep(0.5)
    lives = watchdog.lives
    watchdog.call_off()
    return lives, not watchdog.lives


@pytest.mark.processes
def test_a_watchdog_lives_where_more_files_are_open_than_select_takes():
    assert run_ranks(_watches_in_a_crowd, 1) == [(True, True)]


def test_a_defect_of_the_start_shows_its_traceback(trainer: Trainer, capsys: pytest.CaptureFixture[str]):
    assert main(trainer.flags("run", **defect(trainer))) == 1
    assert "Traceback" in capsys.readouterr().err
    assert not (trainer.folder / "run").exists()


@pytest.mark.processes
def test_a_defect_of_the_start_ends_the_ranks_that_wait(trainer: Trainer, tmp_path: Path):
    flags = trainer.flags("run", num_stages=2, ddp_timeout=600, **defect(trainer))
    with by_hand(2, flags, tmp_path) as ranks:
        assert [rank.wait(60) for rank in ranks] == [1, REFUSED], [rank.text for rank in ranks]
        assert "Traceback" in ranks[0].text
        assert "Traceback" not in ranks[1].text


def test_the_data_that_rank_0_has_read_is_not_read_again(trainer: Trainer):
    class Rows:
        num_sequences = None

        def batch(self, index: int, rows: int, first: int = 0) -> torch.Tensor:
            return torch.full((rows, 32), index)

        def state(self) -> dict[str, Any]:
            return {}

        def restore(self, state: dict[str, Any]) -> bool:
            return True

    config = parse(trainer.flags("run", train_file="not there"))
    data = Data(Rows(), (ValidationSet("validation", Rows(), 1.0),))
    anatomy = SimpleNamespace(num_tokens=0)
    setup: Any = SimpleNamespace(config=config, documents=None, anatomy=anatomy, model_config=lambda: None)
    start: Any = SimpleNamespace(processing_class=load_tokenizer(config), data=data)
    feed = _make_feed(setup, Place(0, (1,)), start, (0, 0))
    assert torch.equal(feed(TRAIN, 8, 0).input_ids, torch.full((2, 32), 7))
    with pytest.raises(ConfigError, match="does not exist"):
        _make_feed(setup, Place(0, (1,)), None, (0, 0))


def test_a_setup_survives_the_store(trainer: Trainer):
    setup = preflight(parse(trainer.flags("run", method="overlapping")), 1)
    assert Setup.from_json(setup.to_json()) == setup


@pytest.mark.processes
def test_a_port_that_is_in_use_is_named(monkeypatch: pytest.MonkeyPatch):
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        port = taken.getsockname()[1]
        environ = {"RANK": 0, "WORLD_SIZE": 2, "LOCAL_RANK": 0, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        for name, value in environ.items():
            monkeypatch.setenv(name, str(value))
        with pytest.raises(ConfigError, match=rf"127.0.0.1:{port} is in use, .*give this run another: --master_port N"):
            open_store(Launch.from_environment(os.environ), "test", 5.0)


def _twice(flags: list[str]) -> list[int]:
    return [main(flags), main(flags)]


@pytest.mark.processes
def test_a_process_has_one_run(trainer: Trainer):
    flags = trainer.flags("run", max_steps=1, eval_batches=0, overwrite_output_dir=True)
    assert run_ranks(_twice, 1, flags) == [[0, REFUSED]]
