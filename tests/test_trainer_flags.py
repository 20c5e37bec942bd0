"""Flags of transformers' Trainer and run_clm.py work here or are refused with what to use; docs/flags.md says which."""

from dataclasses import dataclass
from pathlib import Path

import pytest

from llm_local.config import Config, ConfigError, parse
from llm_local.flags import FLAGS
from llm_local.trainer_flags import DIFFERS, NOT_TAKEN, THEIRS, new_flags, page

NAMES = [name for names in THEIRS.values() for name in names]


def refusal(arguments: list[str]) -> list[str]:
    with pytest.raises(ConfigError) as error:
        parse(arguments)
    return error.value.problems


def test_each_flag_is_taken_or_not_and_said_once():
    taken = {*FLAGS, "local_rank"}
    assert len(NAMES) == len(set(NAMES))
    assert set(NAMES) - taken == set(NOT_TAKEN)
    assert set(DIFFERS) <= set(NAMES) & taken


def test_the_page_is_what_the_command_makes():
    committed = Path(__file__).parents[1] / "docs" / "flags.md"
    assert committed.read_text() == page(), "make it anew: python scripts/flags.py"


def test_flags_of_a_newer_version_are_listed():
    @dataclass
    class Newer:
        output_dir: str
        sharpen_gradients: bool
        fsdp: str

    assert new_flags(Newer) == ["sharpen_gradients"]


@pytest.mark.parametrize("name", NOT_TAKEN)
def test_a_flag_that_is_not_taken_gives_its_one_line(name: str, tmp_path: Path):
    instead = NOT_TAKEN[name].instead
    for given in ([f"--{name}", "another"], [f"--{name}=another"], [f"--{name.replace('_', '-')}", "another", "more"]):
        assert refusal(given) == [f"unknown argument '--{name}'; {instead}"]
    path = tmp_path / "run.yaml"
    path.write_text(f"{name}: another\nseed: 3\n")
    assert refusal([str(path)]) == [f"{path}: unknown setting '{name}'; {instead}"]


@pytest.mark.parametrize("name", [name for name, refusal in NOT_TAKEN.items() if refusal.agrees])
def test_a_value_that_asks_for_what_is_done_anyway_is_passed_over(name: str, tmp_path: Path):
    value = NOT_TAKEN[name].agrees[0]
    assert parse([f"--{name}", value]) == Config()
    path = tmp_path / "run.yaml"
    path.write_text(f"{name}: {value}\nseed: 3\n")
    assert parse([str(path)]).train.seed == 3


def test_a_flag_without_a_value_asks_for_it():
    assert parse(["--do_train", "--do_eval", "--seed", "3"]).train.seed == 3
    assert refusal(["--push_to_hub", "--seed", "3"]) == [
        f"unknown argument '--push_to_hub'; {NOT_TAKEN['push_to_hub'].instead}"
    ]


def test_all_that_is_not_taken_is_said_at_once():
    found = refusal(["--block_size", "64", "--sead", "1", "--do_train", "--max_eval_samples=8"])
    assert found == [
        "unknown argument '--block_size'; use --seq_length",
        "unknown argument '--max_eval_samples'; use --eval_batches",
        "unknown argument '--sead'; see pretrain.py --help",
    ]


def test_help_says_what_to_use(capsys):
    with pytest.raises(SystemExit):
        parse(["--help"])
    shown = " ".join(capsys.readouterr().out.replace(",", " ").split())  # "--a, --b VALUE" from Python 3.13 on
    for name, each in NOT_TAKEN.items():
        assert f"--{name} " in shown
        assert each.instead.split()[0].rstrip(",") in shown
