"""A run: its steps, evaluations and checkpoints, the export at its end, and those who are told of them.

    with prepare(config) as run:
        run.train()
        run.export()

or with a loop of one's own:

    with prepare(config) as run:
        for step in run.steps():
            result = run.train_step()
            if step % 200 == 0:
                run.evaluate()
                run.save()
        run.export()

Each rank does the same. No stage waits for a later one, but by the packets in flight, and in `evaluate`.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import NoReturn

from transformers import TrainerCallback

from llm_local.best import load_best
from llm_local.callbacks import Callbacks, metrics_of
from llm_local.checkpoint.line import checkpoint_of
from llm_local.checkpoint.manifest import DATA_FILE, TRAINER_FILE
from llm_local.checkpoint.saver import SHARED
from llm_local.config import Config, is_due
from llm_local.delayed_engine import delayed_state
from llm_local.files import Unwritten
from llm_local.finish import finish, finish_part
from llm_local.jobs.positions import Positions
from llm_local.place import Place
from llm_local.rank import Rank
from llm_local.rank_step import measure, train_step
from llm_local.report.notes import note_end
from llm_local.results import StepResult
from llm_local.run_trace import end_trace
from llm_local.stopping import CALLBACK
from llm_local.watchdog import leave


class Run:
    """One rank's share of a run, made by `prepare`. Close it, or use it in a `with`: its peers wait for its goodbye."""

    def __init__(self, rank: Rank, callbacks: Sequence[TrainerCallback | type[TrainerCallback]] = ()):
        self._rank = rank
        self._step = self._saved = rank.first_step
        self._evaluated = rank.first_step if rank.job and rank.job.positions.evaluated else None
        self._is_training = self._is_open = True
        if rank.job is not None:
            rank.job.state, rank.job.step = "training", self._step
        if rank.start is not None:
            rank.world.watchdog.last_act = self._write_page
        self._callbacks = Callbacks(rank, callbacks)
        rank.progress.listener = self._callbacks.of_all_stages

    @property
    def config(self) -> Config:
        """The flags, as rank 0 has checked them."""
        return self._rank.config

    @property
    def place(self) -> Place:
        """This rank's stage and replica."""
        return self._rank.world.place

    @property
    def step(self) -> int:
        """Optimizer steps that are done, those before a resume included."""
        return self._step

    @property
    def log_history(self) -> list[dict[str, float]]:
        """What callbacks were told by on_log, if there are any: on rank 0 of all stages."""
        return self._callbacks.state.log_history

    @property
    def output_dir(self) -> Path:
        return self.config.output_dir

    def train(self) -> None:
        """All steps that are left, with the evaluations and checkpoints that the flags ask for.

        A run that is told to stop by a signal saves, and the process ends here. Raises NonFiniteLoss, Unwritten,
        LostPeer, and what a callback raises.
        """
        train = self.config.train
        if train.eval_on_start and self._step == 0:
            self._evaluate()
        for step in self.steps():
            self.train_step()
            control = self._callbacks.control
            is_due_now = is_due(step, self.config.eval_interval) or step == train.max_steps
            if train.eval_batches and (is_due_now or control.should_evaluate):
                self._evaluate()
            if self._saves(step) or control.should_save:
                self.save()
        if train.eval_batches and self._evaluated != self._step:
            self._evaluate()
        if self.config.save_interval and self._saved != self._step:  # a callback has ended the run
            self.save()
        self._end_training()

    def steps(self) -> Iterator[int]:
        """The number of each step that is to come, for `train_step` to train; ends early where a callback asks for it.

        On a signal the run saves, and the process ends here.
        """
        world, train = self._rank.world, self.config.train
        if self.config.save_interval:
            world.watchdog.saves(train.signal_save_seconds)
        self._callbacks.begin(self._step)
        for step in range(self._step + 1, train.max_steps + 1):
            if not world.watchdog.stop.begins(step):
                if world.watchdog.stop.reason == CALLBACK:
                    break
                self._stop()
            yield step
            if self._step != step:
                raise RuntimeError(f"step {step} was not trained; call train_step once for each of steps()")

    def train_step(self) -> StepResult:
        """Trains the next step: losses of this rank's blocks in order, learning rate, gradient norms, tokens."""
        rank, train, step = self._rank, self.config.train, self._step + 1
        rank.world.watchdog.step = step
        self._callbacks.step_begins()
        rank.recorder.begin()
        with rank.traced("train", step):
            result = train_step(rank, step)
        self._step = step
        if rank.job is not None:
            rank.job.step = step
        self._callbacks.step_ends(step)
        is_first, is_last = step == 1 and train.logging_first_step, step == train.max_steps
        records = is_due(step, self.config.logging_interval) or is_first or is_last
        records = records or self._callbacks.control.should_log
        if records and not result.is_skipped:  # the device is waited for in no other step
            rank.engine.check_finite()
            self._callbacks.of_this_stage(rank.recorder.record(step, result))
        read = (
            rank.feed.step_tokens(step)
            if rank.feed
            else int(result.tokens) * self.place.num_replicas
            if rank.job
            else 0
        )
        rank.recorder.end(read)
        rank.saver.check()
        return result

    def evaluate(self) -> dict[str, float]:
        """Validation losses of all stages' exits with the weights of this step; every rank gets them.

        eval_loss is the last stage's, eval_loss_stage_0 the first one's; of a named set they are eval_NAME_loss, ...
        """
        if self._evaluated != self._step:
            self._evaluate()
        return self._losses_of_all()

    def save(self) -> Path:
        """Writes a checkpoint of this step beside the training; returns its folder, which is whole when the slowest
        stage has written its part. Every rank must call."""
        rank, step = self._rank, self._step
        rank.engine.check_finite()
        shared_head = rank.refresher.state() if rank.refresher else {}
        notes = {DATA_FILE: rank.data_state(step), TRAINER_FILE: self._callbacks.saved_state()}
        engines = rank.engine.engines
        further = rank.outer.state() if rank.outer else {}
        further |= {f"{SHARED}{name}": matrix for name, matrix in shared_head.items()} | delayed_state(engines)
        with rank.traced("save", step):
            rank.saver.save(engines, step, rank.rows_after(step), further, notes, self._positions())
        self._saved = step
        self._callbacks.saved()
        return checkpoint_of(self.output_dir, step)

    def export(self, folder: Path | str | None = None) -> Path:
        """The model as `from_pretrained` reads it, in OUTPUT/export, with the exits of all stages; returns the folder.

        folder: where the whole model is copied to, too. With load_best_model_at_end it is the best checkpoint's. Every
        rank must call, once, and no step follows. Raises Unwritten, and WrongExport where what transformers loads is
        not what was trained.
        """
        self._end_training()
        if self._rank.job is not None and self._saved != self._step:
            self.save()
        if self._rank.outer is not None:
            self._rank.outer.settle()
        step = load_best(self._rank, self._step) if self.config.train.load_best_model_at_end else self._step
        if self._rank.job is not None:
            self._rank.saver.wait()
            return finish_part(self._rank, checkpoint_of(self.output_dir, step))
        finish(self._rank, step, self._evaluated == self._step)
        export = self.output_dir / "export"
        if folder is None:
            return export
        if self.place.rank == 0:
            shutil.copytree(export, folder, ignore=shutil.ignore_patterns("exits"), dirs_exist_ok=True)
        return Path(folder)

    def close(self) -> None:
        """Says goodbye to the other ranks; nothing can be done with the run afterwards. Every rank must call."""
        if not self._is_open:
            return
        self._end_training()
        self._is_open = False
        if self._rank.job is not None:
            self._rank.job.finish()
        self._rank.links.close(self._step)
        if self._rank.refresher is not None:
            self._rank.refresher.close(self._step)
        if self._rank.job is not None:
            self._rank.job.close()
        self._rank.world.finish()
        self._say_page()

    def _say_page(self, cause: str = "") -> None:
        if said := self._write_page(cause):
            with suppress(Unwritten):
                self._rank.progress.say(said)

    def _write_page(self, cause: str) -> str:
        """On rank 0; returns a line on it. cause: of an end before the time.

        It is made of what is on disk, and the run is over.
        """
        if self._rank.start is None or not self._step:
            return ""
        from llm_local.report.page import REPORT, report_problem  # one rank needs it, at the end

        path = self.output_dir / REPORT
        if cause:
            with suppress(Unwritten, OSError, ValueError):
                note_end(self.output_dir, cause)
        problem = report_problem([self.output_dir], path)
        return f"llm_local: {problem}" if problem else f"report: {path}"

    def fail(self, error: BaseException) -> None:
        """Tells the other ranks what has ended this one."""
        if self._is_open:
            self._is_open = False
            reason = str(error).partition("\n")[0] or type(error).__name__
            self._rank.world.watchdog.announce(reason)
            self._write_page(reason)

    def __enter__(self) -> Run:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if error is None:
            self.close()
        else:
            self.fail(error)

    def _positions(self) -> Positions | None:
        """Where a job's links stand."""
        rank = self._rank
        refreshed = rank.refresher.num_due if rank.refresher else 0
        return rank.job.here(refreshed, self._evaluated == self._step) if rank.job else None

    def _saves(self, step: int) -> bool:
        interval = self.config.save_interval
        return is_due(step, interval) or (interval > 0 and step == self.config.train.max_steps)

    def _evaluate(self) -> None:
        """Each stage by itself, unless a callback wants to know of all."""
        outer = self._rank.outer
        with outer.averaged() if outer else nullcontext():
            for number, each in enumerate(self._rank.setup.eval_sets):
                measure(self._rank, self._step, number, each)
        self._evaluated = self._step
        if self._callbacks.wait_for_evaluations:
            self._callbacks.evaluated(self._losses_of_all())

    def _losses_of_all(self) -> dict[str, float]:
        world, found = self._rank.world, {}
        seconds = self.config.local.link_timeout_seconds
        for each in self._rank.setup.eval_sets:
            of_stages = [
                world.fetch(f"{each.split}/{self._step}/{stage}", seconds, f"stage {stage} to evaluate")
                for stage in self.place.stages
            ]
            found |= metrics_of(each.split, [float(text.split()[-1]) for text in of_stages], self.place.stages.start)
        return found

    def _end_training(self) -> None:
        if not self._is_training:
            return
        self._is_training = False
        self._rank.saver.wait()
        end_trace(self._rank.tracer, self.config, self._rank.world)
        self._rank.progress.close()
        self._callbacks.end()

    def _stop(self) -> NoReturn:
        """Saves after the step on which the ranks agreed. None ends before all have: launchers then end the others."""
        rank, step = self._rank, self._step
        stop = rank.world.watchdog.stop
        if step > rank.first_step and self._saved != step:
            self.save()
        self._end_training()
        rank.world.everybody("stopped", self.config.train.signal_save_seconds, "the others to save")
        self._say_page(f"{stop.reason} at step {step}")
        rank.progress.say(
            f"llm_local: {stop.reason}: stopped and saved at step {step}; --resume_from_checkpoint auto goes on"
        )
        rank.world.say_goodbye()
        leave(stop.status)
