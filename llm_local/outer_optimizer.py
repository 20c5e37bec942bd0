"""Replicas of a stage that meet rarely: each trains by itself for H steps, and an outer step makes one model of them.

DiLoCo (Douillard et al. 2023, arXiv 2311.08105). The anchor is the model that all went on from when they last met. What
they have moved away from it, on average, is the outer gradient, of which SGD with Nesterov momentum makes the next
anchor. Inner optimizers keep their moments.

    step         1  2  ..  H  H+1  ..  2H
    replica 0    ──────────┐  ┌──────────┐
    replica 1    ──────────┴──┴──────────┴──      --replica_sync_steps H

Between two meetings the model is the mean of the replicas: what is evaluated and exported. A checkpoint has each
replica's weights and optimizer, so that a run goes on from any step as if it had not stopped.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from deepspeed.runtime.engine import DeepSpeedEngine

from llm_local.adapters.deepspeed_internals import forget_second_copies
from llm_local.checkpoint.catalog import Catalog, read_manifest
from llm_local.checkpoint.shards import OUTER, Shard, Stretch, shards
from llm_local.flags import LocalArguments
from llm_local.world import Place, World

ANCHOR, MOMENTUM = "anchor", "momentum_buffer"  # the latter as torch's SGD calls it
_ELEMENTS_AT_A_TIME = 1 << 24
# with others than these a replica's own weights, and the matrices that its heads read, are of another timetable
_MUST_MATCH = ("replica_sync_steps", "head_refresh_steps")


def open_checkpoint(checkpoint: Path, local: LocalArguments, place: Place) -> Catalog:
    """With the rank's own weights, where the run goes on with replicas that were apart; else with those of all, or with
    their mean. Raises BrokenCheckpoint."""
    manifest = read_manifest(checkpoint)
    is_alike = all(manifest.flags.get(name) == getattr(local, name) for name in _MUST_MATCH)
    return Catalog(checkpoint, (place.replica, place.num_replicas) if manifest.apart and is_alike else None)


class OuterOptimizer:
    """One replica's part of the meetings of its stage. Anchor and momentum are in host memory, float32, and flat."""

    def __init__(self, engines: Sequence[DeepSpeedEngine], world: World, local: LocalArguments):
        self._sent_bytes = 0
        self._engines = engines
        self._world = world
        self._every = local.replica_sync_steps
        self._is_apart = False
        self._anchor = self._weights()
        momentum = local.outer_momentum
        self._sgd = torch.optim.SGD(
            [self._anchor], lr=local.outer_learning_rate, momentum=momentum, nesterov=momentum > 0
        )
        if momentum:
            self._sgd.state[self._anchor][MOMENTUM] = torch.zeros_like(self._anchor)

    def begin(self) -> None:
        """With the first replica's weights. Every replica must call."""
        self._world.take_from_first_replica(self._anchor)
        self._put(self._anchor)

    def take_up(self, catalog: Catalog) -> None:
        """Goes on from a checkpoint that the engines have taken up; what it has no anchor of has met there."""
        self._is_apart = catalog.replica is not None
        wanted: dict[str, Stretch] = {}
        for shard, part in self._parts():
            source = catalog.source(shard.name, part.stop - part.start)
            for key, values in self._kept().items():
                name = catalog.source(f"{source}{OUTER}{key}", part.stop - part.start)
                if name is not None:
                    wanted[name] = Stretch(part.stop - part.start, 0, values[part])
        catalog.read(wanted)

    def state(self) -> dict[str, torch.Tensor]:
        """What a checkpoint needs, by name; the same on all replicas."""
        kept = self._kept().items()
        return {f"{shard.name}{OUTER}{key}": values[part] for shard, part in self._parts() for key, values in kept}

    def after(self, step: int) -> None:
        """Meets, if it is time, after this step of the engines. Every replica must call."""
        self._is_apart = True
        if step % self._every == 0:
            self._anchor.grad = self._moved()
            self._sgd.step()
            self._anchor.grad = None
            self._settle_at(self._anchor)

    def settle(self) -> None:
        """Puts the mean of the replicas in the place of each, for good. Every replica must call."""
        if self._is_apart:
            self._settle_at(self._anchor - self._moved())

    def take_sent_bytes(self) -> int:
        """What was sent to the other replicas since the last call."""
        sent, self._sent_bytes = self._sent_bytes, 0
        return sent

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """The engines have the mean of the replicas meanwhile. Every replica must call."""
        if not self._is_apart:
            yield
            return
        own = self._weights()
        self._put(self._anchor - self._moved())
        try:
            yield
        finally:
            self._put(own)

    def _settle_at(self, weights: torch.Tensor) -> None:
        self._put(weights)
        self._is_apart = False

    def _kept(self) -> dict[str, torch.Tensor]:
        return {ANCHOR: self._anchor, **self._sgd.state[self._anchor]}

    def _parts(self) -> Iterator[tuple[Shard, slice]]:
        """What the engines train, in order, and where it lies in a flat tensor of all."""
        start = 0
        for shard in (shard for engine in self._engines for shard in shards(engine, self._world.shard)):
            if shard.master is not None and shard.holder is not None:
                yield shard, slice(start, start + shard.master.numel)
                start += shard.master.numel

    def _weights(self) -> torch.Tensor:
        """A copy of this replica's, flat."""
        masters = [shard.master for shard, _ in self._parts()]
        return torch.cat([each.values.to("cpu", torch.float32) for each in masters if each is not None])

    @torch.no_grad()
    def _put(self, weights: torch.Tensor) -> None:
        """The inverse of `_weights`."""
        for shard, part in self._parts():
            assert shard.master is not None
            for stretch in (shard.master, *shard.weights):
                stretch.values.copy_(weights[part])
        for engine in self._engines:
            forget_second_copies(engine)

    def _moved(self) -> torch.Tensor:
        """How far the replicas are from the anchor, on average."""
        moved = self._anchor - self._weights()
        for some in moved.split(_ELEMENTS_AT_A_TIME):
            some.copy_(self._world.mean_over_replicas(some))
        replicas = self._world.place.num_replicas
        self._sent_bytes += 2 * (replicas - 1) * moved.nbytes // replicas  # of a ring
        return moved


def make_outer(
    local: LocalArguments, world: World, engines: Sequence[DeepSpeedEngine], catalog: Catalog | None
) -> OuterOptimizer | None:
    """Of a new run, or one that has taken up a checkpoint; None where replicas don't train apart. Every replica must
    call."""
    if not world.is_apart:
        return None
    outer = OuterOptimizer(engines, world, local)
    if catalog is None:
        outer.begin()
    else:
        outer.take_up(catalog)
    return outer
