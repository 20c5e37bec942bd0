"""What a rank does in a step, and in an evaluation."""

from __future__ import annotations

import math

from llm_local.evaluation import EvalSet, measures_key, over_replicas
from llm_local.links.packet import EVAL, TRAIN
from llm_local.progress import known_losses
from llm_local.rank import Rank
from llm_local.results import StepResult, skip_step
from llm_local.trace import OUTER_STEP, REFRESH_WAIT, traced


def train_step(rank: Rank, step: int) -> StepResult:
    """Whatever of the run has a part in a step, in order."""
    if rank.refresher is not None:
        with traced(rank.tracer, REFRESH_WAIT):
            rank.refresher.before(step)
    comes = rank.job is None or rank.job.begin(TRAIN, step)
    result = rank.engine.train_batch(step) if comes else skip_step(rank.engine.engines)
    if rank.outer is not None:
        with traced(rank.tracer, OUTER_STEP):
            rank.outer.after(step)
    if rank.refresher is not None:
        rank.refresher.after(step)
    return result


def measure(rank: Rank, step: int, number: int, each: EvalSet) -> None:
    """This stage's exit on a validation set, that of this number in the feed; nobody waits for a later stage."""
    place = rank.world.place
    batches = place.share(rank.config.train.eval_batches)
    rows = batches * rank.config.train.per_device_train_batch_size * place.num_replicas
    if rank.feed is not None:
        rank.feed.validate_on(number)
    if rank.job is not None and not rank.job.begin(EVAL, step):
        if rank.metrics is not None:
            rank.progress.publish(each.split, step, [math.nan])  # for callbacks, who wait
        return
    with rank.traced(each.split, step):
        found = over_replicas(rank.world, rank.engine.eval_batch(step, batches))
    if rank.metrics is not None:
        if found.measures:
            rank.world.publish(measures_key(each.split, step, place.stage), " ".join(map(str, found.measures)))
        losses = known_losses(rank.config, rank.world, each.split, step, found.losses)
        rank.progress.publish(each.split, step, losses)
        padding = 1 - found.tokens / (rows * rank.config.data.seq_length)
        rank.metrics.write(each.record(step, place.stage, losses, found.tokens, padding, found.measures))
