"""The validation sets of a run as every rank knows them, and what a stage records of one."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from llm_local.data.sets import ValidationSet
from llm_local.export.model_card import perplexity
from llm_local.partition import Partition
from llm_local.records import DEPTH_TOLERANCE, Record
from llm_local.results import EvalResult
from llm_local.tasks.task import Task
from llm_local.world import World


@dataclass(frozen=True)
class Found:
    """What an evaluation found of a stage: its blocks' losses, the tokens, and what the task measures of its exit."""

    losses: list[float]
    tokens: int
    measures: list[float]


@dataclass(frozen=True)
class EvalSet:
    """A validation set, by its name. split: under which its records go; 'eval' is the first one's. bytes_per_token: of
    its text, by the tokens that are predicted; 0: of it only some are. score: what exp(loss) is called, '' where it
    has no name. measures: what is reported beside it, as the task has them."""

    name: str
    split: str
    bytes_per_token: float
    score: str = "perplexity"
    measures: tuple[str, ...] = ()

    def bits_per_byte(self, loss: float) -> float:
        """Of the set's text, from nats a predicted token: (predicted tokens / bytes) · loss / ln 2.

        As in The Pile (Gao et al. 2020) and lm-evaluation-harness the bytes are all of the text's. There every token is
        predicted; here a document's first one may be not (data/sets.py), and has no nats then.
        """
        return loss / math.log(2) / self.bytes_per_token

    def describe(self, loss: float, measured: Sequence[float] = ()) -> str:
        """A line for a person."""
        on = "" if self.name == "validation" else f" on {self.name}"
        bits = f", {self.bits_per_byte(loss):.3f} bits a byte" if self.bytes_per_token else ""
        score = f", {self.score} {perplexity(loss):,.1f}" if self.score else ""
        found = "".join(f", {in_words(name)} {value:.2%}" for name, value in zip(self.measures, measured, strict=False))
        return f"validation loss{on} {loss:.4f}{score}{bits}{found}"

    def record(
        self,
        step: int,
        stage: int,
        losses: Sequence[float],
        tokens: int,
        padding: float = 0.0,
        measured: Sequence[float] = (),
    ) -> Record:
        """What the stage's exit scored, whose loss is the last of its blocks'."""
        record = Record(
            step=step,
            split=self.split,
            stage=stage,
            loss=losses[-1],
            block_losses=list(losses),
            tokens=tokens,
            name=self.name,
            perplexity=perplexity(losses[-1]) if self.score else None,
            bits_per_byte=self.bits_per_byte(losses[-1]) if self.bytes_per_token else None,
            padding=padding,
        )
        values: dict[str, Any] = dict(zip(self.measures, measured, strict=False))
        return replace(record, **values)


def in_words(measure: str) -> str:
    """A measure's name, for a person."""
    return measure.replace("_", " ").replace("top 5", "top-5")


def measures_key(split: str, step: int, stage: int) -> str:
    """Under which a stage tells rank 0 what its exit measured."""
    return f"{split}/{step}/{stage}/measures"


def over_replicas(world: World, result: EvalResult) -> Found:
    """Means over the scored positions of all replicas, and the tokens of all; each must call."""
    measured = result.measures[-1].tolist()
    mine = torch.tensor([*result.losses.tolist(), result.tokens, *measured], dtype=torch.float64)
    values, count = world.mean_over_replicas(mine).tolist(), len(result.losses)
    return Found(values[:count], round(values[count] * world.place.data_ranks), values[count + 1 :])


def better_exit(
    name: str,
    losses: Sequence[Sequence[float]],
    partition: Partition,
    exits: Mapping[int, Path] | None,
    resume: str,
    override: Callable[[int], str] = "num_hidden_layers={}".format,
) -> str:
    """Which exit to keep, in a line for a person, where one is better than the whole model; '' if none is.

    name: of the validation set; losses: by stage, of its blocks. exits: the folders of those that are models, by stage;
    None: the run makes none. resume: the flags with which the run goes on, '' where it saved nothing. override: what
    makes a config one of so many layers.
    """
    flat = [loss for of_stage in losses for loss in of_stage]
    behind, best = flat[-1] - min(flat), partition.blocks[flat.index(min(flat))].stop
    if not behind > DEPTH_TOLERANCE:
        return ""
    on = "the validation set" if name == "validation" else name
    gap = f"({flat[-1]:.4f} against {min(flat):.4f}) on {on}"
    said = f"the whole model is {behind:.3f} nats behind the exit of layers 0-{best - 1} {gap}"
    return said if exits is None else f"{said}: {_how_to_keep(best, partition, exits, resume, override(best))}"


def _how_to_keep(best: int, partition: Partition, exits: Mapping[int, Path], resume: str, override: str) -> str:
    """Of the exit of so many layers."""
    ends = [partition.layers_of(stage).stop for stage in range(partition.num_stages)]
    if best in ends and ends.index(best) in exits:
        return f"keep {exits[ends.index(best)]}"
    alone = f"train a model of its own with --config_overrides {override}"
    if best in ends:
        return f"it is no model by itself; {alone}"
    if not resume:
        return f"it is within a stage, and no checkpoint was saved to cut it out of (save_steps); {alone}"
    cuts = [0, *sorted({*ends, best})]
    layers = ",".join(str(stop - start) for start, stop in pairwise(cuts))
    stages = len(cuts) - 1
    return f"to have it, run again in {stages} processes with --num_stages {stages} --stage_layers {layers} {resume}"


def split_of(number: int, name: str) -> str:
    """Under which split a validation set's metrics go: as transformers' Trainer names them, but for the first."""
    return f"eval_{name}" if number else "eval"


def eval_sets(sets: Sequence[ValidationSet], task: Task) -> tuple[EvalSet, ...]:
    """The validation sets without their rows, as all ranks know them."""
    told = (task.score, task.measures)
    return tuple(EvalSet(each.name, split_of(n, each.name), each.bytes_per_token, *told) for n, each in enumerate(sets))
