"""A benchmark's results as a page in the style of the reports: its text, and a bar with its spread at each figure."""

from __future__ import annotations

import base64
import re
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

from markdown_it import MarkdownIt
from markupsafe import Markup

from llm_local.report.page import framed, template

# 1.07, 12.5%, or with its spread: 1.07 (1.05–1.10)
_FIGURE = re.compile(r"([+-]?[\d.,]*\d)( ?%)?(?: \(([+-]?[\d.]+)–([+-]?[\d.]+)\))?")


@dataclass(frozen=True)
class Cell:
    """width, low, high: of the bar and its spread, in % of the column's largest; low and high are equal without one."""

    text: str
    width: float = 0.0
    low: float = 0.0
    high: float = 0.0


def page_of(markdown: Path) -> str:
    """NAME.md of a benchmark as one HTML file. Pictures beside it come along."""
    text = re.sub(r"\((\w+\.png)\)", lambda found: f"({_inline(markdown.parent / found[1])})", markdown.read_text())
    parts = []
    for is_table, lines in groupby(text.splitlines(), key=lambda line: line.startswith("|")):
        part = list(lines)
        parts.append(_table(part) if is_table else MarkdownIt().render("\n".join(part)))
    title = text.splitlines()[0].removeprefix("# ")
    return framed(title, Markup("".join(parts)))


def _inline(picture: Path) -> str:
    return "data:image/png;base64," + base64.b64encode(picture.read_bytes()).decode()


def _table(lines: list[str]) -> str:
    columns, _, *rows = ([cell.strip() for cell in line.strip("|").split("|")] for line in lines)
    settings, *others = ([*column] for column in zip(*rows, strict=True))
    by_column = [[Cell(text) for text in settings], *map(_cells, others)]
    return template("figures.html").render(
        columns=columns,
        rows=[*zip(*by_column, strict=True)],
        numeric=[any(cell.width for cell in column) for column in by_column],
        markdown=lambda text: Markup(MarkdownIt().renderInline(text)),
    )


def _cells(texts: list[str]) -> list[Cell]:
    """Of one column; with bars where all that it has are figures."""
    found = [_FIGURE.fullmatch(text) for text in texts]
    if not any(found) or any(text and not one for text, one in zip(texts, found, strict=True)):
        return [Cell(text) for text in texts]
    values = [[abs(_number(one[n] or one[1])) for n in (1, 3, 4)] if one else [0.0] * 3 for one in found]
    largest = max(max(value) for value in values) or 1.0
    scaled = ([round(100 * number / largest, 1) for number in sorted(value)] for value in values)
    return [Cell(text, middle, low, high) for text, (low, middle, high) in zip(texts, scaled, strict=True)]


def _number(text: str) -> float:
    return float(text.replace(",", ""))
