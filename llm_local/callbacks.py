"""Callbacks as transformers' Trainer has them, and its integrations of experiment trackers (--report_to).

Where they differ from the Trainer's: each rank calls its own callbacks at its own steps, and a later stage may be some
steps behind. On rank 0 `on_log` has the losses of all stages, once the last one is through with the step; on the first
replica of another stage it has that stage's. Where a callback of the run has an `on_evaluate`, all ranks wait in an
evaluation for all stages, and get the same metrics; so what it decides is decided alike on all of them.
should_training_stop may be set by any rank: the ranks agree on a last step. should_save and should_evaluate must be set
on all ranks at the same step.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from fractions import Fraction
from functools import cached_property
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState
from transformers.trainer_callback import ExportableState

from llm_local.checkpoint.line import checkpoint_of
from llm_local.checkpoint.manifest import TRAINER_FILE, read_note
from llm_local.finish import slices_of
from llm_local.rank import Rank
from llm_local.records import Record
from llm_local.reporting import trackers
from llm_local.training_arguments import LocalTrainingArguments

Callback = TrainerCallback | type[TrainerCallback]


def metrics_of(split: str, losses: Sequence[float], first: int = 0) -> dict[str, float]:
    """An evaluation's losses by stage, from the first one of the launch on, as the Trainer names metrics; that of the
    last stage is the model's."""
    return {f"{split}_loss": losses[-1]} | {f"{split}_loss_stage_{n}": loss for n, loss in enumerate(losses, first)}


class Callbacks:
    """Those of one rank. Without any, nothing of this costs a thing."""

    def __init__(self, rank: Rank, callbacks: Sequence[Callback]):
        self._rank = rank
        made = [each() if isinstance(each, type) else each for each in callbacks]
        self.wait_for_evaluations = any(type(each).on_evaluate is not TrainerCallback.on_evaluate for each in made)
        is_first = rank.world.place.rank == 0
        self._callbacks: list[Any] = made + [each() for each in trackers(rank.config) if is_first]
        self._records: dict[int, Record] = {}  # of this stage, until those of all are known
        self.control = TrainerControl()
        self.state = TrainerState(
            max_steps=rank.config.train.max_steps,
            is_local_process_zero=rank.local_rank == 0,
            is_world_process_zero=is_first,
        )
        self._restore()
        self._call("on_init_end")

    @cached_property
    def _arguments(self) -> Any:
        return LocalTrainingArguments.of(self._rank.config, self._rank.world)

    @cached_property
    def _given(self) -> dict[str, Any]:
        """What a callback gets by name. model: this rank's part of it, whose absent layers are stand-ins."""
        engine, start = self._rank.engine.engines[-1], self._rank.start
        known = {"optimizer": engine.optimizer, "lr_scheduler": engine.lr_scheduler, "train_dataloader": None}
        known |= {"eval_dataloader": None, "processing_class": start.processing_class if start else None}
        return known | {"model": slices_of(self._rank.engine)[0][0].model}

    def _call(self, event: str, **more: Any) -> None:
        """Calls all; a stop that one of them asks for becomes one of all ranks."""
        had_stopped = self.control.should_training_stop
        for each in self._callbacks:
            answer = getattr(each, event)(self._arguments, self.state, self.control, **self._given, **more)
            self.control = self.control if answer is None else answer
        if self.control.should_training_stop and not had_stopped:
            self._rank.world.watchdog.ask_to_stop(self._rank.config.local.link_timeout_seconds)

    def begin(self, step: int) -> None:
        """Training begins after so many steps."""
        self._at(step)
        self.control.should_training_stop = False
        self._call("on_train_begin")
        self._call("on_epoch_begin")

    def end(self) -> None:
        """Training has ended; rank 0 hears of what the last stage has yet to say first."""
        if self._callbacks:
            self._rank.progress.show_all(self._rank.config.local.link_timeout_seconds)
        self._call("on_epoch_end")
        self._call("on_train_end")

    def step_begins(self) -> None:
        self.control.should_log = self.control.should_evaluate = self.control.should_save = False
        self._call("on_step_begin")

    def step_ends(self, step: int) -> None:
        self._at(step)
        self._call("on_step_end")

    def saved(self) -> None:
        self._call("on_save")

    def of_this_stage(self, record: Record | None) -> None:
        """A step is recorded, which rank 0 logs when all stages have it."""
        if record is None or not self._callbacks:
            return
        if self.state.is_world_process_zero:
            self._records[record.step] = record
        else:
            self._log(record.step, _training_logs(record, {f"loss_stage_{record.stage}": record.loss}))

    def of_all_stages(self, split: str, step: int, losses: Sequence[float]) -> None:
        """Rank 0 has what every stage says of a step or an evaluation."""
        if not self._callbacks:
            return
        first = self._rank.world.place.stages.start
        if split != "train":
            self._log(step, metrics_of(split, losses, first))
            return
        by_stage = {f"loss_stage_{number}": loss for number, loss in enumerate(losses, first)}
        if (record := self._records.pop(step, None)) is not None:
            self._log(step, _training_logs(record, {"loss": losses[-1], **by_stage}))

    def evaluated(self, metrics: dict[str, float]) -> None:
        """All stages have evaluated at the present step."""
        self._call("on_evaluate", metrics=metrics)
        loss = metrics["eval_loss"]
        if self.state.best_metric is None or loss < self.state.best_metric:
            self.state.best_metric, self.state.best_global_step = loss, self.state.global_step
            self.state.best_model_checkpoint = str(checkpoint_of(self._rank.config.output_dir, self.state.global_step))

    def saved_state(self) -> dict[str, Any] | None:
        """What a checkpoint keeps, on rank 0, as the Trainer's trainer_state.json: how far callbacks have counted."""
        if not (self._callbacks and self.state.is_world_process_zero):
            return None
        held = [each for each in self._callbacks if isinstance(each, ExportableState)]
        return dataclasses.asdict(dataclasses.replace(self.state, stateful_callbacks=held))

    def _restore(self) -> None:
        """Callbacks go on counting where the checkpoint left them."""
        checkpoint = self._rank.setup.checkpoint
        saved = read_note(Path(checkpoint), TRAINER_FILE, self._rank.world.place.stages.start) if checkpoint else {}
        if not (saved and self._callbacks):
            return
        for name in ("best_metric", "best_global_step", "best_model_checkpoint", "log_history"):
            setattr(self.state, name, saved[name])
        for each in self._callbacks:
            kept = saved["stateful_callbacks"].get(type(each).__name__)
            for name, value in (kept["attributes"] if isinstance(kept, dict) else {}).items():
                setattr(each, name, value)

    def _at(self, step: int) -> None:
        self.state.global_step = step
        if self._rank.config.epoch is not None:
            rows, of_step = self._rank.config.epoch
            self.state.epoch = float(Fraction(step * of_step, rows))

    def _log(self, step: int, logs: dict[str, float]) -> None:
        """What the present step is meanwhile, the logs are of the step given."""
        now = self.state.global_step
        self._at(step)
        self.state.log_history.append({**logs, "step": step})
        self._call("on_log", logs=logs)
        self._at(now)


def _training_logs(record: Record, losses: dict[str, float]) -> dict[str, float]:
    """As the Trainer names what it logs of a step; grad_norm and learning_rate are of the record's stage."""
    found = losses | {"learning_rate": record.lr, "grad_norm": record.grad_norm}
    return {name: value for name, value in found.items() if value is not None}
