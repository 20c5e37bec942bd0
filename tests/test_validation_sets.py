"""Named validation sets: each is measured by itself, at every stage, and reported by its name."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Trainer, records
from documents import write_jsonl
from transformers import AutoModelForCausalLM, AutoTokenizer

from llm_local.config import from_flat
from llm_local.data.sets import prepare_all
from llm_local.evaluation import EvalSet, better_exit, split_of
from llm_local.partition import Partition, Span
from llm_local.place import Place
from llm_local.problems import static_problems
from llm_local.progress import Progress


def test_each_named_file_is_a_set_of_its_own(settings, tokenizer, tmp_path, jsonl, texts):
    files = {n: write_jsonl(tmp_path / f"{n}.jsonl", [f"{n} {text}" for text in texts]) for n in ("wiki", "code")}
    named = ",".join(f"{name}={file}" for name, file in files.items())
    both = prepare_all(settings(train_file=jsonl, validation_file=jsonl, validation_files=named), tokenizer)
    assert [each.name for each in both.validation] == ["validation", "wiki", "code"]
    for each in both.validation[1:]:
        assert each.name in tokenizer.decode(each.sequences.batch(0, 40).flatten().tolist())
    alone = prepare_all(settings(train_file=jsonl, validation_files=named), tokenizer)
    assert [each.name for each in alone.validation] == ["wiki", "code"], "then nothing is held out"
    assert alone.train.num_sequences == both.train.num_sequences


def test_bytes_of_a_token_are_those_of_the_text(settings, tokenizer, tmp_path, jsonl):
    held = ["für é 😀 " * 9, "alpha beta\r\n" * 9]
    config = settings(train_file=jsonl, validation_file=write_jsonl(tmp_path / "held.jsonl", held))
    (only,) = prepare_all(config, tokenizer).validation
    tokens = sum(len(tokenizer(text, add_special_tokens=False)["input_ids"]) + 1 for text in held)
    assert only.bytes_per_token == pytest.approx(sum(len(text.encode()) for text in held) / tokens)


def test_a_record_has_the_set_s_name_and_measures():
    record = EvalSet("wiki", split_of(1, "wiki"), bytes_per_token=4.0).record(5, 1, [3.0, 2.0], tokens=64)
    assert (record.split, record.name, record.loss, record.stage, record.step) == ("eval_wiki", "wiki", 2.0, 1, 5)
    assert record.perplexity == pytest.approx(math.exp(2.0))
    assert record.bits_per_byte == pytest.approx(2.0 / math.log(2) / 4)
    assert EvalSet("a", "eval", 0.0).record(5, 1, [3.0], tokens=64).bits_per_byte is None


def test_a_person_reads_the_set_s_name(capsys):
    assert (
        EvalSet("validation", "eval", 4.0).describe(2.0) == "validation loss 2.0000, perplexity 7.4, 0.721 bits a byte"
    )
    assert EvalSet("wiki", "eval_wiki", 0.0).describe(2.0) == "validation loss on wiki 2.0000, perplexity 7.4"
    progress = Progress(Store(), max_steps=1, first_step=0)
    progress.publish("eval", 1, [3.5])
    progress.publish("eval_wiki", 1, [3.25])
    progress.show()
    said = capsys.readouterr().err.splitlines()
    assert said == ["step 1  validation loss by stage: 3.500", "step 1  validation loss on wiki by stage: 3.250"]


def test_the_exit_to_keep_is_named_where_the_whole_model_is_not_the_best():
    """As after 300 steps of four blocks of two layers in two stages: the third block's exit was the best."""
    cut = Partition(tuple(Span(k, k + 2) for k in (0, 2, 4, 6)), (Span(0, 2), Span(2, 4)))
    folders, resume = {0: Path("out/exits/stage-00"), 1: Path("out")}, "--resume_from_checkpoint true"

    def said(*losses: list[float], name: str = "validation", exits: Any = folders, resume: str = resume) -> str:
        return better_exit(name, losses, cut, exits, resume)

    behind = "the whole model is 0.130 nats behind the exit of layers 0-{} (4.4300 against 4.3000) on {}"
    on_text = behind.format(3, "the validation set")
    assert said([4.5, 4.30], [4.6, 4.43]) == f"{on_text}: keep out/exits/stage-00"
    assert said([4.5, 4.30], [4.6, 4.43], name="wiki") == f"{behind.format(3, 'wiki')}: keep out/exits/stage-00"
    assert said([4.5, 4.30], [4.6, 4.43], exits=None) == on_text, "a run without exits"
    alone = "train a model of its own with --config_overrides num_hidden_layers"
    assert said([4.5, 4.30], [4.6, 4.43], exits={}) == f"{on_text}: it is no model by itself; {alone}=4"
    levels = better_exit("validation", ([4.5, 4.30], [4.6, 4.43]), cut, {}, resume, "depths=[1,{}]".format)
    assert levels.endswith("with --config_overrides depths=[1,4]")
    within = [4.5, 4.40], [4.3, 4.43]
    command = f"to have it, run again in 3 processes with --num_stages 3 --stage_layers 4,2,2 {resume}"
    on_text = behind.format(5, "the validation set")
    assert said(*within) == f"{on_text}: {command}"
    unsaved = f"it is within a stage, and no checkpoint was saved to cut it out of (save_steps); {alone}=6"
    assert said(*within, resume="") == f"{on_text}: {unsaved}"
    assert said([4.5, 4.44], [4.43, 4.43]) == ""
    assert said([4.5, 4.425], [4.43, 4.43]) == "", "within the noise of a validation set"


@pytest.mark.processes
def test_an_exit_within_a_stage_is_had_by_the_command_that_the_end_says(trainer: Trainer, capfd):
    common = {"block_loss_weights": "1,1,1,0.0001", "save_steps": 12, "max_steps": 12, "learning_rate": 1e-2}
    output = trainer.run("run", 1, num_stages=1, layers_per_block=1, **common)
    (line,) = [line for line in capfd.readouterr().err.splitlines() if "behind the exit of layers 0-" in line]
    command = line.partition(" processes with ")[2].split()
    flags = dict(zip([name[2:] for name in command[::2]], command[1::2], strict=True))
    assert flags["num_stages"] == "2"
    trainer.run("run", 2, **common, **flags)
    said = capfd.readouterr().err
    assert f"keep {output / 'export/exits/stage-00'}" in said
    kept = AutoModelForCausalLM.from_pretrained(output / "export/exits/stage-00")
    assert kept.config.num_hidden_layers == int(flags["stage_layers"].split(",")[0])


class Store(dict):
    """As much of a world as a progress bar needs."""

    place = Place(0, (1,))
    publish = dict.__setitem__
    peek = dict.get


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ({"validation_files": "a.txt"}, "validation_files='a.txt' is not a list such as wiki=a.jsonl,code=b.txt"),
        ({"validation_files": "wiki="}, "validation_files='wiki=' is not a list such as"),
        ({"validation_files": "a/b=c"}, "validation_files='a/b=c' is not a list such as"),
        ({"validation_files": "a=b,a=c"}, "validation_files='a=b,a=c' gives the name 'a' again; choose another"),
        (
            {"validation_files": "validation=b", "validation_file": "c", "train_file": "d"},
            "validation_files='validation=b' gives the name 'validation' again",
        ),
        ({"data_mixture": "a", "train_file": "b"}, "both train_file and data_mixture are given; keep one"),
        (
            {"data_mixture": "a", "train_file": "b", "dataset_name": "c"},
            "dataset_name and train_file and data_mixture are given; keep one",
        ),
        ({"data_mixture": "a", "dataset_split": "b"}, "dataset_split=b needs dataset_name; say it in the mixture file"),
        ({"dataset_revision": "b"}, "dataset_revision=b needs dataset_name"),
    ],
)
def test_flags_that_do_not_go_together_are_named(flags, said):
    problems = static_problems(from_flat({"model_type": "llama", **flags}), 1, False, True)
    assert any(problem.startswith(said) for problem in problems), problems


def logged(output):
    """Validation records of both stages by split and stage."""
    splits = ("eval", "eval_wiki", "eval_code")
    return {(split, stage): records(output, stage, split) for split in splits for stage in range(2)}


@pytest.mark.processes
@pytest.mark.parametrize("method", ["chunked", "backprop"])
def test_every_stage_reports_every_set(trainer: Trainer, method):
    wiki, code = (write_jsonl(trainer.folder / f"{n}.jsonl", [f"{n} says {i}" * 20 for i in range(40)]) for n in "wc")
    named = f"wiki={wiki},code={code}"
    output = trainer.run(
        "run", 2, num_stages=2, method=method, validation_files=f"{named}", validation_file=trainer.text, eval_steps=2
    )
    found = logged(output)
    for (split, stage), rows in found.items():
        assert [row["step"] for row in rows] == [2, 4], (split, stage)
        for row in rows:
            assert row["name"] == {"eval": "validation"}.get(split, split.removeprefix("eval_"))
            assert row["perplexity"] == pytest.approx(math.exp(row["loss"]))
            assert 0 < row["bits_per_byte"] < row["loss"] / math.log(2)
    assert found["eval", 1][-1]["loss"] != found["eval_wiki", 1][-1]["loss"] != found["eval_code", 1][-1]["loss"]


@pytest.mark.processes
def test_a_set_s_loss_is_the_exported_model_s_on_its_text(trainer: Trainer):
    wiki = write_jsonl(trainer.folder / "wiki.jsonl", [f"wiki says {i} " * 20 for i in range(40)])
    flags = trainer.flags("run", num_stages=1, validation_files=f"other={trainer.text},wiki={wiki}")
    output = trainer.run("run", 1, num_stages=1, validation_files=f"other={trainer.text},wiki={wiki}")
    (record,) = records(output, 0, "eval_wiki")
    model = AutoModelForCausalLM.from_pretrained(output / "export")
    tokenizer = AutoTokenizer.from_pretrained(output / "export")
    values = dict(zip([flag.removeprefix("--") for flag in flags[::2]], flags[1::2], strict=True))
    config = from_flat({**values, "seq_length": 32, "eval_batches": 2, "train_file": values["train_file"]})
    found = prepare_all(config, tokenizer).validation
    assert [each.name for each in found] == ["other", "wiki"]
    ids = found[1].sequences.batch(0, 4)
    with torch.no_grad():
        losses = [model(input_ids=row[None], labels=row[None]).loss.item() for row in ids]
    assert record["loss"] == pytest.approx(sum(losses) / 4, rel=1e-4)
    assert record["bits_per_byte"] == pytest.approx(record["loss"] / math.log(2) / found[1].bytes_per_token)
    assert record["tokens"] == 4 * 32
