"""The tables of a page: exits, speed, cut, data, flags and versions, as rows of text."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from llm_local.config import Config
from llm_local.files import Json
from llm_local.records import DEPTH_TOLERANCE
from llm_local.report.charts import EVAL, TRAIN, of_split
from llm_local.report.curves import finite, smoothed
from llm_local.report.read import RunData

NONE = "–"


@dataclass(frozen=True)
class Table:
    """marked: numbers of the rows that stand out. numeric: columns from this one on are numbers. note: below it."""

    id: str
    title: str
    columns: tuple[str, ...]
    rows: list[tuple[str, ...]]
    marked: tuple[int, ...] = ()
    numeric: int = 1
    note: str = ""


@dataclass(frozen=True)
class Part:
    """A stage in the picture of the cut. share: of all FLOPs."""

    name: str
    layers: str
    about: str
    share: float


def tables_of(runs: Sequence[RunData]) -> list[Table]:
    """Those that have rows."""
    tables = [_exits(runs), _speed(runs), _cut(runs), _data(runs), _flags(runs), _versions(runs)]
    return [table for table in tables if table.rows]


def headline(run: RunData) -> list[tuple[str, str]]:
    """The run in a few numbers, each with what it is."""
    last = _last(run, TRAIN)
    steps, most = max((record["step"] for record in last.values()), default=0), run.flags.get("max_steps")
    times = [_seconds(run, stage) for stage in run.stages]
    known = [seconds for seconds in times if seconds]
    tokens = next((record.get("tokens") for record in last.values()), None)
    found = [("steps", f"{steps:,}" + (f" of {most:,}" if isinstance(most, int) and most > steps else ""))]
    if known and tokens:
        found.append(("tokens a second", f"{tokens / max(known):,.0f}"))
    if kept := best_exit(run):
        stage, loss, is_whole = kept
        found.append(("validation loss", f"{loss:.4f}"))
        found.append(("keep", "the whole model" if is_whole else f"the exit of stage {stage}"))
    return found


def best_exit(run: RunData) -> tuple[int, float, bool] | None:
    """Stage and validation loss of the exit to keep, and whether it is the whole model: which it is but where an
    earlier one is clearly better."""
    losses = {stage: loss for stage, r in _last(run, EVAL).items() if (loss := finite(r["loss"])) is not None}
    if not losses:
        return None
    whole, best = len(run.facts.get("stages", run.stages)) - 1, min(losses, key=lambda stage: losses[stage])
    if whole not in run.stages:  # those of one job, which says nothing of the others
        return None
    if whole in losses and losses[whole] - losses[best] <= DEPTH_TOLERANCE:
        best = whole
    return best, losses[best], best == whole


def _last(run: RunData, split: str) -> dict[int, Json]:
    found = {stage: of_split(records, split) for stage, records in run.stages.items()}
    return {stage: records[-1] for stage, records in found.items() if records}


def _seconds(run: RunData, stage: int) -> float | None:
    times = [seconds for r in of_split(run.stages[stage], TRAIN) if (seconds := finite(r.get("step_seconds")))]
    return median(times) if times else None


def named(runs: Sequence[RunData], run: RunData, stage: int) -> str:
    return f"stage {stage}" if len(runs) == 1 else f"{run.name}, stage {stage}"


def _number(value: Any, form: str) -> str:
    found = finite(value)
    return NONE if found is None else format(found, form)


def _measures(runs: Sequence[RunData]) -> list[tuple[str, str, str]]:
    """What evaluations have beside the loss: field, title and form."""
    scores = {run.facts.get("score", "perplexity") for run in runs}
    score = scores.pop() if len(scores) == 1 else "exp(loss)"
    known = [("perplexity", score, ",.1f"), ("bits_per_byte", "bits a byte", ".3f")]
    known += [("accuracy", "accuracy", ".2%"), ("top_5_accuracy", "of 5", ".2%")]
    records = [record for run in runs for record in _last(run, EVAL).values()]
    return [each for each in known if any(record.get(each[0]) is not None for record in records)]


def _exits(runs: Sequence[RunData]) -> Table:
    rows, marked, measures = [], [], _measures(runs)
    for run in runs:
        tested, trained, kept = _last(run, EVAL), _last(run, TRAIN), best_exit(run)
        for stage, records in run.stages.items():
            found = tested.get(stage, {})
            losses = smoothed([finite(record["loss"]) for record in of_split(records, TRAIN)])
            is_kept = kept is not None and kept[0] == stage
            marked += [len(rows)] if is_kept else []
            rows.append(
                (
                    named(runs, run, stage),
                    _layers(run, stage),
                    _number(losses[-1] if losses else None, ".4f"),
                    _number(found.get("loss"), ".4f"),
                    *(_number(found.get(name), form) for name, _, form in measures),
                    f"{trained.get(stage, found).get('step', 0):,}",
                    "keep" if is_kept else "",
                )
            )
    titles = (title for _, title, _ in measures)
    columns = ("exit", "layers", "training loss", "validation loss", *titles, "step", "")
    note = f"Keep the whole model, but where an earlier exit is more than {DEPTH_TOLERANCE} nats better."
    return Table("exits", "Exits", columns, rows, tuple(marked), 2, note if marked else "")


def _layers(run: RunData, stage: int) -> str:
    """That the exit has: those of the stages before, too."""
    stages = run.facts.get("stages", [])
    return f"0–{stages[stage]['blocks'][-1][1] - 1}" if stage < len(stages) else NONE


def _speed(runs: Sequence[RunData]) -> Table:
    rows = []
    for run in runs:
        for stage, record in _last(run, TRAIN).items():
            seconds = _seconds(run, stage)
            records = of_split(run.stages[stage], TRAIN)
            waits = [wait for r in records if (wait := finite(r.get("wait_seconds"))) is not None]
            peak = max((finite(r.get("peak_memory_bytes")) or 0.0 for r in records), default=0.0)
            tokens, sent = finite(record.get("tokens")), finite(record.get("sent_bytes"))
            rows.append(
                (
                    named(runs, run, stage),
                    _number(seconds, ".3f"),
                    _number(tokens / seconds if tokens and seconds else None, ",.0f"),
                    _number(100 * median(waits) / seconds if waits and seconds else None, ".1f"),
                    _number(sent / tokens if sent is not None and tokens else None, ",.0f"),
                    _number(peak / 1e9 if peak else None, ".2f"),
                )
            )
    columns = ("", "median step, s", "tokens a second", "waits on links, %", "sent, bytes a token", "peak memory, GB")
    return Table("speed", "Speed", columns, rows)


def parts_of(run: RunData) -> list[Part]:
    """The stages side by side, as wide as what they compute."""
    stages = run.facts.get("stages", [])
    weights = [stage["flops"] or 1.0 for stage in stages]  # versions before 2026-11-29 did not always know
    return [
        Part(
            f"stage {number}",
            ", ".join(f"{a}–{b - 1}" if b - a > 1 else str(a) for a, b in stages[number]["blocks"]),
            _heads(run, number),
            weight / sum(weights),
        )
        for number, weight in enumerate(weights)
    ]


def _heads(run: RunData, stage: int) -> str:
    """'2 heads, with 1 private layer each' in short."""
    facts, is_last = run.facts["stages"][stage], stage == len(run.facts["stages"]) - 1
    heads = len(facts["blocks"]) if run.facts["has_local_heads"] else int(is_last)
    private = sum(facts["private_layers"])
    text = f"{heads} head{'' if heads == 1 else 's'}" if heads else "no head"
    text += ", frozen" if facts.get("frozen") else ""
    return f"{text} with {private} private layers" if private else text


def _cut(runs: Sequence[RunData]) -> Table:
    rows = []
    for run in runs:
        facts = run.facts
        for number, stage in enumerate(facts.get("stages", [])):
            layers = sum(b - a for a, b in stage["blocks"])
            parameters = facts["layer_parameters"] * (layers + sum(stage["private_layers"]))
            is_last = number == len(facts["stages"]) - 1
            heads = len(stage["blocks"]) if facts["has_local_heads"] else int(is_last)
            parameters += heads * facts["head_parameters"]
            rows.append(
                (
                    named(runs, run, number),
                    parts_of(run)[number].layers,
                    _heads(run, number),
                    str(stage["replicas"]),
                    f"{parameters / 1e6:,.2f}",
                    _number(stage["flops"] and stage["flops"] / 1e6, ",.1f"),
                )
            )
    columns = ("", "layers by block", "heads", "replicas", "parameters, million", "training MFLOPs a token")
    note = "Parameters are those of layers and heads; a shared or tied matrix counts at each head."
    return Table("cut", "The cut", columns, rows, (), 3, note)


def _data(runs: Sequence[RunData]) -> Table:
    rows = []
    for run in runs:
        sources = run.facts.get("sources", [])
        whole = sum(source["weight"] for source in sources) or 1.0
        for source in sources:
            packed, share = source["packed"], f"{100 * source['weight'] / whole:.1f}"
            known = (NONE,) * 6
            if packed:
                cut = 100 * packed["cut"] / max(1, packed["documents"])
                counts = (f"{packed[name]:,}" for name in ("documents", "tokens", "rows"))
                known = (packed["packing"], *counts, f"{100 * source['padding']:.1f}", f"{cut:.1f}")
            name = source["name"] if len(runs) == 1 else f"{run.name}: {source['name']}"
            rows.append((name, share, *known))
        for name, (documents, tokens) in run.facts.get("counts", {}).items():
            if name.endswith("(validation)"):
                rows.append((name, "", "", f"{documents:,}", f"{tokens:,}", "", "", ""))
    columns = ("source", "share, %", "packing", "documents", "tokens", "rows", "padding, %", "documents cut, %")
    return Table("data", "Data", columns, rows)


def _flags(runs: Sequence[RunData]) -> Table:
    """What differs from the default; of several runs, what differs between them."""
    default = Config().flat()
    names = list(dict.fromkeys(name for run in runs for name in run.flags))
    if len(runs) == 1:
        flags = runs[0].flags
        rows = [(n, _text(flags[n]), _text(default.get(n))) for n in names if flags[n] != default.get(n)]
        note = f"All {len(flags)} are in run.yaml."
        return Table("flags", "Flags that differ from the default", ("flag", "this run", "default"), rows, (), 9, note)
    rows = [
        (n, *(_text(run.flags.get(n)) for run in runs))
        for n in names
        if len({_text(run.flags.get(n)) for run in runs}) > 1
    ]
    return Table("flags", "Flags that differ between the runs", ("flag", *(r.name for r in runs)), rows, (), 99)


def _text(value: object) -> str:
    return NONE if value is None else str(value)


def _versions(runs: Sequence[RunData]) -> Table:
    names = list(dict.fromkeys(name for run in runs for name in run.facts.get("versions", {})))
    rows = [(name, *(run.facts.get("versions", {}).get(name, NONE) for run in runs)) for name in names]
    return Table("versions", "Versions", ("", *(run.name for run in runs)), rows, (), 99)


def alarms(run: RunData) -> list[str]:
    """What a reader should know before anything else, a line each."""
    found = [f"the run ended before its time: {run.facts['ended']}"] if "ended" in run.facts else []
    for stage, records in run.stages.items():
        bad = next((r for r in records if not math.isfinite(r["loss"])), None)
        if bad is not None:
            found.append(f"the loss of stage {stage} is not finite ({bad['loss']}) at step {bad['step']:,}")
    return found + run.facts.get("warnings", [])
