"""A folder of tokens trains like the text that it was made of, wherever it is; one that will not do is refused."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from conftest import Trainer, records
from documents import write_jsonl
from transformers import AutoTokenizer, ByT5Tokenizer

from llm_local.config import ConfigError
from llm_local.data import token_folder
from llm_local.data.parts import STATE
from llm_local.data.sets import data_problems, prepare_all, tokenizer_key
from llm_local.data.tokenizer_training import sample_texts

Write = Callable[..., Path]


@pytest.fixture
def prepared(script: Callable[[str], ModuleType], tokenizer, tmp_path) -> Write:
    """prepared(train_file=..., ...) → the folder, after a move to where neither text nor cache is found."""

    def write(**flags: Any) -> Path:
        tokenizer.save_pretrained(tmp_path / "tokenizer")
        defaults = {
            "tokenizer_name": tmp_path / "tokenizer",
            "cache_dir": tmp_path / "there",
            "output": tmp_path / "made",
            "seq_length": 16,
        }
        given = [part for name, value in {**defaults, **flags}.items() for part in (f"--{name}", str(value))]
        assert script("prepare_data").main(given) == 0
        (tmp_path / "here").mkdir(exist_ok=True)
        moved = tmp_path / "here" / f"folder-{len(os.listdir(tmp_path / 'here'))}"
        shutil.move(tmp_path / "made", moved)
        shutil.rmtree(tmp_path / "there")
        return moved

    return write


@pytest.fixture
def folder(prepared: Write, jsonl) -> Path:
    return prepared(train_file=jsonl)


def rows(sequences: Any, count: int | None = None) -> torch.Tensor:
    return sequences.batch(0, count or sequences.num_sequences)


@pytest.mark.parametrize("packing", ["concat", "best_fit", "none"])
def test_rows_and_their_order_are_those_of_the_text(settings, tokenizer, folder, jsonl, tmp_path, packing: str):
    flags = {"seq_length": 21, "packing": packing}
    text = prepare_all(settings(train_file=jsonl, **flags), tokenizer)
    files = sorted(path for path in folder.rglob("*"))
    os.remove(jsonl)
    config = settings(dataset_name=str(folder), **flags, cache_dir=str(tmp_path / "other"))
    for found in (prepare_all(config, tokenizer), prepare_all(config, tokenizer)):  # made, then only mapped
        assert torch.equal(rows(found.train), rows(text.train))
        assert torch.equal(rows(found.validation[0].sequences), rows(text.validation[0].sequences))
        assert found.validation[0].bytes_per_token == text.validation[0].bytes_per_token
        assert found.sources[0].packed == text.sources[0].packed
    assert sorted(path for path in folder.rglob("*")) == files, "it may be read-only"
    own = write_jsonl(tmp_path / "own.jsonl", ["alpha beta " * 30])
    with_own = prepare_all(settings(dataset_name=str(folder), validation_files=f"own={own}"), tokenizer)
    assert [each.name for each in with_own.validation] == ["own"]


def test_a_running_text_stays_one(settings, tokenizer, prepared: Write, tmp_path, texts):
    (tmp_path / "a.txt").write_text("\n".join(texts * 20))
    held = write_jsonl(tmp_path / "held.jsonl", texts)
    flags = {"train_file": str(tmp_path / "a.txt"), "validation_file": held}
    text = prepare_all(settings(**flags, packing="best_fit"), tokenizer)
    found = prepare_all(settings(dataset_name=str(prepared(**flags)), packing="best_fit"), tokenizer)
    assert torch.equal(rows(found.train), rows(text.train))
    assert torch.equal(rows(found.validation[0].sequences), rows(text.validation[0].sequences))
    assert found.sources[0].packed == text.sources[0].packed
    assert found.sources[0].packed is not None
    assert found.sources[0].packed.documents == 1


def test_folders_are_sources_of_a_mixture(settings, tokenizer, prepared: Write, tmp_path, texts):
    files = [write_jsonl(tmp_path / f"{n}.jsonl", [f"{n} {text}" for text in texts]) for n in range(3)]
    folders = [prepared(train_file=file) for file in files[:2]]

    def mixed(sources: list[str]) -> Any:
        (tmp_path / "mix.yaml").write_text(
            yaml.safe_dump([{"source": s, "weight": n + 1} for n, s in enumerate(sources)])
        )
        return prepare_all(settings(data_mixture=str(tmp_path / "mix.yaml")), tokenizer)

    found, text = mixed([*map(str, folders), files[2]]), mixed(files)
    assert torch.equal(rows(found.train, 400), rows(text.train, 400))
    assert torch.equal(rows(found.validation[0].sequences, 40), rows(text.validation[0].sequences, 40))


def test_its_tokenizer_comes_along(folder, tokenizer):
    assert tokenizer_key(AutoTokenizer.from_pretrained(folder / "tokenizer")) == tokenizer_key(tokenizer)


def test_another_tokenizer_is_refused(settings, tokenizer, folder, tmp_path):
    other = AutoTokenizer.from_pretrained(folder / "tokenizer")
    other.add_tokens(["<|new|>"])
    other.save_pretrained(tmp_path / "other")
    repair = rf"not by other; set tokenizer_name={folder}/tokenizer, or prepare the text by this one"
    with pytest.raises(ConfigError, match=rf"dataset_name={folder} was tokenised by tokenizer, {repair}"):
        prepare_all(settings(dataset_name=str(folder)), AutoTokenizer.from_pretrained(tmp_path / "other"))


def the_problem(settings: Any, folder: Path, **flags: Any) -> str:
    (found,) = data_problems(settings(dataset_name=str(folder), **flags))
    assert found.startswith(f"dataset_name={folder}")
    return found.removeprefix(f"dataset_name={folder}")


def test_a_folder_that_is_not_whole_is_refused(settings, folder):
    assert data_problems(settings(dataset_name=str(folder))) == []
    (part,) = (folder / "train").glob("data-*.arrow")
    size, content = part.stat().st_size, part.read_bytes()
    part.write_bytes(content[:-100])
    said = f" is not whole: train/{part.name} has {size - 100:,} bytes, not {size:,}; copy it again, or write it again"
    assert the_problem(settings, folder).startswith(said)
    part.unlink()
    assert f" is not whole: train/{part.name} is missing; copy it again" in the_problem(settings, folder)
    (folder / "tokens.json").write_text("{")
    assert ": tokens.json cannot be read (" in the_problem(settings, folder)
    (folder / "tokens.json").unlink()
    said = " is a folder of tokens without tokens.json, which is written last; copy it again, or write it again with"
    assert the_problem(settings, folder).startswith(said)


def test_what_an_older_folder_took_for_special_tokens_is_counted(settings, tokenizer, folder):
    """It does not say so itself, and had EOS of text that spelled it."""
    counts, card = (
        json.loads((folder / "train/counts.json").read_text()),
        json.loads((folder / "tokens.json").read_text()),
    )
    del counts["spelled"]
    (folder / "train/counts.json").write_text(json.dumps(counts))
    card["sizes"]["train/counts.json"] = (folder / "train/counts.json").stat().st_size
    (folder / "tokens.json").write_text(json.dumps(card))
    assert prepare_all(settings(dataset_name=str(folder)), tokenizer).warnings == (), "it holds those of its ends alone"
    (part,) = (folder / "train").glob("data-*.arrow")
    content = part.read_bytes()
    first, second = tokenizer("document", add_special_tokens=False)["input_ids"][:2]
    plain, eos = (
        np.array(ids, dtype=np.int32).tobytes() for ids in ([first, second], [tokenizer.eos_token_id, second])
    )
    times = content.count(plain)
    assert times > 10
    part.write_bytes(content.replace(plain, eos))
    said = f"was prepared when text that spelled a special token became one, {times} times; prepare it again"
    assert prepare_all(settings(dataset_name=str(folder)), tokenizer).warnings == (f"dataset_name={folder} {said}",)


def test_a_damaged_file_of_the_right_size_is_named(settings, tokenizer, folder):
    (part,) = (folder / "train").glob("data-*.arrow")
    part.write_bytes(bytes(part.stat().st_size))
    with pytest.raises(
        ConfigError, match=rf"{folder}/train is damaged \(.*\); copy it again, or write it again with pr"
    ):
        prepare_all(settings(dataset_name=str(folder)), tokenizer)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ({"streaming": True}, "is read in any order and not as a stream; leave streaming out"),
        ({"dataset_split": "train"}, "with one set to train and one to validate on; name no split or config"),
        (
            {"validation_split_percentage": 20},
            " was divided with validation_split_percentage=10; leave validation_split_percentage=20 out, or prepare",
        ),
    ],
)
def test_what_was_decided_when_it_was_made_is_not_asked_for_again(settings, prepared, jsonl, flags: Any, said: str):
    folder = prepared(train_file=jsonl, validation_split_percentage=10)
    assert said in the_problem(settings, folder, **flags)
    assert data_problems(settings(dataset_name=str(folder), validation_split_percentage=10)) == []
    assert data_problems(settings(dataset_name=str(folder))) == [], "the default is no wish"


def test_a_folder_of_tokens_is_no_text(settings, folder):
    (found,) = data_problems(settings(train_file=str(folder)))
    assert found == f"train_file={folder} is a folder of tokens, which goes into dataset_name"
    with pytest.raises(ConfigError, match=rf"dataset_name={folder} is a folder of tokens; a tokenizer is trained on"):
        next(sample_texts(settings(dataset_name=str(folder)), 100))


def test_where_nothing_can_be_linked_it_is_copied(monkeypatch: pytest.MonkeyPatch, tokenizer, tmp_path):
    def refuse(*_: Any) -> None:
        raise OSError(18, "Invalid cross-device link")

    (tmp_path / "from").mkdir()
    (tmp_path / "from" / STATE).write_text("{}")
    monkeypatch.setattr(os, "link", refuse)
    sets = {"train": tmp_path / "from"}
    token_folder.write_token_folder(tmp_path / "to", sets, tokenizer, "text", "text", 5)
    assert (tmp_path / "to" / "train" / STATE).read_text() == "{}"
    assert (tmp_path / "to" / "train" / STATE).stat().st_nlink == 1


# --- prepare_data.py --output


@pytest.mark.parametrize(
    ("flags", "made", "said"),
    [
        ({}, {"tokens.json": "{}"}, "output={} holds prepared data; remove it, or choose another"),
        ({}, {"notes.txt": "a"}, "output={} is not empty (notes.txt); choose another"),
        ({}, {"train/mine.txt": "a"}, "output={} is not empty (train); choose another"),
        ({}, {"tokenizer/tokenizer.json": "a"}, "output={} is not empty (tokenizer); choose another"),
        ({}, None, "output={} is a file; choose another name"),
        (
            {"validation_files": "a=b.jsonl"},
            {},
            "output={} has one set to validate on; give validation_files to pretrain",
        ),
        ({"train_file": None, "data_mixture": "mix.yaml"}, {}, "output={} takes one source; write a folder for each"),
    ],
)
def test_an_output_that_will_not_do_is_refused_before_work(script, tmp_path, jsonl, capsys, flags, made, said: str):
    output = tmp_path / "output"
    (tmp_path / "mix.yaml").write_text(yaml.safe_dump([{"source": jsonl}, {"source": jsonl}]))
    if made is None:
        output.write_text("")
    else:
        output.mkdir()
    for name, content in (made or {}).items():
        (output / name).parent.mkdir(exist_ok=True)
        (output / name).write_text(content)
    given = {"train_file": jsonl, "output": output, "cache_dir": tmp_path / "cache"} | flags
    given |= {"data_mixture": tmp_path / "mix.yaml"} if "data_mixture" in flags else {}
    arguments = [part for name, value in given.items() if value is not None for part in (f"--{name}", str(value))]
    assert script("prepare_data").main(arguments) == 2
    assert said.format(output) in capsys.readouterr().err
    assert not (tmp_path / "cache").exists()


def test_a_half_written_output_is_written_anew(prepared: Write, jsonl, tmp_path, settings):
    (tmp_path / "made" / "train").mkdir(parents=True)
    (tmp_path / "made" / "train" / "counts.json").write_text("{}")
    (tmp_path / "made" / "train" / "data-00000-of-00009.arrow").write_bytes(b"of another start")
    folder = prepared(train_file=jsonl)
    assert data_problems(settings(dataset_name=str(folder))) == []
    assert "train/data-00000-of-00009.arrow" not in json.loads((folder / "tokens.json").read_text())["sizes"]
    assert not (folder / "train" / "data-00000-of-00009.arrow").exists()


def test_a_folder_of_tokens_is_not_prepared_again(script, folder, tmp_path, capsys):
    flags = ["--dataset_name", str(folder), "--output", str(tmp_path / "again"), "--cache_dir", str(tmp_path / "cache")]
    assert script("prepare_data").main(flags) == 2
    assert f"dataset_name={folder} is such a folder already; copy it" in capsys.readouterr().err
    assert script("prepare_data").main(["--output"]) == 2
    assert "prepare_data.py: argument --output: expected one argument; see prepare" in capsys.readouterr().err


def test_a_tokenizer_that_is_not_the_same_elsewhere_is_refused(script, jsonl, tmp_path, capsys):
    """One of Python code alone is known by where its files are."""
    ByT5Tokenizer().save_pretrained(tmp_path / "bytes")
    flags = ["--tokenizer_name", str(tmp_path / "bytes"), "--train_file", jsonl, "--cache_dir", str(tmp_path / "cache")]
    assert script("prepare_data").main([*flags, "--output", "made"]) == 2
    said = "output=made needs a tokenizer with a tokenizer.json, which ByT5Tokenizer has not; leave it out"
    assert said in capsys.readouterr().err


def test_an_output_that_cannot_be_written_is_named(script, jsonl, tmp_path, tokenizer, capsys):
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    flags = ["--tokenizer_name", str(tmp_path / "tokenizer"), "--train_file", jsonl, "--seq_length", "16"]
    output = Path(jsonl) / "inside"
    assert script("prepare_data").main([*flags, "--cache_dir", str(tmp_path / "cache"), "--output", str(output)]) == 1
    assert f"prepare_data.py: {output}/train could not be written (Not a directory)" in capsys.readouterr().err


def test_it_is_inspected_like_any_source(script, folder, tmp_path, capsys):
    flags = ["--dataset_name", str(folder), "--tokenizer_name", str(folder / "tokenizer"), "--seq_length", "40"]
    picture = str(tmp_path / "lengths.svg")
    assert script("inspect_data").main([*flags, "--cache_dir", str(tmp_path / "cache"), "--output", picture]) == 0
    said = capsys.readouterr().out
    assert "⟨end of document⟩" in said
    assert f"dataset_name={folder}: 57 documents in" in said
    assert "tokens of a document: shortest " in said


@pytest.mark.processes
def test_a_run_has_the_losses_of_one_on_the_text(script, trainer: Trainer):
    flags = trainer.flags("text", num_stages=2)
    where = flags.index("--output_dir")
    folder = trainer.folder / "tokens"
    assert script("prepare_data").main([*flags[:where], *flags[where + 2 :], "--output", str(folder)]) == 0
    common = {"num_stages": 2, "packing": "best_fit"}
    text = trainer.run("text", 2, **common)
    trainer.text.unlink()
    named = {"train_file": None, "dataset_name": folder, "tokenizer_name": folder / "tokenizer"}
    found = trainer.run("folder", 2, **common, **named, cache_dir=trainer.folder / "cache")
    for split in ("train", "eval"):
        assert [r["loss"] for r in records(found, 1, split)] == [r["loss"] for r in records(text, 1, split)]
