"""Whether a run fits in memory, and which one nearest to it would, before any process is made for it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from transformers import PretrainedConfig

from llm_local.config import Config, ConfigError
from llm_local.cut import plan_partition
from llm_local.device import local_device, memory_bytes
from llm_local.ds_config import load_json, zero_stage
from llm_local.memory.division import Division
from llm_local.memory.sizes import ModelSizes
from llm_local.memory.stage import Memory, run_memory
from llm_local.model.anatomy import Anatomy
from llm_local.partition import Partition
from llm_local.replicas import replicas_of
from llm_local.room import host_room

MARGIN = 1.1  # of what is there: a prediction may be wrong by a tenth
NEAR = 0.9  # from here on it is said that it will be tight


@dataclass(frozen=True)
class Room:
    """host: bytes that this host can still give, for so many ranks. gpu: that a GPU has, 0 where ranks train on CPUs;
    sharing: ranks on it."""

    host: float
    ranks: int
    gpu: float = 0.0
    sharing: int = 1


def room_of(ranks: int) -> Room:
    """Of this host, on which so many ranks train."""
    device, count = local_device(0), torch.accelerator.device_count()
    gpu = 0.0 if device.type == "cpu" else float(memory_bytes(device))
    return Room(host_room(), ranks, gpu, -(-ranks // max(1, count)))


@dataclass(frozen=True)
class MemoryCheck:
    """Of runs of a model, all on the same ranks. sizes_of: a rank's share of it; other_problems: of flags, for other
    reasons; division_problems: of the model, with these flags."""

    model_config: PretrainedConfig
    anatomy: Anatomy
    sizes_of: Callable[[Division], ModelSizes]
    world_size: int
    room: Room
    other_problems: Callable[[Config], Sequence[str]]
    division_problems: Callable[[Config], Sequence[str]]

    def of(self, config: Config, partition: Partition) -> tuple[Memory, ...]:
        """What a rank of each stage needs."""
        sizes = self.sizes_of(Division.of(config))
        return run_memory(config, self.model_config, sizes, partition, self.world_size, self.room.gpu)

    def problems(self, config: Config, memory: Sequence[Memory]) -> tuple[list[str], list[str]]:
        """What cannot fit, with what would; and what may not."""
        share, said = max(self._shares(config, memory))
        if share > MARGIN:
            return [f"{said}; {self._repair(config)}"], []
        return [], [f"memory will be tight: {said}"] if share > NEAR else []

    def _shares(self, config: Config, memory: Sequence[Memory]) -> Iterator[tuple[float, str]]:
        """How much is needed of what there is, and both in words: on rank 0's host, and on each stage's GPUs."""
        room, on_gpu = self.room, self.room.gpu > 0
        stages = self._stages(config)
        needed = {stage: memory[stage].host if on_gpu else memory[stage].whole for stage in stages[: room.ranks]}
        most = max(needed, key=lambda stage: needed[stage])
        text = memory[most].text(device=not on_gpu)
        left = f"{room.host / 1e9:.1f} GB left for {room.ranks} ranks, {room.host / room.ranks / 1e9:.1f} GB each"
        said = f"a rank of stage {most} needs {text} of host memory, and this host has {left}"
        yield sum(needed[stage] for stage in stages[: room.ranks]) / room.host, said
        has = room.gpu / room.sharing
        for stage in sorted({*stages}) if on_gpu else ():
            said = f"a rank of stage {stage} needs {memory[stage]} of GPU memory, and has {has / 1e9:.1f} GB"
            yield memory[stage].total / has, said

    def _stages(self, config: Config) -> list[int]:
        """Of each rank of the launch."""
        if config.local.stage is not None:
            return [config.local.stage] * self.world_size
        counts = enumerate(replicas_of(config, self.world_size))
        return [stage for stage, count in counts for _ in range(count * config.replica_ranks)]

    def _repair(self, config: Config) -> str:
        """The nearest run that fits, with one change or, beside it, those that come before."""
        for names, made in (*self._single(config), *self._together(config)):
            if self._fits(config, made):
                return f"{' and '.join(names)} would fit"
        return "no flags make it fit: use a smaller model, shorter rows, or more devices"

    def _fits(self, given: Config, config: Config) -> bool:
        try:
            if self.other_problems(config):
                return False
            memory = self.of(config, plan_partition(config, self.anatomy))
        except (ValueError, ConfigError):
            return False
        if max(self._shares(config, memory))[0] > 1.0:
            return False
        return Division.of(config) == Division.of(given) or not self.division_problems(config)

    def _single(self, config: Config) -> Iterator[tuple[list[str], Config]]:
        for kind in (*_CHANGES, MemoryCheck._other_ranks):
            for name, made in kind(self, config):
                yield [name], made

    def _together(self, config: Config) -> Iterator[tuple[list[str], Config]]:
        """With the last change of each kind, one kind after the other; at last with other ranks beside, which may not
        go with the last."""
        growing: list[tuple[list[str], Config]] = []
        names: list[str] = []
        for kind in _CHANGES:
            changes = [*kind(self, config)]
            growing += [([*names, name], made) for name, made in changes]
            if changes:
                name, config = changes[-1]
                names = [*names, name]
        yield from growing
        for names, made in growing:
            for name, other in self._other_ranks(made):
                yield [*names, name], other

    def _fewer_rows(self, config: Config) -> Iterator[tuple[str, Config]]:
        """At a time; of a step there are as many."""
        rows, count = config.train.per_device_train_batch_size, config.train.gradient_accumulation_steps
        while rows % 2 == 0:
            rows, count = rows // 2, count * 2
            train = replace(config.train, per_device_train_batch_size=rows, gradient_accumulation_steps=count)
            name = f"per_device_train_batch_size={rows} with gradient_accumulation_steps={count}"
            yield name, replace(config, train=train)

    def _checkpointing(self, config: Config) -> Iterator[tuple[str, Config]]:
        if not config.train.gradient_checkpointing:
            train = replace(config.train, gradient_checkpointing=True)
            yield "gradient_checkpointing=True", replace(config, train=train)

    def _higher_zero(self, config: Config) -> Iterator[tuple[str, Config]]:
        json = load_json(config)
        for stage in range(zero_stage(json) + 1, 4):
            zero = {**json.get("zero_optimization", {}), "stage": stage}
            made = replace(config, deepspeed_json={**json, "zero_optimization": zero})
            yield f"zero_optimization.stage={stage} (deepspeed=configs/ds/zero{stage}.json)", made

    def _other_ranks(self, config: Config) -> Iterator[tuple[str, Config]]:
        """More stages; replicas of more ranks, which divide layers or rows; and both."""
        local, own, ranks = config.local, Division.of(config), self.world_size
        if local.stage_replicas is not None or config.is_job:
            return
        sizes = [size for size in range(2, ranks + 1) if ranks % size == 0]
        divisions = [Division(layers=size) for size in sizes] + [Division(rows=size) for size in sizes]
        larger = [each for each in divisions if each.layers >= own.layers and each.rows >= own.rows and each != own]
        for division in (own, *larger):
            for count in range(local.num_stages, ranks + 1):
                values = {"num_stages": count, **division.flags}
                changes = {name: value for name, value in values.items() if value != getattr(local, name)}
                if changes and ranks % (count * division.ranks) == 0:
                    made = replace(config, local=replace(local, **changes, stage_layers=None))
                    yield " and ".join(f"{name}={value}" for name, value in changes.items()), made


# nearest first: what changes nothing but time; what needs other replicas comes after all
_CHANGES = (MemoryCheck._fewer_rows, MemoryCheck._checkpointing, MemoryCheck._higher_zero)
