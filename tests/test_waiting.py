"""Ranks wait for the data that rank 0 prepares as long as it lives, and no longer."""

from __future__ import annotations

import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from conftest import Trainer
from launching import Rank, by_hand, until
from torch.distributed import TCPStore

from llm_local import rendezvous
from llm_local.config import ConfigError
from llm_local.launch import Launch
from llm_local.peer import LostPeer
from llm_local.rendezvous import SETUP, Rendezvous, RunRefused, fetch_setup
from llm_local.train import REFUSED


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(rendezvous, "SIGN_SECONDS", 0.1)
    return TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)


def meeting_at(store: Any, monkeypatch: pytest.MonkeyPatch) -> Rendezvous:
    meeting = Rendezvous(Launch(0, 2, 0, 2, 0), "run", 5.0)
    monkeypatch.setattr(meeting, "_store", store)
    return meeting


@pytest.mark.processes
def test_a_rank_waits_longer_than_its_limit_while_rank_0_lives(store: Any, monkeypatch: pytest.MonkeyPatch):
    meeting = meeting_at(store, monkeypatch)

    def prepare() -> None:
        with meeting.kept_waiting():
            time.sleep(2.0)
        store.set(SETUP, "the plan")

    rank_0 = threading.Thread(target=prepare)
    rank_0.start()
    assert fetch_setup(store.clone(), 1.0, 1.0) == "the plan"
    rank_0.join()


def test_silence_after_signs_of_life_is_a_loss(store: Any):
    store.add("signs", 1)
    with pytest.raises(LostPeer, match=r"for rank 0's setup; no sign of life for 0.3 s \(--link_timeout_seconds 0.3\)"):
        fetch_setup(store, 60.0, 0.3)


def test_a_store_that_is_gone_is_a_loss():
    server: Any = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    client = server.clone()
    del server
    with pytest.raises(LostPeer, match="waiting for rank 0's setup"):
        fetch_setup(client, 60.0)


def test_a_refusal_reaches_those_who_wait(store: Any, monkeypatch: pytest.MonkeyPatch):
    meeting = meeting_at(store, monkeypatch)
    teller = threading.Thread(target=meeting.say_no, args=(ConfigError(["no"]), 10.0))
    teller.start()
    with pytest.raises(RunRefused):
        fetch_setup(store.clone(), 10.0)
    teller.join(5)
    assert not teller.is_alive(), "it leaves once all others know"


# --- whole runs


def text_of(ranks: list[Rank]) -> str:
    return "\n".join(rank.text for rank in ranks)


LONG = 1500  # documents of 100 KB


@pytest.fixture
def preparing(trainer: Trainer) -> list[str]:
    """Flags of a run that prepares its data for longer than a test lasts."""
    path = trainer.folder / "long.jsonl"
    line = '{"text": "' + "some words of a long text " * 4000 + '"}\n'
    with path.open("w") as file:
        for _ in range(LONG):
            file.write(line)
    cache = trainer.folder / "cache"
    return trainer.flags("run", num_stages=2, train_file=path, cache_dir=cache, ddp_timeout=60, link_timeout_seconds=6)


def until_prepares(trainer: Trainer, ranks: list[Rank]) -> None:
    tokens = trainer.folder / "cache" / "tokens"
    until(lambda: any(tokens.glob("*/.data-*")), 60, lambda: text_of(ranks))


@pytest.mark.processes
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_a_rank_0_that_is_lost_while_it_prepares_is_noticed(
    trainer: Trainer, preparing: list[str], tmp_path: Path, number: signal.Signals
):
    with by_hand(2, preparing, tmp_path) as ranks:
        until_prepares(trainer, ranks)
        time.sleep(2)
        ranks[0].send(number)
        assert ranks[1].wait(30) not in (None, 0), ranks[1].text
        assert "rank 0" in ranks[1].text.strip().splitlines()[-1]
        assert "Traceback" not in ranks[1].text
    assert not (tmp_path / "run").exists()


@pytest.mark.processes
def test_data_that_is_refused_ends_all_ranks(trainer: Trainer, tmp_path: Path):
    """Once they have met: the values alone do not show it."""
    path = trainer.folder / "short.txt"
    path.write_text("a\nb\n")
    with by_hand(2, trainer.flags("run", num_stages=2, train_file=path), tmp_path) as ranks:
        assert [rank.wait(60) for rank in ranks] == [REFUSED, REFUSED], text_of(ranks)
        assert "one sequence needs 32; give more text or lower seq_length" in ranks[0].text
        assert "Traceback" not in text_of(ranks)
        assert "problem" not in ranks[1].text
    assert not (tmp_path / "run").exists()
