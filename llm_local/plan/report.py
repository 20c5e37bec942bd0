"""What a plan says: as text, as JSON, and as a trace of the simulated steps for Chrome's tracing page or Perfetto."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from math import lcm
from typing import Any

from llm_local.costs import head_in_layers
from llm_local.plan.divisions import FLAGS
from llm_local.plan.layouts import Outcome, Planner
from llm_local.plan.machine import Machine
from llm_local.plan.stages import Candidate
from llm_local.plan.times import MOST_PASSES, Pipe
from llm_local.simulator.simulate import Timeline, picture
from llm_local.timeline.chrome_trace import bar, process_name

COLUMNS = ("layout", "micro-batches", "a step", "tokens/s", "idle", "memory", "link, B/token")
_NAMES = {"F": "forward", "B": "backward", "G": "backward from above", "W": "weight gradients", "O": "optimizer"}
MOST_REFUSALS = 12


@dataclass(frozen=True)
class Plan:
    """best: local layouts, fastest first. peers: the fastest of each backpropagation. refused: what does not fit."""

    best: tuple[Outcome, ...]
    peers: tuple[Outcome, ...]
    refused: tuple[Outcome, ...]


def text(planner: Planner, plan: Plan) -> str:
    """All that a person wants to know, in lines."""
    parts = [_model(planner), _ranking("Local layouts, fastest first:", plan.best, "No local layout fits.")]
    parts.append(_ranking("Backpropagation, the fastest layout of each kind:", plan.peers, "No backpropagation fits."))
    parts.append(verdict(plan))
    if plan.best:
        parts.append(f"The best local layout, as flags of pretrain:\n  {flags(planner, plan.best[0])}")
    if plan.refused:
        parts.append("\n".join(["Does not fit:", *_refusals(plan.refused)]))
    return "\n\n".join(parts)


def head_share(planner: Planner) -> float:
    """FLOPs of a head in those of a layer."""
    _, layer, head = planner.anatomy.products
    return head / layer if layer else head_in_layers(planner.sizes.vocab_size, planner.sizes.hidden_size)


def _model(planner: Planner) -> str:
    sizes, machine, config = planner.sizes, planner.machine, planner.config
    share, of_images = head_share(planner), bool(planner.anatomy.row_shape)
    by = "" if of_images else "V/(12h) = "
    rows = f"{planner.rows:,} {'images' if of_images else 'rows'} of {config.data.seq_length:,} tokens"
    return "\n".join(
        [
            f"{sizes.model_type}, {sizes.num_parameters / 1e6:,.0f}M parameters, {sizes.num_layers} layers, "
            f"hidden size {sizes.hidden_size}, {'classes' if of_images else 'vocabulary'} {sizes.vocab_size:,}",
            f"a head costs as much as {by}{share:.2f} layers: each block beside the last adds "
            f"{share / sizes.num_layers:.1%} to the model's layers",
            f"{_devices(machine)}; {machine.link_gbps:g} Gb/s between hosts; a step is {rows}",
        ]
    )


def _devices(machine: Machine) -> str:
    """'8 devices of 80 GB at 100 TFLOP/s, 4 a host', and of other kinds in the order of ranks."""
    kinds = [(len(run), machine.group(run)) for run in machine.alike()]
    each = [f"{count} of {kind.memory_bytes / 1e9:g} GB at {kind.flops / 1e12:g} TFLOP/s" for count, kind in kinds]
    each[0] = each[0].replace(" of", " devices of" if len(kinds) == 1 or kinds[0][0] > 1 else " device of", 1)
    hosts = machine.devices_per_host
    return f"{', '.join(each)}; {' and '.join(map(str, hosts)) if isinstance(hosts, tuple) else hosts} a host"


def _ranking(title: str, outcomes: Sequence[Outcome], nothing: str) -> str:
    if not outcomes:
        return nothing
    rows = [COLUMNS, *(_row(outcome) for outcome in outcomes)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows]
    notes = [f"~ estimated by formula: the step has more than {MOST_PASSES:,} passes"] if "~" in "".join(lines) else []
    return "\n".join([title, *(f"  {line}" for line in [*lines, *notes])])


def _refusals(refused: Sequence[Outcome]) -> list[str]:
    """Those that come nearest first; layouts with one reason in one line."""
    reasons: dict[str, list[Outcome]] = {}
    for outcome in sorted(refused, key=lambda o: o.most_total or float("inf")):
        reasons.setdefault(outcome.problem, []).append(outcome)
    lines = []
    for problem, outcomes in list(reasons.items())[:MOST_REFUSALS]:
        others = f" and {len(outcomes) - 1} more" if len(outcomes) > 1 else ""
        lines.append(f"  {outcomes[0].layout}{others}: {problem}")
    hidden = len(reasons) - len(lines)
    return lines + ([f"  and {hidden} more; --json has them all"] if hidden else [])


def _row(outcome: Outcome) -> tuple[str, ...]:
    assert outcome.prediction is not None
    about = "" if outcome.prediction.timeline else "~"
    idle = outcome.prediction.idle
    return (
        str(outcome.layout),
        f"{outcome.micro_batches:,} x {outcome.rows} rows{', recomputing' * outcome.recomputes}",
        f"{about}{outcome.step_seconds:.4g} s",
        f"{outcome.tokens_per_second:,.0f}",
        f"{sum(idle) / len(idle):.1%}",
        f"{outcome.most_memory.total / 1e9:.1f} GB",
        f"{outcome.forward_bytes + outcome.backward_bytes:,.0f}",
    )


def verdict(plan: Plan) -> str:
    """Whether a person is better off with plain data parallelism, which is the simplest, or another backpropagation."""
    local = plan.best[0] if plan.best else None
    plain = next((o for o in plan.peers if o.layout.method == "data_parallel"), None)
    peer = min(plan.peers, key=lambda o: o.step_seconds, default=None)
    if local is None and peer is None:
        nearest = min(plan.refused, key=lambda o: o.most_total or float("inf"), default=None)
        why = f" Nearest is {nearest.layout}: {nearest.problem}." if nearest else ""
        return f"Nothing fits: take more devices, or more memory on each, or a shorter seq_length.{why}"
    if local is None:
        assert peer is not None
        return f"No local layout fits; use backpropagation ({peer.layout})."
    if plain is not None and plain.step_seconds <= local.step_seconds:
        times = local.step_seconds / plain.step_seconds
        return (
            f"Data-parallel backpropagation would be {_times(times)}: {plain.step_seconds:.4g} s a step "
            f"({plain.layout}) against {local.step_seconds:.4g} s. Use it: a step of it also learns more."
        )
    lines = []
    if plain is None:
        lines.append("Data-parallel backpropagation does not fit.")
    else:
        times = plain.step_seconds / local.step_seconds
        lines.append(f"The best local layout is {times:.2f} times as fast as data-parallel backpropagation.")
    if peer is not None and peer is not plain:
        times = peer.step_seconds / local.step_seconds
        compared = f"{times:.2f} times as fast as" if times >= 1 else f"slower, by {1 / times:.2f} times, than"
        lines.append(f"It is {compared} the best pipeline of backpropagation ({peer.layout}).")
    lines.append("A step of local learning is not worth one of backpropagation: see when not to use it in the README.")
    return " ".join(lines)


def flags(planner: Planner, outcome: Outcome) -> str:
    """Of a run in this local layout, beside those that the plan was given."""
    layout, each = outcome.layout, outcome.layout.replicas
    found = {"method": layout.method, "head": layout.head, "num_stages": layout.num_stages}
    if layout.stage_replicas:
        found["stage_replicas"] = ",".join(map(str, each))
    found |= {name: size for name in FLAGS if (size := getattr(layout, name)) > 1}
    if not outcome.is_even:  # else as the run itself cuts
        found["stage_layers"] = ",".join(map(str, outcome.stage_layers))
    found |= {"per_device_train_batch_size": outcome.rows, "gradient_accumulation_steps": outcome.micro_batches}
    fitting, batches = lcm(*each) // max(each), planner.config.train.eval_batches
    if batches % fitting:  # replicas share those of an evaluation, too
        found["eval_batches"] = -(-batches // fitting) * fitting
    found |= {"gradient_checkpointing": "true"} if outcome.recomputes else {}
    is_sharded = layout.zero > 0 or max(each) * layout.division.rows > 1
    found |= {"deepspeed": f"configs/ds/zero{layout.zero}.json"} if is_sharded else {}
    return " ".join(f"--{name} {value}" for name, value in found.items())


def _times(times: float) -> str:
    return "as fast" if times < 1.005 else f"{times:.2f} times as fast"


def as_json(planner: Planner, plan: Plan) -> dict[str, Any]:
    """Everything in numbers: seconds, bytes, shares; the best layouts stage by stage."""
    return {
        "model": {**asdict(planner.sizes), "parameters": planner.sizes.num_parameters},
        "head_in_layers": head_share(planner),
        "machine": asdict(planner.machine),
        "rows": planner.rows,
        "seq_length": planner.config.data.seq_length,
        "local": [{**_outcome(o), "flags": flags(planner, o)} for o in plan.best],
        "backpropagation": [_outcome(o) for o in plan.peers],
        "refused": [{**_layout(o.layout), "problem": o.problem} for o in plan.refused],
        "verdict": verdict(plan),
    }


def _layout(layout: Candidate) -> dict[str, Any]:
    return {**asdict(layout), "stage_replicas": list(layout.replicas)}


def _outcome(outcome: Outcome) -> dict[str, Any]:
    assert outcome.prediction is not None
    return {
        **_layout(outcome.layout),
        "stage_layers": list(outcome.stage_layers),
        "gradient_accumulation_steps": outcome.micro_batches,
        "per_device_train_batch_size": outcome.rows,
        "gradient_checkpointing": outcome.recomputes,
        "step_seconds": outcome.step_seconds,
        "is_simulated": outcome.prediction.timeline is not None,
        "tokens_per_second": outcome.tokens_per_second,
        "idle": list(outcome.prediction.idle),
        "memory_bytes": [{**asdict(memory), "total": memory.total} for memory in outcome.memory],
        "forward_bytes_per_token": outcome.forward_bytes,
        "backward_bytes_per_token": outcome.backward_bytes,
        "step_bytes_per_boundary": outcome.tokens * (outcome.forward_bytes + outcome.backward_bytes)
        + outcome.refresh_bytes,
    }


def short(pipe: Pipe, num_steps: int = 2) -> tuple[Timeline, int]:
    """A timeline of a few steps, and of how many micro-batches a step: fewer where all would be too many to look at."""
    fewer = pipe
    shared = lcm(*fewer.replicas_of)
    while fewer.num_passes * num_steps > MOST_PASSES and fewer.micro_batches % (2 * shared) == 0:
        fewer = Pipe(**{**vars(fewer), "micro_batches": fewer.micro_batches // 2})
    return fewer.simulate(num_steps), fewer.micro_batches


def draw(pipe: Pipe, timeline: Timeline, width: int = 120) -> str:
    """A picture of the pipe about so many characters wide; a line for each replica that is simulated."""
    lines = picture(timeline, unit=timeline.makespan / width).splitlines()
    if pipe.replicas:
        lines = [
            f"stage {k}, replica {r} |{line.partition('|')[2]}" for line, (k, r) in zip(lines, pipe.places, strict=True)
        ]
    return "\n".join(lines)


def trace_events(pipe: Pipe, timeline: Timeline) -> dict[str, Any]:
    """In Chrome's Trace Event Format: a process for each stage of the pipe, with a thread for each replica."""
    events: list[dict[str, Any]] = []
    for (stage, replica), spans in zip(pipe.places, timeline.spans, strict=True):
        events += [process_name(stage)] if replica == 0 else []
        for span in spans:
            kind, number = _NAMES[span.kind], "" if span.micro_batch is None else f" {span.micro_batch}"
            about = {"step": span.step, "micro_batch": span.micro_batch, "block": span.block}
            events.append(bar(f"{kind}{number}", kind, (stage, replica), span.start, span.end - span.start, about))
    return {"traceEvents": events, "displayTimeUnit": "ms"}
