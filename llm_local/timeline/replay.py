"""A trace's own instructions, simulated: what its steps would be if every pass took its stage's mean time.

What the measured timeline has beyond this one is no matter of the schedule: slow links, Python, uneven passes.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from itertools import pairwise
from statistics import fmean
from typing import Any

from deepspeed.runtime.pipe import schedule as pipe

from llm_local.simulator.simulate import Durations, simulate
from llm_local.timeline.measured import (
    BACKWARD,
    EVAL,
    FORWARD,
    FROM_ABOVE,
    OPTIMIZER,
    TRAIN,
    Bar,
    RankTrace,
    Row,
    RunTrace,
)
from llm_local.trace import BESIDE_SCHEDULE, COMPUTE, RECEIVE

_KINDS = {"F": FORWARD, "B": BACKWARD, "G": FROM_ABOVE, "O": OPTIMIZER}
_FILLING_STEPS = 50  # simulated before those that are wanted, so that a stage is as far ahead as it comes to be


def programs(rank: RankTrace) -> dict[int, list[pipe.PipeInstruction]]:
    """The instructions of each training step, as the rank followed them."""
    found: dict[int, list[pipe.PipeInstruction]] = defaultdict(list)
    for event in rank.events:
        if event.lane == COMPUTE and event.split == TRAIN and event.name not in BESIDE_SCHEDULE:
            options: dict[str, Any] = {} if event.block is None else {"block": event.block}
            options |= {"from_above": True} if event.from_above else {}
            arguments = () if event.micro_batch is None else (0,)
            found[event.step].append(getattr(pipe, event.name)(*arguments, **options))
    return found


def durations(trace: RunTrace, stage: int, steps: Iterable[int]) -> Durations:
    """What a pass and an optimizer step of the stage took on average, and a packet of it from its header to its end."""
    chosen, took, packets = set(steps), defaultdict(list), []
    for rank in trace.ranks:
        for event in rank.events:
            if event.step not in chosen:
                continue
            if event.lane == RECEIVE and event.source == stage and event.split != EVAL:
                packets.append(event.seconds)
            elif event.lane == COMPUTE and event.split == TRAIN and rank.header.stage == stage:
                took[event.name].append(event.seconds)
    reduce = [took[name] for name in ("ReduceGrads", "ReduceTiedGrads", "OptimizerStep") if took[name]]
    return Durations(
        forward=fmean(took["ForwardPass"]),
        backward=fmean(took["BackwardPass"] or took["ForwardPass"]),  # a frozen stage has none
        optimizer=sum(fmean(seconds) for seconds in reduce),
        link=fmean(packets) if packets else 0.0,
    )


def simulated(trace: RunTrace, steps: Sequence[int]) -> list[Row]:
    """A row for each stage: the instructions that were recorded, with the mean durations of each stage's passes."""
    header, by_stage = trace.ranks[0].header, trace.ranks[:: trace.ranks[0].header.num_replicas]
    before = [step for step in trace.steps if step < steps[0]][-_FILLING_STEPS:]
    order, program = [*before, *steps], [programs(rank) for rank in by_stage]
    found = simulate(
        lambda stage: [program[stage][step] for step in order],
        header.num_stages,
        durations=[durations(trace, stage, steps) for stage in range(header.num_stages)],
        max_packets_in_flight=header.max_packets_in_flight,
    )
    rows = []
    for stage, spans in enumerate(found.spans):
        bars, ends, num_passes = [], [0.0], Counter()
        for span in spans:
            step, micro_batch = order[len(ends) - 1], None
            if span.kind == "O":
                ends.append(span.end)
            else:
                micro_batch = num_passes[step, span.kind, span.block]
                num_passes[step, span.kind, span.block] += 1
            bars.append(Bar(_KINDS[span.kind], span.start, span.end, step, micro_batch, span.block))
        windows = dict(zip(order, pairwise(ends), strict=True))
        shown = tuple(bar for bar in bars if bar.step >= steps[0])
        rows.append(Row(stage, 0, shown, {step: windows[step] for step in steps}))
    return rows
