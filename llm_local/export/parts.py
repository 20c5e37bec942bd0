"""Parts of a model: what the job of each stage hands over at the end, and whether parts make one model.

    PART/stage-01/replica-00.safetensors    the stage's weights, as a checkpoint has them, without the optimizer's state
    PART/stage-01/state.json, data.json, links.json     as in a checkpoint
    PART/model/                             the model's config and its tokenizer, in one of the parts at least
    PART/metrics/stage-01.jsonl             all that the stage measured
    PART/check.safetensors                  a row of the data, and the stage's logits on it
    PART/manifest.json                      written last

So a part is a checkpoint of one stage, on one replica. It appears whole or not at all.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import combinations
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from llm_local.checkpoint.catalog import STATE_FILE, Catalog, replica_file, save_stretches
from llm_local.checkpoint.line import METRICS, committed
from llm_local.checkpoint.manifest import (
    DATA_FILE,
    MANIFEST,
    BrokenCheckpoint,
    Manifest,
    model_differences,
    read_manifest,
)
from llm_local.config import ConfigError
from llm_local.export.model_folder import Description, replaced, write_description, write_text, writing
from llm_local.export.stages import CHECK_FILE
from llm_local.jobs.positions import NOTE

MODEL = "model"
MOST_POSITIONS = 64  # of the logits that a part brings along


@dataclass(frozen=True)
class Check:
    """What an export of the stage is compared with. row: what the model reads, (1, T) ids or (1, C, H, W) pixels; None
    of an image behind the first stage. logits: the stage's, (1, T, V) or (1, classes)."""

    row: torch.Tensor | None
    logits: torch.Tensor


def write_part(
    checkpoint: Path,
    folder: Path,
    model: Description | None = None,
    check: Check | None = None,
    metrics: Path | None = None,
) -> None:
    """Makes a part of a checkpoint that holds one stage, in memory that its weights take.

    model: of the run; one part must have it where the files that the flags name may be gone. metrics: the stage's file.
    Raises BrokenCheckpoint, and Unwritten naming a file.
    """
    catalog = Catalog(checkpoint)
    (stage,) = catalog.manifest.held()
    name = f"stage-{stage:02d}"
    with replaced(folder) as draft:
        with writing(draft / name):
            (draft / name).mkdir(parents=True)
            save_stretches({each: catalog.tensor(each) for each in catalog.weights}, {}, draft / name / replica_file(0))
            write_text(draft / name / STATE_FILE, json.dumps(catalog.blocks) + "\n")
            for file in (checkpoint / name / each for each in (DATA_FILE, NOTE)):
                if file.exists():
                    shutil.copyfile(file, draft / name / file.name)
        if metrics is not None:
            with writing(draft / METRICS):
                (draft / METRICS).mkdir()
                shutil.copyfile(metrics, draft / METRICS / metrics.name)
        if model is not None:
            with writing(draft / MODEL):
                (draft / MODEL).mkdir()
                write_description(draft / MODEL, model)
        if check is not None:
            tensors = {"logits": check.logits[:, :MOST_POSITIONS].float()}
            tensors |= {} if check.row is None else {"row": check.row}
            with writing(draft / CHECK_FILE):
                save_file({key: tensor.cpu().contiguous() for key, tensor in tensors.items()}, draft / CHECK_FILE)
        manifest = replace(catalog.manifest, layout=replace(catalog.manifest.layout, replicas=1), apart=False)
        write_text(draft / MANIFEST, json.dumps(asdict(manifest), indent=1) + "\n")


def read_check(part: Path) -> Check | None:
    """What an export of the stage is compared with, if there is something. Raises BrokenCheckpoint."""
    path = part / CHECK_FILE
    if not path.exists():
        return None
    try:
        tensors = load_file(path)
        return Check(tensors.get("row"), tensors["logits"])
    except (OSError, SafetensorError, KeyError) as error:
        raise BrokenCheckpoint(path, error) from error


def fitting(given: Sequence[Path]) -> list[Path]:
    """The part of each stage, in order, of parts, checkpoints and folders of jobs.

    Raises ConfigError with all that keeps them from being one model.
    """
    problems: list[str] = []
    manifests: dict[Path, Manifest] = {}
    for folder in given:
        part = _part_at(folder)
        if part is None:
            problems.append(
                f"{folder} is no part: it has no {MANIFEST}, no export/{MANIFEST} and no complete checkpoint; name the "
                "folder of a part, of a checkpoint, or of a job"
            )
        elif part in manifests:
            problems.append(f"{folder} is named twice, as {part}; name it once")
        else:
            try:
                manifests[part] = read_manifest(part)
            except ConfigError as error:
                problems += error.problems
    problems += _misfits(manifests)
    if problems:
        raise ConfigError(problems)
    return [part for _, part in sorted((stage, part) for part, found in manifests.items() for stage in found.held())]


def _part_at(folder: Path) -> Path | None:
    """Of a job its export, else its newest checkpoint."""
    for part in (folder, folder / "export"):
        if (part / MANIFEST).is_file():
            return part
    return next(reversed(committed(folder)), None)


def _misfits(manifests: Mapping[Path, Manifest]) -> list[str]:
    parts = sorted(manifests.items(), key=lambda item: item[1].held())
    if not parts:
        return []
    (first, of_first), *others = parts
    problems = [line for part, found in others for line in _differences(first, of_first, part, found)]
    for (one, of_one), (other, of_other) in combinations(parts, 2):
        for stage in sorted({*of_one.held()} & {*of_other.held()}):
            problems.append(f"stage {stage} is in {one} and in {other}; name one of them")
    num_stages, held = of_first.layout.num_stages, {stage for _, found in parts for stage in found.held()}
    for stage in sorted({*range(num_stages)} - held):
        before = next((part for part, found in reversed(parts) if min(found.held()) < stage), None)
        after = next((part for part, found in parts if min(found.held()) > stage), None)
        beside = " and ".join(str(part) for part in (before, after) if part)
        problems.append(f"stage {stage} of {num_stages} is missing beside {beside}; name its part, too")
    return problems


def _differences(first: Path, of_first: Manifest, part: Path, found: Manifest) -> list[str]:
    """What two parts must have in common and have not."""
    repairs = {
        "step": "name checkpoints of one step",
        "run": "name parts of one run",
        "method": "name parts of one run",
        "precision": "name parts of one run",
        "num_stages": "all jobs of a run must have the same cut",
        "blocks": "all jobs of a run must have the same cut",
    }
    one, other = ({"step": m.step, "run": m.run} | asdict(m.layout) for m in (of_first, found))
    lines = [
        f"{part} has {name}={other[name]}, {first} has {name}={one[name]}; {repair}"
        for name, repair in repairs.items()
        if one[name] != other[name]
    ]
    if differing := model_differences(found.layout, of_first.layout):
        lines.append(
            f"{part} is of another model ({differing[0]}) than {first} ({differing[1]}); name parts of one run"
        )
    return lines
