"""What a slow link costs: two stages in network namespaces, with a rate and a delay between them.

sudo python scripts/bench_slow_link.py [--shares 0.1,0.5,1,2] [--delays_ms 0,20] [--repeats 3] [--steps 10]

Needs root, ip and /dev/net/tun. Each namespace is a host to torchrun.
"""

from __future__ import annotations

import signal
import sys
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from llm_local.bench.calibration import SCHEDULES, calibrate
from llm_local.bench.cases import (
    METHODS,
    BenchmarkError,
    Case,
    arguments_of,
    bench_model,
    ratios,
    table,
    write,
)
from llm_local.bench.hosts import TwoHosts, missing, two_hosts
from llm_local.bench.relay import MTU
from llm_local.files import ends_with_a_line
from llm_local.plan.times import Link, Pipe, StageSeconds, predict

MICRO_BATCHES = 4
INTRODUCTION = f"""
How many times as long a step takes over a slow link as over an unlimited one, measured in turns: the median over the
rounds, and the smallest and largest. Each stage has a core and a network namespace; rate and delay hold for each
direction, and the rate is chosen so that the bytes of a step of local learning take the given share of its compute.
`deepspeed` is PipelineEngine's 1F1B over the same link. "Waiting": the part of a local step in which the last stage had
no packet to work on; the rest of what a step takes longer goes to the process that holds packets back between the
namespaces, which works on the same cores.

"Predicted": by the simulator, from rate, delay, and the seconds of passes over the unlimited link. Where there is a
delay, its 1F1B is a better one than DeepSpeed's: a message leaves at once, while gloo sends DeepSpeed's when it is
asked for; and nothing is exchanged at the end of a step.

8 layers of width 256, {MICRO_BATCHES} micro-batches of 4 x 128 tokens a step, bf16, frames of {MTU} bytes.
"""


def flags(system: str) -> dict[str, Any]:
    return {
        **bench_model(),
        "method": METHODS[system],
        "bf16": True,
        "seq_length": 128,
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": MICRO_BATCHES,
    }


@ends_with_a_line(BenchmarkError)
def main(arguments: list[str] | None = None) -> int:
    parser = arguments_of(__doc__, repeats=3, steps=10)
    parser.add_argument("--shares", default="0.1,0.5,1,2", help="of a step's compute that its traffic takes")
    parser.add_argument("--delays_ms", default="0,20", help="of each packet, one way (default 0,20)")
    given = parser.parse_args(arguments)
    shares = [float(share) for share in given.shares.split(",")]
    delays = [float(delay) for delay in given.delays_ms.split(",")]
    if min(shares) <= 0 or min(delays) < 0:
        parser.error(
            f"--shares {given.shares} --delays_ms {given.delays_ms}: give shares above 0 and no negative delay"
        )
    if problem := missing():
        parser.error(problem)
    rows, data = measure(shares, delays, given.repeats, given.steps)
    header = ["traffic over compute", "Mbit/s", "delay, ms", "local", "predicted", "local's waiting"]
    header += ["deepspeed 1F1B", "predicted"]
    write(given.output, "slow_link", f"{INTRODUCTION}\n{table(header, rows)}", data)
    return 0


def measure(
    shares: list[float], delays: list[float], repeats: int, steps: int
) -> tuple[list[list[str]], dict[str, Any]]:
    """Rows of the table, and the seconds of every round."""
    cases = [Case(system, 2, "rate", system, flags(system), steps) for system in METHODS]
    with two_hosts() as hosts:
        sent, passes = {}, {}
        for system in METHODS:
            print(f"{system}: traffic and passes", file=sys.stderr)
            timed = Case(system, 2, "passes", system, flags(system), steps)
            sent[system] = hosts.run(replace(timed, measure="traffic", steps=3))[0]["bytes_a_step"]
            passes[system] = calibrate(timed, repeats, launchers=hosts.launchers)
        compute = median(hosts.run(cases[0])[-1]["seconds"])
        slow = [(sent["local"] / (share * compute), share, delay) for delay in delays for share in shares]
        found = {link: Found() for link in slow}
        for number in range(repeats):
            for link in slow:
                print(f"round {number + 1} of {repeats}: share {link[1]:g}, {link[2]:g} ms", file=sys.stderr)
                for case in cases:
                    found[link].add(case.name, *(_over(each, hosts, case) for each in (None, link)))
    rows, data = [], []
    for (rate, share, delay), each in found.items():
        against = {system: ratios(each.slow[system], each.unlimited[system]).text() for system in METHODS}
        link = Link(delay / 1000, 1 / rate)
        predicted = {system: slowdown(system, passes[system], link, sent[system]) for system in METHODS}
        waiting = f"{100 * median(each.waiting['local']):.1f} %"
        row = [f"{share:g}", f"{8e-6 * rate:.1f}", f"{delay:g}", against["local"], f"{predicted['local']:.2f}", waiting]
        rows.append([*row, against["deepspeed"], f"{predicted['deepspeed']:.2f}"])
        data.append({"share": share, "bytes_a_second": rate, "delay_ms": delay, **asdict(each), "predicted": predicted})
    return rows, {"traffic_bytes_a_step": sent, "compute_seconds_a_step": compute, "links": data}


def slowdown(system: str, stages: list[StageSeconds], link: Link, bytes_a_step: float) -> float:
    """How many times as long as over a link that takes no time a step is predicted to take."""
    each = bytes_a_step / MICRO_BATCHES
    way = SCHEDULES[system], stages, MICRO_BATCHES
    slow, free = (predict(Pipe(*way, [one], each, each)).step_seconds for one in (link, Link()))
    return slow / free


@dataclass
class Found:
    """Seconds a step over a slow link and over an unlimited one in turn, and the part of it that the last stage
    waited: by the system, for each round."""

    slow: dict[str, list[float]] = field(default_factory=lambda: {system: [] for system in METHODS})
    unlimited: dict[str, list[float]] = field(default_factory=lambda: {system: [] for system in METHODS})
    waiting: dict[str, list[float]] = field(default_factory=lambda: {system: [] for system in METHODS})

    def add(self, system: str, unlimited: dict[str, Any], slow: dict[str, Any]) -> None:
        self.unlimited[system].append(median(unlimited["seconds"]))
        self.slow[system].append(median(slow["seconds"]))
        steps = zip(slow["waited"], slow["seconds"], strict=True)
        self.waiting[system].append(median(waited / whole for waited, whole in steps))


def _over(link: tuple[float, float, float] | None, hosts: TwoHosts, case: Case) -> dict[str, Any]:
    """What the last stage measured."""
    rate, _, delay = link or (None, 0.0, 0.0)
    return hosts.run(case, rate, delay / 1000)[-1]


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the namespaces go
    sys.exit(main())
