"""Which devices make which stage, where stages may have different numbers of replicas: the splits worth looking at.

    splits([range(1), range(1, 2), range(2, 3)], rows=24, most_stages=8)   # three machines of one device each
    # [(2, 1), (1, 2)]: beside the equal ones, 1,1,1 and 3

Devices go to stages in the order of ranks. Devices that are not alike make a stage only where all of their kinds do;
stages of one kind have fewer and fewer replicas.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice, product
from math import prod

from llm_local.plan.layouts import Replicas

MOST_SPLITS = 256
_MOST_KINDS = 8  # whose neighbours are put together in every way
_MOST_PARTS, _MOST_SEEN = 64, 4096  # of one kind


def splits(alike: Sequence[range], rows: int, most_stages: int) -> list[Replicas]:
    """The replicas of each stage, which differ; alike: devices in runs of equal ones.

    Each number divides the rows of a step. Of more than MOST_SPLITS those with few different numbers, and few stages.
    """
    found: set[Replicas] = set()
    for parts in _merged([len(run) for run in alike]):
        each = [_of_one(length, rows, 1 if is_mixed else most_stages) for length, is_mixed in parts]
        while prod(map(len, each)) > MOST_SPLITS:
            max(each, key=len).pop()
        found |= {sum(chosen, ()) for chosen in product(*each)}
    return sorted((s for s in found if len(set(s)) > 1 and len(s) <= most_stages), key=_simplicity)[:MOST_SPLITS]


def _simplicity(split: Replicas) -> tuple[int, int, Replicas]:
    return len(set(split)), len(split), split


def _merged(lengths: Sequence[int]) -> Iterator[list[tuple[int, bool]]]:
    """Runs as they are, or neighbours put together, in every way: how many devices, and whether they are mixed."""
    borders = len(lengths) - 1
    every = product((True, False), repeat=borders)
    for kept in every if borders < _MOST_KINDS else [(True,) * borders, (False,) * borders]:
        parts = [lengths[:1]]
        for keeps, length in zip(kept, lengths[1:], strict=True):
            parts = [*parts, [length]] if keeps else [*parts[:-1], [*parts[-1], length]]
        yield [(sum(part), len(part) > 1) for part in parts]


def _of_one(length: int, rows: int, most_stages: int) -> list[Replicas]:
    """Of devices of one kind."""
    counts = [count for count in range(length, 0, -1) if rows % count == 0]
    equal = [(count,) * (length // count) for count in counts if length % count == 0 and length // count <= most_stages]
    others = islice(_falling(length, counts, min(most_stages, _MOST_PARTS)), _MOST_SEEN)
    return sorted({*equal, *others}, key=_simplicity)


def _falling(length: int, counts: Sequence[int], most: int) -> Iterator[Replicas]:
    """At most so many of the counts that add up to the length, none greater than the one before."""
    if length == 0:
        yield ()
    for place, count in enumerate(counts):
        if count * most < length:
            return
        if count <= length:
            for rest in _falling(length - count, counts[place:], most - 1):
                yield (count, *rest)
