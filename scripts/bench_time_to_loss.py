"""Minutes until a validation loss on two ranks, over links of several rates: what is fastest, and where.

sudo python scripts/bench_time_to_loss.py [--only curves memory steps] [--runs DIR] [--output DIR]

Time is steps until the loss, from the curve of one run, times seconds of a step over the link. `curves` trains the runs
that are not there, an hour on two cores; `memory` takes minutes; `steps` times steps over links, most of an hour of an
idle machine, as root. A part that is named is made anew, else what OUTPUT/time_to_loss.json has not is measured.
"""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import Mapping
from dataclasses import astuple, dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import yaml

sys.path.insert(0, str(Path(__file__).parents[1]))

from llm_local.bench.cases import (
    ROOT,
    BenchmarkError,
    Case,
    Spread,
    arguments_of,
    positive,
    run_case,
    table,
    torchrun,
    write,
)
from llm_local.bench.curves import draw, evaluations, steps_until, train
from llm_local.bench.hosts import missing, two_hosts
from llm_local.bench.largest import sizes, sizes_table
from llm_local.config import Config
from llm_local.files import ends_with_a_line

STUDY = ROOT / "configs/studies/long.yaml"
PARTS = ("curves", "memory", "steps")
# bytes a second and seconds of delay, in each direction
FREE = "no limit"
LINKS = {FREE: (None, 0.0), "20 Mb/s, 20 ms": (2.5e6, 0.02), "2 Mb/s, 20 ms": (2.5e5, 0.02)}
MICRO_BATCHES = 4  # of what is cut into stages
HALF = 4  # layers of a block: half of the model
EVERY = 50  # steps from one evaluation to the next, and of DiLoCo from one meeting to the next
BEST = 8e-3  # the best rate of three for each method in docs/studies/long_rates
RATES = (4e-3, BEST, 1.6e-2)  # tried with what is not in it
TRIAL = 300  # steps of a trial
BACKPROP = {"method": "backprop"}
DELAYED = {"method": "delayed", "delay_correction": True, "layers_per_block": HALF}
DILOCO = {**BACKPROP, "replica_sync_steps": EVERY, "outer_learning_rate": 0.7, "outer_momentum": 0.5}
LINEAR = {"method": "chunked", "layers_per_block": HALF, "head": "linear"}
SHARED = {**LINEAR, "head": "shared", "head_layers": 1, "head_refresh_steps": 1}
ZERO1 = {"deepspeed": str(ROOT / "configs/ds/zero1.json")}


@dataclass(frozen=True)
class Learning:
    """What a loss curve depends on. stages, replicas: that it is trained on, where that changes it."""

    flags: dict[str, Any]
    rates: tuple[float, ...] = (BEST,)
    stages: int = 1
    replicas: int = 1


@dataclass(frozen=True)
class System:
    """What trains on two ranks, or on one. learning: whose curve it has; micro_batches: of a step, on all replicas."""

    learning: str
    stages: int = 1
    replicas: int = 1
    micro_batches: int = 1
    flags: dict[str, Any] = field(default_factory=dict)

    @property
    def ranks(self) -> int:
        return self.stages * self.replicas


LEARNING = {
    "backprop": Learning(BACKPROP),
    "shared": Learning(SHARED),
    "diloco": Learning(DILOCO, RATES, replicas=2),
    "delayed": Learning(DELAYED, RATES),
    "linear, int8": Learning({**LINEAR, "wire_dtype": "int8"}, stages=2),
    "linear": Learning(LINEAR),
}
SYSTEMS = {
    "one core alone": System("backprop"),
    "data parallel": System("backprop", replicas=2, micro_batches=2),
    "data parallel, ZeRO-1": System("backprop", replicas=2, micro_batches=2, flags=ZERO1),
    "DiLoCo, 50 steps": System("diloco", replicas=2, micro_batches=2),
    "DeepSpeed 1F1B": System("backprop", stages=2, micro_batches=MICRO_BATCHES),
    "delayed, corrected": System("delayed", stages=2, micro_batches=MICRO_BATCHES),
    "local, shared head": System("shared", stages=2, micro_batches=MICRO_BATCHES),
    "local, linear heads": System("linear", stages=2, micro_batches=MICRO_BATCHES),
    "local, linear heads, int8": System("linear, int8", stages=2, micro_batches=MICRO_BATCHES),
}
INTRODUCTION = f"""
Minutes of training until a validation loss: the steps until it, from the curve of one run, which does not depend on the
link, times the seconds of a step over that link. Two ranks with a core each; an 8-layer Llama of width 64 with a
vocabulary of 2048, 0.69M parameters, fp32, 4,096 tokens a step on every system, AdamW, a cosine, one seed
(configs/studies/long.yaml; the text is that of [the long study](../studies/long_rates/README.md)). What is cut into two
stages has {MICRO_BATCHES} micro-batches of 8 rows; two replicas have one of 16 rows each, and a core alone one of 32.
Evaluations, checkpoints and the start are not counted.

1F1B, data parallelism and a core alone are one arithmetic, which a test holds to 1e-4, and share the curve
`backprop`. DiLoCo's replicas meet every {EVERY} steps, with an outer rate of 0.7 and a momentum of 0.5. `delayed` is
backpropagation without bubbles, its gradients one step late, corrected. Local learning has two blocks of four layers;
heads that are shared have a private layer and the last block's matrix, fetched in each step; `int8` is what travels.
"""
LEARNED = f"""
## Curves

Rates of what is not in the long study were chosen by runs of {TRIAL} steps; {BEST:g} is the best of the same three for
all that is. Losses in nats.
"""
STEP = """
## A step

The most resident memory of a rank, less what the process took before, and what its tensors took at a time; bytes that
leave both hosts for a token, as their kernels count them; and seconds of a step, in turns, the median of the rounds
with the smallest and the largest. DiLoCo's are means over a whole period. Rate and delay hold for each direction.
"""


def flags_of(system: System, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Of a run of the system; on all of them a step has the same rows, as has an evaluation."""
    rows = settings["per_device_train_batch_size"]
    return {
        **settings,
        **LEARNING[system.learning].flags,
        **system.flags,
        "num_stages": system.stages,
        "per_device_train_batch_size": rows // system.micro_batches,
        "gradient_accumulation_steps": system.micro_batches // system.replicas,
        "eval_batches": settings["eval_batches"] * system.micro_batches,
    }


def curves(settings: Mapping[str, Any], runs: Path, steps: int) -> dict[str, Any]:
    """Losses by learning, each with the best of its rates, and the losses that its rates end at."""
    found = {}
    for name, learning in LEARNING.items():
        best, ends = learning.rates[0], {}
        if len(learning.rates) > 1:
            few = min(TRIAL, steps)
            ends = {rate: _curve(settings, runs, name, rate, few)[-1][1] for rate in learning.rates}
            best = min(ends, key=lambda rate: ends[rate])
        found[name] = {"rate": best, "ends": ends, "losses": _curve(settings, runs, name, best, steps)}
    return found


def _curve(settings: Mapping[str, Any], runs: Path, name: str, rate: float, steps: int) -> list[tuple[int, float]]:
    learning = LEARNING[name]
    micro_batches = learning.replicas if learning.stages == 1 else MICRO_BATCHES
    system = System(name, learning.stages, learning.replicas, micro_batches)
    each = {"eval_steps": EVERY, "save_steps": 2 * EVERY, "save_total_limit": 1, "link_timeout_seconds": 3600}
    flags = {**flags_of(system, settings), **each, "max_steps": steps, "learning_rate": rate}
    folder = runs / f"{name.replace(', ', '-')}-{rate:g}-{steps}"
    print(folder.name, file=sys.stderr, flush=True)
    train(folder, learning.stages * learning.replicas, flags)
    return evaluations(folder)


def memory(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Bytes of the rank that takes most, by system: that its tensors took, and resident ones."""
    found = {}
    for name, system in SYSTEMS.items():
        flags = _timed(system, settings)
        if flags.get("replica_sync_steps"):
            flags["replica_sync_steps"] = 2  # so that they meet
        print(f"memory: {name}", file=sys.stderr, flush=True)
        launcher = ["env", "MALLOC_MMAP_THRESHOLD_=131072", *torchrun(system.ranks)]  # what is freed leaves the process
        ranks = run_case(Case(name, system.ranks, "peak", "local", flags, 3), [launcher])
        found[name] = {what: max(rank[what] for rank in ranks) for what in ("counted", "resident")}
    return found


def _timed(system: System, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Flags of a run of which steps are timed."""
    return {**flags_of(system, settings), "eval_batches": 0, "save_steps": 0}


def one_round(settings: Mapping[str, Any], steps: int) -> dict[str, dict[str, Any]]:
    """By link and system the seconds of a step, and the bytes of a token that leave both hosts."""
    found: dict[str, dict[str, Any]] = {link: {} for link in LINKS}
    tokens = settings["per_device_train_batch_size"] * settings["seq_length"]
    with two_hosts() as hosts:
        for link, (rate, delay) in LINKS.items():
            for name, system in SYSTEMS.items():
                if system.ranks == 1 and name in found[FREE]:  # a core alone has no link
                    found[link][name] = found[FREE][name]
                    continue
                print(f"{link}: {name}", file=sys.stderr, flush=True)
                flags = _timed(system, settings)
                case = Case(name, system.ranks, "whole", "local", flags, flags.get("replica_sync_steps") or steps)
                ranks = run_case(case) if system.ranks == 1 else hosts.run(case, rate, delay)
                sent = sum(rank["sent_bytes"] for rank in ranks) / tokens
                found[link][name] = {"seconds": ranks[-1]["seconds"], "sent": sent * (system.ranks > 1)}
    return found


def save(found: Mapping[str, Any], output: Path) -> None:
    """The page of what has been measured so far, and its picture."""
    if found.get("curves") and found.get("rounds"):
        output.mkdir(parents=True, exist_ok=True)
        each = {name: found["curves"][system.learning]["losses"] for name, system in SYSTEMS.items()}
        panels = {n: {s: (curve, _spreads(found, n, s).median) for s, curve in each.items()} for n in LINKS}
        draw(panels, output / "time_to_loss.png")
    write(output, "time_to_loss", page(found), dict(found))


def page(found: Mapping[str, Any]) -> str:
    """Its text."""
    parts = [INTRODUCTION]
    if found.get("curves"):
        parts.append(_learned(found))
    if found.get("rounds"):
        parts.append(_of_a_step(found))
    if found.get("curves") and found.get("rounds"):
        parts.append("\n![the loss against minutes, over each link](time_to_loss.png)\n")
        ends = sorted(each["losses"][-1][1] for each in found["curves"].values())
        for loss, said in ((ends[-1], "all reach it"), (ends[(len(ends) - 1) // 2], "half of the curves do")):
            parts.append(_minutes(found, loss, said))
    return "\n".join([*parts, sizes_table(found["largest"])])


def _learned(found: Mapping[str, Any]) -> str:
    """Where each curve ends, and with which rates it was tried."""
    rows = []
    for name, each in found["curves"].items():
        tried = ", ".join(f"{float(rate):g}: {loss:.3f}" for rate, loss in each["ends"].items())
        rows.append([name, f"{each['rate']:g}", f"{each['losses'][-1][1]:.4f}", tried])
    return f"{LEARNED}\n{table(['', 'rate', 'loss at the end', 'of the rates, in short runs'], rows)}\n"


def _spreads(found: Mapping[str, Any], link: str, name: str) -> Spread:
    return Spread.of(each[link][name]["seconds"] for each in found["rounds"])


def _of_a_step(found: Mapping[str, Any]) -> str:
    rows = []
    for name in SYSTEMS:
        taken = found.get("memory", {}).get(name)
        sent = median(each[FREE][name]["sent"] for each in found["rounds"])
        sizes = [f"{taken[what] / 1e6:.0f}" if taken else "" for what in ("resident", "counted")]
        rows.append([name, *sizes, f"{sent:,.0f}", *(_spreads(found, link, name).text(2) for link in LINKS)])
    header = ["", "MB resident", "MB of tensors", "bytes a token", *(f"{link}: s" for link in LINKS)]
    return f"{STEP}\n{table(header, rows)}\n"


def _minutes(found: Mapping[str, Any], loss: float, said: str) -> str:
    """Until the loss, by system and link, and which is first."""
    rows, middle = [], {}
    for name, system in SYSTEMS.items():
        steps = steps_until(found["curves"][system.learning]["losses"], loss)
        if steps is None:
            rows.append([name, *[""] * (1 + len(LINKS))])
            continue
        each = [Spread(*(steps * t / 60 for t in astuple(_spreads(found, link, name)))) for link in LINKS]
        middle[name] = [spread.median for spread in each]
        rows.append([name, f"{steps:.0f}", *(spread.text(1) for spread in each)])
    first = "; ".join(f"{link}: {min(middle, key=lambda n: middle[n][k])}" for k, link in enumerate(LINKS))
    shown = table(["", "steps", *LINKS], rows)
    return f"\n## Minutes until {loss:.3f} nats: {said}\n\n{shown}\n\nThe first to get there, by link: {first}.\n"


@ends_with_a_line(BenchmarkError)
def main(arguments: list[str] | None = None) -> int:
    parser = arguments_of(__doc__, repeats=3, steps=6)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=[], help="made anew (default: all that is missing)")
    parser.add_argument("--curve_steps", type=positive, default=800, help="steps of a curve (default 800)")
    parser.add_argument("--runs", type=Path, default=ROOT / "runs/time_to_loss", help="folder of the runs")
    given = parser.parse_args(arguments)
    file = given.output / "time_to_loss.json"
    found: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {}
    found.pop("machine", None)  # each page says what made it
    rounds = [] if "steps" in given.only else found.get("rounds", [])
    wanted = given.only or [part for part in PARTS[:2] if part not in found] + ["steps"] * (len(rounds) < given.repeats)
    if "steps" in wanted and (problem := missing()):
        parser.error(problem)
    base = yaml.safe_load(STUDY.read_text())["base"]
    typed = Config.load(None, **base).flat()
    settings = {name: typed[name] for name in base}
    found["largest"] = found.get("largest") or sizes()
    if "curves" in wanted:
        found["curves"] = curves(settings, given.runs, given.curve_steps)
        save(found, given.output)
    if "memory" in wanted:
        found["memory"] = memory(settings)
        save(found, given.output)
    while "steps" in wanted and len(rounds) < given.repeats:
        print(f"round {len(rounds) + 1} of {given.repeats}", file=sys.stderr)
        rounds.append(one_round(settings, given.steps))
        found["rounds"] = rounds
        save(found, given.output)
    return 0


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the namespaces go
    sys.exit(main())
