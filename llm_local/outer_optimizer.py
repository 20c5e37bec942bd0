"""Replicas of a stage that meet rarely: each trains by itself for H steps, and an outer step makes one model of them.

DiLoCo (Douillard et al. 2023, arXiv 2311.08105). The anchor is the model that all went on from when they last met. What
they have moved away from it, on average, is the outer gradient, of which SGD with Nesterov momentum makes the next
anchor. Inner optimizers keep their moments.

    step         1  2  ..  H  H+1  ..  2H
    replica 0    ──────────┐  ┌──────────┐
    replica 1    ──────────┴──┴──────────┴──      --replica_sync_steps H

With --replica_sync_fragments each part of the weights has steps of its own to meet in, so that less is sent at a time,
and with --replica_sync_delay the replicas train on while it travels (Streaming DiLoCo, Douillard et al. 2025, arXiv
2501.18512). What they have learned meanwhile is not lost: each goes on from halfway to the new anchor.

    step         1  2  3  4  5  6  7  8       H = 4, two fragments, a delay of 1
    fragment 0            ├──┤        ├──     sent after step 4, put in the place of the replicas' after step 5
    fragment 1      ├──┤        ├──┤          sent after step 2, ...

Between two meetings the model is the mean of the replicas: what is evaluated and exported. A checkpoint has each
replica's weights and optimizer, so that a run goes on from any step as if it had not stopped.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from deepspeed.runtime.engine import DeepSpeedEngine

from llm_local.adapters.deepspeed_internals import forget_second_copies
from llm_local.checkpoint.catalog import Catalog
from llm_local.checkpoint.manifest import read_manifest
from llm_local.checkpoint.shards import OUTER, Shard, Stretch, shards
from llm_local.flags import LocalArguments
from llm_local.place import Place
from llm_local.world import World

ANCHOR, MOMENTUM = "anchor", "momentum_buffer"  # the latter as torch's SGD calls it
MOVED = "moved"  # of what is on its way
_OWN_SHARE = 0.5  # of a replica's own weights where they have gone on meanwhile: Streaming DiLoCo's alpha
# with others than these a replica's own weights, and the matrices that its heads read, are of another timetable
_MUST_MATCH = ("replica_sync_steps", "replica_sync_fragments", "replica_sync_delay", "head_refresh_steps")


def open_checkpoint(checkpoint: Path, local: LocalArguments, place: Place) -> Catalog:
    """With the rank's own weights, where the run goes on with replicas that were apart; else with those of all, or with
    their mean. Raises BrokenCheckpoint."""
    manifest, before = read_manifest(checkpoint), LocalArguments()  # what a flag is that there was not yet
    is_alike = all(manifest.flags.get(name, getattr(before, name)) == getattr(local, name) for name in _MUST_MATCH)
    return Catalog(checkpoint, (place.replica, place.num_replicas) if manifest.apart and is_alike else None)


@dataclass(frozen=True)
class Meetings:
    """The steps after which a fragment is sent, and when it has come."""

    every: int
    delay: int
    first: int  # 0: as many steps after the start as between two

    def is_sent(self, step: int) -> bool:
        return step % self.every == self.first

    def is_due(self, step: int) -> bool:
        """Whether what was sent is taken up after this step."""
        return step > self.delay and self.is_sent(step - self.delay)

    def is_on_its_way(self, step: int) -> bool:
        return any(each > 0 and self.is_sent(each) for each in range(step - self.delay + 1, step + 1))


@dataclass
class _Fragment:
    """Weights that meet together. anchor: their part of it, a view; moved: waits for what is on its way."""

    meetings: Meetings
    part: slice
    anchor: torch.Tensor
    moved: Callable[[], torch.Tensor] | None = None

    def has(self, part: slice) -> bool:
        return self.part.start <= part.start < self.part.stop


class OuterOptimizer:
    """One replica's part of the meetings of its stage. Anchor and momentum are in host memory, float32, and flat."""

    def __init__(self, engines: Sequence[DeepSpeedEngine], world: World, local: LocalArguments):
        self._sent_bytes = 0
        self._engines = engines
        self._world = world
        self._is_apart = False
        self._anchor = self._weights()
        self._fragments = list(self._cut(local))
        momentum = local.outer_momentum
        anchors = [each.anchor for each in self._fragments]
        self._sgd = torch.optim.SGD(anchors, lr=local.outer_learning_rate, momentum=momentum, nesterov=momentum > 0)
        self._kept = {ANCHOR: self._anchor}
        if momentum:
            self._kept[MOMENTUM] = torch.zeros_like(self._anchor)
            for each in self._fragments:
                self._sgd.state[each.anchor][MOMENTUM] = self._kept[MOMENTUM][each.part]

    def begin(self) -> None:
        """With the first replica's weights. Every replica must call."""
        self._world.take_from_first_replica(self._anchor)
        self._put(self._anchor)

    def restore(self, catalog: Catalog) -> None:
        """Goes on from a checkpoint that the engines were restored from; what it has no anchor of has met there."""
        self._is_apart = catalog.replica is not None
        kept = {**self._kept, MOVED: torch.zeros_like(self._anchor)}
        wanted: dict[str, Stretch] = {}
        for shard, part in self._parts():
            source = catalog.source(shard.name, part.stop - part.start)
            for key, values in kept.items():
                name = catalog.source(f"{source}{OUTER}{key}", part.stop - part.start)
                if name is not None:
                    wanted[name] = Stretch(part.stop - part.start, 0, values[part])
        catalog.read(wanted)
        for each in self._fragments:
            if self._is_apart and each.meetings.is_on_its_way(catalog.manifest.step):
                each.moved = partial(kept[MOVED].__getitem__, each.part)

    def state(self) -> dict[str, torch.Tensor]:
        """What a checkpoint needs, by name; the same on all replicas."""
        kept = self._kept.items()
        found = {f"{shard.name}{OUTER}{key}": values[part] for shard, part in self._parts() for key, values in kept}
        for each in self._fragments:
            for shard, part in self._parts():
                if each.moved is not None and each.has(part):
                    start = part.start - each.part.start
                    found[f"{shard.name}{OUTER}{MOVED}"] = each.moved()[start : start + part.stop - part.start]
        return found

    def after(self, step: int) -> None:
        """Meets, if it is time, after this step of the engines. Every replica must call."""
        self._is_apart = True
        for each in self._fragments:
            if each.meetings.is_sent(step):
                each.moved = self._send(each)
            if each.moved is not None and each.meetings.is_due(step):
                each.anchor.grad, each.moved = each.moved(), None
                self._sgd.step()
                each.anchor.grad = None
                self._go_on_from(each)

    def settle(self) -> None:
        """Puts the mean of the replicas in the place of each, for good. Every replica must call."""
        if self._is_apart:
            for each in self._fragments:
                if each.moved is not None:  # which nobody waits for any more
                    each.moved()
                    each.moved = None
            self._put(self._mean())
            self._is_apart = False

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
        self._put(self._mean())
        try:
            yield
        finally:
            self._put(own)

    def _cut(self, local: LocalArguments) -> Iterator[_Fragment]:
        """Fragments of whole parameters, as equal as these allow; none is empty."""
        every, count, total = local.replica_sync_steps, local.replica_sync_fragments, len(self._anchor)
        starts: dict[int, int] = {}
        for _, part in self._parts():
            starts.setdefault(part.start * count // total, part.start)
        for (number, start), stop in zip(starts.items(), [*starts.values(), total][1:], strict=True):
            meetings = Meetings(every, local.replica_sync_delay, every * number // count)
            yield _Fragment(meetings, slice(start, stop), self._anchor[start:stop])

    def _go_on_from(self, fragment: _Fragment) -> None:
        """From its new anchor; from halfway to it where the replicas have trained meanwhile."""
        if fragment.meetings.delay:
            self._put(torch.lerp(fragment.anchor, self._weights(fragment), _OWN_SHARE), fragment)
        else:
            self._put(fragment.anchor, fragment)
            self._is_apart = len(self._fragments) > 1

    def _parts(self) -> Iterator[tuple[Shard, slice]]:
        """What the engines train, in order, and where it lies in a flat tensor of all."""
        start = 0
        for shard in (shard for engine in self._engines for shard in shards(engine, self._world.shard)):
            if shard.master is not None and shard.holder is not None:
                yield shard, slice(start, start + shard.master.numel)
                start += shard.master.numel

    def _weights(self, fragment: _Fragment | None = None) -> torch.Tensor:
        """A copy of this replica's, flat; of a fragment's, given one."""
        masters = [shard.master for shard, part in self._parts() if fragment is None or fragment.has(part)]
        return torch.cat([each.values.to("cpu", torch.float32) for each in masters if each is not None])

    @torch.no_grad()
    def _put(self, weights: torch.Tensor, fragment: _Fragment | None = None) -> None:
        """The inverse of `_weights`; of a fragment's, given those alone."""
        first = fragment.part.start if fragment else 0
        for shard, part in self._parts():
            assert shard.master is not None
            if fragment is None or fragment.has(part):
                for stretch in (shard.master, *shard.weights):
                    stretch.values.copy_(weights[part.start - first : part.stop - first])
        for engine in self._engines:
            forget_second_copies(engine)

    def _mean(self) -> torch.Tensor:
        """The replicas' weights, on average."""
        return self._anchor - self._send()()

    def _send(self, fragment: _Fragment | None = None) -> Callable[[], torch.Tensor]:
        """How far the replicas are from the anchor, or from a fragment's, on average, once it has come."""
        moved = (fragment.anchor if fragment else self._anchor) - self._weights(fragment)
        replicas = self._world.place.num_replicas
        self._sent_bytes += 2 * (replicas - 1) * moved.nbytes // replicas  # of a ring
        return self._world.begin_mean(moved)


def make_outer(
    local: LocalArguments, world: World, engines: Sequence[DeepSpeedEngine], catalog: Catalog | None
) -> OuterOptimizer | None:
    """Of a new run or a restored one; None where replicas don't train apart. Every replica must call."""
    if not world.is_apart:
        return None
    outer = OuterOptimizer(engines, world, local)
    if catalog is None:
        outer.begin()
    else:
        outer.restore(catalog)
    return outer
