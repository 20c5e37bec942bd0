"""All ranks train from what rank 0 has checked, whatever their own host has, and whatever becomes of its files."""

from __future__ import annotations

import json
import re
import shutil
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from conftest import TINY, Trainer
from launching import START_SECONDS, Rank, ending, losses
from ranks import free_port, run_ranks
from test_remote_code import brings_code
from transformers import AutoModelForCausalLM, AutoTokenizer

from llm_local.checks.preflight import preflight
from llm_local.config import parse
from llm_local.data.tokenizer import builtin_tokenizer_dir
from llm_local.offline_export import export_checkpoint
from llm_local.setup import Setup
from llm_local.train import REFUSED

ZERO_1 = {"zero_optimization": {"stage": 1}, "optimizer": {"type": "AdamW", "params": {"weight_decay": 0.1}}}


@contextmanager
def two_hosts(flags: list[list[str]], folders: list[Path], logs: Path) -> Iterator[list[Rank]]:
    """Two ranks, each the first of its host: with flags and a working folder of its own."""
    port = free_port()
    each = enumerate(zip(flags, folders, strict=True))
    with ending(
        [Rank(n, 2, port, given, logs / f"rank-{n}.txt", folder, LOCAL_RANK="0") for n, (given, folder) in each]
    ) as ranks:
        yield ranks


@pytest.mark.processes
def test_a_host_with_other_flags_trains_with_rank_0s_and_says_so(trainer: Trainer, tmp_path: Path):
    trainer.run("alone", 2, num_stages=2)
    flags = [trainer.flags("run", num_stages=2, **other) for other in ({}, {"learning_rate": 0.5, "seed": 7})]
    with two_hosts(flags, [tmp_path, tmp_path], tmp_path) as ranks:
        assert [rank.wait(START_SECONDS) for rank in ranks] == [0, 0], [rank.text for rank in ranks]
        said = "was given other flags; rank 0's hold: learning_rate=0.5 (rank 0: 0.003), seed=7 (rank 0: 42)"
        assert said in ranks[1].text
        assert "was given other flags" not in ranks[0].text
    assert losses(trainer.folder / "run", 2) == losses(trainer.folder / "alone", 2)


@pytest.mark.processes
@pytest.mark.parametrize("other", ["text", "tokenizer"])
def test_a_host_with_other_data_is_refused(trainer: Trainer, tmp_path: Path, other: str):
    """Two replicas of stage 0, which reads; files of the same names in each host's folder."""
    folders = [tmp_path / name for name in ("here", "there")]
    for folder in folders:
        folder.mkdir()
        shutil.copy(trainer.text, folder / "text.txt")
        AutoTokenizer.from_pretrained(builtin_tokenizer_dir(trainer.cache)).save_pretrained(folder / "tokenizer")
    if other == "text":
        with (folders[1] / "text.txt").open("a") as file:
            file.write("A line more.\n")
        why = r"tokens, rank 0's .*; copy the files, or name a folder that all hosts see"
    else:
        path = folders[1] / "tokenizer" / "tokenizer.json"
        values = json.loads(path.read_text())
        values["model"]["merges"].pop()
        path.write_text(json.dumps(values))
        why = r"its tokenizer is another one than rank 0's; copy that, or name a folder that all hosts see"
    flags = trainer.flags("run", train_file="text.txt", tokenizer_name="tokenizer")
    with two_hosts([flags, flags], folders, tmp_path) as ranks:
        assert all(rank.wait(START_SECONDS) in (1, REFUSED) for rank in ranks), [rank.text for rank in ranks]
        text = "\n".join(rank.text for rank in ranks)
    (line,) = [line for line in text.splitlines() if line.startswith("  - rank 1 on ")]
    assert re.search(why, line), text
    assert "rank 1 refuses its configuration" in text
    assert "Traceback" not in text


def _train_while_files_go(flags: list[str], output: str, gone: list[str], changed: str) -> tuple[int, bool]:
    """Trains; once it has begun, removes files and folders and changes the model's JSON. Whether that was in time."""
    from llm_local.train import main

    in_time = threading.Event()

    def spoil() -> None:
        while not (Path(output) / "metrics" / "stage-00.jsonl").exists():
            time.sleep(0.01)
        for path in map(Path, gone):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        Path(changed).write_text(json.dumps(TINY | {"rope_theta": 5.0, "num_hidden_layers": 3}))
        if not list(Path(output).glob("export*")):
            in_time.set()

    thread = threading.Thread(target=spoil, daemon=True)
    thread.start()
    status = main(flags)
    thread.join(10)
    return status, in_time.is_set()


@pytest.mark.processes
def test_files_that_change_during_a_run_change_nothing(trainer: Trainer, tmp_path: Path):
    """The export's config, tokenizer and card are of the run; its own check compares the logits."""
    tokenizer, settings, model = tmp_path / "tokenizer", tmp_path / "zero.json", tmp_path / "model.json"
    AutoTokenizer.from_pretrained(builtin_tokenizer_dir(trainer.cache)).save_pretrained(tokenizer)
    settings.write_text(json.dumps(ZERO_1))
    model.write_text(json.dumps(TINY))
    kept = {path.name: path.read_bytes() for path in tokenizer.iterdir()}
    flags = trainer.flags(
        "run",
        config_name=model,
        tokenizer_name=tokenizer,
        deepspeed=settings,
        weight_decay=0.1,
        max_steps=20,
        save_steps=20,
    )
    output = trainer.folder / "run"
    gone = [str(tokenizer), str(settings)]
    assert run_ranks(_train_while_files_go, 1, flags, str(output), gone, str(model)) == [(0, True)]
    values = json.loads((output / "export" / "config.json").read_text())
    assert values["num_hidden_layers"] == TINY["num_hidden_layers"]
    assert "5.0" not in json.dumps(values["rope_parameters"])
    assert json.loads((output / "export" / "tokenizer.json").read_text()) == json.loads(kept["tokenizer.json"])
    assert '"weight_decay": 0.1' in (output / "export" / "README.md").read_text()
    model.write_text(json.dumps(TINY))
    tokenizer.mkdir()
    for name, content in kept.items():
        (tokenizer / name).write_bytes(content)
    export_checkpoint(output / "checkpoints" / "step-00000020", tmp_path / "later", None, "auto")
    ours, later = (AutoModelForCausalLM.from_pretrained(path) for path in (output / "export", tmp_path / "later"))
    assert all((a == b).all() for a, b in zip(ours.parameters(), later.parameters(), strict=True))
    assert '"weight_decay": 0.1' in (tmp_path / "later" / "README.md").read_text()


@pytest.mark.processes
def test_a_models_code_that_goes_during_a_run_is_in_its_export(trainer: Trainer, tmp_path: Path):
    code = brings_code(tmp_path / "code")
    flags = trainer.flags("run", config_name=code, trust_remote_code=True, max_steps=20, eval_batches=0)
    output, other = trainer.folder / "run", tmp_path / "other.json"
    assert run_ranks(_train_while_files_go, 1, flags, str(output), [str(code)], str(other)) == [(0, True)]
    assert "class TinyConfig" in (output / "export" / "configuration_tiny.py").read_text()


def test_the_flags_that_differ_are_named(trainer: Trainer):
    setup = preflight(parse(trainer.flags("run")), 1)
    assert setup.other_flags(setup.given) == ""
    assert setup.other_flags(setup.given | {"max_steps": 9}) == "max_steps=9 (rank 0: 4)"


def test_the_models_config_comes_back_as_it_was(trainer: Trainer):
    overrides: dict[str, Any] = {"attn_implementation": "eager", "config_overrides": "rope_theta=77.0"}
    setup = preflight(parse(trainer.flags("run", **overrides)), 1)
    config = Setup.from_json(setup.to_json()).model_config()
    assert type(config).__name__ == "LlamaConfig"
    assert config._attn_implementation == "eager"
    assert config.rope_parameters["rope_theta"] == 77.0
