"""A run's trace as one file in Chrome's Trace Event Format: https://ui.perfetto.dev or chrome://tracing open it.

A process is a stage, a thread what its ranks do. An arrow goes from each send to the receive that it meets.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from llm_local.files import Json, writing
from llm_local.timeline.measured import RankTrace, RunTrace, kind_of
from llm_local.trace import COMPUTE, LANES, Event

_MEETS = {"RecvActivation": ("SendActivation", -1), "RecvGrad": ("SendGrad", 1)}  # the send, stages away from here


def write_chrome_trace(trace: RunTrace) -> Path:
    """Writes trace.json beside the files that it joins. Its clock starts with the first event. Raises Unwritten."""
    path = trace.folder / "trace.json"
    start = min(event.start for rank in trace.ranks for event in rank.events)
    header = trace.ranks[0].header
    error = max(rank.error_seconds for rank in trace.ranks)
    with writing(path), path.open("w") as file:
        file.write('{"traceEvents": [\n')
        for index, record in enumerate(_records(trace, start)):
            file.write(("" if index == 0 else ",\n") + json.dumps(record))
        about = {"run": header.run, "method": header.method, "clock_error_seconds": error}
        file.write(f'\n], "displayTimeUnit": "ms", "otherData": {json.dumps(about)}}}\n')
    return path


def _records(trace: RunTrace, start: float) -> Iterator[Json]:
    for rank in trace.ranks:
        yield from _names(rank)
        for event in rank.events:
            yield _bar_of(rank, event, start)
    for replica in range(trace.ranks[0].header.num_replicas):
        yield from _arrows([rank for rank in trace.ranks if rank.header.replica == replica], start)


def _names(rank: RankTrace) -> Iterator[Json]:
    stage, replica = rank.header.stage, rank.header.replica
    if replica == 0:
        yield process_name(stage)
        yield {"ph": "M", "pid": stage, "name": "process_sort_index", "args": {"sort_index": stage}}
    prefix = f"replica {replica}: " if rank.header.num_replicas > 1 else ""
    for lane in LANES:
        place = {"ph": "M", "pid": stage, "tid": _thread(rank, lane)}
        yield {**place, "name": "thread_name", "args": {"name": prefix + lane}}
        yield {**place, "name": "thread_sort_index", "args": {"sort_index": _thread(rank, lane)}}


def _thread(rank: RankTrace, lane: str) -> int:
    return rank.header.replica * len(LANES) + LANES.index(lane)


def process_name(stage: int) -> Json:
    return {"ph": "M", "pid": stage, "name": "process_name", "args": {"name": f"stage {stage}"}}


def bar(
    title: str, category: str, place: tuple[int, int], start: float, seconds: float, about: Mapping[str, Any]
) -> Json:
    """What happens at a place, stage and thread, from `start` on. about: shown beside it, but for what is None."""
    stage, thread = place
    place_and_time = {"pid": stage, "tid": thread, "ts": _microseconds(start), "dur": _microseconds(seconds)}
    arguments = {name: value for name, value in about.items() if value is not None}
    return {"name": title, "cat": category, "ph": "X", **place_and_time, "args": arguments}


def _microseconds(seconds: float) -> float:
    return round(seconds * 1e6, 1)


def _bar_of(rank: RankTrace, event: Event, start: float) -> Json:
    category = kind_of(event) if event.lane == COMPUTE else event.lane
    title = event.name if event.lane == COMPUTE else f"{event.name} {event.step}"
    about = {"step": event.step, "split": event.split, "micro_batch": event.micro_batch, "block": event.block}
    place = rank.header.stage, _thread(rank, event.lane)
    return bar(title, category, place, event.start - start, event.seconds, about)


def meetings(ranks: list[RankTrace]) -> Iterator[tuple[RankTrace, Event, RankTrace, Event]]:
    """Each send that was recorded and the receive that takes it, with their ranks: those of one replica, by stage."""
    sends = {
        (rank.header.stage, e.name, e.split, e.step, e.micro_batch): e
        for rank in ranks
        for e in rank.events
        if e.lane == COMPUTE and e.name.startswith("Send")
    }
    for rank in ranks:
        for event in rank.events:
            if event.lane == COMPUTE and event.name in _MEETS:
                name, away = _MEETS[event.name]
                stage = rank.header.stage + away
                send = sends.get((stage, name, event.split, event.step, event.micro_batch))
                if send is not None:
                    yield ranks[stage], send, rank, event


def _arrows(ranks: list[RankTrace], start: float) -> Iterator[Json]:
    def end(rank: RankTrace, event: Event, at: float) -> Json:
        return {"pid": rank.header.stage, "tid": _thread(rank, event.lane), "ts": _microseconds(at - start)}

    for sender, send, receiver, receive in meetings(ranks):
        key = f"{sender.header.replica}/{sender.header.stage}/{send.name}/{send.split}/{send.step}/{send.micro_batch}"
        flow = {"name": "link", "cat": "link", "id": key}
        yield flow | {"ph": "s", **end(sender, send, send.start)}
        yield flow | {"ph": "f", "bp": "e", **end(receiver, receive, receive.end)}
