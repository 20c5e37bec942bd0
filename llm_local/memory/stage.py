"""Bytes that a rank of each stage needs at the time when it needs most: what a plan, and a start, go by.

What a CUDA context and fragmentation take is not in it, nor what a process takes before it trains: a device should have
some GB beside, a host about one for each rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from itertools import accumulate
from math import gcd
from typing import Any

from llm_local.config import Config
from llm_local.costs import low_rank_parameters
from llm_local.ds_config import resolve
from llm_local.memory.engine import BYTES, EngineMemory, Zero, engine_memory
from llm_local.memory.parts import (
    Parameters,
    alive_passes,
    block_activations,
    loss_memory,
    packet_memory,
    pipeline_parameters,
    stage_parameters,
)
from llm_local.memory.sizes import ModelSizes
from llm_local.model.heads.head import head_of
from llm_local.partition import Partition
from llm_local.replicas import of_stage, replicas_of

_SAVED = 12  # bytes of a parameter in a checkpoint: its float32 weight, and Adam's moments
_MADE = 4  # of a new parameter, whatever the precision
_MOVED = 8  # of the replicas' meeting: what they have moved, and the weights or the step that it is made of


_ON_HOST = ("offloaded", "checkpoint", "outer")


@dataclass(frozen=True)
class Memory:
    """Bytes of a rank. All but the last three are on its device: offloaded, checkpoint and outer are in host memory,
    the optimizer's part, what is being written, and the outer optimizer."""

    weights: float
    gradients: float
    optimizer: float
    activations: float
    logits: float
    packets: float
    offloaded: float = 0.0
    checkpoint: float = 0.0
    outer: float = 0.0

    @property
    def host(self) -> float:
        return self.offloaded + self.checkpoint + self.outer

    @property
    def total(self) -> float:
        """On the device."""
        states = self.weights + self.gradients + self.optimizer
        return states + self.activations + self.logits + self.packets

    @property
    def whole(self) -> float:
        """Where the device is the host."""
        return self.total + self.host

    def text(self, device: bool = True, host: bool = True) -> str:
        """'40.1 GB (optimizer 24.0, weights 4.0, ...)' of the device, of host memory or both, greatest first; parts
        below 0.05 GB are left out."""
        names = [field.name for field in fields(self) if (host if field.name in _ON_HOST else device)]
        parts = {name: getattr(self, name) / 1e9 for name in names}
        shown = [f"{name} {size:.1f}" for name, size in sorted(parts.items(), key=lambda p: -p[1]) if size >= 0.05]
        return f"{sum(parts.values()):.1f} GB" + (f" ({', '.join(shown)})" if shown else "")

    def __str__(self) -> str:
        """Of the device."""
        return self.text(host=False)


@dataclass(frozen=True)
class Load:
    """What a rank of a stage has to do. kept: layers whose activations are there at a time. has_loss, trains_matrix: of
    some block; links: to the stages before and behind; micro_batches: of a step."""

    parameters: Parameters
    kept: float
    has_loss: bool
    trains_matrix: bool
    micro_batches: int
    links: tuple[int, int] = (0, 0)


def load_of(config: Config, sizes: ModelSizes, partition: Partition, replicas: Sequence[int], stage: int) -> Load:
    """Of a stage of a run. replicas: of each stage."""
    num_stages = partition.num_stages
    micro_batches = of_stage(config, replicas, stage).train.gradient_accumulation_steps
    is_last, blocks = stage == num_stages - 1, range(partition.stages[stage].start, partition.stages[stage].stop)
    if config.is_pipelined:
        layers = len(partition.layers_of(stage))
        kept = layers * alive_passes("1f1b", num_stages, stage, micro_batches)
        return Load(pipeline_parameters(sizes, layers, stage == 0, is_last), kept, is_last, is_last, micro_batches)
    links = tuple(_links(replicas, stage, other) for other in (stage - 1, stage + 1))
    passes = config.method.schedule(config.local)
    if config.method.is_delayed:
        layers = len(partition.layers_of(stage))
        kept = layers * passes.alive_passes(num_stages - stage - 1, micro_batches, 1)
        found = pipeline_parameters(sizes, layers, stage == 0, is_last)
        # two copies of the weights, and their gradients in one of them
        parameters = replace(found, read=3 * found.trained)
        return Load(parameters, kept, is_last, is_last, micro_batches, (links[0], links[1]))
    seen, schedule = config.local.head_token_fraction, config.head_layers_schedule
    most = max(len(partition.blocks[b]) + seen * len(partition.private_layers(b, schedule)) for b in blocks)
    kept = most * passes.alive_passes(num_stages - stage - 1, micro_batches, len(blocks))
    parameters = stage_parameters(sizes, partition, stage, config, private_parameters(config, sizes))
    trains_matrix = is_last or not head_of(config).shares_matrix
    if stage in config.frozen_stages:
        kept, trains_matrix = 0.0, False
        parameters = Parameters((0,) * len(blocks), parameters.read + parameters.trained)
    elif config.local.lora_rank is not None:
        parameters = _adapted(parameters, config, sizes, partition, stage)
    return Load(parameters, kept, True, trains_matrix, micro_batches, (links[0], links[1]))


def _adapted(parameters: Parameters, config: Config, sizes: ModelSizes, partition: Partition, stage: int) -> Parameters:
    """With adapters in place of all that is trained but heads that are not the model's own; at most, in each matrix."""
    last, shares = len(partition.blocks) - 1, head_of(config).shares_matrix
    adapters, engines = low_rank_parameters(sizes.layer_matrices, config.local.lora_rank or 0), []
    for block in range(partition.stages[stage].start, partition.stages[stage].stop):
        private = partition.private_layers(block, config.head_layers_schedule)
        own = len(private) * private_parameters(config, sizes)
        own += 0 if shares or block == last else sizes.head_parameters
        engines.append(adapters * len(partition.blocks[block]) + own)
    heads = sum(engines) - adapters * len(partition.layers_of(stage))
    return Parameters(tuple(engines), parameters.read + parameters.trained - heads)


def private_parameters(config: Config, sizes: ModelSizes) -> int:
    """Of a private layer of a head."""
    rank = config.local.head_rank
    return sizes.layer_parameters if rank is None else low_rank_parameters(sizes.layer_matrices, rank)


def _links(replicas: Sequence[int], stage: int, other: int) -> int:
    """Of each replica, to those of a neighbour."""
    if not 0 <= other < len(replicas):
        return 0
    return replicas[other] // gcd(replicas[stage], replicas[other])


def memory_of(load: Load, config: Config, sizes: ModelSizes, zero: Zero, num_ranks: int, gpu_bytes: float) -> Memory:
    """The most that a rank needs at a time. num_ranks: that an engine spans, which have the same part of the model;
    gpu_bytes: of the device, 0 on a CPU."""
    config = replace(config, data=replace(config.data, seq_length=config.rank_positions))
    accumulates = load.micro_batches > 1
    largest = sizes.head_parameters if load.has_loss else 0
    shared = (config.precision, zero, num_ranks, accumulates, largest)
    engines = [engine_memory(trained, *shared) for trained in load.parameters.engines]
    standing = _standing(load, config, sizes, engines, num_ranks, zero)
    # the buffers of ZeRO 1 stay until the step
    gradients = [engine.gradients + engine.buffer * (zero.stage == 1) for engine in engines]
    at_step = max(e.gradients + e.step - mine for e, mine in zip(engines, gradients, strict=True))
    found = [replace(standing, gradients=standing.gradients + sum(gradients) + at_step)]
    if sizes.division.layers > 1 and not gpu_bytes:  # the last block is made whole before it is divided
        *others, last = load.parameters.engines
        found.append(Memory(_MADE * (sum(others) + sizes.division.layers * last), 0.0, 0.0, 0.0, 0.0, 0.0))
    if config.local.replica_sync_steps:
        found.append(replace(standing, outer=standing.outer + _MOVED * load.parameters.trained))
    kept, around, working = block_activations(sizes, load.kept, config)
    loss, matrix = loss_memory(sizes, config, load.trains_matrix, gpu_bytes) if load.has_loss else (0.0, 0.0)
    # without accumulation a block's own gradients come while its activations go
    whole = [sum(gradients) - engine.buffer * (zero.stage == 1) for engine in engines]
    before = whole if accumulates else [0.0, *accumulate(gradients[:-1])]
    for engine, others in zip(engines, before, strict=True):
        at = replace(standing, weights=standing.weights + engine.gathered, gradients=standing.gradients + others)
        found.append(replace(at, activations=kept + around, logits=loss + matrix))
        at = replace(at, gradients=at.gradients + engine.buffer)
        found.append(replace(at, activations=kept + working, logits=matrix))
        own = engine.gradients * (not accumulates) + engine.end
        found.append(replace(at, activations=working, gradients=at.gradients + own))
    return max(found, key=lambda memory: memory.total if gpu_bytes else memory.whole)


def _standing(
    load: Load, config: Config, sizes: ModelSizes, engines: Sequence[EngineMemory], num_ranks: int, zero: Zero
) -> Memory:
    """What is there at all times."""
    trained, own = load.parameters.trained, load.parameters.trained / (num_ranks if zero.stage else 1)
    is_apart = bool(config.local.replica_sync_steps)
    return Memory(
        weights=sum(e.weights for e in engines) + BYTES[config.precision] * load.parameters.read,
        gradients=sum(e.standing for e in engines),
        optimizer=sum(e.optimizer for e in engines),
        activations=0.0,
        logits=0.0,
        packets=packet_memory(sizes, config, *load.links),
        offloaded=sum(e.host for e in engines),
        checkpoint=_SAVED * own if config.save_interval else 0.0,
        outer=4 * (1 + bool(config.local.outer_momentum)) * trained if is_apart else 0.0,
    )


def run_memory(
    config: Config, model_config: Any, sizes: ModelSizes, partition: Partition, world_size: int, gpu_bytes: float
) -> tuple[Memory, ...]:
    """Of a rank of each stage of a run. sizes: of a rank's share of the model."""
    replicas, found = replicas_of(config, world_size), []
    for stage, count in enumerate(replicas):
        ranks = config.engine_ranks(count)
        zero = Zero.of(resolve(of_stage(config, replicas, stage), ranks, model_config))
        load = load_of(config, sizes, partition, replicas, stage)
        found.append(memory_of(load, config, sizes, zero, ranks * sizes.division.rows, gpu_bytes))
    return tuple(found)
