"""What ranks that share a GPU cannot do together, and what is worth saying of those that can."""

from __future__ import annotations

from collections.abc import Sequence

from llm_local.config import Config
from llm_local.device import DeviceName
from llm_local.place import Place


def device_problems(config: Config, place: Place, names: Sequence[DeviceName]) -> list[str]:
    """Ranks of one process group that share a GPU: NCCL, by which they meet, takes each once. names: by rank."""
    if config.is_pipelined:
        groups, who = [range(place.world_size)], "stages"
        repair = "give each rank a GPU of its own, or start one process (--num_stages 1)"
    elif config.local.replica_sync_steps:
        return []  # they meet through host memory
    else:
        groups = [range(place.rank_of(k, 0), place.rank_of(k, place.replicas[k])) for k in place.stages]
        who, repair = "replicas of a stage", "start fewer ranks, or more stages (--num_stages)"
    problems = []
    for group in groups:
        shared = next((ranks for ranks in _sharing(group, names) if len(ranks) > 1), None)
        if shared is not None:
            ranks = " and ".join(map(str, shared))
            problems.append(f"ranks {ranks}, {who}, share {names[shared[0]].identity}, which NCCL cannot do; {repair}")
    return problems


def device_warnings(place: Place, names: Sequence[DeviceName]) -> tuple[str, ...]:
    """Stages that share a GPU."""
    ranks = range(place.world_size)
    devices = len(list(_sharing(ranks, names)))
    if devices == len(ranks):
        return ()
    return (
        f"{len(ranks)} ranks share {devices} {'GPU' if devices == 1 else 'GPUs'}: good for trying out; links between "
        "them go through host memory, and stages take turns",
    )


def _sharing(ranks: range, names: Sequence[DeviceName]) -> list[list[int]]:
    """The ranks of each device."""
    found: dict[str, list[int]] = {}
    for rank in ranks:
        found.setdefault(names[rank].identity, []).append(rank)
    return list(found.values())
