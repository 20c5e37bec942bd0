"""Every way to put a model on a machine, and what each would take: what scripts/plan.py ranks.

All layouts train on the same number of rows a step. A step's time is first estimated; those that are shown are
simulated, where that takes no more than seconds.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeAlias

from llm_local.config import Config
from llm_local.memory.division import WHOLE, Division
from llm_local.memory.sizes import ModelSizes
from llm_local.memory.stage import Memory
from llm_local.methods.method import PLAIN_ZERO, local_methods
from llm_local.model.anatomy import Anatomy
from llm_local.plan.machine import Machine
from llm_local.plan.stages import PEER_METHODS, Candidate, Stages
from llm_local.plan.times import Pipe, Prediction, predict
from llm_local.registry import METHODS
from llm_local.sequence_problems import sequence_problems
from llm_local.tensor_problems import tensor_problems

Replicas: TypeAlias = tuple[int, ...]  # of each stage


@dataclass(frozen=True)
class Outcome:
    """What a layout would take, or why it cannot be.

    micro_batches: of a step on each replica of the stage with the most, each of so many rows. memory: of a device of
    each stage, that has such room. tokens: of a step, all replicas. recomputes: whether it checkpoints, which the flags
    may not ask for. stage_layers: of its cut, which is the flags' own where stages are equally fast (is_even).
    forward_bytes, backward_bytes: of a token over each boundary. refresh_bytes: a step, of the shared head's matrix.
    """

    layout: Candidate
    problem: str = ""
    micro_batches: int = 0
    rows: int = 0
    recomputes: bool = False
    tokens: int = 0
    memory: tuple[Memory, ...] = ()
    room: tuple[float, ...] = ()
    stage_layers: tuple[int, ...] = ()
    is_even: bool = True
    forward_bytes: float = 0.0
    backward_bytes: float = 0.0
    refresh_bytes: float = 0.0
    pipe: Pipe | None = None
    prediction: Prediction | None = None

    @property
    def step_seconds(self) -> float:
        return self.prediction.step_seconds if self.prediction else float("inf")

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.step_seconds

    @property
    def most_memory(self) -> Memory:
        different = {id(memory): memory for memory in self.memory}  # stages that are alike share one
        return max(different.values(), key=lambda memory: memory.total)

    @property
    def most_total(self) -> float:
        return self.most_memory.total if self.memory else 0.0

    @property
    def fullest(self) -> tuple[float, int]:
        """The bytes that a stage has too many, most of all, and which stage."""
        over = [memory.total - room for memory, room in zip(self.memory, self.room, strict=True)]
        return max(over, default=0.0), over.index(max(over)) if over else 0


@dataclass(frozen=True)
class Planner:
    """config: the flags of the runs to compare, of which a layout sets its own. rows: of a step, over all replicas.
    shares: the numbers of a device's share of the model, by who divides it."""

    anatomy: Anatomy
    sizes: ModelSizes
    machine: Machine
    config: Config
    rows: int
    shares: Mapping[Division, ModelSizes] = field(default_factory=dict)

    def layouts(
        self,
        methods: Sequence[str],
        heads: Sequence[str],
        stages: Sequence[int | Replicas],
        zero: Sequence[int],
        division: Division = WHOLE,
    ) -> Iterator[Candidate]:
        """Those that differ, and that DeepSpeed runs: one replica has nothing to shard, one block is backpropagation,
        and pipelines of that divide neither layers nor rows. stages: their number, of equally many replicas, or the
        replicas of each."""
        replicas = self.machine.devices // division.ranks  # of one stage
        for method in methods:
            is_local = method in local_methods()
            is_one_block = is_local and METHODS[method].block_layers(self.config.local) is None
            for given in [1] if method == "data_parallel" else stages:
                each = (replicas // given,) * given if isinstance(given, int) else given
                if len(each) == 1 and (is_one_block or method in PEER_METHODS[1:]):
                    continue
                if sum(each) != replicas or (method in PEER_METHODS[1:] and division != WHOLE):
                    continue
                for head in heads if is_local else ("",):
                    shards = self._shards(method, head, zero, division)
                    for stage in shards if max(each) * division.rows > 1 else shards[:1]:
                        unequal, sizes = each if len(set(each)) > 1 else (), (division.layers, division.rows)
                        yield Candidate(method, len(each), max(each), stage, head, unequal, *sizes)

    def _shards(self, method: str, head: str, zero: Sequence[int], division: Division) -> list[int]:
        """The ZeRO stages with which the method runs, and its model can be divided so."""
        found, sizes = [], (division.layers, division.rows)
        for stage in (stage for stage in zero if stage <= self._most_zero(method)):
            config = Candidate(method, 1, 1, stage, head, (), *sizes).flags(self.config)
            config = replace(config, deepspeed_json={"zero_optimization": {"stage": stage}})
            problems = config.method.problems(config.local) + tensor_problems(config) + sequence_problems(config)
            if division == WHOLE or not problems:
                found.append(stage)
        return found

    def _most_zero(self, method: str) -> int:
        """As ds_problems.py has it."""
        if method in local_methods():
            return METHODS[method].most_zero(self.config.local)
        return PLAIN_ZERO if method == "data_parallel" else 1

    def evaluate(self, layout: Candidate) -> Outcome:
        """With an estimated step. Where the flags' micro-batch does not fit, of fewer rows, or with checkpointing:
        whichever is faster."""
        checkpointing = [True] if self.config.train.gradient_checkpointing else [False, True]
        tried = [self._largest(layout, recomputes) for recomputes in checkpointing]
        fitting = [outcome for outcome in tried if not outcome.problem]
        return min(fitting, key=lambda outcome: outcome.step_seconds) if fitting else tried[-1]

    def _largest(self, layout: Candidate, recomputes: bool) -> Outcome:
        """With the largest micro-batch that fits and that replicas can share, of the flags' rows or a half, a quarter,
        ... of them."""
        rows = self.config.train.per_device_train_batch_size
        tried = [rows, *(rows >> half for half in range(1, rows.bit_length()))]
        shared = [rows for rows in tried if self._unshared(layout, rows) is None] or [rows]
        found = self._evaluate(layout, shared[0], recomputes)
        for rows in shared[1:]:
            if found.fullest[0] <= 0:
                break
            found = self._evaluate(layout, rows, recomputes)
        return found

    def _unshared(self, layout: Candidate, rows: int) -> int | None:
        """How many replicas cannot have as many micro-batches each."""
        return next((count for count in layout.replicas if self.rows % (count * rows)), None)

    def _evaluate(self, layout: Candidate, rows: int, recomputes: bool) -> Outcome:
        made = Outcome(layout, "", self.rows // (layout.num_replicas * rows), rows, recomputes)
        if replicas := self._unshared(layout, rows):
            problem = f"{self.rows} rows a step are no multiple of {replicas} replicas x {rows} rows"
            return replace(made, problem=problem)
        count = made.micro_batches
        if layout.method == "interleaved" and count % layout.num_stages:
            problem = f"interleaving needs a multiple of {layout.num_stages} micro-batches, not {count}"
            return replace(made, problem=problem)
        train = replace(
            self.config.train,
            per_device_train_batch_size=rows,
            gradient_accumulation_steps=count,
            gradient_checkpointing=recomputes,
        )
        config = layout.flags(replace(self.config, train=train))
        try:
            share = self.shares.get(layout.division, self.sizes)
            stages = Stages(layout, config, self.anatomy, self.sizes, share, self.machine)
        except ValueError as error:
            return replace(made, problem=str(error))
        memory, (ahead, back) = stages.memory(), stages.traffic()
        made = replace(made, tokens=self.rows * config.data.seq_length, memory=memory)
        made = replace(made, room=stages.room(), stage_layers=stages.layers(), is_even=stages.is_even)
        made = replace(made, forward_bytes=ahead, backward_bytes=back, refresh_bytes=stages.refresh_bytes())
        over, stage = made.fullest
        if over > 0:
            where = f"stage {stage}" if layout.num_stages > 1 else "a device"
            least = f"with one row a micro-batch{' and checkpointing' * recomputes} "
            problem = f"{least}{where} needs {memory[stage]}; a device has {made.room[stage] / 1e9:g} GB"
            return replace(made, problem=problem)
        pipe = stages.pipe()
        return replace(made, pipe=pipe, prediction=predict(pipe, most_passes=0))


def fastest(outcomes: Sequence[Outcome], count: int) -> list[Outcome]:
    """The best of those that fit, simulated. Of equally fast ones the one with less memory is better."""
    fitting = sorted((o for o in outcomes if o.pipe), key=_order)[:count]
    exact = [replace(o, prediction=predict(o.pipe)) for o in fitting if o.pipe]
    return sorted(exact, key=_order)


def _order(outcome: Outcome) -> tuple[float, float]:
    return round(outcome.step_seconds, 9), outcome.most_memory.total
