"""Draws a run's steps as they were and, below on the same scale, as they were simulated."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llm_local.screen import pyplot_without_screen
from llm_local.timeline.measured import (
    BACKWARD,
    FORWARD,
    FROM_ABOVE,
    LOAD,
    OPTIMIZER,
    SAVE,
    TRAIN,
    WAIT,
    Bar,
    Row,
    stage_times,
)

COLOURS = {
    FORWARD: "#4477aa",
    BACKWARD: "#228833",
    FROM_ABOVE: "#ccbb44",
    OPTIMIZER: "#aa3377",
    LOAD: "#bbbbbb",
    WAIT: "#f7d9d3",
    SAVE: "#222222",
}
NAMES = {
    FORWARD: "forward",
    BACKWARD: "backward",
    FROM_ABOVE: "backward, from above",
    OPTIMIZER: "optimizer",
    LOAD: "load",
    WAIT: "waits for the link",
    SAVE: "saves a checkpoint",
}
PACKET, IDLE = "#ee6677", "#f4f4f4"
LIGHTEN = (0.0, 0.32, 0.16, 0.48)  # towards white, by block: neighbours differ
BAR, STRIP = 0.62, 0.1  # heights, of a row's 1
MOST_ROWS = 32
WIDTH_INCHES, LABEL_INCHES, DIGIT_INCHES = 15.0, 3.2, 0.11


@dataclass(frozen=True)
class Panel:
    title: str
    rows: Sequence[Row]


def draw_timeline(panels: Sequence[Panel], title: str, output: Path) -> None:
    """Writes the picture, in the format that the file's name ends in: a row for each rank, time from left to right."""
    pyplot = pyplot_without_screen()

    shown = [panel.rows[:MOST_ROWS] for panel in panels]
    heights = [len(rows) + 0.9 for rows in shown]
    figure, axes = pyplot.subplots(
        len(panels),
        1,
        squeeze=False,
        sharex=True,
        figsize=(WIDTH_INCHES, 1.3 + 0.62 * sum(heights)),
        gridspec_kw={"height_ratios": heights},
        layout="constrained",
    )
    starts = [min(start for row in rows for start, _ in row.steps.values()) for rows in shown]
    ends = [max(end for row in rows for _, end in row.steps.values()) for rows in shown]
    length = max(end - start for start, end in zip(starts, ends, strict=True))
    for axis, panel, rows, start in zip(axes[:, 0], panels, shown, starts, strict=True):
        _draw_panel(axis, panel, rows, start, length)
    axes[-1, 0].set_xlabel("milliseconds")
    figure.suptitle(title, x=0.01, ha="left", fontsize=13, fontweight="bold")
    _legend(figure, [row for rows in shown for row in rows])
    figure.savefig(output, dpi=130)
    pyplot.close(figure)


def _draw_panel(axis: Any, panel: Panel, rows: Sequence[Row], start: float, length: float) -> None:
    several = any(row.replica for row in panel.rows)
    times = {time.stage: time for time in stage_times(panel.rows)}
    for place, row in enumerate(rows):
        _draw_row(axis, row, place, start, length)
        time = times[row.stage]
        numbers = f"bubble {time.bubble:.1%}"
        if time.wait_seconds:
            numbers += f"\nlink wait {time.wait_share:.1%}"
        axis.text(1.008, place, numbers, transform=axis.get_yaxis_transform(), va="center", fontsize=9)
    more = f"   (the first {len(rows)} of {len(panel.rows)} ranks)" if len(rows) < len(panel.rows) else ""
    axis.set_title(panel.title + more, loc="left", fontsize=10.5)
    axis.set_yticks(range(len(rows)))
    axis.set_yticklabels([f"stage {r.stage}" + (f", replica {r.replica}" if several else "") for r in rows])
    axis.set_ylim(len(rows) - 0.4, -0.75)
    axis.set_xlim(0, 1000 * length)
    axis.tick_params(axis="y", length=0)
    for side in ("top", "right", "left"):
        axis.spines[side].set_visible(False)


def _draw_row(axis: Any, row: Row, place: int, start: float, length: float) -> None:
    low = place - BAR / 2
    for number, (first, last) in row.steps.items():
        left = 1000 * (first - start)
        axis.broken_barh([(left, 1000 * (last - first))], (low, BAR), color=IDLE, zorder=0)
        axis.plot([left, left], [low - 0.12, low + BAR], color="black", linewidth=0.8, zorder=4)
        axis.text(left, low - 0.05, f" step {number}", fontsize=7.5, color="#444444", va="bottom")
    groups: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for bar in row.bars:
        groups[colour_of(bar)].append((1000 * (bar.start - start), 1000 * (bar.end - bar.start)))
    for colour, spans in groups.items():
        axis.broken_barh(spans, (low, BAR), facecolor=colour, edgecolor="white", linewidth=0.3, zorder=2)
    packets = [(1000 * (first - start), 1000 * (last - first)) for first, last in row.packets]
    axis.broken_barh(packets, (low + BAR + 0.03, STRIP), color=PACKET, zorder=2)
    _number(axis, row.bars, place, start, length)


def _number(axis: Any, bars: Iterable[Bar], place: int, start: float, length: float) -> None:
    """Writes the micro-batch into each pass that is wide enough for it."""
    inches = (WIDTH_INCHES - LABEL_INCHES) / length
    for bar in bars:
        text = "" if bar.micro_batch is None or bar.kind in (WAIT, LOAD) else str(bar.micro_batch)
        if text and (bar.end - bar.start) * inches > DIGIT_INCHES * len(text):
            middle = 1000 * ((bar.start + bar.end) / 2 - start)
            style: dict[str, Any] = {"ha": "center", "va": "center", "fontsize": 8, "clip_on": True, "zorder": 5}
            axis.text(middle, place, text, color=_ink(colour_of(bar)), **style)


def colour_of(bar: Bar) -> str:
    """By kind; the blocks of a stage in shades of it, and what belongs to no training step paler still."""
    from matplotlib.colors import to_hex, to_rgb

    towards_white = 0.6 if bar.split != TRAIN else LIGHTEN[(bar.block or 0) % len(LIGHTEN)]
    red, green, blue = (part + (1 - part) * towards_white for part in to_rgb(COLOURS[bar.kind]))
    return to_hex((red, green, blue))


def _ink(colour: str) -> str:
    from matplotlib.colors import to_rgb

    red, green, blue = to_rgb(colour)
    return "white" if 0.3 * red + 0.59 * green + 0.11 * blue < 0.58 else "black"


def _legend(figure: Any, rows: Sequence[Row]) -> None:
    """Of what is there; where stages have several blocks, their shades as well."""
    from matplotlib.patches import Patch

    bars = [bar for row in rows for bar in row.bars]
    kinds = {bar.kind for bar in bars if bar.split == TRAIN}
    entries = [Patch(color=COLOURS[kind], label=NAMES[kind]) for kind in COLOURS if kind in kinds]
    if any(row.packets for row in rows):
        entries.append(Patch(color=PACKET, label="receives, in a thread"))
    if any(bar.split not in (TRAIN, SAVE) for bar in bars):
        entries.append(Patch(color=colour_of(Bar(FORWARD, 0, 0, 0, split="")), label="evaluation"))
    if any(bar.kind == SAVE for bar in bars):
        entries.append(Patch(color=colour_of(Bar(SAVE, 0, 0, 0, split=SAVE)), label=NAMES[SAVE]))
    num_blocks = 1 + max((bar.block or 0 for bar in bars), default=0)
    entries.append(Patch(facecolor=IDLE, edgecolor="#cccccc", label="idle"))
    if num_blocks > 1:
        for block in range(min(num_blocks, len(LIGHTEN))):
            shade = colour_of(Bar(FORWARD, 0, 0, 0, block=block))
            entries.append(Patch(color=shade, label=f"block {block} of a stage"))
    figure.legend(handles=entries, loc="outside lower left", ncols=min(len(entries), 8), frameon=False, fontsize=9)
