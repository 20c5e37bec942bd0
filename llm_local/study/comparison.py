"""What a study found, as pure functions of what its runs recorded: study.json and the table of study.md.

All losses are validation losses in nats. A point's last block is the whole model; earlier blocks are exits.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import fmean, median, stdev
from typing import Any

from llm_local.config import Config
from llm_local.costs import count_flops, flops_so_far
from llm_local.files import Json
from llm_local.study.points import Point, Study

HEADER = (
    "setting",
    "blocks",
    "validation loss",
    "perplexity vs backprop",
    "best exit − last",
    "total FLOPs",
    "sequential FLOPs",
)


@dataclass(frozen=True)
class Result:
    """One finished run. evals: the steps that were evaluated, each with the losses of all blocks, in order. accuracy:
    at the end, of the last block, where the task has one."""

    evals: tuple[tuple[int, tuple[float, ...]], ...]
    step_seconds: float
    peak_memory_bytes: int
    accuracy: float | None = None

    @staticmethod
    def from_json(values: Mapping[str, Any]) -> Result:
        evals = tuple((int(step), tuple(losses)) for step, losses in values["evals"])
        return Result(evals, float(values["step_seconds"]), int(values["peak_memory_bytes"]), values.get("accuracy"))

    @property
    def block_losses(self) -> tuple[float, ...]:
        """The final ones."""
        return self.evals[-1][1]


Results = Mapping[tuple[str, int], Result]


def summarise(records: Sequence[Mapping[str, Any]]) -> Result:
    """A run's result from its metrics. Raises ValueError if it has not evaluated."""
    train = [r for r in records if r["split"] == "train"]
    evals = tuple((r["step"], tuple(r["block_losses"])) for r in records if r["split"] == "eval")
    if not evals or not train:
        raise ValueError("the run's metrics have no evaluation; set eval_batches")
    seconds, memory = median(r["step_seconds"] for r in train), max(r["peak_memory_bytes"] for r in train)
    accuracy = next((r.get("accuracy") for r in reversed(records) if r["split"] == "eval"), None)
    return Result(evals, seconds, memory, accuracy)


def tokens_per_step(config: Config) -> int:
    train = config.train
    return train.per_device_train_batch_size * train.gradient_accumulation_steps * config.data.seq_length


def curve(point: Point, result: Result) -> list[dict[str, float]]:
    """The last block's loss at each evaluation, with the tokens and the FLOPs that were spent until then."""
    config, each = point.config, tokens_per_step(point.config)
    first_global = config.train.max_steps - config.local.final_backprop_steps
    rows = []
    for step, losses in result.evals:
        spent = flops_so_far(point.shape, point.setting, step * each, max(0, step - first_global) * each)
        row = {"tokens": step * each, "flops": spent.total, "sequential_flops": spent.sequential, "loss": losses[-1]}
        rows.append(row)
    return rows


def baseline(study: Study) -> Point | None:
    """The point that trains the whole model by backpropagation."""
    whole = (
        p for p in study.points if not p.config.method.has_local_losses and p.config.model == study.base.config.model
    )
    return next(whole, None)


def compare(study: Study, results: Results) -> Json:
    """Everything about the points, ready for JSON; those without a finished run have no losses."""
    reference = baseline(study)
    return {
        "tokens": tokens_per_step(study.base.config) * study.base.config.train.max_steps,
        "seeds": list(study.seeds),
        "baseline": reference.name if reference else None,
        "points": [_compare_point(study, point, reference, results) for point in study.points],
    }


def _compare_point(study: Study, point: Point, reference: Point | None, results: Results) -> Json:
    mine = {seed: results[point.name, seed] for seed in study.seeds if (point.name, seed) in results}
    flops = count_flops(point.shape, point.setting)
    whole = count_flops(study.base.shape, study.base.setting).backprop
    last = [result.block_losses[-1] for result in mine.values()]
    above = [min(r.block_losses) - r.block_losses[-1] for r in mine.values()]
    known = {**study.base.config.flat(), "method": None}  # a point always says its method
    return {
        "name": point.name,
        "flags": {name: value for name, value in point.config.flat().items() if value != known[name]},
        "blocks": [[span.start, span.stop] for span in point.setting.blocks],
        "flops_per_token": asdict(flops) | {"blocks": list(flops.blocks)},
        "total_flops": flops.total / whole,
        "sequential_flops": flops.sequential / whole,
        "loss": fmean(last) if last else None,
        "loss_std": stdev(last) if len(last) > 1 else None,
        "perplexity_ratio": _perplexity_ratio(point, reference, results, study.seeds),
        "best_exit": fmean(above) if above else None,
        "accuracy": fmean(found) if (found := [r.accuracy for r in mine.values() if r.accuracy is not None]) else None,
        "runs": [
            {
                "seed": seed,
                "block_losses": list(result.block_losses),
                "curve": curve(point, result),
                "step_seconds": result.step_seconds,
                "peak_memory_bytes": result.peak_memory_bytes,
                "accuracy": result.accuracy,
            }
            for seed, result in mine.items()
        ],
    }


def _perplexity_ratio(point: Point, reference: Point | None, results: Results, seeds: Sequence[int]) -> float | None:
    """Geometric mean over the seeds that both have; below 1 the point is better than the reference."""
    if reference is None:
        return None
    both = [seed for seed in seeds if {(point.name, seed), (reference.name, seed)} <= set(results)]
    gaps = [results[point.name, s].block_losses[-1] - results[reference.name, s].block_losses[-1] for s in both]
    return math.exp(fmean(gaps)) if gaps else None


def mean_curve(point: Mapping[str, Any], axis: str) -> list[tuple[float, float]]:
    """(spent, loss) of a point of the comparison at each evaluation, a mean over its runs; axis: what is spent."""
    curves = [run["curve"] for run in point["runs"]]
    losses = [fmean(row["loss"] for row in rows) for rows in zip(*curves, strict=True)]
    return [(row[axis], loss) for row, loss in zip(curves[0], losses, strict=True)]


def front(places: Iterable[tuple[float, float]]) -> list[tuple[float, float]]:
    """The Pareto front of (spent, loss): every place that no other one beats with as little or less."""
    found: list[tuple[float, float]] = []
    for spent, loss in sorted(places):
        if not found or loss < found[-1][1]:
            found.append((spent, loss))
    return found


def table(comparison: Mapping[str, Any]) -> str:
    """A Markdown table, one line a point, and below it what the columns are."""
    count = len(comparison["seeds"])
    lines = [HEADER, ("---", *["---:"] * (len(HEADER) - 1))]
    lines += [_line(point, count) for point in comparison["points"]]
    if any(accuracies := [point.get("accuracy") for point in comparison["points"]]):
        more = ["accuracy", "---:", *("–" if each is None else f"{each:.2%}" for each in accuracies)]
        lines = [(*cells, cell) for cells, cell in zip(lines, more, strict=True)]
    rows = "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
    seeds = "1 seed" if count == 1 else f"{count} seeds, mean ± standard deviation"
    note = (
        f"{comparison['tokens']:,} tokens each; {seeds}. The loss is that of the last block, in nats. "
        "Best exit − last: its distance to the best block's loss, below 0 where an earlier exit is the better model. "
        "FLOPs are relative to "
        "backpropagation through the whole model; the sequential ones are those of the costliest block, which a "
        "machine with a part for every block has to wait for."
    )
    return f"{rows}\n\n{note}\n"


def _line(point: Mapping[str, Any], count: int) -> tuple[str, ...]:
    ratio, found = point["perplexity_ratio"], len(point["runs"])
    loss = "–" if point["loss"] is None else f"{point['loss']:.4f}"
    loss += "" if point["loss_std"] is None else f" ± {point['loss_std']:.4f}"
    loss += f" ({found} of {count} runs)" if found < count else ""
    return (
        point["name"],
        str(len(point["blocks"])),
        loss,
        "–" if ratio is None else f"{100 * (ratio - 1):+.1f} %",
        "–" if point["best_exit"] is None else f"{point['best_exit']:.4f}",
        f"{point['total_flops']:.2f}",
        f"{point['sequential_flops']:.2f}",
    )
