"""What is wrong with a job is said in a line each, before anything is written."""

from __future__ import annotations

import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from channels import Stranger, Waiting
from conftest import Trainer
from cryptography.hazmat.primitives import serialization
from ranks import free_port, free_ports

from llm_local.checks.preflight import preflight
from llm_local.config import Config, ConfigError, parse
from llm_local.job import Job
from llm_local.job_start import fingerprint, hello_of, identified, log_need, log_problems
from llm_local.jobs.hello import Refusal
from llm_local.jobs.key import make_key
from llm_local.owner import claim_folder
from llm_local.peer import LostPeer
from llm_local.place import Place
from llm_local.problems import static_problems
from llm_local.setup import Setup
from llm_local.train import REFUSED, main
from llm_local.watchdog import Watchdog
from llm_local.world import World

MIDDLE = {"num_stages": 3, "stage": 1, "send_to": "localhost:7002", "save_steps": 10}


@pytest.fixture
def key(tmp_path: Path) -> Path:
    made = tmp_path / "run.key"
    make_key(made)
    return made


@pytest.fixture
def job(trainer: Trainer, key: Path) -> Callable[..., Config]:
    """job(**changes) → the middle one of three, with a key and a port; None leaves a flag out."""

    def job(**changes: Any) -> Config:
        settings = {**MIDDLE, "receive_on": f"127.0.0.1:{free_port()}", "run_key_file": key, **changes}
        return parse(trainer.flags("run", **settings))

    return job


class TestFlags:
    def test_that_are_right(self, job):
        assert static_problems(job(), 1, True, True) == []
        assert static_problems(job(stage=2, send_to=None), 1, True, True) == []

    @pytest.mark.parametrize(
        ("changes", "said"),
        [
            ({"stage": 3}, ["stage=3 is none of num_stages=3, which are 0 to 2; jobs share two stages or more"]),
            (
                {"stage": 0, "num_stages": 1},
                ["stage=0 is none of num_stages=1, which are 0 to 0; jobs share two stages or more"],
            ),
            ({"send_to": None}, ["stage=1 needs send_to, HOST:PORT of the link with stage 2"]),
            ({"receive_on": None}, ["stage=1 needs receive_on, HOST:PORT of the link with stage 0"]),
            ({"run_key_file": None}, ["stage=1 needs run_key_file; make one with llm-local key, once for all jobs"]),
            ({"stage": 2}, ["stage=2 of 3 has no use for send_to=localhost:7002; leave it out"]),
            (
                {"send_to": "siteB,siteC:70000"},
                [
                    "send_to=siteB,siteC:70000: 'siteB' is no HOST:PORT; write it as siteB:7001",
                    "send_to=siteB,siteC:70000: 'siteC:70000' is no HOST:PORT; write it as siteB:7001",
                ],
            ),
            ({"receive_on": "7001"}, ["receive_on=7001: '7001' is no HOST:PORT; write it as siteB:7001"]),
            (
                {"save_steps": None},
                ["stage=1 needs save_steps: a job goes on from its last checkpoint, the one before it keeps what foll"],
            ),
            ({"method": "overlapping"}, ["method=overlapping asks the next stage for something in each step, so no s"]),
            (
                {"method": "backprop"},
                ["method=backprop asks the next stage for something in each step, so no stage"],
            ),
            (
                {"on_full_log": "skip", "head": "shared"},
                ["on_full_log=skip waits for no stage behind, head=shared for the last one's matrix; use another head"],
            ),
            ({"distillation_weight": 0.5}, ["distillation_weight=0.5 asks the next stage for something in each step,"]),
            (
                {"final_backprop_steps": 2},
                ["final_backprop_steps=2 asks the next stage for something in each step,"],
            ),
            (
                {"num_train_epochs": 1, "max_steps": None},
                ["num_train_epochs=1.0 is counted by", "num_train_epochs=1.0 counts rows"],
            ),
            ({"trace": True}, ["trace=True joins the clocks of all stages, which jobs do not share; leave it out"]),
            (
                {"load_best_model_at_end": True, "eval_steps": 10},
                ["load_best_model_at_end=True compares stages at the end, when others may be gone; leave it out"],
            ),
        ],
        ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
    )
    def test_that_are_wrong(self, job, changes: dict[str, Any], said: list[str]):
        found = static_problems(job(**changes), 1, True, True)
        assert len(found) == len(said), found
        assert all(each.startswith(start) for each, start in zip(found, said, strict=True)), found

    def test_of_jobs_without_a_stage(self, job):
        config = job(stage=None)
        assert [each.partition("=")[0] for each in static_problems(config, 3, True, True)] == [
            "send_to",
            "receive_on",
            "run_key_file",
        ]


class TestSurroundings:
    def problems(self, config: Config, tmp_path: Path) -> list[str]:
        before = sorted(tmp_path.rglob("*"))
        with pytest.raises(ConfigError) as refusal:
            preflight(config, 1)
        assert sorted(tmp_path.rglob("*")) == before
        return refusal.value.problems

    def test_a_port_in_use(self, job, tmp_path: Path):
        """As by a second job of the stage on this machine."""
        with socket.create_server(("127.0.0.1", 0)) as other:
            address = f"127.0.0.1:{other.getsockname()[1]}"
            assert self.problems(job(receive_on=address), tmp_path) == [
                f"receive_on={address} cannot be listened on (Address already in use); choose another port or address"
            ]

    @pytest.mark.processes
    def test_a_port_in_use_of_another_rank(self, job):
        """Who finds it when the ranks have met."""
        own, port = free_ports(2)
        with socket.create_server(("127.0.0.1", port)):
            setup = preflight(job(receive_on=f"127.0.0.1:{own}"), 1)
            world = World(Place(0, (1, 1, 1), 1), torch.device("cpu"), None, Watchdog(1), 1.0)
            with pytest.raises(ConfigError, match=f"receive_on=127.0.0.1:{port} cannot be listened on"):
                Job(setup, world, local_rank=1)

    @pytest.mark.parametrize("host", ["no-such-host.invalid", "a..b", "a" * 70])
    def test_addresses_that_do_not_resolve(self, job, tmp_path: Path, host: str):
        (found,) = self.problems(job(send_to=f"localhost:7002,{host}:7001"), tmp_path)
        assert found.startswith(f"send_to={host}:7001: {host} is no known host (")
        assert found.endswith("); correct it")
        (found,) = self.problems(job(receive_on=f"{host}:7001"), tmp_path)
        assert found.startswith(f"receive_on={host}:7001 cannot be listened on (")

    def test_an_address_of_another_machine_to_listen_on(self, job, tmp_path: Path):
        (found,) = self.problems(job(receive_on="192.0.2.1:7001"), tmp_path)
        assert found.startswith("receive_on=192.0.2.1:7001 cannot be listened on (Cannot assign requested address); ")

    def test_a_key_that_others_can_read(self, job, key: Path, tmp_path: Path):
        key.chmod(0o644)
        assert self.problems(job(), tmp_path) == [
            f"run_key_file={key} can be read by others (mode 644); chmod 600 it, or make a new one"
        ]

    def test_a_key_with_a_passphrase(self, job, key: Path, tmp_path: Path):
        private = serialization.load_pem_private_key(key.read_bytes(), None)
        protection = serialization.BestAvailableEncryption(b"secret")
        key.write_bytes(
            private.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, protection)
            + key.read_bytes().partition(b"-----END PRIVATE KEY-----\n")[2]
        )
        assert self.problems(job(), tmp_path) == [
            f"run_key_file={key} has a passphrase, which no job can be asked for; use one of llm-local key, without"
        ]

    def test_the_folder_of_a_job_that_lives(self, trainer: Trainer, key: Path, tmp_path: Path, capfd):
        """The same job, started twice."""
        flags = {**MIDDLE, "receive_on": f"127.0.0.1:{free_port()}", "run_key_file": key}
        with claim_folder(tmp_path / "run/stage-01"):
            assert main(trainer.flags("run", **flags)) == REFUSED
        assert f"output_dir={tmp_path / 'run/stage-01'} is in use by another run (pid " in capfd.readouterr().err

    def test_the_folder_of_jobs_for_one_launch(self, trainer: Trainer, tmp_path: Path, capfd):
        """`auto` would find no checkpoint there, and begin anew."""
        folder = tmp_path / "run"
        (folder / "stage-01").mkdir(parents=True)
        (folder / "stage-01/job.json").write_text("{}")
        assert main(trainer.flags("run", resume_from_checkpoint="auto")) == REFUSED
        said = capfd.readouterr().err
        assert f"output_dir={folder} holds a run whose stages are jobs (stage-01); train it as jobs (" in said

    def test_all_in_one_message_and_exit_status_2(self, trainer: Trainer, key: Path, tmp_path: Path, capfd):
        key.write_text("secret")
        flags = {**MIDDLE, "send_to": "a..b:1", "receive_on": "192.0.2.1:7001", "run_key_file": key}
        assert main(trainer.flags("run", **flags)) == REFUSED
        said = capfd.readouterr().err
        for line in (f"run_key_file={key} is no key of llm-local key", "send_to=a..b:1", "receive_on=192.0.2.1:7001"):
            assert said.count(line) == 1
        assert "Traceback" not in said
        assert not (tmp_path / "run").exists()


def place(setup: Setup, replicas: tuple[int, ...] = (1, 1, 1)) -> Place:
    return Place(0, replicas, setup.config.local.stage)


class TestTheLog:
    def test_what_it_needs_is_said(self, job):
        setup = preflight(job(gradient_accumulation_steps=3, log_memory_gb=1e-5, log_disk_gb=1e-4, eval_batches=0), 1)
        need, words = log_need(setup, place(setup))
        packet = 2 * 32 * (4 * 32 + 4)  # hidden states in fp32, and token ids
        assert 30 * packet < need < 40 * packet
        assert log_problems(setup, place(setup)) == [
            "log_memory_gb=1e-05 and log_disk_gb=0.0001 are less than the log of stage 1 needs, "
            f"{words}; raise log_disk_gb or lower save_steps"
        ]
        assert words.endswith("GB for the 10 steps between two checkpoints, at 0.00853 MB a packet")

    def test_evaluations_are_packets_too(self, job):
        setups = [preflight(job(eval_batches=number, eval_steps=5), 1) for number in (0, 3)]
        without, with_them = (log_need(setup, place(setup))[0] for setup in setups)
        assert with_them > without

    def test_a_stage_with_fewer_replicas_sends_more_from_each(self, job):
        setup = preflight(job(), 1)
        alone, more = (log_need(setup, place(setup, replicas))[0] for replicas in ((1, 1, 1), (1, 1, 4)))
        assert more > 3.9 * alone

    def test_room_enough_and_none_needed(self, job):
        last = preflight(job(stage=2, send_to=None, log_memory_gb=1e-6, log_disk_gb=0), 1)
        for setup in (preflight(job(), 1), last):
            assert log_problems(setup, place(setup)) == []


class TestNeighbours:
    """What two jobs find different of each other when they meet."""

    def test_nothing_of_each_jobs_own(self, job):
        first, second = job(), job(stage=0, receive_on=None, gradient_checkpointing=True, stage_layers="2,1,1")
        assert fingerprint(preflight(first, 1), (1, 1, 1)) == fingerprint(preflight(second, 1), (1, 1, 1))

    @pytest.mark.processes
    @pytest.mark.parametrize(
        ("changes", "said"),
        [
            ({"learning_rate": 1e-4}, "learning_rate differs: 0.0001 in stage 0, 0.003 in stage 1; start both alike"),
            (
                {"stage_layers": "1,1,2"},
                "blocks differs: [[0, 1], [1, 2], [2, 4]] in stage 0, [[0, 2], [2",
            ),
            ({"config_overrides": "hidden_size=64"}, "model.head_dim differs: 16 in stage 0, 8 in stage 1"),
            ({"seed": 3}, "seed differs: 3 in stage 0, 42 in stage 1"),
            ({"eval_batches": 5}, "eval_batches differs: 5 in stage 0, 2 in stage 1"),
            ({"max_steps": 9}, "max_steps differs: 9 in stage 0, 4 in stage 1"),
        ],
    )
    def test_another_setup_is_refused_with_the_first_difference(self, job, changes: dict[str, Any], said: str):
        """Stage 1 asks stage 0 at its start, and ends."""
        mine, other = preflight(job(), 1), preflight(job(stage=0, receive_on=None, **changes), 1)
        found = refused(mine, hello_of(other, Place(0, (1, 1, 1), 0)))
        assert found.startswith(f"link 0→1: {said}")

    @pytest.mark.processes
    def test_a_gap_in_the_chain(self, job):
        mine, other = preflight(job(), 1), preflight(job(stage=2, send_to=None), 1)
        assert refused(mine, hello_of(other, Place(0, (1, 1, 1), 2))).startswith(
            "link 0→1: stage 1, replica 0 waits for stage 0 here, not for stage 2, replica 0 ("
        )

    @pytest.mark.processes
    def test_other_numbers_of_replicas(self, job):
        mine, other = preflight(job(), 1), preflight(job(stage=0, receive_on=None), 2)
        assert "replicas differs: 2 in stage 0, 1 in stage 1" in refused(mine, hello_of(other, Place(0, (2, 2, 2), 0)))

    @pytest.mark.processes
    def test_one_that_does_not_come(self, job):
        setup = preflight(job(absent_peer_timeout=0.5), 1)
        with pytest.raises(LostPeer, match=r"^stage 0 has not come to 127\.0\.0\.1:\d+ within 0\.5 s \(--absent_"):
            identified(setup, 1)


def refused(setup: Any, other: Any) -> str:
    """What the job says that asks the other one for what it knows; the other one hears it, too."""
    local = setup.config.local
    heard: list[str] = []

    def come() -> None:
        stranger = Stranger(int(local.receive_on.rpartition(":")[2]), Path(local.run_key_file))
        stranger.say(other.to_bytes())
        heard.append(Refusal.of(stranger.hears()).reason)

    coming = Waiting(come)
    with pytest.raises(ConfigError) as refusal:
        identified(setup, 1)
    coming.join()
    (said,) = refusal.value.problems
    assert heard == [said.partition(": ")[2]]
    return said
