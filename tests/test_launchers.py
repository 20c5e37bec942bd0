"""One script, any launcher: the same run comes out, and accelerate's way to start a single process is explained."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

import pytest
from conftest import Trainer
from launching import BIN, ROOT, SCRIPT, accelerate, by_hand, deepspeed, job, losses, mpirun, srun, torchrun
from ranks import free_port

from llm_local.config import ConfigError
from llm_local.launch import Launch, of_scheduler

SECONDS = 120.0


def two_torchruns() -> list[list[str]]:
    """Two nodes of one rank each, both on this host."""
    address = ["--master_addr", "127.0.0.1", "--master_port", str(free_port())]
    nodes = [["--nnodes", "2", "--node_rank", str(node), "--nproc_per_node", "1", *address] for node in (0, 1)]
    return [[str(BIN / "torchrun"), *node] for node in nodes]


def two_accelerates() -> list[list[str]]:
    nodes = [["--machine_rank", str(node), "--num_processes", "2"] for node in (0, 1)]
    shared = accelerate("multi_node.yaml")
    return [[*shared, *node] for node in nodes]


def two_tasks() -> list[list[str]]:
    """As srun starts them, each in a container that has the host's name, where root may make one."""
    container = ["unshare", "--pid", "--fork", "--mount-proc"]
    if not shutil.which("unshare") or subprocess.run([*container, "true"], capture_output=True).returncode:
        container = []
    step = {"SLURM_JOB_ID": "7", "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_TASKS_PER_NODE": "2"}
    tasks = [step | {"MASTER_PORT": str(free_port())}] * 2
    places = [{"SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank)} for rank in (0, 1)]
    variables = [[f"{name}={value}" for name, value in (a | b).items()] for a, b in zip(tasks, places, strict=True)]
    behind = [
        "sh",
        "-c",
        'for n in 1 2 3 4 5 6 7 8 9; do true & done; wait; "$@"; exit $?',
        "sh",
    ]  # a number of its own
    return [
        [*container, *extra, "env", *each, sys.executable] for extra, each in zip(([], behind), variables, strict=True)
    ]


LAUNCHERS = {
    "srun, in containers": two_tasks,
    "deepspeed": lambda: [deepspeed(2)],
    "torchrun": lambda: [torchrun(2)],
    "accelerate": lambda: [accelerate("cpu.yaml")],
    "mpirun": lambda: [mpirun(2)],
    "srun": lambda: [srun(2)],
    "two nodes of torchrun": two_torchruns,
    "two nodes of accelerate": two_accelerates,
}


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory, cache: Path) -> tuple[Trainer, list[list[float]]]:
    """The losses of both stages over three steps, from ranks that were started by hand."""
    folder = tmp_path_factory.mktemp("reference")
    trainer = Trainer(folder, cache)
    with by_hand(2, trainer.flags("run", num_stages=2, max_steps=3), folder) as ranks:
        assert [rank.wait(SECONDS) for rank in ranks] == [0, 0], [rank.text for rank in ranks]
    return trainer, losses(folder / "run", 2)


@pytest.mark.processes
@pytest.mark.parametrize("name", LAUNCHERS)
def test_every_launcher_trains_the_same(reference, tmp_path: Path, name: str):
    trainer, expected = reference
    flags = trainer.flags("run", num_stages=2, max_steps=3, output_dir=tmp_path / "run")
    with ExitStack() as stack:
        nodes = LAUNCHERS[name]()
        runs = [stack.enter_context(job(launcher, flags, tmp_path, f"log-{n}")) for n, launcher in enumerate(nodes)]
        for run in runs:
            assert run.wait(SECONDS) == 0, "\n".join(run.text for run in runs)
    assert [len(stage) for stage in expected] == [3, 3]
    assert losses(tmp_path / "run", 2) == expected


@pytest.mark.processes
def test_accelerate_launch_cpu_is_told_what_to_use_instead(trainer: Trainer, tmp_path: Path):
    command = [str(BIN / "accelerate"), "launch", "--cpu", "--num_processes", "2", SCRIPT]
    environ = {key: value for key, value in os.environ.items() if key != "RANK"}
    flags = trainer.flags("run", num_stages=2)
    done = subprocess.run([*command, *flags], capture_output=True, text=True, timeout=SECONDS, cwd=ROOT, env=environ)
    assert done.returncode != 0
    said = "accelerate launch --cpu starts one process without a rank; use instead deepspeed --num_gpus N, torchrun "
    assert (done.stdout + done.stderr).count(said) == 1, done.stdout + done.stderr
    assert "configs/accelerate/cpu.yaml" in done.stderr
    assert not (tmp_path / "run").exists()


def test_the_environment_of_each_launcher():
    common = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "MASTER_ADDR": "a", "MASTER_PORT": "1"}
    assert Launch.from_environment({}) == Launch(0, 1, 0, 1, 0)
    assert Launch.from_environment(common) == Launch(3, 4, 1, 4, 0)
    assert Launch.from_environment({**common, "LOCAL_SIZE": "2"}) == Launch(3, 4, 1, 2, 0)
    elastic = {**common, "LOCAL_WORLD_SIZE": "2", "TORCHELASTIC_RESTART_COUNT": "1"}
    assert Launch.from_environment(elastic) == Launch(3, 4, 1, 2, 1)


SRUN = {
    "SLURM_JOB_ID": "123456",
    "SLURM_STEP_ID": "0",
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "1",
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_STEP_TASKS_PER_NODE": "2(x2)",
    "SLURM_STEP_NODELIST": "node[03-04]",
}
OPEN_MPI = {
    "OMPI_COMM_WORLD_RANK": "1",
    "OMPI_COMM_WORLD_SIZE": "2",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
}


def test_the_environment_of_srun_and_mpirun():
    on_two_nodes = of_scheduler(SRUN)
    assert Launch.from_environment(on_two_nodes) == Launch(3, 4, 1, 2, 0)
    assert (on_two_nodes["MASTER_ADDR"], on_two_nodes["MASTER_PORT"]) == ("node03", "23456")
    on_one = of_scheduler(OPEN_MPI)
    assert Launch.from_environment(on_one) == Launch(1, 2, 1, 2, 0)
    assert (on_one["MASTER_ADDR"], on_one["MASTER_PORT"]) == ("127.0.0.1", "29500")
    hydra = {"PMI_RANK": "1", "PMI_SIZE": "2", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "2"}
    assert of_scheduler(hydra) == on_one
    pmi2 = SRUN | {"PMI_RANK": "3", "PMI_SIZE": "4", "PMI_JOBID": "123456.0"}
    assert of_scheduler(pmi2) == on_two_nodes, "srun --mpi=pmi2"
    assert of_scheduler({"SLURM_PROCID": "1", "SLURM_NTASKS": "2", "SLURM_LOCALID": "1", "MASTER_ADDR": "a"}) == {
        "RANK": "1",
        "WORLD_SIZE": "2",
        "LOCAL_RANK": "1",
        "MASTER_PORT": "29500",
    }


def test_a_process_of_srun_or_mpirun_that_is_alone_or_has_another_launcher_is_as_without():
    assert of_scheduler({**SRUN, "RANK": "0"}) == {}, "torchrun, started by srun"
    assert of_scheduler({**SRUN, "SLURM_STEP_NUM_TASKS": "1"}) == {}
    batch = {"SLURM_JOB_ID": "1", "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NTASKS": "4"}
    assert of_scheduler(batch) == {}, "the script of sbatch itself, which runs once"
    assert of_scheduler({}) == {}
    shell = SRUN | {"SLURM_PROCID": "0", "SLURM_PTY_PORT": "40495"}
    assert of_scheduler(shell, at_terminal=True) == {}, "srun --pty bash, with several tasks"
    assert of_scheduler(shell)["WORLD_SIZE"] == "4", "srun without --pty in that shell"


def test_runs_that_share_a_host_have_ports_of_their_own():
    def ports(*changes: dict[str, str]) -> list[str]:
        return [of_scheduler(each)["MASTER_PORT"] for each in changes]

    steps = ports(SRUN, SRUN | {"SLURM_STEP_ID": "1"}, SRUN | {"SLURM_JOB_ID": "123457"})
    assert len({*steps}) == 3
    # mpirun in a script of sbatch, where every rank has the script's number: as seen with Slurm 22.05, Open MPI 4.1
    batch = OPEN_MPI | {"SLURM_JOB_ID": "4", "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NTASKS": "2"}
    first, second = ({**batch, "PMIX_NAMESPACE": name} for name in ("751894529", "1392902145"))
    assert len({*ports(first, second)}) == 2
    assert len({*ports(first, {**first, "OMPI_COMM_WORLD_RANK": "0"})}) == 1
    assert of_scheduler(first)["RANK"] == "1"


def test_mpirun_on_several_hosts_is_told_what_to_add():
    with pytest.raises(ConfigError, match=r"not MASTER_ADDR; .* or set them, as mpirun -x MASTER_ADDR=HOST_OF_RANK_0"):
        Launch.from_environment(of_scheduler({**OPEN_MPI, "OMPI_COMM_WORLD_LOCAL_SIZE": "1"}))


def test_an_environment_that_no_launcher_makes():
    with pytest.raises(ConfigError, match="RANK is set but not WORLD_SIZE, MASTER_PORT; start with deepspeed"):
        Launch.from_environment({"RANK": "0", "LOCAL_RANK": "0", "MASTER_ADDR": "a"})
    with pytest.raises(ConfigError, match="accelerate launch --cpu starts one process without a rank"):
        Launch.from_environment({"ACCELERATE_USE_CPU": "True"})
    with pytest.raises(ConfigError, match=r"GLOO_SOCKET_IFNAME=lo,eth77: .* has no eth77; it has .*lo"):
        Launch.from_environment({"GLOO_SOCKET_IFNAME": "lo,eth77"})
