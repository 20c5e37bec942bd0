"""A run's line of checkpoints: which one to go on from, and what does not lead to it.

OUTPUT/checkpoints/step-00000200           of the line that the run is on; the newest is what 'true' and 'auto' mean
OUTPUT/checkpoints/abandoned-1/            later ones, and metrics, of a line that a run went back from: never
                                           picked, counted or removed, but to be resumed from by their path
"""

from __future__ import annotations

import os
import shutil
from dataclasses import replace
from itertools import count
from pathlib import Path

import yaml

from llm_local.checkpoint.manifest import MANIFEST, read_manifest
from llm_local.config import Config, ConfigError, from_here
from llm_local.jobs.positions import IDENTITY

FOLDER, METRICS = "checkpoints", "metrics"
AUTO = "auto"
_NEWEST = (AUTO, "true", "last", "latest")


def committed(output_dir: Path) -> list[Path]:
    """The complete checkpoints of the run, the newest last."""
    return sorted(manifest.parent for manifest in (output_dir / FOLDER).glob(f"step-*/{MANIFEST}"))


def checkpoint_of(output_dir: Path, step: int) -> Path:
    """The folder of the checkpoint after a step."""
    return output_dir / FOLDER / f"step-{step:08d}"


def find_checkpoint(config: Config) -> Path | None:
    """The checkpoint that --resume_from_checkpoint means; None for a new run.

    Raises ConfigError if it is missing, or only half written.
    """
    wanted = config.train.resume_from_checkpoint
    if wanted is None or wanted.lower() == "false":
        return None
    place = config.output_dir if wanted.lower() in _NEWEST else Path(wanted)
    if place.name.startswith("step-"):
        if not (place / MANIFEST).exists():
            named = f"resume_from_checkpoint={place}{from_here(place)}"
            raise ConfigError([f"{named} has no {MANIFEST}: it is missing or half written"])
        return place
    found, folder = committed(place), place / FOLDER
    if not found and wanted.lower() != AUTO:
        raise ConfigError([f"resume_from_checkpoint={wanted}: no complete checkpoint in {folder}{from_here(folder)}"])
    return found[-1] if found else None


def documents_begin(config: Config) -> bool | None:
    """add_bos; where it is not set, that of the run which is gone on with."""
    if config.data.add_bos is not None:
        return config.data.add_bos
    try:
        checkpoint = find_checkpoint(config)
        return read_manifest(checkpoint).flags["add_bos"] if checkpoint else None
    except ConfigError:  # said when the run is to go on from it
        return None


def after_restart(config: Config) -> Config:
    """The flags with which a run goes on that a launcher starts again: from its newest checkpoint, or as it began."""
    wanted = (config.train.resume_from_checkpoint or "false").lower()
    if committed(config.output_dir) or wanted in ("false", *_NEWEST):
        wanted = AUTO
    else:  # from elsewhere
        wanted = config.train.resume_from_checkpoint
    train = replace(config.train, resume_from_checkpoint=wanted, overwrite_output_dir=False)
    return replace(config, train=train)


def is_own(output_dir: Path, checkpoint: Path | None) -> bool:
    """Whether the checkpoint is of the run in output_dir, or of a line that it abandoned."""
    return checkpoint is not None and checkpoint.resolve().is_relative_to((output_dir / FOLDER).resolve())


def another_run(config: Config, checkpoint: Path | None) -> list[str]:
    """Why a run that begins anew, or with the checkpoint of another one, cannot do so in output_dir."""
    folder, wanted = config.output_dir, config.train.resume_from_checkpoint
    if jobs := sorted(path.parent.name for path in folder.glob(f"stage-*/{IDENTITY}")):
        how = "as jobs (--stage, or llm-local up)"
        return [f"output_dir={folder} holds a run whose stages are jobs ({jobs[0]}); train it {how}, or choose another"]
    if is_own(folder, checkpoint) or not ((folder / "run.yaml").exists() or committed(folder)):
        return []
    others = "replace it (--overwrite_output_dir), or choose another folder"
    if checkpoint is not None:
        if not committed(folder) and _began_with(folder) == wanted:
            return []  # the same command again, before the first checkpoint
        return [
            f"resume_from_checkpoint={checkpoint} lies outside output_dir={folder}, which holds another run; "
            f"go on with that one (--resume_from_checkpoint {AUTO}), {others}"
        ]
    if (wanted or "").lower() != AUTO:
        return [f"output_dir={folder} holds another run; go on with it (--resume_from_checkpoint {AUTO}), {others}"]
    if (folder / "export").exists():
        return [f"output_dir={folder} holds a finished run without a checkpoint to go on from; {others}"]
    return []


def _began_with(output_dir: Path) -> str | None:
    try:
        return yaml.safe_load((output_dir / "run.yaml").read_text()).get("resume_from_checkpoint")
    except (OSError, ValueError, AttributeError, yaml.YAMLError):
        return None


def set_aside(output_dir: Path, checkpoint: Path | None, *others: str) -> str | None:
    """Moves checkpoints that are not on the line of this one, or of a new run, out of the way; says which.

    A copy of the metrics, and `others`, entries of output_dir, go with them. The newest goes first and nothing is
    removed, so that what a kill leaves is a line up to some step, with all its metrics.
    """
    folder, metrics = output_dir / FOLDER, output_dir / METRICS
    is_on_it = checkpoint is not None and checkpoint.resolve().parent == folder.resolve()
    said = None
    later = [path for path in committed(output_dir) if not (checkpoint and is_on_it and path.name <= checkpoint.name)]
    if later:
        aside = next(path for n in count(1) if not (path := folder / f"abandoned-{n}").exists())
        aside.mkdir()
        if metrics.exists():
            shutil.copytree(metrics, aside / METRICS)
        for path in (*filter(Path.exists, (output_dir / name for name in others)), *reversed(later)):
            os.rename(path, aside / path.name)
        said = f"{', '.join(path.name for path in later)} set aside in {aside}: this run goes on without them"
    if checkpoint is not None and not is_on_it and is_own(output_dir, checkpoint):  # back to an abandoned line
        shutil.rmtree(metrics, ignore_errors=True)
        if (checkpoint.parent / METRICS).exists():
            shutil.copytree(checkpoint.parent / METRICS, metrics)
    return said
