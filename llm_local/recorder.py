"""What a stage's step was, for the metrics file and the progress line."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass

import torch

from llm_local.checkpoint.saver import Saver
from llm_local.config import Config
from llm_local.device import finish_queued_work, peak_memory_bytes
from llm_local.links.links import Links
from llm_local.metrics import MetricsFile, total_norm
from llm_local.model.refresh import Refresher
from llm_local.outer_optimizer import OuterOptimizer
from llm_local.progress import Progress, known_losses
from llm_local.records import Record
from llm_local.results import StepResult
from llm_local.world import World


@dataclass(frozen=True)
class _Meter:
    """The clock, and what links have counted so far: in seconds, and in bytes."""

    clock: float
    wait: float
    sent: float
    received: float
    gradients: float
    refreshes: float

    def since(self, before: _Meter) -> list[float]:
        return [getattr(self, name) - getattr(before, name) for name in self.__dataclass_fields__]


@dataclass(frozen=True)
class Traffic:
    """All by which a rank tells others something of its training."""

    links: Links
    refresher: Refresher | None
    outer: OuterOptimizer | None

    def meter(self) -> _Meter:
        links, refresher = self.links, self.refresher
        return _Meter(
            time.perf_counter(),
            sum(link.wait_seconds for link in links.all()) + (refresher.wait_seconds if refresher else 0.0),
            links.sender.bytes if links.sender else 0,
            links.receiver.bytes if links.receiver else 0,
            links.gradient_sender.bytes if links.gradient_sender else 0,
            refresher.sent_bytes if refresher else 0,
        )


class Recorder:
    """One for each rank; the first replica of a stage has the metrics file and writes for all."""

    def __init__(
        self,
        config: Config,
        world: World,
        traffic: Traffic,
        saver: Saver,
        metrics: MetricsFile | None,
        progress: Progress,
    ):
        self._config = config
        self._world = world
        self._traffic = traffic
        self._saver = saver
        self._metrics = metrics
        self._progress = progress
        self._before = traffic.meter()
        self._begun = world.clock.here()

    def begin(self) -> None:
        """A step begins; on the device when what is queued before it is done."""
        self._before = self._traffic.meter()
        self._begun = self._world.clock.here()

    def end(self, tokens: int) -> None:
        """A step has ended, recorded or not; tokens: of all replicas, known where the progress is shown."""
        self._progress.step(time.perf_counter() - self._before.clock, tokens)

    def record(self, step: int, result: StepResult) -> Record | None:
        """The step's record, means and sums over the replicas, written on the stage's first replica; None on others.
        Every rank must call."""
        finish_queued_work(self._world.device)
        begun = self._begun.result()
        _, *moved = self._traffic.meter().since(self._before)
        mine = [time.perf_counter() - begun, *moved]
        outer, layout = self._traffic.outer, self._saver.layout
        others = [outer.take_sent_bytes() if outer else 0, total_norm(result.grad_norms), result.tokens]
        values = torch.tensor([*result.losses.tolist(), *mine, *map(float, others)], dtype=torch.float64)
        *means, sent_each, norm, tokens_each = self._world.mean_over_replicas(values).tolist()
        losses, (seconds, wait, *moved) = means[: len(result.losses)], means[len(result.losses) :]
        counted = not self._config.is_pipelined  # DeepSpeed's pipeline moves its packets by itself
        ranks = self._world.place.data_ranks
        sent, received, gradients, refreshes = (round(bytes_ * ranks) if counted else None for bytes_ in moved)
        if self._metrics is None:
            return None
        tokens, places = round(tokens_each * ranks), layout.sequences_per_step * layout.seq_length
        losses = [*known_losses(self._config, self._world, "train", step, losses)]
        self._progress.publish("train", step, losses)
        record = Record(
            step=step,
            split="train",
            stage=self._world.place.stage,
            loss=losses[-1],
            block_losses=losses,
            tokens=tokens,
            lr=result.lr,
            grad_norm=norm if math.isfinite(norm) else None,
            step_seconds=seconds,
            wait_seconds=wait if counted else None,
            sent_bytes=sent,
            received_bytes=received,
            sent_gradient_bytes=gradients,
            sent_refresh_bytes=refreshes,
            sent_replica_bytes=round(sent_each * ranks) if outer else None,
            save_seconds=self._saver.take_seconds(),
            peak_memory_bytes=peak_memory_bytes(self._world.device),
            padding=1 - tokens / places,
        )
        self._metrics.write(record)
        return record
