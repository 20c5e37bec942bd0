"""BOS begins each document where the tokenizer begins a text with it, or where the run says so, and in prompts too."""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import pairwise
from types import ModuleType
from typing import Any

import pytest
import torch
import yaml
from conftest import Trainer
from documents import write_jsonl
from transformers import AutoModelForCausalLM, AutoTokenizer, ByT5Tokenizer, PreTrainedTokenizerBase

from llm_local.checks.preflight import preflight
from llm_local.commands import generate
from llm_local.config import Config, ConfigError, parse
from llm_local.data.encoding import first_token, prompt_ids
from llm_local.data.sets import prepare
from llm_local.data.tokenizer import load_tokenizer

Load = Callable[..., tuple[Config, PreTrainedTokenizerBase]]


@pytest.fixture
def folders(tokenizer, tmp_path) -> dict[str, str]:
    """The same tokenizer, which by itself begins a text 'with' or 'without' BOS."""
    tokenizer.save_pretrained(tmp_path / "without")
    told: Any = AutoTokenizer.from_pretrained(tmp_path / "without")
    told.add_bos_token = True
    told.save_pretrained(tmp_path / "with")
    return {name: str(tmp_path / name) for name in ("with", "without")}


@pytest.fixture
def load(settings, folders) -> Load:
    def made(name: str, **flags: Any) -> tuple[Config, PreTrainedTokenizerBase]:
        config = settings(tokenizer_name=folders[name], **flags)
        return config, load_tokenizer(config)

    return made


def begins_each(rows: torch.Tensor, tokenizer: PreTrainedTokenizerBase, whole: bool) -> bool:
    """Whether BOS is behind every EOS and nowhere else; whole: rows begin where a document does."""
    found = [row[row >= 0].tolist() for row in rows]
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    behind = all((one == eos) == (other == bos) for row in found for one, other in pairwise(row))
    return behind and (not whole or all(row[0] == bos for row in found)) and sum(row.count(bos) for row in found) >= 20


@pytest.mark.parametrize("streaming", [False, True], ids=["stored", "streamed"])
@pytest.mark.parametrize("packing", ["concat", "best_fit", "none"])
def test_each_document_begins_with_it(load: Load, tmp_path, texts, packing: str, streaming: bool):
    train, held = write_jsonl(tmp_path / "a.jsonl", texts), write_jsonl(tmp_path / "held.jsonl", texts[::-1])
    files = {"train_file": train, "validation_file": held}
    config, tokenizer = load("with", **files, packing=packing, seq_length=96, streaming=streaming)
    for sequences in prepare(config, tokenizer):
        assert begins_each(sequences.batch(0, 20), tokenizer, whole=packing != "concat")


@pytest.mark.parametrize("streaming", [False, True], ids=["stored", "streamed"])
def test_a_running_text_begins_with_it_once(load: Load, tmp_path, streaming: bool):
    (tmp_path / "a.txt").write_text("".join(f"line {n}\n" for n in range(500)))
    held = write_jsonl(tmp_path / "held.jsonl", ["held out " * 9])
    config, tokenizer = load("with", train_file=str(tmp_path / "a.txt"), validation_file=held, streaming=streaming)
    train, _ = prepare(config, tokenizer)
    rows = train.batch(0, train.num_sequences or 600)
    begun = (rows == tokenizer.bos_token_id).nonzero().tolist()
    if streaming:  # and again in the next epoch
        assert begun[0] == [0, 0]
        assert begun[1][0] > 100
    else:
        (place,) = begun
        assert place[1] == 0


def test_a_run_may_say_otherwise(load: Load, jsonl):
    (default, plain), (_, forced) = load("without", train_file=jsonl), load("without", train_file=jsonl, add_bos=True)
    (_, own), (_, off) = load("with", train_file=jsonl), load("with", train_file=jsonl, add_bos=False)
    assert [first_token(each) for each in (plain, forced, own, off)] == [None, 1, 1, None]
    rows = [prepare(default, each)[0].batch(0, 40) for each in (plain, forced, own, off)]
    assert torch.equal(rows[0], rows[3])
    assert not (rows[0] == 1).any()
    assert torch.equal(rows[1], rows[2])
    assert begins_each(rows[1], own, whole=False)
    assert prompt_ids("x", plain) == plain.encode("x", add_special_tokens=False)
    assert prompt_ids("x", forced) == [1, *prompt_ids("x", plain)] == prompt_ids("<|bos|>x", forced)


def test_what_ends_a_text_still_does(load: Load, settings, tmp_path):
    _, told = load("without")
    told.add_eos_token = True  # pyright: ignore[reportAttributeAccessIssue]
    told.save_pretrained(tmp_path / "ends")
    ids = load_tokenizer(settings(tokenizer_name=str(tmp_path / "ends"), add_bos=True))("x")["input_ids"]
    assert ids == [1, *told("x")["input_ids"]]  # pyright: ignore[reportGeneralTypeIssues]
    assert ids[-1] == told.eos_token_id


def test_a_tokenizer_that_cannot_is_refused(settings, folders, tmp_path):
    def refusal(tokenizer: PreTrainedTokenizerBase, **flags: Any) -> str:
        tokenizer.save_pretrained(tmp_path / "other")
        with pytest.raises(ConfigError) as caught:
            load_tokenizer(settings(tokenizer_name=str(tmp_path / "other"), **flags))
        (line,) = caught.value.problems
        return line

    why = "leave add_bos out, or choose another tokenizer"
    assert (
        refusal(ByT5Tokenizer(), add_bos=True) == f"add_bos=True: the tokenizer is a ByT5Tokenizer without BOS; {why}"
    )
    said = refusal(ByT5Tokenizer(bos_token="<b>"), add_bos=True)
    assert said == f"add_bos=True: the tokenizer is a ByT5Tokenizer which cannot be told to; {why}"
    same = AutoTokenizer.from_pretrained(folders["with"], bos_token="<|eos|>")
    same.add_bos_token = True
    said = "document_mask=True: the tokenizer's BOS, which begins documents, is also its EOS, which ends them"
    assert refusal(same, document_mask=True) == f"{said}; set add_bos=false"


def test_a_folder_of_tokens_keeps_it(load: Load, folders, jsonl, tmp_path, script: Callable[[str], ModuleType]):
    folder = tmp_path / "tokens"
    flags = {
        "train_file": jsonl,
        "tokenizer_name": folders["without"],
        "cache_dir": tmp_path / "there",
        "seq_length": 16,
    }
    given = [part for name, value in flags.items() for part in (f"--{name}", str(value))]
    assert script("prepare_data").main([*given, "--add_bos", "true", "--output", str(folder)]) == 0
    config, forced = load("without", dataset_name=str(folder), add_bos=True)
    own = load_tokenizer(parse(["--tokenizer_name", str(folder / "tokenizer")]))
    for tokenizer in (forced, own):
        assert begins_each(prepare(config, tokenizer)[0].batch(0, 40), tokenizer, whole=False)
    said = f"dataset_name={folder} has documents that begin with BOS, this run's begin without BOS; "
    with pytest.raises(ConfigError, match=rf"{said}set tokenizer_name={folder}/tokenizer and leave add_bos out, or"):
        prepare(*load("without", dataset_name=str(folder)))


@pytest.mark.processes
def test_the_export_does_the_same_and_a_resumed_run_goes_on_as_it_began(trainer: Trainer):
    settings = {"max_steps": 1, "save_steps": 1, "eval_batches": 1, "sample_prompt": "import "}
    run = trainer.run("run", 1, add_bos="true", **settings)
    exported = AutoTokenizer.from_pretrained(run / "export")
    assert first_token(exported) == exported.bos_token_id
    model = AutoModelForCausalLM.from_pretrained(run / "export")
    for prompt in ("import ", "<|bos|>x"):  # the script has the rule in its own words: it needs transformers alone
        assert generate.encode(exported, prompt, model, 1).tolist() == [prompt_ids(prompt, exported)]

    def resumed(**flags: Any) -> bool | None:
        config = parse(trainer.flags("run", resume_from_checkpoint="true", **settings, **flags))
        return preflight(config, 1).config.data.add_bos

    assert resumed() is True
    assert resumed(add_bos="false") is False
    (manifest,) = run.glob("checkpoints/*/manifest.json")
    values = json.loads(manifest.read_text())
    del values["flags"]["add_bos"]  # of a version without the flag
    manifest.write_text(json.dumps(values))
    assert resumed(tokenizer_name=run / "export") is False
    assert yaml.safe_load((run / "run.yaml").read_text())["add_bos"] is True
