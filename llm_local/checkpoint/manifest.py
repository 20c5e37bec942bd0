"""What a checkpoint says of itself: the manifest, its commit mark, and the notes of its stages."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from transformers import PretrainedConfig

from llm_local.adapters.hf_internals import NAME_OR_PATH
from llm_local.config import Config, ConfigError, from_flat
from llm_local.ds_config import load_json, zero_stage
from llm_local.files import Json
from llm_local.flags import MACHINE, START, WATCH, deciding
from llm_local.model.token_ids import TOKEN_IDS
from llm_local.partition import Partition
from llm_local.registry import HEADS, METHODS
from llm_local.replicas import sequences_per_step

MANIFEST = "manifest.json"
DATA_FILE = "data.json"  # of the first stage, which reads: see feed.py
TRAINER_FILE = "trainer_state.json"  # of the first stage: what transformers' Trainer keeps of its callbacks


class BrokenCheckpoint(RuntimeError):
    """A file of a committed checkpoint is missing or damaged. what: without the repair of a run."""

    def __init__(self, path: Path, reason: object):
        self.what = f"{path}: {str(reason).partition(chr(10))[0]}"
        super().__init__(f"{self.what}; resume from an earlier checkpoint")


@dataclass(frozen=True)
class Layout:
    """How a run is laid out; what must_match must be that of the checkpoint that it goes on from. replicas: of each
    stage, a list where they differ."""

    method: str
    num_stages: int
    replicas: int | list[int]
    blocks: list[list[int]]
    zero_stage: int
    precision: str
    sequences_per_step: int
    seq_length: int
    seed: int
    model: Json

    @property
    def stage_replicas(self) -> tuple[int, ...]:
        """Replicas of each stage."""
        return (self.replicas,) * self.num_stages if isinstance(self.replicas, int) else tuple(self.replicas)

    def has_as_many(self, replicas: Sequence[int]) -> bool:
        """Whether each replica of stages with so many has one of its own number here, wherever its layers were."""
        return self.stage_replicas == tuple(replicas) or len({*self.stage_replicas, *replicas}) == 1


MUST_MATCH = {
    "seq_length": "rows of another length are other rows",
    "seed": "another seed puts the data in another order",
}
# what says nothing of what is trained; "model" is the layout's
_OF_NO_WEIGHT = {*deciding(START, MACHINE, WATCH), "max_steps", "model"}
# of a model's config, what says nothing of its weights or of how they are used
_INCIDENTAL = (NAME_OR_PATH, "transformers_version", "dtype", "torch_dtype", "architectures", "use_cache")
_INCIDENTAL += TOKEN_IDS


def layout_of(config: Config, partition: Partition, replicas: Sequence[int], model_config: PretrainedConfig) -> Layout:
    train = config.train
    model = json.loads(json.dumps(model_config.to_diff_dict(), sort_keys=True, default=str))
    return Layout(
        method=config.local.method,
        num_stages=partition.num_stages,
        replicas=replicas[0] if len({*replicas}) == 1 else [*replicas],
        blocks=[[b.start, b.stop] for b in partition.blocks],
        zero_stage=zero_stage(load_json(config)),
        precision=config.precision,
        sequences_per_step=sequences_per_step(config, replicas),
        seq_length=config.data.seq_length,
        seed=train.seed,
        model={name: value for name, value in model.items() if name not in _INCIDENTAL},
    )


@dataclass(frozen=True)
class Manifest:
    """step: the last one trained. rows: sequences of the training data that are used up. flags: the run's. deepspeed:
    the JSON that they name; None in a checkpoint of a time when it was not kept. stages: those that the checkpoint
    holds; None for all. run: which run's jobs wrote it; None of one launch. apart: whether each replica has tensors of
    its own."""

    step: int
    rows: int
    layout: Layout
    flags: Json
    versions: dict[str, str]
    deepspeed: Json | None = None
    stages: list[int] | None = None
    run: str | None = None
    apart: bool = False

    def held(self) -> list[int]:
        """The stages whose tensors the checkpoint has."""
        return list(range(self.layout.num_stages)) if self.stages is None else self.stages

    def config(self) -> Config:
        """The run's configuration. Raises ConfigError for a method or head that is not the library's and has not been
        registered here."""
        for kind, known in (("method", METHODS), ("head", HEADS)):
            if (name := self.flags.get(kind)) is not None and name not in known:
                raise ConfigError(
                    [f"the checkpoint was trained with {kind}={name}, which is unknown; register it first"]
                )
        return replace(from_flat(self.flags), deepspeed_json=self.deepspeed)


def read_manifest(checkpoint: Path) -> Manifest:
    """Raises ConfigError naming the file if it is no manifest of ours."""
    path = checkpoint / MANIFEST
    try:
        values = json.loads(path.read_text())
        flags = {"add_bos": False} | values["flags"]  # as it was before there was such a flag
        return Manifest(**values | {"layout": Layout(**values["layout"]), "flags": flags})
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError([f"{path} cannot be read ({error}); name another checkpoint"]) from error


def read_data_state(checkpoint: Path) -> Json:
    """Where the training data stood, beyond the number of rows; empty if that says it all. Raises BrokenCheckpoint."""
    return read_note(checkpoint, DATA_FILE)


def read_note(checkpoint: Path, name: str, stage: int = 0) -> Json:
    """A JSON file of a stage, beside its tensors; empty if there is none. Raises BrokenCheckpoint."""
    path = checkpoint / f"stage-{stage:02d}" / name
    if not path.exists():
        return {}
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise BrokenCheckpoint(path, error) from error


def layout_problems(checkpoint: Path, layout: Layout) -> list[str]:
    """Why the run cannot go on from the checkpoint, naming both sides."""
    saved, instead = read_manifest(checkpoint).layout, "start a new run from its export (--model_name_or_path)"
    problems = [
        f"{checkpoint} was written with {name}={getattr(saved, name)}, this run has {name}={getattr(layout, name)}: "
        f"{why}; {instead}"
        for name, why in MUST_MATCH.items()
        if getattr(saved, name) != getattr(layout, name)
    ]
    if differing := model_differences(saved, layout):
        problems.append(f"{checkpoint} holds another model ({differing[0]}); this run's has {differing[1]}")
    return problems


def model_differences(one: Layout, other: Layout) -> tuple[str, str] | None:
    """In which values the models of two layouts differ, those of each; None if in none that matters."""
    names = sorted((one.model.keys() | other.model.keys()) - set(_INCIDENTAL))
    differing = [name for name in names if one.model.get(name) != other.model.get(name)]
    if not differing:
        return None
    more = f" and {len(differing) - 3} more" if len(differing) > 3 else ""
    first, second = (", ".join(f"{n}={m.get(n)}" for n in differing[:3]) + more for m in (one.model, other.model))
    return first, second


def layout_changes(saved: Manifest, layout: Layout, flags: Json) -> list[str]:
    """What differs from the run that wrote a checkpoint, and is followed: 'num_stages 2 → 4'."""
    theirs, ours = saved.flags | asdict(saved.layout), flags | asdict(layout)
    names = [name for name in ours if name not in _OF_NO_WEIGHT]
    return [f"{name} {theirs.get(name)} → {ours[name]}" for name in names if theirs.get(name) != ours[name]]
