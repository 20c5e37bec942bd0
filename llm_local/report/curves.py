"""Curves of a run, made short enough for a page and no less true: pure functions of numbers."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from itertools import accumulate, pairwise

Values = list[float | None]
MOST_POINTS = 300
WINDOWS = 15  # a curve is smoothed over a part of its values, one in so many
_DIGITS = 5


def finite(value: object) -> float | None:
    """The number, if it is one."""
    return float(value) if isinstance(value, (int, float)) and math.isfinite(value) else None


def smoothed(values: Sequence[float | None], windows: float = WINDOWS) -> Values:
    """Exponential moving average over about a fifteenth of the values, without a bias at the start; None stays None."""
    keep = 1.0 - 1.0 / max(1.0, len(values) / windows)
    averages: Values = []
    total = weight = 0.0
    for value in values:
        if value is None:
            averages.append(None)
            continue
        total, weight = keep * total + value, keep * weight + 1.0
        averages.append(total / weight)
    return averages


def extremes(values: Sequence[float | None], most: int = MOST_POINTS) -> list[int]:
    """Indices of at most 3 · most values that look like all: of each bucket the lowest, the highest, and a gap."""
    if len(values) <= 2 * most:
        return list(range(len(values)))
    found: set[int] = {0, len(values) - 1}
    for bucket in _buckets(len(values), most):
        known = [n for n in bucket if values[n] is not None]
        found |= {next(n for n in bucket if values[n] is None)} if len(known) < len(bucket) else set()
        if known:
            found |= {min(known, key=lambda n: values[n] or 0.0), max(known, key=lambda n: values[n] or 0.0)}
    return sorted(found)


def evenly(count: int, most: int = MOST_POINTS) -> list[int]:
    """Indices of at most `most` of so many values, the last of each bucket, and of the first one."""
    return sorted({0, *(bucket[-1] for bucket in _buckets(count, most))}) if count else []


def _buckets(count: int, most: int) -> Iterable[range]:
    ends = [round(n * count / most) for n in range(most + 1)] if count > most else range(count + 1)
    return (range(a, b) for a, b in pairwise(ends))


def short(value: float | None) -> float | None:
    """With as many digits as a chart can show."""
    return None if value is None else float(f"{value:.{_DIGITS}g}")


def tokens_until(steps: Sequence[int], tokens: Sequence[float]) -> list[float]:
    """Tokens that were trained on up to each recorded step: the steps between two records had as many as the later."""
    passed = [after - before for before, after in pairwise([0, *steps])]
    return list(accumulate(count * each for count, each in zip(passed, tokens, strict=True)))
