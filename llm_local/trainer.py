"""transformers' Trainer as its users know it, over a run by local parallelism."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from transformers import PretrainedConfig, PreTrainedTokenizerBase, TrainerCallback
from transformers.trainer_utils import TrainOutput

from llm_local.run import Run
from llm_local.start import prepare
from llm_local.training_arguments import LocalTrainingArguments

Callback = TrainerCallback | type[TrainerCallback]


class LocalTrainer:
    """The part of transformers' Trainer that pretraining needs, with the same names.

    model: a config for a new model, or a pretrained one's folder or hub name; each rank makes its own layers of it.
    args: LocalTrainingArguments. The data: as `prepare` takes them. Each rank of the launcher makes a trainer; nothing
    starts before `train` or `evaluate`, which raise what `prepare` and `Run` do.
    """

    def __init__(
        self,
        model: PretrainedConfig | Path | str | None = None,
        args: Any = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: PreTrainedTokenizerBase | Path | str | None = None,
        callbacks: Sequence[Callback] = (),
    ):
        self.args = LocalTrainingArguments() if args is None else args
        self._model, self._tokenizer = model, processing_class
        self._train_dataset, self._eval_dataset = train_dataset, eval_dataset
        self._callbacks = list(callbacks)
        self._run: Run | None = None

    def train(self, resume_from_checkpoint: str | bool | None = None) -> TrainOutput:
        """All steps; resume_from_checkpoint: a checkpoint, or True for the newest in output_dir.

        Returns the steps that are done, and the mean of this stage's recorded losses.
        """
        run = self._prepared(resume_from_checkpoint)
        run.train()
        losses = [logs[name] for logs in run.log_history for name in ("loss",) if name in logs]
        return TrainOutput(run.step, sum(losses) / len(losses) if losses else float("nan"), {})

    def evaluate(self) -> dict[str, float]:
        """Validation losses of all stages' exits, as Run.evaluate."""
        return self._prepared(None).evaluate()

    def save_model(self, output_dir: str | Path | None = None) -> Path:
        """The model as `from_pretrained` reads it, and the end of the run; as Run.export."""
        run = self._prepared(None)
        exported = run.export(output_dir)
        run.close()
        return exported

    def add_callback(self, callback: Callback) -> None:
        """Before `train`."""
        self._callbacks.append(callback)

    def remove_callback(self, callback: Callback) -> None:
        """That object, or the first of that class."""
        found = [each for each in self._callbacks if each is callback or type(each) is callback]
        self._callbacks.remove(found[0] if found else callback)

    @property
    def run(self) -> Run | None:
        """What trains, once it is prepared."""
        return self._run

    def _prepared(self, resume: str | bool | None) -> Run:
        if self._run is None:
            config = self.args.config()
            if resume:
                asked = "true" if resume is True else str(resume)
                config = replace(config, train=replace(config.train, resume_from_checkpoint=asked))
            data = (self._train_dataset, self._eval_dataset)
            self._run = prepare(config, self._model, self._tokenizer, *data, callbacks=self._callbacks)
        return self._run
