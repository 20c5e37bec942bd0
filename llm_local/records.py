"""Metrics of a stage: one JSON record a logged step, in OUTPUT/metrics/stage-00.jsonl.

Every record speaks of one step. loss, block_losses, step_seconds and wait_seconds are means over the stage's replicas;
tokens, which are those of text, and what is sent and received are their sums; peak_memory_bytes is replica 0's.
wait_seconds is the time that the step was blocked on links, inside step_seconds; save_seconds, of replica 0, that
checkpoints have held the training up since the record before. name, perplexity and bits_per_byte, and accuracy and
top_5_accuracy of classifiers, are of an evaluation: split is "eval" for the first validation set and "eval_NAME" for
the others. padding is the share of the rows' places that hold no token, in this step or evaluation.
sent_replica_bytes, like save_seconds, is all since the record before: what replicas that train apart have sent to each
other; null where they don't. DeepSpeed's own pipeline (--method backprop) has no links of ours: what is counted on
them is null there.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from llm_local.files import Json

FOLDER = "metrics"
DEPTH_TOLERANCE = 0.01  # nats that a deeper exit may be behind a shallower one


@dataclass(frozen=True)
class Record:
    step: int
    split: str
    stage: int
    loss: float
    block_losses: list[float]
    tokens: int
    lr: float | None = None
    grad_norm: float | None = None
    step_seconds: float | None = None
    wait_seconds: float | None = None
    sent_bytes: int | None = None
    received_bytes: int | None = None
    sent_gradient_bytes: int | None = None
    sent_refresh_bytes: int | None = None
    sent_replica_bytes: int | None = None
    save_seconds: float | None = None
    peak_memory_bytes: int | None = None
    name: str | None = None
    perplexity: float | None = None
    bits_per_byte: float | None = None
    padding: float | None = None
    accuracy: float | None = None
    top_5_accuracy: float | None = None


def read_records(path: Path) -> list[Json]:
    """The records of one stage; a last line that a killed run left half written is not one."""
    if not path.exists():
        return []
    records = []
    for line in path.read_text().splitlines():
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return records
