"""Where a rank lives: a pure function of its number and the flags."""

from __future__ import annotations

from dataclasses import dataclass

from llm_local.config import Config
from llm_local.replicas import Dealing, replicas_of, share


@dataclass(frozen=True)
class Place:
    """A rank's stage, replica and tensor rank: ranks count through those of a replica first, then through the replicas
    of stage 0. replicas: of each stage; job: the launch's only stage; tensor_ranks: of each replica, between which its
    layers are divided; sequence_ranks: of each replica, between which its rows are, by position."""

    rank: int
    replicas: tuple[int, ...]
    job: int | None = None
    tensor_ranks: int = 1
    sequence_ranks: int = 1

    @staticmethod
    def of(rank: int, config: Config, world_size: int) -> Place:
        """Of a rank of a launch with so many."""
        local = config.local
        ranks = (max(1, local.tensor_parallel_size), max(1, local.sequence_parallel_size))
        return Place(rank, replicas_of(config, world_size), local.stage, *ranks)

    @property
    def num_stages(self) -> int:
        return len(self.replicas)

    @property
    def stages(self) -> range:
        """Those of this launch."""
        return range(self.num_stages) if self.job is None else range(self.job, self.job + 1)

    @property
    def stage(self) -> int:
        return next(stage for stage in reversed(self.stages) if self.rank_of(stage, 0) <= self.rank)

    @property
    def replica(self) -> int:
        return (self.rank - self.rank_of(self.stage, 0)) // self.replica_ranks

    @property
    def replica_ranks(self) -> int:
        """Of each replica: sequence_problems.py refuses to have it divided both ways."""
        return self.tensor_ranks * self.sequence_ranks

    @property
    def tensor_rank(self) -> int:
        """Among the ranks of its replica."""
        return self.rank % self.tensor_ranks

    @property
    def sequence_rank(self) -> int:
        """Among the ranks of its replica."""
        return self.rank % self.sequence_ranks

    @property
    def num_replicas(self) -> int:
        """Of this rank's stage."""
        return self.replicas[self.stage]

    @property
    def world_size(self) -> int:
        """Ranks of the launch."""
        return sum(self.replicas[stage] for stage in self.stages) * self.replica_ranks

    @property
    def stage_ranks(self) -> int:
        """Ranks of this rank's stage."""
        return self.num_replicas * self.replica_ranks

    @property
    def data_ranks(self) -> int:
        """Ranks of this rank's stage that have the same part of the model: with rows, or positions, of their own."""
        return self.num_replicas * self.sequence_ranks

    @property
    def data_rank(self) -> int:
        """Among these."""
        return self.replica * self.sequence_ranks + self.sequence_rank

    def rank_of(self, stage: int, replica: int) -> int:
        """The first rank of a replica."""
        return (sum(self.replicas[self.stages.start : stage]) + replica) * self.replica_ranks

    def peer_of(self, stage: int, replica: int) -> int:
        """The rank of a replica that has links with this one: the first, or the one with the same positions."""
        return self.rank_of(stage, replica) + self.sequence_rank

    @property
    def neighbours(self) -> list[int]:
        """The stages of this launch before and behind this one."""
        return [stage for stage in (self.stage - 1, self.stage + 1) if stage in self.stages]

    def share(self, count: int) -> int:
        """Micro-batches of this rank, where a replica of the stage with the most replicas has `count`."""
        return share(count, self.replicas, self.stage)

    def dealing(self, stage: int) -> Dealing:
        """Between this rank and the replicas of another stage."""
        return Dealing(self.replica, self.num_replicas, self.replicas[stage])

    @property
    def is_first_stage(self) -> bool:
        return self.stage == 0

    @property
    def is_last_stage(self) -> bool:
        return self.stage == self.num_stages - 1

    @property
    def is_recorder(self) -> bool:
        """The first rank of replica 0 speaks for its stage."""
        return self.rank == self.rank_of(self.stage, 0)
