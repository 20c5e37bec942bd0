"""What layouts are worth on machines that fail: as jobs of their own where stages can live alone, and in one launch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from llm_local.config import Config
from llm_local.flags import SAVE_STEPS
from llm_local.memory.division import WHOLE
from llm_local.plan.layouts import Outcome
from llm_local.simulator.failures import Failures, as_jobs, in_one_launch

_GB = 10**9
MOST_LOGGED = 20  # intervals between checkpoints; more room changes nothing any more


@dataclass(frozen=True)
class Share:
    """What is left of a layout's throughput; as_jobs: None where stages cannot live alone."""

    layout: str
    num_stages: int
    as_jobs: float | None
    in_one_launch: float


def shares(
    config: Config, local: Sequence[Outcome], peers: Sequence[Outcome], mean_seconds: float, restart_seconds: float
) -> list[Share]:
    """Of layouts whose stages fail every mean_seconds, each, on average."""
    return [_share(config, each, mean_seconds, restart_seconds, each in local) for each in (*local, *peers)]


def _share(config: Config, outcome: Outcome, mean_seconds: float, restart_seconds: float, is_local: bool) -> Share:
    stages, seconds = outcome.layout.num_stages, outcome.step_seconds
    save_steps = int(config.save_interval) or SAVE_STEPS
    capacity = (config.local.log_memory_gb + config.local.log_disk_gb) * _GB
    step_bytes = outcome.tokens * outcome.forward_bytes / min(outcome.layout.replicas[:-1], default=1)
    log_steps = int(min(capacity / step_bytes, MOST_LOGGED * save_steps)) if step_bytes else MOST_LOGGED * save_steps
    failures = Failures(mean_seconds, restart_seconds, save_steps, log_steps)
    lives_alone = is_local and stages > 1 and log_steps > save_steps and outcome.layout.division == WHOLE
    alone = as_jobs([seconds] * stages, failures) if lives_alone else None
    return Share(str(outcome.layout), stages, alone, in_one_launch(seconds, stages, failures))


def text(found: Sequence[Share], mean_seconds: float, restart_seconds: float) -> str:
    """For a person."""
    rows = [("layout", "stages as jobs", "one launch")]
    for each in found:
        alone = "" if each.as_jobs is None else f"{each.as_jobs:.1%}"
        rows.append((each.layout, alone, f"{each.in_one_launch:.1%}"))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows]
    title = f"Throughput that is left when each stage fails every {mean_seconds / 3600:g} h and is back in"
    return "\n".join([f"{title} {restart_seconds:g} s:", *(f"  {line}" for line in lines)])
