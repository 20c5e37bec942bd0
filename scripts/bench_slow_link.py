"""What a slow link costs: two stages in network namespaces, with a rate between them.

sudo python scripts/bench_slow_link.py [--shares 0.1,0.5,1,2] [--delay_ms 0] [--repeats 3] [--steps 10]

Needs root, ip and tc; the kernel's tbf queue, and netem for a delay. Each namespace is a host to torchrun.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from llm_local.benchmark import (
    BenchmarkError,
    Case,
    arguments_of,
    bench_model,
    in_turns,
    ratios,
    run_case,
    table,
    write,
)

SYSTEMS = {"local": "chunked", "deepspeed": "backprop"}
HOSTS = ("llmlocal0", "llmlocal1")
ADDRESSES = ("10.213.77.1", "10.213.77.2")
PORT = 29533
INTRODUCTION = """
How many times as long a step takes over a slow link as over an unlimited one: the median over the rounds, and the
smallest and largest. Each stage has a core and a network namespace; the rate holds for each direction and is chosen so
that the bytes of a step of local learning take the given share of its compute. `deepspeed` is PipelineEngine's 1F1B
over the same link. 8 layers of width 256, 4 micro-batches of 4 x 128 tokens a step, bf16, frames of 9000 bytes.
"""


def sh(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise BenchmarkError(f"{' '.join(command)}: {done.stderr.strip()}")


@contextmanager
def two_hosts() -> Iterator[list[list[str]]]:
    """Two network namespaces with a cable; yields what starts a node's ranks in each."""
    try:
        for host in HOSTS:
            sh("ip", "netns", "add", host)
        sh(
            "ip",
            "link",
            "add",
            "cable0",
            "netns",
            HOSTS[0],
            "type",
            "veth",
            "peer",
            "name",
            "cable1",
            "netns",
            HOSTS[1],
        )
        for number, (host, address) in enumerate(zip(HOSTS, ADDRESSES, strict=True)):
            for command in (
                ["addr", "add", f"{address}/24", "dev", f"cable{number}"],
                # each frame costs the core that computes some time
                ["link", "set", f"cable{number}", "mtu", "9000", "up"],
                ["link", "set", "lo", "up"],
            ):
                sh("ip", "-n", host, *command)
        yield [_launcher(number) for number in (0, 1)]
    finally:
        for host in HOSTS:
            subprocess.run(["ip", "netns", "del", host], capture_output=True, check=False)


def _launcher(number: int) -> list[str]:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc_per_node=1"]
    torchrun += [f"--node_rank={number}", f"--master_addr={ADDRESSES[0]}", f"--master_port={PORT}"]
    return ["ip", "netns", "exec", HOSTS[number], "env", f"GLOO_SOCKET_IFNAME=cable{number}", *torchrun]


def limit(bytes_a_second: float | None, delay_ms: float) -> None:
    """Sets the rate and delay of both directions; None: no limit."""
    for number, host in enumerate(HOSTS):
        device = ["dev", f"cable{number}", "root"]
        subprocess.run(["tc", "-n", host, "qdisc", "del", *device], capture_output=True, check=False)
        if bytes_a_second is None:
            continue
        rate = f"{round(8 * bytes_a_second)}bit"
        if delay_ms:
            sh("tc", "-n", host, "qdisc", "add", *device, "netem", "delay", f"{delay_ms}ms", "rate", rate)
        else:
            sh("tc", "-n", host, "qdisc", "add", *device, "tbf", "rate", rate, "burst", "64kb", "limit", "64mb")


def flags(system: str) -> dict[str, Any]:
    return {
        **bench_model(),
        "method": SYSTEMS[system],
        "bf16": True,
        "seq_length": 128,
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 4,
    }


def main(arguments: list[str] | None = None) -> int:
    parser = arguments_of(__doc__, repeats=3, steps=10)
    parser.add_argument("--shares", default="0.1,0.5,1,2", help="of a step's compute that its traffic takes")
    parser.add_argument("--delay_ms", type=float, default=0.0, help="of each packet, one way (default 0)")
    given = parser.parse_args(arguments)
    shares = [float(share) for share in given.shares.split(",")]
    if min(shares) <= 0 or given.delay_ms < 0:
        parser.error(
            f"--shares {given.shares} --delay_ms {given.delay_ms:g}: give shares above 0 and no negative delay"
        )
    if os.geteuid() or not (shutil.which("ip") and shutil.which("tc")):
        parser.error("network namespaces need root, ip and tc")
    try:
        rows, data = measure(shares, given.delay_ms, given.repeats, given.steps)
    except BenchmarkError as error:
        print(f"bench_slow_link.py: {error}", file=sys.stderr)
        return 1
    text = INTRODUCTION + (f"\nEach packet is {given.delay_ms:g} ms on its way.\n" if given.delay_ms else "")
    header = ["traffic over compute", "Mbit/s", "local", "deepspeed 1F1B"]
    write(given.output, "slow_link", f"{text}\n{table(header, rows)}", {"seconds_a_step": data})
    return 0


def measure(shares: list[float], delay_ms: float, repeats: int, steps: int) -> tuple[list[list[str]], dict[str, Any]]:
    cases = [Case(system, 2, "rate", system, flags(system), steps) for system in SYSTEMS]
    with two_hosts() as launchers:
        traffic = run_case(Case("traffic", 2, "traffic", "local", flags("local"), 3), launchers)[0]["bytes_a_step"]
        compute = median(run_case(cases[0], launchers)[-1]["seconds"])
        data: dict[str, Any] = {"unlimited": {system: [] for system in SYSTEMS}}
        data |= {str(share): {system: [] for system in SYSTEMS} for share in shares}
        for _ in range(repeats):
            for share in (None, *shares):
                limit(None if share is None else traffic / (share * compute), delay_ms)
                found = in_turns(cases, 1, launchers)
                for system, rounds in found.items():
                    key = "unlimited" if share is None else str(share)
                    data[key][system].append(median(rounds[0][-1]["seconds"]))
    rows = []
    for share in shares:
        against = [ratios(data[str(share)][system], data["unlimited"][system]).text() for system in SYSTEMS]
        rows.append([f"{share:g}", f"{8e-6 * traffic / (share * compute):.1f}", *against])
    return rows, {"traffic_bytes_a_step": traffic, "compute_seconds_a_step": compute, **data}


if __name__ == "__main__":
    sys.exit(main())
