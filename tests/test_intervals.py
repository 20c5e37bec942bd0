"""When a run records, evaluates and saves: every so many steps, every share of all steps, or not at all."""

import json
import shutil
from pathlib import Path

import pytest
from conftest import records

from llm_local.checks.epochs import with_epochs
from llm_local.config import ConfigError, parse

pytestmark = pytest.mark.processes


def steps(output: Path) -> tuple[list[int], list[int], list[int]]:
    """Of the training records, of the evaluations, and of the checkpoints."""
    saved = sorted(int(path.name.removeprefix("step-")) for path in (output / "checkpoints").glob("step-*"))
    return [r["step"] for r in records(output, 0)], [r["step"] for r in records(output, 0, "eval")], saved


def test_shares_of_all_steps_and_a_warm_up(trainer):
    flags = {"logging_steps": 0.25, "logging_first_step": "false", "eval_strategy": "steps", "eval_steps": 0.5}
    output = trainer.run("shares", 1, max_steps=8, save_strategy="steps", save_steps=0.3, warmup_ratio=0.5, **flags)
    assert steps(output) == ([2, 4, 6, 8], [4, 8], [3, 6, 8])
    # four steps up from 0 and four down again; step 2 is the one behind the first
    rates = [record["lr"] for record in records(output, 0)]
    assert rates == pytest.approx([3e-3 * share for share in (0.25, 0.75, 0.75, 0.25)])
    assert json.loads((output / "checkpoints/step-00000008/manifest.json").read_text())["flags"]["warmup_ratio"] == 0.5


def test_none_of_it(trainer):
    never = {"logging_strategy": "no", "eval_strategy": "no", "save_strategy": "no", "logging_first_step": "false"}
    output = trainer.run("never", 1, eval_steps=1, save_steps=1, **never)
    assert steps(output) == ([4], [4], [])


def test_epochs_on_all_stages_and_resumed(trainer):
    """Five rows, two a step: an epoch is two steps and a half, three are eight steps."""
    flags = {"max_train_samples": 5, "num_train_epochs": 3, "max_steps": None, "num_stages": 2}
    flags |= {"logging_strategy": "epoch", "eval_strategy": "epoch", "save_strategy": "epoch"}
    output = trainer.run("epochs", 2, **flags)
    assert steps(output) == ([1, 3, 5, 8], [3, 5, 8], [3, 5, 8])
    assert [r["step"] for r in records(output, 1, "eval")] == [3, 5, 8]
    shutil.rmtree(output / "checkpoints/step-00000008")
    before = records(output, 1)[-1]["loss"]
    trainer.run("epochs", 2, resume_from_checkpoint="true", **flags)
    assert steps(output) == ([1, 3, 5, 8], [3, 5, 8], [3, 5, 8])
    assert records(output, 1)[-1]["loss"] == before


@pytest.mark.parametrize(
    ("flags", "line"),
    [
        (
            "--num_train_epochs 3 --dataset_name x/y --streaming",
            "num_train_epochs=3.0 counts the rows of the data, which a stream does not tell; use max_steps",
        ),
        (
            "--eval_strategy epoch --dataset_name x/y --streaming",
            "eval_strategy=epoch counts the rows of the data, which a stream does not tell; use eval_steps",
        ),
        (
            "--save_strategy epoch --data_mixture MIX",
            "save_strategy=epoch counts the rows of the data, which a mixture does not tell; use save_steps",
        ),
        ("--num_train_epochs 0", "num_train_epochs=0.0 must be greater than 0"),
        ("--num_train_epochs 1 --seq_length 0", "seq_length=0 must be greater than 0"),
    ],
)
def test_epochs_that_cannot_be_counted(tmp_path: Path, flags: str, line: str):
    path = tmp_path / "mix.yaml"
    path.write_text("- source: builtin\n- source: builtin\n")
    with pytest.raises(ConfigError) as error:
        with_epochs(parse(flags.replace("MIX", str(path)).split()), 1)
    assert error.value.problems == [line]
