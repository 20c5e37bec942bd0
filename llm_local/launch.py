"""What a launcher tells each process of its place, in environment variables."""

from __future__ import annotations

import re
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from zlib import crc32

from llm_local.config import ConfigError

LAUNCHERS = (
    "deepspeed --num_gpus N, torchrun --nproc_per_node N, or accelerate launch --config_file configs/accelerate/"
)

PORT, _FIRST_PORT, _NUM_PORTS = 29500, 20000, 10000
# rank, world size, local rank, local world size
_MPI = (
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_SIZE"),
    ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"),
)
_SLURM = (
    ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID", "SLURM_STEP_TASKS_PER_NODE"),
    ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID", "SLURM_TASKS_PER_NODE"),
)


def of_scheduler(environ: Mapping[str, str], at_terminal: bool = False) -> dict[str, str]:
    """The launchers' variables for a process of srun or mpirun, which have others; none where there are no such ranks.

    An address that cannot be derived is left out. at_terminal: a person may have started the process in a shell, which
    srun --pty has started.
    """
    if "RANK" in environ:
        return {}
    for rank, size, local_rank, local_size in (*_MPI, *_SLURM):
        if rank not in environ or not environ.get(size, "").isdecimal():
            continue
        if rank == "PMI_RANK" and local_rank not in environ and "SLURM_LOCALID" in environ:
            continue  # of srun --mpi=pmi2
        by_slurm = rank == "SLURM_PROCID"
        # the script of sbatch runs once and has these variables, too
        in_script = by_slurm and "SLURM_JOB_ID" in environ and "SLURM_STEP_ID" not in environ
        in_shell = by_slurm and "SLURM_PTY_PORT" in environ and at_terminal
        if environ[size] == "1" or in_script or in_shell:
            return {}
        found = {"RANK": environ[rank], "WORLD_SIZE": environ[size], "MASTER_PORT": str(_port(environ, by_slurm))}
        if local_rank in environ:
            found["LOCAL_RANK"] = environ[local_rank]
        here = re.match(r"\d+", environ.get(local_size, ""))  # of "2(x3),1" the first host's
        if here:
            found["LOCAL_WORLD_SIZE"] = here[0]
        hosts = environ.get("SLURM_STEP_NODELIST") or environ.get("SLURM_JOB_NODELIST")
        if here and here[0] == environ[size]:
            found["MASTER_ADDR"] = "127.0.0.1"
        elif hosts and by_slurm:
            found["MASTER_ADDR"] = first_host(hosts)
        return {name: value for name, value in found.items() if name not in environ}
    return {}


def _port(environ: Mapping[str, str], by_slurm: bool) -> int:
    """The same for all ranks, and another one for each step of Slurm and each mpirun of Open MPI: they share hosts."""
    job, step = environ.get("SLURM_JOB_ID", ""), environ.get("SLURM_STEP_ID", "0")
    if by_slurm and job.isdecimal() and step.isdecimal():
        return _FIRST_PORT + (int(job) + 101 * int(step)) % _NUM_PORTS
    if "OMPI_COMM_WORLD_RANK" in environ and "PMIX_NAMESPACE" in environ and not by_slurm:
        return _FIRST_PORT + crc32(environ["PMIX_NAMESPACE"].encode()) % _NUM_PORTS
    return PORT


def first_host(hosts: str) -> str:
    """'node03' of SLURM's 'node[03-07,9],login'."""
    found = re.match(r"([^,\[]*)(?:\[(\d+)[^\]]*\])?([^,\[]*)", hosts)
    return "".join(part or "" for part in found.groups()) if found else hosts


@dataclass(frozen=True)
class Launch:
    """What the launcher's environment says of this process."""

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    restart: int

    @staticmethod
    def from_environment(environ: Mapping[str, str]) -> Launch:
        """Reads the variables of deepspeed, torchrun and accelerate; without any, the process is a world of one.

        Raises ConfigError for `accelerate launch --cpu`, which starts one process and gives it no rank, and for a
        GLOO_SOCKET_IFNAME that this host has not.
        """
        asked = environ.get("GLOO_SOCKET_IFNAME", "")
        there = [name for _, name in socket.if_nameindex()] if asked else []
        if missing := [name for name in asked.split(",") if name and name not in there]:
            raise ConfigError(
                [f"GLOO_SOCKET_IFNAME={asked}: {socket.gethostname()} has no {missing[0]}; it has {', '.join(there)}"]
            )
        if "RANK" not in environ:
            if any(name.startswith("ACCELERATE_") for name in environ):
                raise ConfigError(
                    [f"accelerate launch --cpu starts one process without a rank; use instead {LAUNCHERS}cpu.yaml"]
                )
            return Launch(0, 1, 0, 1, 0)
        unset = [n for n in ("WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT") if n not in environ]
        if unset:
            by_hand = " or set them, as mpirun -x MASTER_ADDR=HOST_OF_RANK_0 does"
            raise ConfigError([f"RANK is set but not {', '.join(unset)}; start with {LAUNCHERS}*.yaml,{by_hand}"])
        world_size = int(environ["WORLD_SIZE"])
        local = environ.get("LOCAL_WORLD_SIZE") or environ.get("LOCAL_SIZE") or world_size
        restart = int(environ.get("TORCHELASTIC_RESTART_COUNT", "0"))
        return Launch(int(environ["RANK"]), world_size, int(environ["LOCAL_RANK"]), int(local), restart)
