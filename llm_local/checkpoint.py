"""Checkpoints: DeepSpeed's files for each block, and a manifest that is written last.

    OUTPUT/checkpoints/step-00000200/stage-00/block-000/...   DeepSpeed's own files
    OUTPUT/checkpoints/step-00000200/stage-00/rng-00.safetensors
    OUTPUT/checkpoints/step-00000200/manifest.json            the commit mark

No stage waits for another to save: whoever finishes last writes the manifest. A folder without one is half written
and is never picked. Loading runs no code from the files: only tensors and DeepSpeed's own few classes are unpickled.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from deepspeed.runtime.checkpoint_engine import TorchCheckpointEngine
from deepspeed.runtime.engine import DeepSpeedEngine
from safetensors.torch import load_file, save_file
from transformers import PretrainedConfig

from llm_local.config import ConfigError, RunConfig
from llm_local.device import restore_rng_states, rng_states
from llm_local.ds_config import load_json, zero_stage
from llm_local.partition import Partition
from llm_local.world import Place, World

MANIFEST = "manifest.json"
_TAG = "state"


@dataclass(frozen=True)
class Layout:
    """What a run must share with a checkpoint to go on from it."""

    method: str
    num_stages: int
    replicas: int
    blocks: list[list[int]]
    head_layers: int
    zero_stage: int
    precision: str
    sequences_per_step: int
    seq_length: int
    seed: int
    model: str


def layout_of(config: RunConfig, partition: Partition, num_replicas: int, model_config: PretrainedConfig) -> Layout:
    shape = json.dumps(model_config.to_diff_dict(), sort_keys=True, default=str)
    train = config.train
    return Layout(
        method=config.local.method,
        num_stages=partition.num_stages,
        replicas=num_replicas,
        blocks=[[b.start, b.stop] for b in partition.blocks],
        head_layers=config.private_head_layers,
        zero_stage=zero_stage(load_json(config)),
        precision=config.precision,
        sequences_per_step=train.per_device_train_batch_size * train.gradient_accumulation_steps * num_replicas,
        seq_length=config.data.seq_length,
        seed=train.seed,
        model=f"{model_config.model_type}-{hashlib.sha256(shape.encode()).hexdigest()[:8]}",
    )


def find_checkpoint(config: RunConfig) -> Path | None:
    """The checkpoint that --resume_from_checkpoint means; None if the flag is not set.

    Raises ConfigError if there is none, or if it is only half written.
    """
    wanted = config.train.resume_from_checkpoint
    if wanted is None or wanted.lower() == "false":
        return None
    place = config.output_dir if wanted.lower() in ("true", "last", "latest") else Path(wanted)
    if place.name.startswith("step-"):
        if not (place / MANIFEST).exists():
            raise ConfigError([f"resume_from_checkpoint={place} has no {MANIFEST}: it is missing or half written"])
        return place
    committed = sorted((place / "checkpoints").glob(f"step-*/{MANIFEST}"))
    if not committed:
        raise ConfigError([f"resume_from_checkpoint={wanted}: no complete checkpoint in {place / 'checkpoints'}"])
    return committed[-1].parent


def read_manifest(checkpoint: Path) -> dict[str, Any]:
    """Raises ConfigError naming the file if it is no manifest of ours."""
    path = checkpoint / MANIFEST
    try:
        manifest = json.loads(path.read_text())
        return {name: manifest[name] for name in ("step", "layout", "carried_over")}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError([f"{path} cannot be read ({error}); name another checkpoint"]) from error


def read_step(checkpoint: Path) -> int:
    return int(read_manifest(checkpoint)["step"])


def layout_problems(checkpoint: Path, layout: Layout) -> list[str]:
    """Where the run differs from the checkpoint's, naming both sides."""
    saved = read_manifest(checkpoint)["layout"]
    wanted = asdict(layout)
    return [
        f"{checkpoint} was written with {name}={saved.get(name)}, this run has {name}={value}; "
        "resuming with another layout is not built yet"
        for name, value in wanted.items()
        if saved.get(name) != value
    ]


def carried_over(config: RunConfig) -> dict[str, float]:
    """Flags that an optimizer's or a scheduler's saved state brings back, whatever a resumed run says."""
    train = config.train
    names = ("learning_rate", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon")
    return {name: getattr(train, name) for name in names}


def resume_warnings(checkpoint: Path, config: RunConfig) -> tuple[str, ...]:
    """Flags whose new value a resumed run does not follow."""
    saved = read_manifest(checkpoint)["carried_over"]
    return tuple(
        f"{name}={value} is not followed: the state in {checkpoint} goes on with {saved[name]}"
        for name, value in carried_over(config).items()
        if saved[name] != value
    )


def save_checkpoint(
    world: World, config: RunConfig, layout: Layout, engines: Sequence[DeepSpeedEngine], step: int
) -> None:
    """Writes this rank's part; the last of all ranks commits. Only this stage's replicas wait for each other."""
    root = config.output_dir / "checkpoints" / f"step-{step:08d}"
    folder = root / f"stage-{world.place.stage:02d}"
    if world.place.is_recorder:
        shutil.rmtree(folder, ignore_errors=True)  # what a killed run left half written
        folder.mkdir(parents=True)
    world.stage_barrier()
    for path, engine in _engine_folders(root, world.place, layout, engines):
        engine.save_checkpoint(str(path), tag=_TAG, save_latest=False)
    save_file(rng_states(world.device), folder / f"rng-{world.place.replica:02d}.safetensors")
    _to_disk(folder)
    if world.count(f"saved/{step}") == world.place.world_size:
        _write_manifest(root, layout, config, step)
        _remove_old(root.parent, config.train.save_total_limit)


def load_checkpoint(checkpoint: Path, world: World, layout: Layout, engines: Sequence[DeepSpeedEngine]) -> int:
    """Restores this rank as it was; returns the step that the checkpoint was written after."""
    for path, engine in _engine_folders(checkpoint, world.place, layout, engines):
        engine.checkpoint_engine = TensorsOnly()
        found, _ = engine.load_checkpoint(str(path), tag=_TAG)
        if found is None:
            raise RuntimeError(f"{path} is incomplete although {checkpoint / MANIFEST} exists")
    folder = checkpoint / f"stage-{world.place.stage:02d}"
    restore_rng_states(world.device, load_file(folder / f"rng-{world.place.replica:02d}.safetensors"))
    return read_step(checkpoint)


class TensorsOnly(TorchCheckpointEngine):
    """DeepSpeed's reader without its trust: a pickle that names anything but these classes is refused."""

    def load(self, path: str, map_location: Any = None) -> Any:
        with torch.serialization.safe_globals(_deepspeed_classes()):
            return torch.load(path, map_location=map_location, weights_only=True)


def _deepspeed_classes() -> list[Any]:
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    return [LossScaler, DynamicLossScaler, ZeroStageEnum, fragment_address]


def _engine_folders(root: Path, place: Place, layout: Layout, engines: Sequence[DeepSpeedEngine]):
    if layout.method == "backprop":  # one engine spans the stages and names its own files
        return [(root / "pipeline", engines[0])]
    folder = root / f"stage-{place.stage:02d}"
    return [(folder / f"block-{index:03d}", engine) for index, engine in enumerate(engines)]


def _write_manifest(root: Path, layout: Layout, config: RunConfig, step: int) -> None:
    import deepspeed

    versions = {"torch": torch.__version__, "deepspeed": deepspeed.__version__}
    manifest = {"step": step, "layout": asdict(layout), "carried_over": carried_over(config), "versions": versions}
    text = json.dumps(manifest, indent=1)
    draft = root / f"{MANIFEST}.draft"
    draft.write_text(text + "\n")
    _to_disk(draft)
    os.replace(draft, root / MANIFEST)


def _to_disk(path: Path) -> None:
    """Forces a file, or all files below a folder, out of the page cache: the manifest must not overtake them."""
    files = [path] if path.is_file() else [p for p in path.rglob("*") if p.is_file()]
    for file in files:
        descriptor = os.open(file, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)


def _remove_old(folder: Path, limit: int | None) -> None:
    committed = sorted(manifest.parent for manifest in folder.glob(f"step-*/{MANIFEST}"))
    for old in committed[: -limit if limit else 0]:
        (old / MANIFEST).unlink()  # first, so that a half-removed checkpoint is not one
        shutil.rmtree(old)
