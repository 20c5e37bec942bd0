"""How many replicas each stage has, and how the micro-batches of a step are dealt to them: pure functions.

Micro-batch g of a step, 0, 1, ..., is trained by replica g mod R of a stage with R replicas, as its number g div R. So
each replica of a stage has as many as the others, and a boundary between 4 replicas and 2 carries from 0 and 2 to 0,
from 1 and 3 to 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import gcd

from llm_local.config import Config


@dataclass(frozen=True)
class Dealing:
    """Between a replica of a stage with `mine` replicas and those of a stage with `theirs`."""

    replica: int
    mine: int
    theirs: int

    def at(self, index: int) -> tuple[int, int]:
        """Which replica there has this one's micro-batch `index`, and as which of its own."""
        micro_batch = index * self.mine + self.replica
        return micro_batch % self.theirs, micro_batch // self.theirs

    @property
    def peers(self) -> tuple[int, ...]:
        """The replicas there that have one of this one's micro-batches: of each as many as of the others."""
        step = gcd(self.mine, self.theirs)
        return tuple(range(self.replica % step, self.theirs, step))

    @property
    def source(self) -> int:
        """The replica there from which this one gets what all replicas get."""
        return self.replica % self.theirs

    @property
    def targets(self) -> tuple[int, ...]:
        """The replicas there whose source is this one."""
        return tuple(range(self.replica, self.theirs, self.mine))


ALONE = Dealing(0, 1, 1)


def parse_replicas(text: str) -> tuple[int, ...] | None:
    """'4,2,1' → (4, 2, 1); None if the text is no such list."""
    parts = [part.strip() for part in text.split(",")]
    return tuple(map(int, parts)) if all(part.isdecimal() for part in parts) else None


def replicas_of(config: Config, world_size: int) -> tuple[int, ...]:
    """Of each stage, of a launch with so many ranks."""
    given, num_stages = config.local.stage_replicas, max(1, config.local.num_stages)
    found = parse_replicas(given) if given is not None else None
    if found is None or len(found) != num_stages or 0 in found:  # a problem, of which another function tells
        of_one_each = config.launched_stages * config.replica_ranks
        return (max(1, world_size // of_one_each),) * num_stages
    return found


def replicas_text(replicas: Sequence[int]) -> str:
    """'2', or '4,2,1' where they differ."""
    return str(replicas[0]) if len({*replicas}) == 1 else ",".join(map(str, replicas))


def share(count: int, replicas: Sequence[int], stage: int) -> int:
    """Micro-batches of each replica of the stage, where the stage with the most replicas has `count` on each."""
    return count * max(replicas) // replicas[stage]


def sequences_per_step(config: Config, replicas: Sequence[int]) -> int:
    """Rows of a step, of all replicas."""
    return config.train.per_device_train_batch_size * config.train.gradient_accumulation_steps * max(replicas)


def of_stage(config: Config, replicas: Sequence[int], stage: int) -> Config:
    """The flags as an engine of the stage has them."""
    micro_batches = share(config.train.gradient_accumulation_steps, replicas, stage)
    return replace(config, train=replace(config.train, gradient_accumulation_steps=micro_batches))


def replica_problems(config: Config, world_size: int) -> list[str]:
    """What is wrong with the number of ranks, and with stage_replicas."""
    local, count = config.local, config.replica_ranks
    name = "tensor_parallel_size" if local.tensor_parallel_size > 1 else "sequence_parallel_size"
    of_ranks = f" with {name}={count}" if count > 1 else ""
    if local.num_stages < 1:  # which the flags' ranges have
        return []
    if count > 1 and world_size % count:
        return [
            f"{world_size} ranks cannot be divided into replicas of {name}={count} ranks; start a "
            f"multiple of {count * config.launched_stages} ranks, or change {name}"
        ]
    if local.stage_replicas is None:
        if world_size % (config.launched_stages * count) == 0:
            return []
        return [
            f"{world_size} ranks cannot be divided into num_stages={local.num_stages} stages of equal size{of_ranks}; "
            f"start a multiple of {local.num_stages * count} ranks, change num_stages, or give stage_replicas"
        ]
    given, found = f"stage_replicas={local.stage_replicas!r}", parse_replicas(local.stage_replicas)
    if found is None:
        return [f"{given} is not a list such as 4,2,1"]
    if len(found) != local.num_stages:
        return [f"{given} names {len(found)} stages, num_stages is {local.num_stages}"]
    if 0 in found:
        return [f"{given} leaves stage {found.index(0)} without a replica"]
    if local.stage is not None and local.stage < len(found) and world_size != found[local.stage]:
        return [f"{given} has {found[local.stage]} for stage {local.stage}, which {world_size} ranks were started for"]
    if local.stage is None and world_size != sum(found) * count:
        return [f"{given}{of_ranks} are {sum(found) * count} ranks, {world_size} were started"]
    return _unequal_problems(config, given, found) if len(set(found)) > 1 else []


def _unequal_problems(config: Config, given: str, found: Sequence[int]) -> list[str]:
    problems, most = [], max(found)
    for name in ("gradient_accumulation_steps", "eval_batches"):
        count = getattr(config.train, name)
        for stage, replicas in enumerate(found):
            if count > 0 and count * most % replicas:
                fitting = replicas // gcd(most, replicas)
                problems.append(
                    f"{given}: {name}={count} on each of {most} replicas are {count * most} micro-batches, which the "
                    f"{replicas} of stage {stage} cannot share; use a multiple of {fitting}"
                )
                break
    back = config.method.back_dtype(config.local, config.precision, config.wire_dtype)
    if back is not None or not config.method.has_local_losses:
        problems.append(
            f"{given}: gradients, or soft targets, come back over the boundaries of this run, which need as many "
            "replicas of each stage; use a method whose losses are local to the end"
        )
    if config.train.trace:
        problems.append(f"{given}: trace=True compares stages step by step, of equal numbers of replicas; leave it out")
    return problems
