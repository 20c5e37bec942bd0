"""Writes checkpoints beside the training.

A save copies what this rank owns to host memory, which is all that training waits for; a thread writes the copy, and
the thread that finishes last of all ranks commits the checkpoint. So no stage waits for another to save, a kill at any
moment leaves the checkpoints that are committed, and a folder without a manifest is never picked.
"""

from __future__ import annotations

import json
import os
import shutil
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from deepspeed.runtime.engine import DeepSpeedEngine

from llm_local.adapters.deepspeed_internals import base_optimizer
from llm_local.checkpoint.catalog import OUTER_FILE, STATE_FILE, replica_file, replica_folder, save_stretches
from llm_local.checkpoint.line import FOLDER, checkpoint_of, committed
from llm_local.checkpoint.manifest import MANIFEST, Layout, Manifest
from llm_local.checkpoint.shards import (
    OUTER,
    PART,
    SCALAR,
    STATE,
    check_masters,
    cuts_of,
    saved_module,
    shards,
    states_of,
)
from llm_local.config import Config
from llm_local.ds_config import load_json
from llm_local.files import unwritten, writing
from llm_local.jobs.positions import NOTE, Neighbourhood, Positions
from llm_local.rendezvous import fetch
from llm_local.world import World

SHARED = "shared/"
REPAIR = "the checkpoints before it are whole: make room, and resume"
_LOSS_SCALE = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")


class UnsavedCheckpoint(RuntimeError):
    """No checkpoint can be made of what is trained, or by what trains it; those before it are whole."""


class Saver:
    """Writes this rank's part of every checkpoint of a run, one at a time. best: finds the step of the one
    that load_best_model_at_end keeps. job: where the launch is that of one stage."""

    def __init__(
        self,
        world: World,
        config: Config,
        layout: Layout,
        best: Callable[[], int | None],
        job: Neighbourhood | None = None,
    ):
        self._seconds = 0.0
        self._world = world
        self._store = world.store.clone()
        self.layout = layout
        self._flags, self._deepspeed = config.flat(), load_json(config)
        self._folder = config.output_dir / FOLDER
        self._limit = config.train.save_total_limit
        self._best = best if config.train.load_best_model_at_end else lambda: None
        self._thread: threading.Thread | None = None
        self._failure: Exception | None = None
        self._checked = False
        self._job = job

    def save(
        self,
        engines: Sequence[DeepSpeedEngine],
        step: int,
        rows: int,
        further: Mapping[str, torch.Tensor] | None = None,
        notes: Mapping[str, Any] | None = None,
        positions: Positions | None = None,
    ) -> None:
        """Saves what is true after `step`, with `rows` sequences used up. Every replica of the stage must call.

        further: tensors that are the same on all replicas, by name, those of the outer optimizer among them. notes:
        further JSON files of the stage, by name. positions: of a job's links. Raises Unwritten where this save cannot
        begin or the one before has failed, and MisplacedWeights rather than save another model than is trained.
        """
        start = time.perf_counter()
        self.wait()
        if not self._checked:
            check_masters(engines, self._world.shard)
            self._checked = True
        place, root = self._world.place, checkpoint_of(self._folder.parent, step)
        folder = root / f"stage-{place.stage:02d}"
        own = replica_folder(folder, place.replica) if self._world.is_apart else folder
        if place.is_recorder:  # what a killed run left half written, or one that went on from before
            with writing(folder, repair=REPAIR):
                (root / MANIFEST).unlink(missing_ok=True)
                shutil.rmtree(folder, ignore_errors=True)
                folder.mkdir(parents=True)
        self._world.stage_barrier()
        with writing(own, repair=REPAIR):
            own.mkdir(exist_ok=True)
        tensors, starts = snapshot(engines, self._world.shard, place.tensor_rank)
        files: dict[Path, str] = {}
        outer: dict[str, torch.Tensor] = {}
        if place.is_recorder or self._world.is_apart:
            for name, tensor in (further or {}).items():
                kept = outer if OUTER in name else tensors
                kept[name] = tensor.detach().to("cpu", copy=True).view(-1)
            files[own / STATE_FILE] = json.dumps([block_state(engine) for engine in engines])
        shares = [(own / replica_file(place.data_rank, place.tensor_rank), tensors)]
        if place.is_recorder:
            notes = {**(notes or {}), NOTE: asdict(positions) if positions else None}
            files |= {folder / name: json.dumps(value) for name, value in notes.items() if value}
            if outer:
                shares.append((folder / OUTER_FILE, outer))
        manifest = Manifest(step, rows, self.layout, self._flags, _versions(), self._deepspeed)
        manifest = replace(manifest, apart=self._world.is_apart)
        if self._job is not None:
            manifest = replace(manifest, stages=[place.stage], run=self._job.run)
        arguments = (shares, starts, files, manifest, positions)
        self._thread = threading.Thread(target=self._write, args=arguments, name="save", daemon=True)
        self._thread.start()
        self._seconds += time.perf_counter() - start

    def take_seconds(self) -> float:
        """How long saving has held the training up since the last call."""
        seconds, self._seconds = self._seconds, 0.0
        return seconds

    def wait(self) -> None:
        """Until this rank's part of the last save is on the disk. Raises Unwritten if it is not."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        self.check()

    def check(self) -> None:
        """Raises Unwritten, or what else it was, if a save has failed; waits for nothing."""
        if self._failure is not None:
            raise self._failure

    def _write(
        self,
        shares: Sequence[tuple[Path, dict[str, torch.Tensor]]],
        starts: dict[str, int],
        files: dict[Path, str],
        manifest: Manifest,
        positions: Positions | None,
    ) -> None:
        path = root = checkpoint_of(self._folder.parent, manifest.step)
        try:
            for path, tensors in shares:
                save_stretches(tensors, starts, path)
                _to_disk(path)
            for path, text in files.items():
                path.write_text(text + "\n")
                _to_disk(path)
            if self._job is not None and positions is not None:
                self._job.persist(positions)
            path, key = root / MANIFEST, f"committed/{manifest.step}"
            if self._store.add(f"saved/{manifest.step}", 1) == self._world.place.world_size:
                _commit(path, manifest)
                best = self._best()
                kept = None if best is None else checkpoint_of(self._folder.parent, best)
                _remove_old(root, self._limit, kept, self._job.rescue() if self._job is not None else None)
                self._store.set(key, "1")
            if self._job is not None and positions is not None:
                fetch(self._store, key, self._world.timeout_seconds, f"the others to save step {manifest.step}")
                self._job.made_durable(positions)
        except Exception as error:  # the training thread raises it
            self._failure = unwritten(error, path, repair=REPAIR) or error
            if not (root / MANIFEST).exists():  # an older one may be what cannot be removed
                shutil.rmtree(root / f"stage-{self._world.place.stage:02d}", ignore_errors=True)


def snapshot(
    engines: Sequence[DeepSpeedEngine], replica: int, tensor_rank: int = 0
) -> tuple[dict[str, torch.Tensor], dict[str, int]]:
    """Copies in host memory of all that this rank owns, flat, and the first element of each in its tensor.

    What every replica has is replica 0's to save, what every rank of a replica has the first one's. Raises
    UnsavedCheckpoint for an optimizer whose state is neither one number for each weight nor one for the parameter.
    """
    tensors: dict[str, torch.Tensor] = {}
    starts: dict[str, int] = {}
    for engine in engines:
        for shard in shards(engine, replica):
            if shard.master is None or (shard.is_replicated and replica > 0):
                continue
            cut = shard.master.cut
            if cut is None and tensor_rank > 0:
                continue
            part = "" if cut is None else f"{PART}{cut.rank}"
            tensors[f"{shard.name}{part}"] = shard.master.values.to("cpu", copy=True)
            starts[f"{shard.name}{part}"] = shard.master.start
            state = {} if shard.holder is None else states_of(engine).get(shard.holder, {})
            for key, value in state.items():
                if isinstance(value, torch.Tensor) and shard.fits(value):
                    tensors[f"{shard.name}{STATE}{key}{part}"] = shard.part(value.detach()).to("cpu", copy=True)
                    starts[f"{shard.name}{STATE}{key}{part}"] = shard.master.start
                elif isinstance(value, (int, float)) or (isinstance(value, torch.Tensor) and value.numel() == 1):
                    if shard.master.start == 0 and tensor_rank == 0:
                        tensors[f"{shard.name}{SCALAR}{key}"] = torch.as_tensor(value).cpu().clone().view(1)
                else:
                    kind = type(base_optimizer(engine.optimizer)).__name__
                    raise UnsavedCheckpoint(
                        f"{kind} keeps {key} of {shard.name} in a shape that no checkpoint can hold"
                    )
    return tensors, starts


def block_state(engine: DeepSpeedEngine) -> dict[str, Any]:
    """Where the block's schedule stands, which names stand for others, how tensors are cut, and with fp16 its loss
    scale."""
    scheduler: Any = engine.lr_scheduler
    position = {"last_epoch": getattr(scheduler, "last_epoch", None)}
    if position["last_epoch"] is None:  # DeepSpeed's own count from -1
        position["last_epoch"] = scheduler.last_batch_iteration + 1
    module = saved_module(engine)
    span = None if module.span is None else [module.span.start, module.span.stop]
    scales = {f"{number}.{name}": value for number, name, _, value in loss_scales(engine)}
    cuts = {name: asdict(cut) for name, cut in cuts_of(engine).items()}
    return {"span": span, "tied": module.tied_names(), "scheduler": position, "loss_scale": scales, "cuts": cuts}


def loss_scales(engine: DeepSpeedEngine) -> list[tuple[int, str, Any, float]]:
    """(owner's number, name, owner, value) of what a dynamic loss scale consists of; nothing but with fp16."""
    optimizer: Any = engine.optimizer
    owners = (optimizer, getattr(optimizer, "loss_scaler", None)) if engine.fp16_enabled() else ()
    found = []
    for number, owner in enumerate(owners):
        for name in _LOSS_SCALE:
            value = getattr(owner, name, None)
            if isinstance(value, (int, float)):
                found.append((number, name, owner, value))
    return found


def _versions() -> dict[str, str]:
    import deepspeed

    return {"torch": torch.__version__, "deepspeed": deepspeed.__version__}


def _commit(path: Path, manifest: Manifest) -> None:
    draft = path.with_suffix(".draft")
    draft.write_text(json.dumps(asdict(manifest), indent=1) + "\n")
    _to_disk(draft)
    os.replace(draft, path)


def _to_disk(path: Path) -> None:
    """Forces a file out of the page cache: the manifest must not overtake it."""
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


def _remove_old(newest: Path, limit: int | None, *kept: Path | None) -> None:
    """Keeps the newest, which has just been written, those before it up to the limit, and these."""
    line = [path for path in committed(newest.parent.parent) if path.name <= newest.name]
    for old in line[: -limit if limit else 0]:
        if old in kept:
            continue
        (old / MANIFEST).unlink()  # first, so that a half-removed checkpoint is not one
        shutil.rmtree(old)
