"""Records when a rank runs each instruction, on one clock for all ranks: --trace.

    OUTPUT/trace/stage-00-replica-00.jsonl     a header, a line for each event, and the last reading of the clock
    OUTPUT/trace/trace.json                    all of them joined, for Perfetto and chrome://tracing

Times in a rank's file are those of its own clock. A reading says what to add for rank 0's; there is one in the header
and one in the last line, and between them the difference is a straight line (timeline/measured.py).
"""

from __future__ import annotations

import json
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Protocol, TextIO

from llm_local.files import writing

FORMAT = 1
FOLDER = "trace"
STEP, COMPUTE, RECEIVE, REFRESH = LANES = ("step", "compute", "receive", "refresh")
REFRESH_WAIT, OUTER_STEP = BESIDE_SCHEDULE = ("RefreshHead", "OuterStep")
BUFFERED_EVENTS = 1000
ROUNDS = 20


class Mail(Protocol):
    """What the clocks are compared through; a World is one."""

    def publish(self, key: str, value: str) -> None: ...

    def fetch(self, key: str, seconds: float, what: str) -> str: ...


@dataclass(frozen=True)
class Reading:
    """What to add to a rank's clock, when it shows `at`, for that of rank 0; at most error_seconds off."""

    at: float
    offset_seconds: float
    error_seconds: float


@dataclass(frozen=True)
class Event:
    """Something that took a rank from start to end, in seconds of its own clock.

    lane: STEP, a whole step, evaluation or checkpoint; COMPUTE, what the training's thread does, one instruction after
    the other; RECEIVE and REFRESH, a packet from its header to its last byte, in a thread beside it. split, step: what
    it belongs to. source: the stage that a packet is from.
    """

    lane: str
    name: str
    start: float
    end: float
    split: str = ""
    step: int = 0
    micro_batch: int | None = None
    block: int | None = None
    from_above: bool = False
    source: int | None = None

    @property
    def seconds(self) -> float:
        return self.end - self.start


_DEFAULTS = {field.name: field.default for field in fields(Event)}


@dataclass(frozen=True)
class TraceHeader:
    """Whose events follow. run: the same in all files of a run. max_packets_in_flight: None where nothing bounds it."""

    run: str
    stage: int
    replica: int
    num_stages: int
    num_replicas: int
    method: str
    max_packets_in_flight: int | None
    device: str

    @property
    def file_name(self) -> str:
        return trace_file(self.stage, self.replica)


def trace_file(stage: int, replica: int) -> str:
    return f"stage-{stage:02d}-replica-{replica:02d}.jsonl"


class Tracer:
    """Writes one rank's file. Events of several threads are kept in memory until a step ends with enough of them."""

    def __init__(self, folder: Path, header: TraceHeader, finish_work: Callable[[], None] | None):
        """finish_work: waits for the device, where instructions return before their work is done."""
        self.header = header
        self.path = folder / FOLDER / header.file_name
        self._finish_work = finish_work
        self._events: deque[Event] = deque()
        self._file: TextIO | None = None
        self._closed = False
        self._split, self._step = "", 0
        self._num_done: Counter[tuple[str, int | None, bool]] = Counter()

    def start(self, reading: Reading) -> None:
        """Writes the header. Raises Unwritten, as everything that writes."""
        self._write({"llm_local_trace": FORMAT, **asdict(self.header), "clock": asdict(reading)})

    @contextmanager
    def batch(self, split: str, step: int) -> Iterator[None]:
        """A step, an evaluation or a checkpoint: what is recorded meanwhile belongs to it."""
        self._split, self._step = split, step
        self._num_done.clear()
        start = time.perf_counter()
        yield
        self.record(Event(STEP, split, start, time.perf_counter(), split, step))
        if len(self._events) >= BUFFERED_EVENTS:
            self.flush()

    def wrap(self, instruction_map: Mapping[type, Callable[..., None]]) -> dict[type, Callable[..., None]]:
        """The same map, whose functions are timed; bound methods and functions of a class will both do."""
        return {kind: self._timed(kind.__name__, function) for kind, function in instruction_map.items()}

    def _timed(self, name: str, function: Callable[..., None]) -> Callable[..., None]:
        def timed(*args: Any, **kwargs: Any) -> None:
            with self.span(name, "buffer_id" in kwargs, kwargs.get("block"), kwargs.get("from_above", False)):
                function(*args, **kwargs)

        return timed

    @contextmanager
    def span(
        self, name: str, of_a_micro_batch: bool = False, block: int | None = None, from_above: bool = False
    ) -> Iterator[None]:
        """Times what the training's thread does. Micro-batches are counted: every schedule keeps their order."""
        start = self._now()
        yield
        index, key = None, (name, block, from_above)
        if of_a_micro_batch:
            index = self._num_done[key]
            self._num_done[key] += 1
        self.record(Event(COMPUTE, name, start, self._now(), self._split, self._step, index, block, from_above))

    def _now(self) -> float:
        if self._finish_work is not None:
            self._finish_work()
        return time.perf_counter()

    def record(self, event: Event) -> None:
        """Keeps the event; any thread may call. After `close` it does nothing."""
        if not self._closed:
            self._events.append(event)

    def flush(self) -> None:
        """Writes what has been recorded."""
        lines = []
        for _ in range(len(self._events)):  # another thread may add some meanwhile
            event = vars(self._events.popleft())
            line = {name: value for name, value in event.items() if value != _DEFAULTS[name]}
            lines.append(line | {"start": round(event["start"], 7), "end": round(event["end"], 7)})
        self._write(*lines)

    def close(self, reading: Reading) -> None:
        """Writes what is left, and the last reading."""
        self._closed = True
        self.flush()
        self._write({"clock": asdict(reading)})
        assert self._file is not None
        self._file.close()

    def _write(self, *records: Mapping[str, Any]) -> None:
        with writing(self.path):
            if self._file is None:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                self._file = self.path.open("w")
            self._file.write("".join(json.dumps(record) + "\n" for record in records))
            self._file.flush()


def traced(tracer: Tracer | None, name: str) -> AbstractContextManager[None]:
    """Times what the training's thread does, if there is a trace."""
    return nullcontext() if tracer is None else tracer.span(name)


def read_clock(
    mail: Mail, rank: int, num_ranks: int, when: str, seconds: float, clock: Callable[[], float] = time.perf_counter
) -> Reading:
    """This rank's clock against rank 0's, by NTP's formula on the quickest of some round trips through the store.

    Every rank must call; each has its turn. The clocks differ by the offset, up to half of that round trip. Where this
    leaves room for no difference at all and both ranks run on one kernel, whose clock they share, there is none.
    """
    if rank == 0:
        for other in range(1, num_ranks):
            for number in range(ROUNDS):
                key = f"clock/{when}/{other}/{number}"
                mail.fetch(f"{key}/ask", seconds, f"rank {other} to read the clock")
                mail.publish(f"{key}/answer", json.dumps([clock(), _kernel()]))
        return Reading(clock(), 0.0, 0.0)
    best, kernel = Reading(clock(), 0.0, float("inf")), ""
    for number in range(ROUNDS):
        key = f"clock/{when}/{rank}/{number}"
        asked = clock()
        mail.publish(f"{key}/ask", "")
        theirs, kernel = json.loads(mail.fetch(f"{key}/answer", seconds, "rank 0 to read the clock"))
        answered = clock()
        middle, error = (asked + answered) / 2, (answered - asked) / 2
        if error < best.error_seconds:
            best = Reading(middle, theirs - middle, error)
    shared = kernel == _kernel() != "" and abs(best.offset_seconds) <= best.error_seconds
    return Reading(best.at, 0.0, 0.0) if shared else best


def _kernel() -> str:
    """Names the running kernel; '' where that is not to be known."""
    path = Path("/proc/sys/kernel/random/boot_id")
    return path.read_text().strip() if path.exists() else ""
