"""What a launcher tells each process of its place, in environment variables."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from llm_local.config import ConfigError

LAUNCHERS = (
    "deepspeed --num_gpus N, torchrun --nproc_per_node N, or accelerate launch --config_file configs/accelerate/"
)


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

        Raises ConfigError for `accelerate launch --cpu`, which starts one process and gives it no rank.
        """
        if "RANK" not in environ:
            if any(name.startswith("ACCELERATE_") for name in environ):
                raise ConfigError(
                    [f"accelerate launch --cpu starts one process without a rank; use instead {LAUNCHERS}cpu.yaml"]
                )
            return Launch(0, 1, 0, 1, 0)
        missing = [n for n in ("WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT") if n not in environ]
        if missing:
            raise ConfigError([f"RANK is set but not {', '.join(missing)}; start with {LAUNCHERS}*.yaml"])
        world_size = int(environ["WORLD_SIZE"])
        local = environ.get("LOCAL_WORLD_SIZE") or environ.get("LOCAL_SIZE") or world_size
        restart = int(environ.get("TORCHELASTIC_RESTART_COUNT", "0"))
        return Launch(int(environ["RANK"]), world_size, int(environ["LOCAL_RANK"]), int(local), restart)
