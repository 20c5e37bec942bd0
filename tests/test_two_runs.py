"""Two runs at one address, or in one folder: the first goes on as if it were alone, the second says why it leaves."""

from __future__ import annotations

import dataclasses
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from conftest import Trainer
from launching import START_SECONDS, Rank, by_hand, losses, until, until_step
from ranks import free_port
from torch.distributed import PrefixStore, TCPStore

from llm_local import owner
from llm_local.checks.output_folder import open_output
from llm_local.checks.preflight import preflight
from llm_local.config import ConfigError, parse
from llm_local.launch import Launch
from llm_local.owner import LOCK, Owner, claim_folder, folder_problems
from llm_local.rendezvous import Claim, claim_place
from llm_local.train import REFUSED, main

ADDRESS = "host:1"
REPAIR = "give this run another: --master_port N of the launcher"


def text_of(ranks: list[Rank]) -> str:
    return "\n".join(rank.text for rank in ranks)


@pytest.mark.processes
def test_a_run_outlives_all_who_come_to_its_address(trainer: Trainer, tmp_path: Path):
    """A rank of it started twice, the same command with another folder, and a rank of a larger world."""
    port, folders = free_port(), [tmp_path / name for name in ("twice", "second", "larger")]
    for folder in folders:
        folder.mkdir()
    steady = {"num_stages": 2, "eval_batches": 0, "lr_scheduler_type": "constant"}
    flags = trainer.flags("run", **steady, max_steps=1_000_000)
    with ExitStack() as stack:
        run = stack.enter_context(by_hand(2, flags, tmp_path, port))
        until_step(2, tmp_path / "run", 2, lambda: text_of(run))
        twice = Rank(1, 2, port, flags, folders[0] / "rank-1.txt")
        second = stack.enter_context(by_hand(2, trainer.flags("other", **steady), folders[1], port))
        larger = Rank(2, 3, port, flags, folders[2] / "rank-2.txt")
        others = [twice, *second, larger]
        assert [rank.wait(START_SECONDS) for rank in others] == [REFUSED] * 4, text_of(others)
        starter = f"(pid {{}} on {Owner.me('').host}, output_dir {tmp_path / 'run'}, started 20"
        for rank, what, pid in (
            (twice, f"rank 1 at 127.0.0.1:{port}", run[1].pid),
            (second[0], f"the port of 127.0.0.1:{port}", run[0].pid),
            (second[1], f"127.0.0.1:{port}", run[0].pid),
            (larger, f"127.0.0.1:{port}", run[0].pid),
        ):
            said = [line for line in rank.text.splitlines() if REPAIR in line]
            assert len(said) == 1, rank.text
            assert said[0].startswith(f"  - {what} is in use, by another run, or by this one started twice "), rank.text
            assert starter.format(pid) in said[0], rank.text
            assert "Traceback" not in rank.text
        steps = len(losses(tmp_path / "run", 2)[0]) + 10
        until_step(steps, tmp_path / "run", 2, lambda: text_of(run))
        assert "Traceback" not in text_of(run)
        assert not (tmp_path / "other").exists()
    alone = trainer.run("alone", 2, **steady, max_steps=steps)
    assert [stage[:steps] for stage in losses(tmp_path / "run", 2)] == losses(alone, 2)


@pytest.mark.processes
@pytest.mark.parametrize("order", [(0, 0, 1, 1), (1, 1, 0, 0)], ids=["rank 0 first", "rank 1 first"])
@pytest.mark.parametrize("folders", [("run", "run"), ("run", "other")], ids=["one command twice", "two folders"])
def test_of_two_starts_at_one_port_one_goes_on(trainer: Trainer, tmp_path: Path, order: tuple, folders: tuple):
    """By hand at the same moment; of the same command twice it may be a rank of each."""
    port, num_started, started = free_port(), [0, 0], []
    with ExitStack() as stack:
        for rank in order:
            which = num_started[rank]
            num_started[rank] += 1
            flags = trainer.flags(folders[which], num_stages=2, max_steps=1_000_000, eval_batches=0)
            each = Rank(rank, 2, port, flags, tmp_path / f"rank-{rank}-{which}.txt")
            stack.callback(each.process.kill)
            started.append(each)
        until(lambda: any(steps(tmp_path / name) > 2 for name in folders), START_SECONDS, lambda: text_of(started))
        until(lambda: alive(started) == 2, START_SECONDS, lambda: text_of(started))
        left = [each for each in started if not each.process.is_alive()]
        assert [each.process.exitcode for each in left] == [REFUSED] * 2, text_of(started)
        assert all(" is in use, " in each.text for each in left), text_of(left)
        (folder,) = {tmp_path / name for name in folders if (tmp_path / name).exists()}
        until_step(steps(folder) + 5, folder, 2, lambda: text_of(started))


def alive(ranks: list[Rank]) -> int:
    return sum(rank.process.is_alive() for rank in ranks)


def steps(folder: Path) -> int:
    """That both stages have logged."""
    files = [folder / "metrics" / f"stage-{k:02d}.jsonl" for k in (0, 1)]
    return min(len(file.read_text().splitlines()) if file.exists() else 0 for file in files)


# --- a place in the store


@pytest.fixture
def store() -> Any:
    return PrefixStore("places", TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False))


def claim(rank: int = 0, size: int = 2, **changes: Any) -> Claim:
    """As another process of this machine would make it."""
    made = Claim.of(Launch(rank, size, rank, size, 0), "runs/one")
    return dataclasses.replace(made, **changes)


def elsewhere(made: Claim, **changes: Any) -> Claim:
    return dataclasses.replace(made, owner=dataclasses.replace(made.owner, **changes))


def test_ranks_of_a_run_agree_on_a_name_that_no_other_run_has(store: Any):
    names = {claim_place(store, rank, claim(rank, 3), ADDRESS, 1.0) for rank in range(3)}
    again = PrefixStore("again", store)
    names |= {claim_place(again, rank, claim(rank, 3), ADDRESS, 1.0) for rank in range(3)}
    assert len(names) == 2


@pytest.mark.parametrize(
    "stranger",
    [
        claim(2, 3),
        claim(1, output_dir="runs/two"),
        elsewhere(claim(1), folder="/another/working/directory/runs/one"),
        claim(1, launcher=1),
    ],
    ids=["world_size", "output_dir", "folder", "launcher"],
)
def test_a_process_of_another_run_takes_no_place_that_is_free(store: Any, stranger: Claim):
    claim_place(store, 0, claim(), ADDRESS, 1.0)
    with pytest.raises(ConfigError, match=rf"host:1 is in use, .*\(pid \d+ on .*, output_dir /.*{REPAIR}"):
        claim_place(store, 1, stranger, ADDRESS, 1.0)
    claim_place(store, 1, claim(1), ADDRESS, 1.0)


def test_hosts_may_see_the_folder_at_another_path(store: Any):
    name = claim_place(store, 0, claim(launcher=7), ADDRESS, 1.0)
    other_host = elsewhere(claim(1), machine="another", folder="/mnt/runs/one")
    assert claim_place(store, 1, other_host, ADDRESS, 1.0) == name


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_started_twice_changes_nothing(store: Any, rank: int):
    for number in (0, 1):
        claim_place(store, number, claim(number), ADDRESS, 1.0)
    before = store.get(str(rank))
    with pytest.raises(ConfigError, match=f"rank {rank} at host:1 is in use, "):
        claim_place(store, rank, claim(rank), ADDRESS, 1.0)
    assert store.get(str(rank)) == before


# --- a folder


@pytest.fixture(autouse=True)
def _no_patience(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(owner, "PATIENCE_SECONDS", 0.0)


@pytest.mark.parametrize("flags", [{}, {"overwrite_output_dir": True}, {"resume_from_checkpoint": "true"}])
def test_the_folder_of_a_run_that_lives_is_refused(trainer: Trainer, capsys: pytest.CaptureFixture[str], flags: dict):
    folder = trainer.folder / "run"
    with claim_folder(folder):
        (folder / "run.yaml").write_text("seed: 1\n")
        assert main(trainer.flags("run", **flags)) == REFUSED
        said = capsys.readouterr().err
    assert f"output_dir={folder} is in use by another run (pid " in said
    assert "wait for its end, stop it, or choose another folder" in said
    assert "1 problem:" in said
    assert (folder / "run.yaml").read_text() == "seed: 1\n"
    assert folder_problems(folder) == [], "its end frees the folder"


def test_of_two_starts_in_a_new_folder_one_goes_on(trainer: Trainer):
    config = parse(trainer.flags("run"))
    setup = preflight(config, 1)
    with claim_folder(config.output_dir):
        with pytest.raises(ConfigError, match="is in use by another run"):
            claim_folder(config.output_dir)
        open_output(setup)
    with pytest.raises(ConfigError, match="holds another run"):
        open_output(setup)


def test_without_locks_the_owner_counts_if_it_is_of_this_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def no_locks(*_: Any) -> None:
        raise OSError("no locks available")

    monkeypatch.setattr(owner.fcntl, "flock", no_locks)
    claim_folder(tmp_path).close()
    me = Owner.me(tmp_path)
    for changes, problems in (({}, 0), ({"pid": 1}, 1), ({"pid": 1, "machine": "another"}, 0), ({"pid": 2**30}, 0)):
        (tmp_path / LOCK).write_text(dataclasses.replace(me, **changes).to_json())
        assert len(folder_problems(tmp_path)) == problems, changes
