"""The folder of a run: what is wrong with it before the start, and how it is opened."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

import yaml

from llm_local.checkpoint.line import another_run, find_checkpoint, is_own, set_aside
from llm_local.checkpoint.manifest import read_manifest
from llm_local.config import Config, ConfigError
from llm_local.export.model_folder import draft_of, predecessor_of
from llm_local.flags import FLAGS
from llm_local.jobs.positions import DONE, IDENTITY, LOG, LOG_BACK, STATUS
from llm_local.metrics import keep_until
from llm_local.owner import folder_problems
from llm_local.setup import Setup
from llm_local.trace import FOLDER as TRACE

_EXPORT = Path("export")
OURS = ("run.yaml", "metrics", "checkpoints", "export", draft_of(_EXPORT).name, predecessor_of(_EXPORT).name)
OURS += ("report.html", "tensorboard", "csv", TRACE, IDENTITY, STATUS, DONE, LOG, LOG_BACK)


def output_problems(config: Config) -> list[str]:
    folder = config.output_dir
    if folder.exists() and not folder.is_dir():
        return [f"output_dir={folder} is a file; name a folder"]
    if problems := folder_problems(folder):
        return problems
    problems = unwritable("output_dir", folder)
    try:
        checkpoint = find_checkpoint(config)
    except ConfigError as error:
        return problems + error.problems
    if _replaces(config, checkpoint):
        return problems + _lost_inputs(config)
    return problems + another_run(config, checkpoint)


def _replaces(config: Config, checkpoint: Path | None) -> bool:
    """Whether the run that output_dir holds goes; what is gone on with stays."""
    return config.train.overwrite_output_dir and not is_own(config.output_dir, checkpoint)


def unwritable(name: str, folder: Path) -> list[str]:
    """Tries it where the folder is or would be made: with a file that has no name, which leaves no trace."""
    try:
        there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
        with tempfile.TemporaryFile(dir=there):
            return []
    except OSError as error:
        return [f"{name}={folder} cannot be written ({error.strerror}); choose another, or change its permissions"]


def _lost_inputs(config: Config) -> list[str]:
    """What the run reads and overwrite_output_dir would remove first."""
    read = [name for name, flag in FLAGS.items() if flag.is_read]
    given = {n: Path(value) for n in read if (value := config.flat()[n]) and Path(value).exists()}
    given["cache_dir"] = config.cache_dir
    removed = [config.output_dir / name for name in OURS]
    return [
        f"{name}={path} lies in {entry}, which overwrite_output_dir removes before the run reads it; "
        "choose another output_dir, or move it elsewhere"
        for name, path in given.items()
        for entry in removed
        if path.resolve().is_relative_to(entry.resolve())
    ]


def open_output(setup: Setup, is_restart: bool = False) -> tuple[str, ...]:
    """Makes OUTPUT and writes run.yaml; returns lines for a person.

    A run that is replaced goes first, and nothing else in the folder does: checkpoints that are not on the line that is
    gone on with are set aside, and so are all that a restart, which replaces nothing, does not know as its own.
    """
    config, checkpoint = setup.config, Path(setup.checkpoint) if setup.checkpoint else None
    folder, replaces = config.output_dir, _replaces(config, checkpoint)
    if not replaces and (problems := another_run(config, checkpoint)):  # it came and went since the checks
        raise ConfigError(problems)
    if replaces and not is_restart:
        for name in OURS:
            _remove(folder / name)
    said = set_aside(folder, checkpoint, TRACE)
    keep_until(folder, read_manifest(checkpoint).step if checkpoint else 0)
    if config.train.trace:  # of the part of the run that is gone on from
        _remove(folder / TRACE)
    _remove(draft_of(folder / _EXPORT))  # of a run that ended while it exported
    folder.mkdir(parents=True, exist_ok=True)
    text = yaml.safe_dump(config.flat(), sort_keys=False, allow_unicode=True)
    (folder / "run.yaml").write_text(f"# {setup.partition.describe()}\n{text}")
    return (said,) if said else ()


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
