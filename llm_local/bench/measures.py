"""What a rank of a benchmark measures, by name in MEASURES."""

from __future__ import annotations

import json
import os
import time
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, replace
from itertools import count, islice, pairwise
from pathlib import Path
from statistics import median
from typing import Any

import torch

from llm_local.backprop import id_columns
from llm_local.bench.peers import PEERS, System, make_peer
from llm_local.bench.plain import PlainLoop
from llm_local.bench.saved_bytes import saved_bytes
from llm_local.bench.task import Task, wait_for_turn
from llm_local.config import Config, from_flat
from llm_local.device import finish_queued_work, peak_memory_bytes
from llm_local.files import Json
from llm_local.launch import Launch
from llm_local.links.links import Links
from llm_local.links.packet import Packet
from llm_local.rank import Rank, build, check
from llm_local.run import Run
from llm_local.watchdog import Watchdog

LOCAL, DEEPSPEED = "local", "deepspeed"
SECONDS = 300.0  # longest wait of ranks for one another
PROFILED, NAME = 16, 70  # rows of a profile, and characters of a kernel's name


def begin(task: Task, checked: Callable[[], None] = lambda: None) -> Rank:
    """A run as pretrain.py starts it, up to its first step. checked: called when rank 0 has checked it."""
    flags = {"logging_steps": 1, "eval_batches": 0, "overwrite_output_dir": True, "max_grad_norm": 0.0, **task.flags}
    config: Config = from_flat({**flags, "max_steps": 1_000_000, "lr_scheduler_type": "constant"})
    launch = Launch.from_environment(os.environ)
    watchdog = Watchdog(launch.rank)
    watchdog.start()
    start = check(config, launch) if launch.rank == 0 else None
    checked()
    return build(config, launch, watchdog, start)


def leave(run: Rank) -> None:
    """Nobody's links go while another still trains."""
    run.world.everybody("done", SECONDS, "all ranks to be done")
    run.world.finish()


def system_of(task: Task) -> System:
    """What trains on every rank."""
    if task.system in PEERS:
        return make_peer(task.system, task.flags)
    run = begin(task)

    def step(number: int) -> float:
        return float(run.engine.train_batch(number).losses[-1])

    return System(step, lambda name: run.world.everybody(name, SECONDS, name), lambda: leave(run), lambda: _waited(run))


def rate(task: Task) -> Json:
    """Seconds of each step, with nothing between one and the next: the last stage's tell the throughput."""
    system = system_of(task)
    for number in range(1, task.warmup + 1):
        system.step(number)
    system.everybody("warm")
    ends, waits, losses = [time.perf_counter()], [system.waited()], []
    for number in range(task.warmup + 1, task.warmup + task.steps + 1):
        losses.append(system.step(number))
        ends.append(time.perf_counter())
        waits.append(system.waited())
    system.finish()
    seconds, waited = ([b - a for a, b in pairwise(values)] for values in (ends, waits))
    return {"seconds": seconds, "waited": waited, "losses": losses}


def whole(task: Task) -> Json:
    """Mean seconds of a step as a run trains it, with the matrices of a shared head and the meetings of replicas, whose
    whole periods `steps` should be; and the bytes of a step that leave this rank's host."""
    rank = begin(task)
    run = Run(rank)
    start = bytes_before = 0.0
    for step in islice(run.steps(), task.warmup + task.steps):
        run.train_step()
        if step == task.warmup:
            start, bytes_before = time.perf_counter(), _bytes_left_host()
    finish_queued_work(rank.world.device)
    seconds, sent = time.perf_counter() - start, _bytes_left_host() - bytes_before
    leave(rank)
    return {"seconds": seconds / task.steps, "sent_bytes": sent / task.steps}


def _bytes_left_host() -> int:
    """By all of its networks, as the kernel counts them: what acknowledges and announces is among them."""
    lines = (line.split(":") for line in Path("/proc/self/net/dev").read_text().splitlines()[2:])
    return sum(int(counts.split()[8]) for name, counts in lines if name.strip() != "lo")


def beside_plain(task: Task) -> Json:
    """Seconds of each step of a run, and of a plain loop's, in turns."""
    rank = begin(task)
    run, loop = Run(rank), PlainLoop(rank.config, rank.setup.model_config())
    found: dict[str, list[float]] = {"ours": [], "plain": []}
    for _ in islice(run.steps(), task.warmup + task.steps):
        for name, step in (("ours", run.train_step), ("plain", loop.step)):
            start = time.perf_counter()
            step()
            found[name].append(time.perf_counter() - start)
    return {name: seconds[task.warmup :] for name, seconds in found.items()}


@dataclass
class _Fed:
    """In a receiver's place: the same micro-batch again and again, from memory."""

    packet: Packet

    def receive(self, kind: int, step: int, index: int) -> Packet:
        return replace(self.packet, kind=kind, step=step, index=index)


class _Nowhere:
    """In a sender's place."""

    def send(self, packet: Packet) -> None:
        pass


class _Keeping:
    """A receiver that remembers what it gave last."""

    def __init__(self, receiver: Any):
        self._receiver = receiver
        self.last: Packet | None = None

    def receive(self, kind: int, step: int, index: int) -> Packet:
        packet = self._receiver.receive(kind, step, index)
        self.last = packet
        return packet


def efficiency(task: Task) -> Json:
    """Rounds of steps in the pipe, and of steps of each stage by itself, fed from memory, while the others also run."""
    run = begin(task)
    engine: Any = run.engine
    assert engine.blocks, "the stock pipeline has no links to be fed through"
    links, numbers = run.links, count(1)
    keeping = None if links.receiver is None else _Keeping(links.receiver)
    piped: Any = Links(receiver=keeping, sender=links.sender)  # pyright: ignore[reportArgumentType]
    result: Json = {"piped": [], "fed": [], "waiting": []}
    for turn in range(task.rounds + 1):
        engine.links = piped
        for _ in range(2):  # fills the pipe
            engine.train_batch(next(numbers))
        waited, start = _waited(run), time.perf_counter()
        for _ in range(task.steps):
            engine.train_batch(next(numbers))
        seconds, waited = time.perf_counter() - start, _waited(run) - waited
        run.world.everybody(f"piped {turn}", SECONDS, "the pipe's turn")
        engine.links = Links(
            receiver=None if keeping is None else _Fed(keeping.last),  # pyright: ignore[reportArgumentType]
            sender=None if links.sender is None else _Nowhere(),  # pyright: ignore[reportArgumentType]
        )
        alone = [_timed(engine, next(numbers)) for _ in range(task.steps)]
        run.world.everybody(f"fed {turn}", SECONDS, "each stage's own turn")
        if turn:  # the first is for warming up
            result["piped"].append(seconds / task.steps)
            result["fed"].append(sum(alone) / task.steps)
            result["waiting"].append(waited / seconds)
    leave(run)
    return result


def _waited(run: Rank) -> float:
    return sum(link.wait_seconds for link in run.links.all())


def _timed(engine: Any, number: int) -> float:
    start = time.perf_counter()
    engine.train_batch(number)
    return time.perf_counter() - start


def memory(task: Task) -> Json:
    """The most bytes that graphs held for their backward passes in a step."""
    with saved_bytes() as saved:
        system = system_of(task)
        for number in range(1, task.steps + 1):
            system.step(number)
        system.finish()
    return {"peak_saved_bytes": saved.peak}


def peak(task: Task) -> Json:
    """The most bytes that this rank's tensors took at a time, from before its stage is made to the end of the steps,
    with a checkpoint of the first where the flags ask for them; the most resident memory, less what there was before;
    and what the start expects."""
    profiler = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True)
    base: list[int] = []

    def checked() -> None:
        base.append(_resident_bytes("VmRSS"))
        Path("/proc/self/clear_refs").write_text("5")  # the most resident memory is that of what follows
        profiler.start()

    rank = begin(task, checked)
    run = Run(rank)
    for step in islice(run.steps(), task.steps):
        run.train_step()
        if rank.config.save_interval and step == 1:  # once: what the thread that writes it frees is not counted
            run.save()
    rank.saver.wait()
    resident = _resident_bytes("VmHWM") - base[0]
    profiler.stop()
    leave(rank)
    file = Path(task.results, f"trace-{rank.world.place.rank}.json")
    profiler.export_chrome_trace(str(file))
    events = json.loads(file.read_text())["traceEvents"]
    file.unlink()
    counted = _most_held([event for event in events if event["name"] == "[memory]"])
    expected = rank.setup.memory[rank.world.place.stage]
    return {"counted": counted, "resident": resident, "expected": expected.whole, "parts": asdict(expected)}


def _most_held(events: list[Json]) -> int:
    """The most bytes at a time of tensors that were made and not freed, by their addresses: one that a thread of gloo
    has freed, which the profiler does not see, is gone when another one has its address."""
    held: dict[int, int] = {}
    now = most = 0
    for event in sorted(events, key=lambda event: event["ts"]):
        address, size = event["args"]["Addr"], event["args"]["Bytes"]
        now -= held.pop(address, 0)
        if size > 0:
            held[address] = size
            now += size
        most = max(most, now)
    return most


def _resident_bytes(name: str) -> int:
    """VmRSS: of this process; VmHWM: the most that there were."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) * 1024


def traffic(task: Task) -> Json:
    """Bytes that leave this rank in a step: of a link all, of DeepSpeed's pipeline hidden states and gradients alone,
    as its own models load token ids on every stage that reads them."""
    from deepspeed.runtime.pipe import p2p

    sent, send = [0], p2p.send

    def counted(tensor: Any, dest_stage: int) -> Any:
        if tensor.ndim == 3:  # not what DeepSpeed says at the start
            sent[0] += tensor[..., : -id_columns(tensor.dtype)].nbytes
        return send(tensor, dest_stage)

    p2p.send = counted
    run = begin(task)
    before = []
    for number in range(1, task.steps + 2):
        before.append(sum(link.bytes for link in (run.links.sender, run.links.gradient_sender) if link) + sent[0])
        run.engine.train_batch(number)
    leave(run)
    return {"bytes_a_step": median(b - a for a, b in pairwise(before))}


class _Stopwatch:
    """In a tracer's place: the seconds of every instruction, by its name, and of these the ones that it had a core."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.seconds: dict[str, list[float]] = defaultdict(list)
        self.core_seconds: dict[str, list[float]] = defaultdict(list)

    def wrap(self, instruction_map: dict[type, Callable[..., None]]) -> dict[type, Callable[..., None]]:
        return {kind: self._timed(kind.__name__, function) for kind, function in instruction_map.items()}

    def _timed(self, name: str, function: Callable[..., None]) -> Callable[..., None]:
        def timed(*args: Any, **kwargs: Any) -> None:
            start, on_core = time.perf_counter(), time.process_time()
            function(*args, **kwargs)
            finish_queued_work(self.device)
            self.seconds[name].append(time.perf_counter() - start)
            self.core_seconds[name].append(time.process_time() - on_core)

        return timed


def passes(task: Task) -> Json:
    """Median seconds of each kind of instruction; of sends and receives that is how long the stage waited. Where ranks
    share a core, core_seconds leave out those in which another one had it."""
    run = begin(task)
    for number in range(1, task.warmup + 1):
        run.engine.train_batch(number)
    watch = _watched(run, range(task.warmup + 1, task.warmup + task.steps + 1))
    leave(run)
    return {"seconds": _medians(watch.seconds), "core_seconds": _medians(watch.core_seconds)}


def _watched(run: Rank, numbers: Iterable[int]) -> _Stopwatch:
    watch, engine = _Stopwatch(run.world.device), run.engine
    engine.trace(watch)  # pyright: ignore[reportArgumentType]
    for number in numbers:
        engine.train_batch(number)
    return watch


def _medians(by_name: dict[str, list[float]]) -> dict[str, float]:
    return {name: median(seconds) for name, seconds in by_name.items()}


def stage(task: Task) -> Json:
    """A rank by itself: seconds of a step, where none waits for the device but the last, then a profile of one, then
    seconds of passes."""
    run, numbers = begin(task), count(1)
    for _ in range(task.warmup):
        run.engine.train_batch(next(numbers))
    finish_queued_work(run.world.device)
    wait_for_turn(exclusive=True)
    start = time.perf_counter()
    results = [run.engine.train_batch(next(numbers)) for _ in range(task.steps)]
    loss = float(results[-1].losses[-1])
    finish_queued_work(run.world.device)
    seconds = (time.perf_counter() - start) / task.steps
    peak = peak_memory_bytes(run.world.device)
    profile = _profile(run, next(numbers))
    watch = _watched(run, islice(numbers, task.steps))
    leave(run)
    found = {"step_seconds": seconds, "loss": loss, "peak_memory_bytes": peak}
    return {**found, "passes": _medians(watch.seconds), "profile": profile}


def _profile(run: Rank, number: int) -> Json:
    """Where a step's time goes: milliseconds and calls of the costliest kernels, on a CPU of operators, and of all."""
    on_cpu = run.world.device.type == "cpu"
    with torch.profiler.profile() as profiler:
        run.engine.train_batch(number)
        finish_queued_work(run.world.device)
    key = "self_cpu_time_total" if on_cpu else "self_device_time_total"
    found = [(e.key[:NAME], getattr(e, key) / 1000, e.count) for e in profiler.key_averages() if _is_on(e, on_cpu)]
    rows = sorted(found, key=lambda row: -row[1])[:PROFILED]
    return {"rows": rows, "milliseconds": sum(row[1] for row in found), "calls": sum(row[2] for row in found)}


def _is_on(event: Any, on_cpu: bool) -> bool:
    return (event.device_type == torch.autograd.DeviceType.CPU) == on_cpu


MEASURES: dict[str, Callable[[Task], Json]] = {
    "rate": rate,
    "whole": whole,
    "beside_plain": beside_plain,
    "efficiency": efficiency,
    "memory": memory,
    "peak": peak,
    "traffic": traffic,
    "passes": passes,
    "stage": stage,
}
