"""The link between two jobs beside gloo, which carries one within a launch; and what a long way costs it.

python scripts/bench_job_link.py [--megabytes 1,16] [--repeats 5]
"""

from __future__ import annotations

import socket
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable
from multiprocessing import get_context
from multiprocessing.queues import Queue
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
import torch.distributed as dist  # noqa: TID251 - gloo as such

from llm_local.bench.cases import Spread, arguments_of, table, write
from llm_local.jobs.channel import LINGER_SECONDS, Channel
from llm_local.jobs.hello import Hello, Terms
from llm_local.jobs.key import make_key, tls
from llm_local.jobs.packet_log import PacketLog
from llm_local.jobs.side import Limits
from llm_local.jobs.ways import Address, Dial, Door, Way

BYTES = 1 << 30  # of a transfer
IN_FLIGHT = 4
PASS_SECONDS, PACKETS, DELAY_SECONDS = 0.05, 100, 0.05
LIMIT_SECONDS = 300.0
INTRODUCTION = f"""
Packets from one process to another over loopback: by gloo, as within a launch, and by the link of jobs, which logs them
in memory, encrypts them by TLS 1.3 and sends them again after a break; {IN_FLIGHT} in flight.
"""
FAR = f"""
A stage that takes {PASS_SECONDS * 1e3:g} ms for each packet of 0.5 MB, over a way of {DELAY_SECONDS * 1e3:g} ms in each
direction: seconds beside those of the passes alone.
"""


def channel(folder: Path, stage: int, port: int, window: int, most: int) -> Channel:
    """An end of a link from stage 0 to stage 1."""
    is_sender = stage == 0
    context = tls(folder / "run.key", server=not is_sender)
    address = Address("127.0.0.1", port)
    way: Way = Dial(address, context) if is_sender else Door(address, context).visits[0]
    terms = Terms(Hello(stage, 0, f"stage {stage}", 1, {}, run="bench", window=window), 1 - stage, (0,))
    log = PacketLog(folder / "log", 4 << 30, None) if is_sender else None
    made = Channel(way, terms, log, 0, Limits(most))
    made.start()
    return made


def job_end(folder: Path, stage: int, port: int, size: int, said: Queue[float]) -> None:
    torch.set_num_threads(1)
    count, end = BYTES // size, channel(folder, stage, port, IN_FLIGHT, size)
    if stage == 0:
        packet = torch.zeros(size, dtype=torch.uint8).numpy()
        for _ in range(count + 1):
            end.send(packet)
        end.await_finish()
    else:
        end.take()
        start = time.perf_counter()
        for number in range(count):
            end.take()
            if number % IN_FLIGHT == 0:
                end.made_durable(number)  # else the log would grow
        said.put(time.perf_counter() - start)
        end.finish()
    end.part()
    end.await_parted(LINGER_SECONDS)
    end.close()


def gloo_end(folder: Path, stage: int, port: int, size: int, said: Queue[float]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=stage, world_size=2)
    packets = [torch.zeros(size, dtype=torch.uint8) for _ in range(IN_FLIGHT)]
    pending: deque[Any] = deque()
    dist.barrier()
    start = time.perf_counter()
    for number in range(BYTES // size):
        if len(pending) == IN_FLIGHT:
            pending.popleft().wait()
        act: Any = dist.irecv if stage else dist.isend
        pending.append(act(packets[number % IN_FLIGHT], 1 - stage))
    for each in pending:
        each.wait()
    if stage:
        said.put(time.perf_counter() - start)
    dist.barrier()


def transfer(end: Callable[..., None], folder: Path, size: int) -> float:
    """Seconds of BYTES in packets of that size."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    spawn = get_context("spawn")
    said: Any = spawn.Queue()
    both = [spawn.Process(target=end, args=(folder, stage, port, size, said), daemon=True) for stage in (0, 1)]
    for each in both:
        each.start()
    seconds = said.get(timeout=LIMIT_SECONDS)
    for each in both:
        each.join(LIMIT_SECONDS)
    return seconds


def long_way(target: int, delay_seconds: float) -> int:
    """The port of a relay to another one, on which each byte takes so long in each direction."""
    listener = socket.create_server(("127.0.0.1", 0))

    def carry(source: socket.socket, sink: socket.socket) -> None:
        under_way: deque[tuple[float, bytes]] = deque()
        changed = threading.Condition()

        def hand_out() -> None:
            while True:
                with changed:
                    changed.wait_for(lambda: under_way)
                    due, data = under_way.popleft()
                time.sleep(max(0.0, due - time.monotonic()))
                sink.sendall(data)

        threading.Thread(target=hand_out, daemon=True).start()
        while data := source.recv(1 << 20):
            with changed:
                under_way.append((time.monotonic() + delay_seconds, data))
                changed.notify()

    def accept() -> None:
        while True:
            one = listener.accept()[0]
            other = socket.create_connection(("127.0.0.1", target))
            for each, beyond in ((one, other), (other, one)):
                each.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                threading.Thread(target=carry, args=(each, beyond), daemon=True).start()

    threading.Thread(target=accept, daemon=True).start()
    return listener.getsockname()[1]


def far(folder: Path, delay_seconds: float, window: int) -> float:
    """Seconds of passes that take packets over a long way, beside those of the passes alone."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    packet = torch.zeros(500_000, dtype=torch.uint8).numpy()
    receiver = channel(folder, 1, port, window, 1 << 20)
    sender = channel(folder, 0, long_way(port, delay_seconds), window, 1 << 20)
    threading.Thread(target=lambda: [sender.send(packet) for _ in range(PACKETS + window)], daemon=True).start()
    for _ in range(window):
        receiver.take()
    start = time.perf_counter()
    for _ in range(PACKETS):
        receiver.take()
        time.sleep(PASS_SECONDS)
    return (time.perf_counter() - start) / (PACKETS * PASS_SECONDS)


def main() -> int:
    parser = arguments_of(__doc__, repeats=5, steps=1)
    parser.add_argument("--megabytes", default="1,16", help="of a packet (default 1,16)")
    given = parser.parse_args()
    rows, numbers = [], {}
    with tempfile.TemporaryDirectory(prefix="llm_local-bench-") as text:
        folder = Path(text)
        make_key(folder / "run.key")
        for megabytes in map(int, given.megabytes.split(",")):
            rates: dict[str, list[float]] = {"gloo": [], "jobs": []}
            for number in range(given.repeats):
                for name, end in (("gloo", gloo_end), ("jobs", job_end)):
                    own = folder / f"{megabytes}-{number}-{name}"
                    own.mkdir()
                    (own / "run.key").symlink_to(folder / "run.key")
                    rates[name].append(BYTES / 1e9 / transfer(end, own, megabytes << 20))
            shares = Spread.of(b / a for a, b in zip(rates["gloo"], rates["jobs"], strict=True))
            spreads = [Spread.of(rates[name]).text() for name in rates]
            rows.append([f"{megabytes} MB", *spreads, shares.text(), "0.9"])
            numbers[f"{megabytes} MB"] = {**rates, "share": shares.median}
        ways = []
        for delay in (0.0, DELAY_SECONDS):
            for window in (4, 8):
                own = folder / f"far-{delay}-{window}"
                own.mkdir()
                (own / "run.key").symlink_to(folder / "run.key")
                took = far(own, delay, window)
                ways.append([f"{delay * 1e3:g} ms", str(window), f"{took:.3f}", "1.03"])
                numbers[f"{delay * 1e3:g} ms, {window} packets"] = took
    header = ["packets of", "gloo, GB/s", "jobs, GB/s", "share", "goal, at least"]
    text = f"{INTRODUCTION}\n{table(header, rows)}\n{FAR}\n"
    text += table(["each way", "--max_packets_in_flight", "of the passes alone", "goal, at most"], ways)
    write(given.output, "job_link", text, numbers)
    return 0


if __name__ == "__main__":
    sys.exit(main())
