"""The library from Python: objects in place of flags, a loop of one's own, callbacks, transformers' Trainer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TINY, records
from datasets import Dataset
from ranks import run_ranks
from transformers import AutoModelForCausalLM, AutoTokenizer, EarlyStoppingCallback, LlamaConfig, TrainerCallback

import llm_local as ll
from llm_local.data.mixture import OBJECT
from llm_local.data.objects import with_objects
from llm_local.data.source_problems import data_problems
from llm_local.reporting import report_problems

MODEL = {name: value for name, value in TINY.items() if name != "model_type"}
FLAGS = {
    "seq_length": 32,
    "per_device_train_batch_size": 2,
    "max_steps": 6,
    "learning_rate": 3e-3,
    "logging_steps": 1,
    "eval_batches": 2,
    "link_timeout_seconds": 60,
    "ddp_timeout": 60,
}


def config_of(folder: Path, cache: Path, **flags: Any) -> ll.Config:
    return ll.Config.load(None, **FLAGS | {"output_dir": str(folder), "cache_dir": str(cache)} | flags)


def texts() -> list[str]:
    words = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
    return [" ".join(words[n % 10 :] + words[: n % 7]) + f" {n}." for n in range(400)]


class Recorded(TrainerCallback):
    def __init__(self) -> None:
        self.events: list[str] = []
        self.logs: list[dict[str, float]] = []
        self.metrics: list[dict[str, float]] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any):
        assert model.config.hidden_size == 32
        assert args.learning_rate == 3e-3
        self.events.append(f"begin {state.global_step}/{state.max_steps}")

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any):
        self.events.append(f"step {state.global_step}")

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any):
        self.logs.append({**logs, "step": state.global_step})

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any = None, **kwargs: Any):
        self.metrics.append({**metrics, "step": state.global_step})

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any):
        self.events.append("save")

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any):
        self.events.append("end")


def _own_loop(folder: Path, cache: Path) -> dict[str, Any]:
    tokenizer = AutoTokenizer.from_pretrained(next((cache / "tokenizer").iterdir()))
    data, held_out = Dataset.from_dict({"text": texts()}), Dataset.from_dict({"text": texts()[:100]})
    told = Recorded()
    config = config_of(folder, cache, num_stages=2, head="shared", head_refresh_steps=2)
    with ll.prepare(config, LlamaConfig(**MODEL), tokenizer, data, held_out, callbacks=[told]) as run:
        found, steps = [], []
        for step in run.steps():
            found.append(run.train_step().losses.tolist())
            steps.append(step)
            if step == 4:
                metrics = run.evaluate()
                checkpoint = run.save()
        exported = run.export(folder / "model")
    names = {"events": told.events, "logs": told.logs, "metrics": told.metrics, "evaluated": metrics}
    return names | {"losses": found, "steps": steps, "checkpoint": checkpoint, "export": exported}


@pytest.fixture
def cache_with_tokenizer(cache: Path) -> Path:
    from llm_local.data.tokenizer import builtin_tokenizer_dir

    builtin_tokenizer_dir(cache)
    return cache


@pytest.mark.processes
def test_a_loop_of_ones_own_over_objects(tmp_path: Path, cache_with_tokenizer: Path):
    first, last = run_ranks(_own_loop, 2, tmp_path / "run", cache_with_tokenizer)
    assert first["steps"] == last["steps"] == [1, 2, 3, 4, 5, 6]
    assert last["losses"][-1] < last["losses"][0]
    assert first["checkpoint"] == tmp_path / "run/checkpoints/step-00000004"
    assert (first["checkpoint"] / "manifest.json").exists()
    # every rank has the losses of all stages, and they are those of the metrics files
    assert first["evaluated"] == last["evaluated"]
    by_stage = [records(tmp_path / "run", stage, "eval")[0]["loss"] for stage in (0, 1)]
    wanted = {"eval_loss": by_stage[1], "eval_loss_stage_0": by_stage[0], "eval_loss_stage_1": by_stage[1]}
    assert first["evaluated"] == wanted
    assert first["metrics"] == last["metrics"] == [wanted | {"step": 4}]
    steps = [f"step {n}" for n in range(1, 5)]
    assert first["events"] == ["begin 0/6", *steps, "save", "step 5", "step 6", "end"]
    # rank 0 logs what all stages have, each other stage what it has itself
    trained = [logs for logs in first["logs"] if "learning_rate" in logs]
    assert [logs["step"] for logs in trained] == [1, 2, 3, 4, 5, 6]
    for logs in trained:
        of_stages = [records(tmp_path / "run", stage)[logs["step"] - 1]["loss"] for stage in (0, 1)]
        assert [logs["loss_stage_0"], logs["loss_stage_1"], logs["loss"]] == [*of_stages, of_stages[1]]
    assert [logs for logs in first["logs"] if "eval_loss" in logs] == [wanted | {"step": 4}]
    assert {*last["logs"][0]} == {"loss_stage_1", "learning_rate", "grad_norm", "step"}
    model = AutoModelForCausalLM.from_pretrained(first["export"])
    assert first["export"] == tmp_path / "run/model"
    assert model.config.num_hidden_layers == 4
    assert not (tmp_path / "run/model/exits").exists()


def _stops_early(folder: Path, cache: Path, more: dict[str, Any]) -> dict[str, Any]:
    data = Dataset.from_dict({"text": texts()})
    config = config_of(folder, cache, num_stages=2, eval_steps=2, save_steps=2, **{"max_steps": 40} | more)
    told, stopper = Recorded(), EarlyStoppingCallback(early_stopping_patience=3, early_stopping_threshold=100.0)
    with ll.prepare(config, LlamaConfig(**MODEL), train_dataset=data, callbacks=[told, stopper]) as run:
        run.train()
        run.export()
        return {"step": run.step, "evaluated": [metrics["step"] for metrics in told.metrics]}


@pytest.mark.processes
@pytest.mark.parametrize("more", [{}, {"head": "shared", "head_refresh_steps": 3, "load_best_model_at_end": True}])
def test_early_stopping_ends_all_ranks_at_the_same_step(tmp_path: Path, cache: Path, more: dict[str, Any]):
    """By transformers' own callback. No later loss is better than the first by so much."""
    found = run_ranks(_stops_early, 2, tmp_path / "run", cache, more)
    assert found == [{"step": 8, "evaluated": [2, 4, 6, 8]}] * 2
    assert [record["step"] for record in records(tmp_path / "run", 1)] == [*range(1, 9)]
    assert (tmp_path / "run/checkpoints/step-00000008/manifest.json").exists()
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "run/export")


@pytest.mark.processes
def test_early_stopping_goes_on_counting_after_a_resume(tmp_path: Path, cache: Path):
    run_ranks(_stops_early, 2, tmp_path / "run", cache, {"max_steps": 4})
    assert json.loads((tmp_path / "run/checkpoints/step-00000004/stage-00/trainer_state.json").read_text())
    found = run_ranks(_stops_early, 2, tmp_path / "run", cache, {"resume_from_checkpoint": "true"})
    assert [each["step"] for each in found] == [8, 8]


def _raises(folder: Path, cache: Path) -> int:
    class Raises(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any):
            if state.global_step == 6 and not state.is_world_process_zero:
                raise ValueError("the sky falls")

    config = config_of(folder, cache, num_stages=2, save_steps=2)
    with ll.prepare(config, LlamaConfig(**MODEL), train_dataset=texts(), callbacks=[Raises()]) as run:
        run.train()
    return run.step


@pytest.mark.processes
def test_a_callback_that_raises_ends_the_run_and_spares_the_checkpoints(tmp_path: Path, cache: Path):
    with pytest.raises(AssertionError, match="ValueError: the sky falls"):
        run_ranks(_raises, 2, tmp_path / "run", cache)
    assert (tmp_path / "run/checkpoints/step-00000002/manifest.json").exists()


def _stops_by_a_late_stage(folder: Path, cache: Path) -> int:
    class Stops(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any):
            control.should_training_stop = state.global_step >= 3 and not state.is_world_process_zero

    config = config_of(folder, cache, num_stages=2, max_steps=100)
    with ll.prepare(config, LlamaConfig(**MODEL), train_dataset=texts(), callbacks=[Stops]) as run:
        run.train()
        run.export()
    return run.step


@pytest.mark.processes
def test_a_stop_that_one_rank_asks_for_is_one_of_all(tmp_path: Path, cache: Path):
    first, last = run_ranks(_stops_by_a_late_stage, 2, tmp_path / "run", cache)
    assert first == last
    assert 3 <= first <= 3 + 4 + 2, "as far as the first stage had come, which the packets in flight bound"
    assert [record["step"] for record in records(tmp_path / "run", 1, "eval")] == [first]


def _train_on(folder: Path, cache: Path, kind: str) -> list[float]:
    tokenizer = AutoTokenizer.from_pretrained(next((cache / "tokenizer").iterdir()))
    ids = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts()]
    data: Any = {
        "text": lambda: Dataset.from_dict({"text": texts(), "other": [1] * 400}),
        "ids": lambda: Dataset.from_dict({"input_ids": ids}),
        "list": texts,
        "torch": lambda: Numbers(ids),
        "stream": lambda: Dataset.from_dict({"text": texts()}).to_iterable_dataset(),
        "stream of ids": lambda: Dataset.from_dict({"input_ids": ids}).to_iterable_dataset(),
        "torch stream": lambda: Stream(ids),
    }[kind]()
    held_out = Dataset.from_dict({"text": texts()[:50]})
    config = config_of(folder, cache, max_steps=3)
    run = ll.prepare(config, LlamaConfig(**MODEL), tokenizer, data, {"wiki": held_out})
    losses = [run.train_step().losses.item() for _ in run.steps()]
    losses.append(run.evaluate()["eval_loss"])
    run.close()
    return losses


class Numbers(torch.utils.data.Dataset):
    def __init__(self, ids: list[list[int]]):
        self.ids = ids

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, number: int) -> dict[str, torch.Tensor]:
        return {"input_ids": torch.tensor(self.ids[number]), "labels": torch.tensor([0])}


class Stream(torch.utils.data.IterableDataset):
    def __init__(self, ids: list[list[int]]):
        self.ids = ids

    def __iter__(self) -> Any:
        yield from (torch.tensor(each) for each in self.ids)


@pytest.mark.processes
@pytest.mark.parametrize(
    "kinds",
    [["text", "ids", "list", "torch"], ["stream", "stream of ids", "torch stream"]],
    ids=["stored", "streams"],
)
def test_the_same_text_trains_the_same_whatever_object_holds_it(
    tmp_path: Path, cache_with_tokenizer: Path, kinds: list[str]
):
    found = [run_ranks(_train_on, 1, tmp_path / kind, cache_with_tokenizer, kind)[0] for kind in kinds]
    assert all(each == found[0] for each in found)
    (record,) = records(tmp_path / kinds[0], 0, "eval")
    assert record["name"] == "wiki"
    assert record["bits_per_byte"] > 0


def _of_trainer(folder: Path, cache: Path) -> dict[str, Any]:
    args = ll.LocalTrainingArguments(
        output_dir=str(folder),
        cache_dir=str(cache),
        num_stages=2,
        seq_length=32,
        per_device_train_batch_size=2,
        num_train_epochs=1,
        learning_rate=3e-3,
        logging_steps=1,
        eval_strategy="steps",
        eval_steps=20,
        save_strategy="no",
        report_to="none",
        eval_batches=2,
        max_train_samples=80,
    )
    told = Recorded()
    data, held_out = Dataset.from_dict({"text": texts()}), Dataset.from_dict({"text": texts()[:50]})
    trainer = ll.LocalTrainer(LlamaConfig(**MODEL), args, data, held_out)
    trainer.add_callback(told)
    output = trainer.train()
    metrics = trainer.evaluate()
    trainer.save_model(folder / "model")
    return {"steps": output.global_step, "loss": output.training_loss, "metrics": metrics, "seen": told.metrics}


@pytest.mark.processes
def test_the_names_of_transformers_trainer(tmp_path: Path, cache: Path):
    first, last = run_ranks(_of_trainer, 2, tmp_path / "run", cache)
    assert first["steps"] == 40, "80 sequences, two a step"
    assert [metrics["step"] for metrics in first["seen"]] == [20, 40]
    assert first["metrics"] == last["metrics"]
    assert first["metrics"]["eval_loss"] < first["seen"][0]["eval_loss"]
    trained = [record["loss"] for record in records(tmp_path / "run", 1)]
    assert first["loss"] == pytest.approx(sum(trained) / len(trained))
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "run/model").config.num_hidden_layers == 4


def test_arguments_that_a_run_does_not_take_are_refused_with_what_to_use():
    args = ll.LocalTrainingArguments(output_dir="run", optim="adafactor", hub_model_id="me/mine", data_seed=3)
    with pytest.raises(ll.ConfigError) as refused:
        args.config()
    assert len(refused.value.problems) == 3
    assert "optim=" in str(refused.value)
    assert "name another than AdamW in the JSON of --deepspeed" in str(refused.value)
    assert "data_seed=3 is not taken; use --seed" in str(refused.value)


def test_arguments_are_flags_with_the_defaults_of_transformers():
    config = ll.LocalTrainingArguments(output_dir="run", gradient_checkpointing=True, head="shared").config()
    assert config.train.learning_rate == 5e-5
    assert config.train.num_train_epochs == 3.0
    assert config.train.save_steps == config.train.logging_steps == 500
    assert config.train.gradient_checkpointing
    assert config.local.head == "shared"
    assert config.train.report_to == "none"
    assert ll.LocalTrainingArguments(output_dir="run", max_steps=7).config().train.max_steps == 7


class TestRefusals:
    def refused(self, *args: Any, config: ll.Config | None = None, **kwargs: Any) -> str:
        with pytest.raises(ll.ConfigError) as error:
            with_objects(config or ll.Config.load(), *args, **kwargs)
        (problem,) = error.value.problems
        return problem

    def test_a_model_that_is_made_already(self):
        model: Any = torch.nn.Linear(1, 1)
        assert self.refused(model).startswith("model=Linear: give its .config for a new model, or the folder")

    def test_data_of_no_known_kind(self):
        found = self.refused(train_dataset=7)
        assert found.startswith("train_dataset is a int; give a Dataset or IterableDataset of datasets or torch, or")

    def test_data_without_rows_or_text(self, tmp_path: Path):
        config = ll.Config.load(cache_dir=str(tmp_path))
        empty, other = Dataset.from_dict({"text": []}), Dataset.from_dict({"a": [1], "b": [2]})
        assert self.refused(eval_dataset=empty) == "eval_dataset has no rows; give a data set with text"
        found = self.refused(train_dataset=other, config=config)
        assert found == "train_dataset has no text in 'text' and no 'input_ids', only 'a', 'b'; set text_column_name"

    def test_a_stream_to_validate_on(self):
        stream = Dataset.from_dict({"text": texts()}).to_iterable_dataset()
        found = self.refused(eval_dataset={"wiki": stream})
        assert found == "eval_dataset 'wiki' is a stream; give a Dataset, which all evaluations find alike"

    def test_numbers_of_no_tokenizer_or_another(self, cache_with_tokenizer: Path):
        numbers = Dataset.from_dict({"input_ids": [[5, 99_999]]})
        found = self.refused(train_dataset=numbers)
        assert found == "train_dataset has input_ids; give the tokenizer that has made them"
        tokenizer = AutoTokenizer.from_pretrained(next((cache_with_tokenizer / "tokenizer").iterdir()))
        config = ll.Config.load(cache_dir=str(cache_with_tokenizer))
        found = self.refused(train_dataset=numbers, tokenizer=tokenizer, config=config)
        assert found == "train_dataset has the token 99999, the tokenizer none above 4095; give its own"

    def test_what_a_flag_says_too(self):
        found = self.refused("folder", config=ll.Config.load(config_name="a.json"))
        assert found == "model= is given, and the flag config_name=a.json; keep one"

    def test_a_run_of_objects_that_is_gone_on_with_by_flags(self):
        (found,) = data_problems(ll.Config.load(dataset_name=OBJECT))
        assert found.startswith("dataset_name=<train_dataset> was an object of a Python program; give it again")

    def test_unknown_flags_and_types(self):
        with pytest.raises(ll.ConfigError, match="unknown setting 'stages'"):
            ll.Config.load(stages=2)
        with pytest.raises(ll.ConfigError, match="max_steps: 'many' is not a whole number"):
            ll.Config.load(max_steps="many")

    @pytest.mark.parametrize(
        ("asked", "said"),
        [
            ("wandbb", "report_to=wandbb: 'wandbb' is unknown; use none, all, or some of azure_ml, "),
            (
                "csv,codecarbon",
                "report_to=csv,codecarbon: CodeCarbonCallback cannot be used (CodeCarbonCallback requires",
            ),
        ],
    )
    def test_trackers(self, asked: str, said: str):
        (found,) = report_problems(ll.Config.load(report_to=asked))
        assert found.startswith(said)
        assert not report_problems(ll.Config.load(report_to="tensorboard,csv"))


def _twice(folder: Path, cache: Path) -> list[str]:
    """Refused, tried again, and a second run."""
    said = []
    for flags in ({"seq_length": 9999}, {"max_steps": 1}, {"max_steps": 1}):
        try:
            with ll.prepare(config_of(folder, cache, **flags), LlamaConfig(**MODEL), train_dataset=texts()) as run:
                run.train()
            said.append(f"{run.step} step")
        except ll.ConfigError as error:
            said += error.problems
    return said


@pytest.mark.processes
def test_a_process_tries_until_it_has_had_its_run(tmp_path: Path, cache: Path):
    ((refused, trained, again),) = run_ranks(_twice, 1, tmp_path / "run", cache)
    assert refused.startswith("seq_length=9999")
    assert trained == "1 step"
    assert again == "this process has had its run; start another process for the next one"


def _refused_on_all(folder: Path, cache: Path) -> list[str]:
    try:
        ll.prepare(config_of(folder, cache, num_stages=2, seq_length=9999), LlamaConfig(**MODEL), train_dataset=texts())
    except ll.ConfigError as error:
        return error.problems
    return []


@pytest.mark.processes
def test_a_refusal_is_the_same_on_every_rank(tmp_path: Path, cache: Path):
    first, other = run_ranks(_refused_on_all, 2, tmp_path / "run", cache)
    assert first == other
    assert first[0].startswith("seq_length=9999 is longer than the model's 64 positions")
    assert not (tmp_path / "run").exists()


def test_the_public_names():
    assert sorted(ll.__all__) == [
        "Config",
        "ConfigError",
        "Head",
        "LocalTrainer",
        "LocalTrainingArguments",
        "LostPeer",
        "Method",
        "NonFiniteLoss",
        "Run",
        "Schedule",
        "StepResult",
        "Task",
        "prepare",
        "register_head",
        "register_method",
        "register_task",
    ]
    for name in ll.__all__:
        assert getattr(ll, name).__doc__, name
    assert set(ll.__all__) <= set(dir(ll))
    with pytest.raises(AttributeError, match="has no attribute 'Trainer'"):
        _ = ll.Trainer
