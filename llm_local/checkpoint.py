"""Checkpoints: DeepSpeed's files for each block, and a manifest that is written last.

    OUTPUT/checkpoints/step-00000200/stage-00/block-000/...   DeepSpeed's own files
    OUTPUT/checkpoints/step-00000200/stage-00/rng-00.safetensors
    OUTPUT/checkpoints/step-00000200/stage-00/shared-head.safetensors    with --head shared: see refresh.py
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
from pickle import UnpicklingError
from typing import Any

import torch
from deepspeed.runtime.checkpoint_engine import TorchCheckpointEngine
from deepspeed.runtime.engine import DeepSpeedEngine
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import PretrainedConfig

from llm_local.config import ConfigError, RunConfig, from_here
from llm_local.device import restore_rng_states, rng_states
from llm_local.ds_config import load_json, zero_stage
from llm_local.head_plan import loss_weights
from llm_local.partition import Partition
from llm_local.world import Place, World

MANIFEST = "manifest.json"
SHARED_HEAD = "shared-head.safetensors"
_TAG = "state"


class BrokenCheckpoint(RuntimeError):
    """A file of a committed checkpoint is missing or damaged."""

    def __init__(self, path: Path, reason: object):
        super().__init__(f"{path}: {str(reason).partition(chr(10))[0]}; resume from an earlier checkpoint")


@dataclass(frozen=True)
class Layout:
    """What a run must share with a checkpoint to go on from it."""

    method: str
    num_stages: int
    replicas: int
    blocks: list[list[int]]
    overlap: int
    head: str
    head_refresh_steps: int
    head_layers: list[int]
    head_rank: int | None
    head_token_fraction: float
    head_features: bool
    block_loss_weights: list[float]
    distillation: list[float]
    zero_stage: int
    precision: str
    sequences_per_step: int
    seq_length: int
    seed: int
    model: str


def layout_of(config: RunConfig, partition: Partition, num_replicas: int, model_config: PretrainedConfig) -> Layout:
    shape = json.dumps(model_config.to_diff_dict(), sort_keys=True, default=str)
    train, schedule = config.train, config.head_layers_schedule
    return Layout(
        method=config.local.method,
        num_stages=partition.num_stages,
        replicas=num_replicas,
        blocks=[[b.start, b.stop] for b in partition.blocks],
        overlap=partition.overlap,
        head="linear" if config.local.method == "backprop" else config.local.head,
        head_refresh_steps=config.local.head_refresh_steps if config.shares_head else 0,
        head_layers=[len(partition.private_layers(b, schedule)) for b in range(len(partition.blocks))],
        head_rank=config.local.head_rank,
        head_token_fraction=config.local.head_token_fraction,
        head_features=config.local.head_features,
        block_loss_weights=list(loss_weights(config, len(partition.blocks))),
        distillation=[weight, config.local.distillation_top_k] if (weight := config.local.distillation_weight) else [],
        zero_stage=zero_stage(load_json(config)),
        precision=config.precision,
        sequences_per_step=train.per_device_train_batch_size * train.gradient_accumulation_steps * num_replicas,
        seq_length=config.data.seq_length,
        seed=train.seed,
        model=f"{model_config.model_type}-{hashlib.sha256(shape.encode()).hexdigest()[:8]}",
    )


def resumes(config: RunConfig) -> bool:
    return (config.train.resume_from_checkpoint or "false").lower() != "false"


def find_checkpoint(config: RunConfig) -> Path | None:
    """The checkpoint that --resume_from_checkpoint means; None if the flag is not set.

    Raises ConfigError if there is none, or if it is only half written.
    """
    wanted = config.train.resume_from_checkpoint
    if wanted is None or not resumes(config):
        return None
    place = config.output_dir if wanted.lower() in ("true", "last", "latest") else Path(wanted)
    if place.name.startswith("step-"):
        if not (place / MANIFEST).exists():
            named = f"resume_from_checkpoint={place}{from_here(place)}"
            raise ConfigError([f"{named} has no {MANIFEST}: it is missing or half written"])
        return place
    committed = sorted((place / "checkpoints").glob(f"step-*/{MANIFEST}"))
    if not committed:
        folder = place / "checkpoints"
        raise ConfigError([f"resume_from_checkpoint={wanted}: no complete checkpoint in {folder}{from_here(folder)}"])
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


CARRIED_OVER = ("learning_rate", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon")


def carried_over(config: RunConfig, checkpoint: Path | None) -> dict[str, float]:
    """Values that an optimizer's or a scheduler's saved state brings back, whatever the flags of a resumed run say."""
    if checkpoint is not None:
        return dict(read_manifest(checkpoint)["carried_over"])
    return {name: getattr(config.train, name) for name in CARRIED_OVER}


def resume_warnings(checkpoint: Path, config: RunConfig) -> tuple[str, ...]:
    """Flags whose new value a resumed run does not follow."""
    saved = carried_over(config, checkpoint)
    return tuple(
        f"{name}={value} is not followed: the state in {checkpoint} goes on with {saved[name]}"
        for name, value in carried_over(config, None).items()
        if saved[name] != value
    )


def save_checkpoint(
    world: World,
    config: RunConfig,
    layout: Layout,
    engines: Sequence[DeepSpeedEngine],
    step: int,
    carried: dict[str, float],
    shared_head: dict[str, torch.Tensor] | None = None,
) -> None:
    """Writes this rank's part; the last of all ranks commits. Only this stage's replicas wait for each other.

    carried: the values that the saved states hold, which are not the flags' in a resumed run. shared_head: the state
    of the stage's Refresher, where it has one.
    """
    root = config.output_dir / "checkpoints" / f"step-{step:08d}"
    folder = root / f"stage-{world.place.stage:02d}"
    if world.place.is_recorder:
        shutil.rmtree(folder, ignore_errors=True)  # what a killed run left half written
        folder.mkdir(parents=True)
    world.stage_barrier()
    for path, engine in _engine_folders(root, world.place, layout, engines):
        engine.save_checkpoint(str(path), tag=_TAG, save_latest=False)
    save_tensors(rng_states(world.device), folder / f"rng-{world.place.replica:02d}.safetensors")
    if shared_head is not None and world.place.is_recorder:
        save_tensors(shared_head, folder / SHARED_HEAD)
    world.stage_barrier()  # a file that another replica still writes has a passing name
    _to_disk(folder)
    if world.count(f"saved/{step}") == world.place.world_size:
        _write_manifest(root, layout, carried, step)
        _remove_old(root.parent, config.train.save_total_limit)


def load_checkpoint(checkpoint: Path, world: World, layout: Layout, engines: Sequence[DeepSpeedEngine]) -> int:
    """Restores this rank as it was; returns the step that the checkpoint was written after."""
    for path, engine in _engine_folders(checkpoint, world.place, layout, engines):
        engine.checkpoint_engine = TensorsOnly()
        try:
            found, _ = engine.load_checkpoint(str(path), tag=_TAG)
        except AssertionError as error:  # DeepSpeed's answer to a missing *_model_states.pt
            raise BrokenCheckpoint(path, "a file is missing") from error
        if found is None:
            raise BrokenCheckpoint(path, f"files are missing although {checkpoint / MANIFEST} exists")
    rng = checkpoint / f"stage-{world.place.stage:02d}" / f"rng-{world.place.replica:02d}.safetensors"
    restore_rng_states(world.device, _load_tensors(rng))
    return read_step(checkpoint)


def load_shared_head(checkpoint: Path, place: Place) -> dict[str, torch.Tensor]:
    """What save_checkpoint was given as the stage's shared_head."""
    return _load_tensors(checkpoint / f"stage-{place.stage:02d}" / SHARED_HEAD)


def _load_tensors(path: Path) -> dict[str, torch.Tensor]:
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise BrokenCheckpoint(path, error) from error


def save_tensors(tensors: dict[str, torch.Tensor], path: Path, metadata: dict[str, str] | None = None) -> None:
    """A safetensors file that others may read as far as the umask lets them; the library's own are for the owner."""
    save_file(tensors, path, metadata=metadata)
    mask = os.umask(0o077)  # there is no way to read it but to set it
    os.umask(mask)
    path.chmod(0o666 & ~mask)


class TensorsOnly(TorchCheckpointEngine):
    """DeepSpeed's reader without its trust: a pickle that names anything but these classes is refused."""

    def load(self, path: str, map_location: Any = None) -> Any:
        try:
            with torch.serialization.safe_globals(_deepspeed_classes()):
                return torch.load(path, map_location=map_location, weights_only=True)
        except (OSError, EOFError, RuntimeError, UnpicklingError) as error:
            raise BrokenCheckpoint(Path(path), error) from error


def _deepspeed_classes() -> list[Any]:
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    return [LossScaler, DynamicLossScaler, ZeroStageEnum, fragment_address]


def _engine_folders(root: Path, place: Place, layout: Layout, engines: Sequence[DeepSpeedEngine]):
    if layout.method == "backprop" and layout.num_stages > 1:  # one engine spans the stages and names its own files
        return [(root / "pipeline", engines[0])]
    folder = root / f"stage-{place.stage:02d}"
    return [(folder / f"block-{index:03d}", engine) for index, engine in enumerate(engines)]


def _write_manifest(root: Path, layout: Layout, carried: dict[str, float], step: int) -> None:
    import deepspeed

    versions = {"torch": torch.__version__, "deepspeed": deepspeed.__version__}
    manifest = {"step": step, "layout": asdict(layout), "carried_over": carried, "versions": versions}
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
