"""A layout, and what each of its stages takes: bytes by memory/stage.py, seconds by FLOPs and the machine's rates."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import accumulate, pairwise
from math import gcd

from llm_local.config import Config
from llm_local.costs import Passes, Setting, Shape, count_passes
from llm_local.cut import plan_partition, run_setting, run_shape
from llm_local.head_problems import cut_problems
from llm_local.memory.division import NOTHING, WHOLE, Division, Told
from llm_local.memory.engine import BYTES, Zero
from llm_local.memory.parts import TOKEN_IDS, Parameters, alive_passes, pipeline_parameters, wire_bytes
from llm_local.memory.sizes import ModelSizes
from llm_local.memory.stage import Load, Memory, load_of, memory_of
from llm_local.methods.method import local_methods
from llm_local.methods.schedule import GRADIENT, SOFT_TARGETS, Schedule
from llm_local.model.anatomy import Anatomy
from llm_local.model.heads.head import head_of
from llm_local.partition import Partition
from llm_local.plan.machine import Group, Machine
from llm_local.plan.times import Link, Pipe, StageSeconds
from llm_local.registry import HEADS

PEER_METHODS = ("data_parallel", "gpipe", "1f1b", "interleaved", "zero_bubble")
CHUNKS = 2  # of a stage of the interleaved schedule
# read and written for a parameter: its gradient, float32 weight and two moments, and the weight that computes
_ADAM_BYTES = 30


@dataclass(frozen=True)
class Candidate:
    """head is '' for backpropagation, which has the model's own. stage_replicas: of each stage, where they differ;
    num_replicas is then the most. The last two are as in the flags of a run."""

    method: str
    num_stages: int
    num_replicas: int
    zero: int
    head: str = ""
    stage_replicas: tuple[int, ...] = ()
    tensor_parallel_size: int = 1
    sequence_parallel_size: int = 1

    @property
    def division(self) -> Division:
        return Division(self.tensor_parallel_size, self.sequence_parallel_size)

    @property
    def replicas(self) -> tuple[int, ...]:
        return self.stage_replicas or (self.num_replicas,) * self.num_stages

    @property
    def is_local(self) -> bool:
        return self.method in local_methods()

    @property
    def num_chunks(self) -> int:
        return CHUNKS if self.method == "interleaved" else 1

    def __str__(self) -> str:
        each = ",".join(map(str, self.stage_replicas)) or self.num_replicas
        stages = f"{self.num_stages} stage{'s' if self.num_stages > 1 else ''} x {each}"
        stages += f" x {self.division.ranks} ranks a {'layer' if self.tensor_parallel_size > 1 else 'row'}" * (
            self.division != WHOLE
        )
        return f"{self.method}, {stages}, ZeRO {self.zero}" + (f", {self.head} heads" if self.head else "")

    def flags(self, config: Config) -> Config:
        """Those of `config` as a run of this layout has them; of a peer those of its model's cut."""
        local = replace(type(config.local)(), method="backprop", num_stages=self.num_stages * self.num_chunks)
        if self.is_local:
            local = replace(config.local, method=self.method, head=self.head, num_stages=self.num_stages)
            if not HEADS[self.head].takes_private_layers:
                local = replace(local, head_layers=0, head_layers_schedule=None, head_rank=None)
        return self.division.in_flags(replace(config, local=local))


class Stages:
    """The stages of a layout on a machine. sizes, share: of the model, and of what a device has of it. Raises
    ValueError saying what does not fit the model."""

    def __init__(
        self,
        layout: Candidate,
        config: Config,
        anatomy: Anatomy,
        sizes: ModelSizes,
        share: ModelSizes,
        machine: Machine,
    ):
        self.layout, self.config, self.anatomy, self.machine = layout, config, anatomy, machine
        self.sizes, self.share = sizes, share
        ends = [0, *accumulate(count * layout.division.ranks for count in layout.replicas)]
        self.groups = [machine.group(range(a, b), layout.division) for a, b in pairwise(ends)]
        speeds = [group.num_replicas * group.flops for group in self.groups]
        self.is_even = len(set(speeds)) == 1
        # the cut does not depend on the training, nor on who divides layers or rows, so that all of these share one
        alike = WHOLE.in_flags(replace(config, train=type(config.train)()))
        self.partition = _cut(alike, anatomy, () if self.is_even else (*speeds,) * layout.num_chunks)
        if layout.is_local and (problems := cut_problems(config, self.partition)):
            raise ValueError("; ".join(problems))
        if layout.stage_replicas and (not layout.is_local or self._own_schedule.back):
            raise ValueError("what comes back over its boundaries needs as many replicas of each stage")
        self.micro_batches = config.train.gradient_accumulation_steps * layout.num_replicas  # of a step
        self.tokens = config.train.per_device_train_batch_size * config.data.seq_length  # of a micro-batch
        self.loads = [self._load(stage) for stage in range(layout.num_stages)]

    @property
    def schedule(self) -> str:
        """As plan/times.py names it."""
        if self.layout.is_local:
            return self._own_schedule.name
        return "local" if self.layout.method == "data_parallel" else self.layout.method

    @property
    def _own_schedule(self) -> type[Schedule]:
        """Of a local layout, as a step before the final ones has it."""
        return self.config.method.schedule(self.config.local)

    def traffic(self) -> tuple[float, float]:
        """Bytes of a token over each boundary, forward and back."""
        if self.layout.num_stages == 1:
            return 0.0, 0.0
        plain = float(self.sizes.hidden_size * BYTES[self.config.precision])
        if not self.layout.is_local:
            return plain, plain
        hidden = float(wire_bytes(self.sizes, self.config.wire_dtype))
        dtype = self.config.method.back_dtype(self.config.local, self.config.precision, self.config.wire_dtype)
        back = {
            None: 0.0,
            GRADIENT: float(wire_bytes(self.sizes, dtype or self.config.wire_dtype)),
            SOFT_TARGETS: 2.0 * BYTES["fp32"] * self.config.local.distillation_top_k,
        }
        return hidden + TOKEN_IDS, back[self._own_schedule.back]

    def refresh_bytes(self) -> float:
        """Of a shared head's matrix over each boundary, back, for one step on average."""
        if not head_of(self.config).shares_matrix or self.layout.num_stages == 1:
            return 0.0
        return self.sizes.head_parameters * BYTES[self.config.precision] / self.config.local.head_refresh_steps

    def memory(self) -> tuple[Memory, ...]:
        """Of a device of each stage."""
        found: dict[tuple[Load, int, float], Memory] = {}
        memories = []
        for load, group in zip(self.loads, self.groups, strict=True):
            key = (load, group.num_replicas, group.memory_bytes)
            if key not in found:
                zero = Zero(self.layout.zero)
                found[key] = memory_of(load, self.config, self.share, zero, group.data_ranks, group.memory_bytes)
            memories.append(found[key])
        return tuple(memories)

    def room(self) -> tuple[float, ...]:
        """Of a device of each stage, the bytes that it has."""
        return tuple(group.memory_bytes for group in self.groups)

    def layers(self) -> tuple[int, ...]:
        """Of each stage."""
        return tuple(sum(len(self.partition.blocks[b]) for b in self._blocks(k)) for k in range(self.layout.num_stages))

    def pipe(self) -> Pipe:
        """What its step's time depends on."""
        replicas = self.layout.replicas
        division, stages = self.layout.division, range(self.layout.num_stages - 1)
        links = [self.machine.boundary(replicas, stage, division) for stage in stages]
        each = tuple(links) if len(set(links)) > 1 else tuple(links[:1]) or (Link(),)
        ahead, back = (self.tokens / division.rows * size for size in self.traffic())
        bound = self.config.local.max_packets_in_flight
        alike = gcd(*replicas)  # parts of the pipe that have nothing to do with each other
        made = (self._seconds(), self.micro_batches // alike, each, ahead, back, bound)
        dealt = tuple(count // alike for count in replicas) if self.layout.stage_replicas else ()
        return Pipe(self.schedule, *made, replicas=dealt)

    def _load(self, stage: int) -> Load:
        if self.layout.is_local:
            return load_of(self.config, self.share, self.partition, self.layout.replicas, stage)
        blocks, is_last = self._blocks(stage), stage == self.layout.num_stages - 1
        share = self.micro_batches // self.layout.replicas[stage]
        sizes = [len(self.partition.blocks[block]) for block in blocks]
        kept = max(sizes) * alive_passes(self.schedule, self.layout.num_stages, stage, share, len(blocks))
        parameters = pipeline_parameters(self.share, sum(sizes), stage == 0, is_last)
        return Load(parameters, kept, is_last, is_last, share)

    def _blocks(self, stage: int) -> range:
        """The stage's blocks, or chunks."""
        if not self.layout.is_local:
            return range(stage, len(self.partition.blocks), self.layout.num_stages)
        return range(self.partition.stages[stage].start, self.partition.stages[stage].stop)

    def _passes(self) -> tuple[Passes, ...]:
        """FLOPs of a token through each block, on all devices of a replica. Of backpropagation the last head is the
        only one."""
        sizes = self.sizes
        parameters = (sizes.active_layer_parameters, sizes.head_parameters)
        shape = Shape(sizes.hidden_size, self.config.data.seq_length, *parameters)
        if self.anatomy.row_shape:
            shape = run_shape(self.config, self.anatomy)
        if not self.layout.is_local:
            return count_passes(shape, Setting(self.partition.blocks, token_fraction=0.0))
        return count_passes(shape, run_setting(self.config, self.partition, sizes.layer_matrices))

    def _seconds(self) -> tuple[StageSeconds, ...]:
        passes = self._passes()
        found: dict[tuple[tuple[Passes, ...], Parameters, Group, bool], StageSeconds] = {}
        made = []
        for stage, (load, group) in enumerate(zip(self.loads, self.groups, strict=True)):
            parameters = load.parameters
            key = (tuple(passes[block] for block in self._blocks(stage)), parameters, group, stage == 0)
            if key not in found:
                computing = self._telling(self._computing(key[0], group), stage, group)
                found[key] = self._with_collectives(computing, parameters, group)
            made.append(found[key])
        return tuple(made)

    def _computing(self, passes: Sequence[Passes], group: Group) -> StageSeconds:
        each = self.tokens / group.flops / group.division.ranks
        again = each * self.config.train.gradient_checkpointing
        # parts of logits are made again for their gradient (model/loss.py)
        logits = each * (group.division.layers > 1)
        return StageSeconds(
            forward=tuple(each * p.forward for p in passes),
            backward=tuple(each * p.backward + again * p.layers + logits * (p.forward - p.layers) for p in passes),
            weights=tuple(each * p.weights for p in passes),
            from_above=tuple(each * (p.from_above or p.backward) for p in passes),  # the last block has none
        )

    def _telling(self, stage: StageSeconds, number: int, group: Group) -> StageSeconds:
        """With what the devices of a replica tell each other in the passes of a micro-batch through each block: what
        was counted in layers and, where these are divided, a sum of the embedding's parts or, behind the first stage,
        the packet, and the gradient that the parts of a head's matrix have of their input."""
        if group.division == WHOLE:
            return stage
        train, sizes = self.config.train, self.share
        rows, schedule = train.per_device_train_batch_size, self.config.head_layers_schedule
        states = rows * self.config.rank_positions * sizes.hidden_size * BYTES[self.config.precision]
        forward, backward = [], []
        for block in self._blocks(number):
            layers = len(self.partition.blocks[block]) + len(self.partition.private_layers(block, schedule))
            ahead, back = (each.through(layers, rows) for each in (sizes.ahead, sizes.back))
            back += ahead if train.gradient_checkpointing else NOTHING
            if group.division.layers > 1:
                back += Told(2 * states, 1)
            if group.division.layers > 1 and block == self._blocks(number)[0]:
                ahead += Told(states, 1) if number else Told(2 * states, 1)
            forward.append(self.machine.told_seconds(ahead, group))
            backward.append(self.machine.told_seconds(back, group))
        assert stage.from_above is not None
        return replace(
            stage,
            forward=tuple(map(sum, zip(stage.forward, forward, strict=True))),
            backward=tuple(map(sum, zip(stage.backward, backward, strict=True))),
            from_above=tuple(map(sum, zip(stage.from_above, backward, strict=True))),
        )

    def _with_collectives(self, stage: StageSeconds, parameters: Parameters, group: Group) -> StageSeconds:
        """With the optimizer's own time, and what the replicas tell each other (the ZeRO paper, section 7).

        ZeRO 0 and 1 reduce once a step: after it in a pipe's stage, and for data parallelism beside the last backward
        pass, as the usual engines do. ZeRO 2 reduces beside every backward pass, ZeRO 3 gathers beside every pass.
        """
        zero, ranks = self.layout.zero, group.data_ranks
        num_bytes = BYTES[self.config.precision] * parameters.trained
        gather = self.machine.gather_seconds(num_bytes, ranks, group.num_hosts, rings=group.division.layers)
        held = parameters.trained / (ranks if zero else 1)
        adam = _ADAM_BYTES * held / group.memory_bytes_per_second
        if zero <= 1:
            beside = sum(stage.backward) if self.layout.method == "data_parallel" else 0.0
            return replace(stage, optimizer=adam + max(0.0, gather - beside) + gather)
        slower = max(1.0, gather / sum(stage.forward)) if zero == 3 else 1.0
        slower_back = max(1.0, gather * (2 if zero == 3 else 1) / sum(stage.backward))
        return replace(
            stage,
            forward=tuple(seconds * slower for seconds in stage.forward),
            backward=tuple(seconds * slower_back for seconds in stage.backward),
            optimizer=adam + (gather if zero == 2 else 0.0),
        )


@lru_cache(maxsize=256)
def _cut(config: Config, anatomy: Anatomy, stage_speeds: tuple[float, ...]) -> Partition:
    return plan_partition(config, anatomy, stage_speeds=stage_speeds)
