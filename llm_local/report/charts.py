"""The curves of a page, ready for JSON: what is drawn of which records, in which colour."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from llm_local.files import Json
from llm_local.report.curves import Values, evenly, extremes, finite, short, smoothed, tokens_until
from llm_local.report.read import RunData

RAW, LINE, POINTS = "raw", "line", "points"
NUM_COLOURS, NUM_DASHES = 7, 4
TRAIN, EVAL = "train", "eval"


@dataclass(frozen=True)
class Curve:
    """kind: RAW is drawn faintly below a LINE of the same run and stage. run: its number. x: optimizer steps."""

    label: str
    kind: str
    run: int
    stage: int
    colour: int
    dash: int
    x: list[int]
    y: Values


@dataclass(frozen=True)
class Chart:
    """note: what a reader has to know of its curves."""

    id: str
    title: str
    unit: str
    note: str
    curves: list[Curve]


def _share(part: Any, whole: Any) -> float | None:
    return None if part is None or not whole else part / whole


def _scaled(name: str, factor: float = 1.0) -> Callable[[Json], float | None]:
    def value(record: Json) -> float | None:
        found = finite(record.get(name))
        return None if found is None else found * factor

    return value


def _backward_bytes(record: Json) -> float | None:
    parts = [record.get(name) for name in ("sent_gradient_bytes", "sent_refresh_bytes")]
    return None if None in parts else sum(parts) / 1e6  # type: ignore[arg-type]


def _percent_waited(record: Json) -> float | None:
    share = _share(record.get("wait_seconds"), record.get("step_seconds"))
    return None if share is None else 100 * share


# what has a chart of its own if it is ever more than 0: id, title, unit, and how it is found in a record
MEASURES: tuple[tuple[str, str, str, Callable[[Json], float | None]], ...] = (
    ("rate", "Throughput", "tokens a second", lambda r: _share(r.get("tokens"), r.get("step_seconds"))),
    ("wait", "Waiting on links", "% of the step", _percent_waited),
    ("sent", "Sent to the next stage", "MB a step", _scaled("sent_bytes", 1e-6)),
    ("back", "Sent to the stage before", "MB a step", _backward_bytes),
    ("between", "Sent between replicas", "MB a record", _scaled("sent_replica_bytes", 1e-6)),
    ("memory", "Peak memory", "GB, replica 0", _scaled("peak_memory_bytes", 1e-9)),
    ("norm", "Gradient norm", "before clipping", _scaled("grad_norm")),
    ("lr", "Learning rate", "", _scaled("lr")),
    ("save", "Held up by checkpoints", "seconds", _scaled("save_seconds")),
    ("padding", "Padding", "% of the places", _scaled("padding", 100.0)),
)


def charts_of(runs: Sequence[RunData]) -> list[Chart]:
    """The charts in which there is something to see."""
    found = [_loss(runs), *_named_sets(runs), _blocks(runs)]
    found += [_measure(runs, *measure) for measure in MEASURES]
    return [chart for chart in found if chart.curves]


def to_json(charts: Sequence[Chart]) -> list[Json]:
    return [asdict(chart) for chart in charts]


def token_axes(runs: Sequence[RunData]) -> list[dict[str, list[float]]]:
    """Of each run, tokens by step, as points of a line."""
    axes = []
    for run in runs:
        records = next((of for stage in run.stages.values() if (of := of_split(stage, TRAIN))), [])
        steps = [record["step"] for record in records]
        tokens = tokens_until(steps, [float(record.get("tokens") or 0) for record in records])
        chosen = evenly(len(steps))
        axes.append({"steps": [0, *(steps[n] for n in chosen)], "tokens": [0, *(round(tokens[n]) for n in chosen)]})
    return axes


def of_split(records: Sequence[Json], split: str) -> list[Json]:
    """Those of training, or of a validation set, each step once: the record that was written last."""
    return list({record["step"]: record for record in records if record["split"] == split}.values())


def _loss(runs: Sequence[RunData]) -> Chart:
    curves = []
    for place in _places(runs):
        train, tested = of_split(place.records, TRAIN), of_split(place.records, EVAL)
        losses = [finite(record["loss"]) for record in train]
        if len(runs) == 1:
            curves.append(place.curve("", RAW, train, losses, extremes(losses)))
        curves.append(place.curve("", LINE, train, smoothed(losses), evenly(len(losses))))
        curves.append(place.points(", validation", tested))
    note = "Lines: training, smoothed over about a fifteenth of the run" + (
        "; faint: as recorded. " if len(runs) == 1 else ". "
    )
    return Chart("loss", "Loss", "nats", f"{note}Dots: validation.", [c for c in curves if any(_known(c.y))])


def _known(values: Values) -> list[bool]:
    return [value is not None for value in values]


def _named_sets(runs: Sequence[RunData]) -> list[Chart]:
    """Of each validation set but the first, whose losses are in the loss's chart."""
    splits: dict[str, str] = {}
    for run in runs:
        for record in (record for records in run.stages.values() for record in records):
            if record["split"] not in (TRAIN, EVAL):
                splits[record["split"]] = str(record.get("name") or record["split"])
    return [
        Chart(
            f"set-{number}",
            f"Loss on {name}",
            "nats",
            "",
            [place.points("", found) for place in _places(runs) if (found := of_split(place.records, split))],
        )
        for number, (split, name) in enumerate(splits.items())
    ]


def _blocks(runs: Sequence[RunData]) -> Chart:
    """Of one run whose stages have several blocks."""
    curves: list[Curve] = []
    first = 0
    for place in _places(runs) if len(runs) == 1 else ():
        train = of_split(place.records, TRAIN)
        count = max((len(record.get("block_losses") or ()) for record in train), default=0)
        for block in range(count):
            losses = [finite((*(r.get("block_losses") or ()), *[None] * count)[block]) for r in train]
            each = _Place(place.run, place.stage, place.records, f"block {first + block}", first + block, place.stage)
            curves.append(each.curve("", LINE, train, smoothed(losses), evenly(len(losses))))
        first += count
    has_several = len(curves) > len({curve.stage for curve in curves})
    return Chart("blocks", "Loss of every block", "nats", "Smoothed.", curves if has_several else [])


def _measure(runs: Sequence[RunData], name: str, title: str, unit: str, value: Callable[[Json], float | None]) -> Chart:
    curves, peak = [], 0.0
    for place in _places(runs):
        train = of_split(place.records, TRAIN)
        values = [value(record) for record in train]
        peak = max([peak, *(v for v in values if v is not None)])
        averaged = values if name in ("lr", "memory", "save") else smoothed(values, 60)
        curves.append(place.curve("", LINE, train, averaged, evenly(len(values))))
    if name in ("sent", "back", "between"):  # the last stage has nobody to send to
        curves = [curve for curve in curves if any(curve.y)]
    return Chart(name, title, unit, "", [c for c in curves if any(_known(c.y))] if peak > 0 else [])


@dataclass(frozen=True)
class _Place:
    """A stage of a run, and how its curves are told from others."""

    run: int
    stage: int
    records: list[Json]
    label: str
    colour: int
    dash: int

    def curve(self, suffix: str, kind: str, records: Sequence[Json], values: Values, chosen: Sequence[int]) -> Curve:
        x, y = [records[n]["step"] for n in chosen], [short(values[n]) for n in chosen]
        colour, dash = self.colour % NUM_COLOURS, self.dash % NUM_DASHES
        return Curve(self.label + suffix, kind, self.run, self.stage, colour, dash, x, y)

    def points(self, suffix: str, records: Sequence[Json]) -> Curve:
        values = [finite(record["loss"]) for record in records]
        return self.curve(suffix, POINTS, records, values, extremes(values))


def _places(runs: Sequence[RunData]) -> list[_Place]:
    """A colour for each stage of one run, or for each of several runs, whose stages have dashes then."""
    found = []
    for number, run in enumerate(runs):
        for stage, records in run.stages.items():
            if len(runs) == 1:
                found.append(_Place(number, stage, records, f"stage {stage}", stage, stage))
            else:
                name = f"{run.name}, stage {stage}" if len(run.stages) > 1 else run.name
                found.append(_Place(number, stage, records, name, number, stage + number // NUM_COLOURS))
    return found
