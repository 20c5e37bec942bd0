"""A study: its file becomes points, its runs are trained once each, and their metrics become a table and JSON."""

from __future__ import annotations

import json
import math
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from llm_local.config import ConfigError
from llm_local.costs import count_flops
from llm_local.files import write_whole
from llm_local.partition import Span
from llm_local.study.comparison import Result, baseline, compare, curve, front, mean_curve, summarise, table
from llm_local.study.points import Study, expand, expand_grid, read_study
from llm_local.study.runs import StudyRun, arguments_of, runs_of, stale_runs, take_results, train_all

ROOT = Path(__file__).parent.parent
SCRIPT = ROOT / "scripts" / "study.py"
MODEL = {
    "model_type": "llama",
    "vocab_size": 512,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 8,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


class Files:
    """Writes studies of a tiny model into a folder."""

    def __init__(self, folder: Path, cache: Path):
        self.folder = folder
        (folder / "model.json").write_text(json.dumps(MODEL))
        self.base: dict[str, Any] = {
            "config_name": str(folder / "model.json"),
            "cache_dir": str(cache),
            "seq_length": 32,
            "per_device_train_batch_size": 2,
            "max_steps": 4,
            "learning_rate": "3e-3",  # as YAML reads 3e-3
            "eval_steps": 2,
            "eval_batches": 2,
            "logging_steps": 1,
        }

    def study(self, base: dict[str, Any] | None = None, **keys: Any) -> Path:
        path = self.folder / "tiny.yaml"
        content = {"base": self.base | (base or {}), "seeds": [1], **keys}
        path.write_text(yaml.safe_dump({key: value for key, value in content.items() if value is not None}))
        return path

    def problems(self, **keys: Any) -> list[str]:
        with pytest.raises(ConfigError) as caught:
            read_study(self.study(**keys))
        return caught.value.problems


@pytest.fixture
def files(tmp_path: Path, cache: Path) -> Files:
    return Files(tmp_path, cache)


def names(grid: dict[str, Any]) -> list[str]:
    found, problems = expand_grid(grid, 8)
    assert problems == []
    return [name for name, _ in found]


class TestExpansion:
    def test_only_methods_with_blocks_have_them(self):
        assert names({"method": ["backprop"]}) == ["backprop"]
        assert names({"method": ["greedy"], "head": ["linear"]}) == ["greedy-linear"]
        grid = {"method": ["backprop", "greedy", "chunked"], "head": ["linear", "shared"], "blocks": [2, 4]}
        assert names(grid) == [
            "backprop",
            "greedy-linear",
            "greedy-shared",
            "chunked-2-linear",
            "chunked-2-shared",
            "chunked-4-linear",
            "chunked-4-shared",
        ]

    def test_flags_of_a_point(self):
        grid = {"method": ["chunked", "overlapping"], "head": ["linear", "decoder"], "blocks": [4], "head_layers": 2}
        found = dict(expand_grid(grid, 8)[0])
        assert found["chunked-4-linear"] == {
            "method": "chunked",
            "head": "linear",
            "head_layers": 0,
            "layers_per_block": 2,
        }
        assert found["overlapping-4-decoder"] == {
            "method": "overlapping",
            "head": "decoder",
            "head_layers": 2,
            "layers_per_block": 3,
            "block_stride": 2,
        }

    def test_half_a_layer_of_overlap_counts_as_one(self):
        flags = expand_grid({"method": ["overlapping"], "head": ["linear"], "blocks": [8]}, 24)[0][0][1]
        assert (flags["layers_per_block"], flags["block_stride"]) == (5, 3)

    def test_a_point_may_be_like_another(self):
        content = {
            "grid": {"method": ["greedy"], "head": ["shared"]},
            "points": [
                {"name": "some", "like": "greedy-shared", "head_token_fraction": 0.5},
                {"name": "fewer", "like": "some", "head_rank": 4},
            ],
        }
        found, problems = expand(content, 8)
        assert problems == []
        greedy = {"method": "greedy", "head": "shared", "head_layers": 1}
        assert found[1:] == [
            ("some", greedy | {"head_token_fraction": 0.5}),
            ("fewer", greedy | {"head_token_fraction": 0.5, "head_rank": 4}),
        ]

    def test_a_study_of_real_settings(self, files: Files):
        grid = {"method": ["backprop", "greedy", "chunked"], "head": ["linear", "decoder"], "blocks": [4]}
        shallow = {"name": "shallow", "method": "backprop", "config_overrides": "num_hidden_layers=2"}
        study = read_study(files.study(grid=grid, points=[shallow], builtin_vocab_size=512))
        blocks = {point.name: len(point.setting.blocks) for point in study.points}
        assert blocks == {
            "backprop": 1,
            "greedy-linear": 8,
            "greedy-decoder": 8,
            "chunked-4-linear": 4,
            "chunked-4-decoder": 4,
            "shallow": 1,
        }
        by_name = {point.name: point for point in study.points}
        assert by_name["shallow"].setting.blocks == (Span(0, 2),)
        assert by_name["chunked-4-decoder"].setting.private_layers == (1, 1, 1, 0)
        assert by_name["backprop"].config.train.learning_rate == 3e-3
        assert by_name["backprop"].shape.head_parameters == 512 * 16
        assert baseline(study) == by_name["backprop"]


class TestRefusals:
    def test_the_file(self, files: Files):
        for text, said in [("- a", "no 'name: value' lines"), ("a: [", "is not YAML"), ("", "no 'name: value' lines")]:
            path = files.folder / "bad.yaml"
            path.write_text(text)
            with pytest.raises(ConfigError, match=said):
                read_study(path)
        with pytest.raises(ConfigError, match="cannot read the study"):
            read_study(files.folder / "none.yaml")

    def test_all_problems_of_the_file_at_once(self, files: Files):
        text = "\n".join(
            files.problems(base={"seed": 1}, seeds=[1, 1], grids={}, builtin_vocab_size="many", points=None)
        )
        for said in ("'grids'", "base: seed is set by the study", "seed twice", "nothing to train", "'many'"):
            assert said in text

    @pytest.mark.parametrize("seeds", [[], 3, [1.5], ["a"], [-1], [True]])
    def test_seeds(self, files: Files, seeds: Any):
        assert "is not a list of whole numbers" in files.problems(seeds=seeds, grid={"method": ["backprop"]})[0]

    def test_the_base(self, files: Files):
        assert files.problems(base={"max_steps": 0}, grid={"method": ["backprop"]}) == [
            "base: max_steps=0 must be greater than 0"
        ]
        path = files.folder / "no_base.yaml"
        path.write_text("seeds: [1]\ngrid: {method: [backprop]}\n")
        with pytest.raises(ConfigError, match="base: give the flags"):
            read_study(path)

    @pytest.mark.parametrize(
        ("grid", "said"),
        [
            ([1], "grid: give lists"),
            ({"method": ["greedy"], "heads": ["linear"]}, "unknown key 'heads'"),
            ({"method": ["greedy"], "heads": ["linear"]}, "head=None is not a list"),
            ({"method": "greedy", "head": ["linear"]}, "method='greedy' is not a list"),
            ({"method": ["greed"], "head": ["linear"]}, "method='greed' is unknown; choose from backprop"),
            ({"method": ["greedy"], "head": ["round"]}, "head='round' is unknown"),
            ({"method": ["chunked"], "head": ["linear"]}, "blocks=None is not a list"),
            (
                {"method": ["chunked"], "head": ["linear"], "blocks": [3]},
                "blocks=3 does not divide the model's 8 layers",
            ),
            ({"method": ["chunked"], "head": ["linear"], "blocks": [1]}, "use 2, 4, 8, or write"),
            ({"method": ["greedy"], "head": ["decoder"], "head_layers": 0}, "head_layers=0 must be 1 or more"),
        ],
    )
    def test_the_grid(self, grid: Any, said: str):
        found, problems = expand_grid(grid, 8)
        assert found == []
        assert any(said in problem for problem in problems), problems

    def test_points(self, files: Files):
        problems = files.problems(
            grid={"method": ["greedy"], "head": ["linear"]},
            points=[
                {"name": "greedy-linear", "method": "greedy"},
                {"name": "long", "like": "greedy-linear", "max_steps": 9},
                {"name": "seeded", "like": "greedy-linear", "seed": 9},
                {"name": "lost", "like": "nothing"},
                {"name": "wrong", "method": "greedy", "head": "decoder"},
                {"name": "unknown", "layers": 2},
                {"name": "cut", "method": "chunked", "layers_per_block": 0},
                {"name": "../up", "method": "greedy"},
                "greedy",
            ],
        )
        text = "\n".join(problems)
        for said in (
            "two points are named 'greedy-linear'",
            "long: max_steps would give it other data or tokens",
            "seeded: seed is set by the study",
            "lost: like='nothing' names no earlier point",
            "wrong: head=decoder needs private layers",
            "unknown: unknown argument '--layers'",
            "cut: layers_per_block=0 must be greater than 0",
            "points: number 8 has no name",
            "points: number 9 has no name",
        ):
            assert said in text
        assert expand({"points": "greedy"}, 8)[1] == ["points: give a list, one '- {name: ..., flag: value}' a point"]

    def test_a_vocabulary_larger_than_the_models(self, files: Files):
        grid = {"method": ["backprop"]}
        assert "smaller than builtin_vocab_size=513" in files.problems(grid=grid, builtin_vocab_size=513)[0]
        named = files.problems(base={"tokenizer_name": "some"}, grid=grid, builtin_vocab_size=512)
        assert "studies that name no tokenizer" in named[0]

    def test_a_model_that_is_not_there(self, files: Files):
        problems = files.problems(base={"config_name": "none.json"}, grid={"method": ["backprop"]})
        assert problems[0].startswith("base: config_name=none.json: no such file")


GRID = {"method": ["backprop", "chunked"], "head": ["linear"], "blocks": [2]}


@pytest.fixture
def study(files: Files) -> Study:
    return read_study(files.study(seeds=[1, 2], grid=GRID))


def result(*final: float) -> Result:
    return Result(((2, tuple(loss + 1 for loss in final)), (4, final)), step_seconds=0.5, peak_memory_bytes=10)


RESULTS = {
    ("backprop", 1): result(3.0),
    ("backprop", 2): result(3.2),
    ("chunked-2-linear", 1): result(3.0, 3.1),
    ("chunked-2-linear", 2): result(3.3, 3.3),
}


class TestComparison:
    def test_a_result_from_metrics(self):
        records = [
            {"split": "train", "step": 1, "step_seconds": 9.0, "peak_memory_bytes": 5},
            {"split": "train", "step": 2, "step_seconds": 1.0, "peak_memory_bytes": 7},
            {"split": "eval", "step": 2, "block_losses": [4.0, 3.0]},
            {"split": "train", "step": 3, "step_seconds": 2.0, "peak_memory_bytes": 6},
        ]
        found = summarise(records)
        assert found == Result(((2, (4.0, 3.0)),), 2.0, 7)
        assert found.block_losses == (4.0, 3.0)
        assert Result.from_json(json.loads(json.dumps(vars(found)))) == found
        with pytest.raises(ValueError, match="set eval_batches"):
            summarise(records[:2])

    def test_a_curve_counts_tokens_and_flops(self, study: Study):
        point = study.points[1]
        flops = count_flops(point.shape, point.setting)
        rows = curve(point, result(3.0, 3.1))
        assert [row["tokens"] for row in rows] == [2 * 2 * 32, 4 * 2 * 32]
        assert [row["loss"] for row in rows] == [4.1, 3.1]
        assert rows[1]["flops"] == pytest.approx(256 * flops.total)
        assert rows[1]["sequential_flops"] == pytest.approx(256 * flops.sequential)

    def test_last_steps_of_backpropagation_cost_more_one_after_the_other(self, files: Files):
        local = {"name": "local", "method": "chunked", "layers_per_block": 4}
        last = {"name": "last", "like": "local", "final_backprop_steps": 1}
        one, two = (curve(p, result(3.0, 3.1)) for p in read_study(files.study(points=[local, last])).points)
        assert one[0] == two[0]
        assert two[1]["sequential_flops"] > one[1]["sequential_flops"]

    def test_means_spreads_and_ratios(self, study: Study):
        whole, local = compare(study, RESULTS)["points"]
        assert whole["loss"] == pytest.approx(3.1)
        assert whole["perplexity_ratio"] == whole["total_flops"] == whole["sequential_flops"] == 1.0
        assert local["loss"] == pytest.approx(3.2)
        assert local["loss_std"] == pytest.approx(math.sqrt(0.02))
        assert local["perplexity_ratio"] == pytest.approx(math.exp(0.1))
        assert local["best_exit"] == pytest.approx(-0.05)
        assert local["total_flops"] > 1 > local["sequential_flops"]
        assert local["blocks"] == [[0, 4], [4, 8]]
        assert local["flags"] == {"method": "chunked", "layers_per_block": 4}
        assert [run["block_losses"] for run in local["runs"]] == [[3.0, 3.1], [3.3, 3.3]]

    def test_seeds_that_both_have_are_compared(self, study: Study):
        some = {key: value for key, value in RESULTS.items() if key != ("backprop", 2)}
        whole, local = compare(study, some)["points"]
        assert local["perplexity_ratio"] == pytest.approx(math.exp(0.1))
        assert whole["loss_std"] is None
        none = compare(study, {})["points"][0]
        assert none["loss"] is none["perplexity_ratio"] is none["best_exit"] is None

    def test_a_study_without_backpropagation_has_no_ratios(self, files: Files):
        study = read_study(files.study(grid=GRID | {"method": ["chunked"]}))
        assert baseline(study) is None
        found = compare(study, RESULTS)
        assert found["baseline"] is None
        assert found["points"][0]["perplexity_ratio"] is None
        assert found["points"][0]["total_flops"] > 1

    def test_the_table(self, study: Study):
        some = {key: value for key, value in RESULTS.items() if key != ("chunked-2-linear", 2)}
        lines = table(compare(study, some)).splitlines()
        assert lines[2] == "| backprop | 1 | 3.1000 ± 0.1414 | +0.0 % | 0.0000 | 1.00 | 1.00 |"
        cells = [cell.strip() for cell in lines[3].strip("|").split("|")]
        assert cells[:5] == ["chunked-2-linear", "2", "3.1000 (1 of 2 runs)", "+10.5 %", "-0.1000"]
        assert "256 tokens each; 2 seeds" in lines[-1]
        empty = table(compare(study, {}))
        assert "| backprop | 1 | – (0 of 2 runs) | – | – | 1.00 | 1.00 |" in empty

    def test_classifiers_have_their_accuracy(self, study: Study):
        exact = {key: replace(value, accuracy=0.5 + key[1] / 10) for key, value in RESULTS.items()}
        lines = table(compare(study, exact)).splitlines()
        assert lines[0].endswith("| sequential FLOPs | accuracy |")
        assert lines[2].endswith("| 65.00% |")

    def test_json(self, study: Study):
        found = compare(study, RESULTS)
        assert json.loads(json.dumps(found, allow_nan=False)) == found


def finish(run: StudyRun, **changes: Any) -> None:
    """As if the run had been trained."""
    run.folder.mkdir(parents=True)
    write_whole(run.folder / "flags.json", json.dumps(run.flags | changes))
    write_whole(run.folder / "result.json", json.dumps(vars(result(3.0))))


class TestRuns:
    def test_every_point_first_with_the_first_seed(self, study: Study, tmp_path: Path):
        runs = runs_of(study, tmp_path)
        assert [run.name for run in runs] == [
            "backprop-seed1",
            "chunked-2-linear-seed1",
            "backprop-seed2",
            "chunked-2-linear-seed2",
        ]
        assert [run.config.train.seed for run in runs] == [1, 1, 2, 2]
        assert {run.config.train.output_dir for run in runs} == {str(run.folder) for run in runs}

    def test_finished_runs_with_other_settings_are_refused(self, study: Study, tmp_path: Path):
        first, second, *_ = runs_of(study, tmp_path)
        finish(first)
        assert first.is_finished
        assert first.result() == result(3.0)
        assert stale_runs([first, second]) == []
        finish(second, learning_rate=0.5)
        (problem,) = stale_runs([first, second])
        assert f"{second.folder} was trained with other settings (learning_rate: 0.5, now 0.003)" in problem
        assert "remove that folder" in problem
        (second.folder / "flags.json").unlink()
        assert "flags.json cannot be read" in stale_runs([second])[0]

    def test_a_flag_that_was_not_there_yet_had_its_default(self, study: Study, tmp_path: Path):
        first, *_ = runs_of(study, tmp_path)
        finish(first)
        before = {name: value for name, value in first.flags.items() if name != "head_rank"}
        write_whole(first.folder / "flags.json", json.dumps(before))
        assert stale_runs([first]) == []

    def test_another_model_under_the_same_name_is_another_run(self, files: Files, tmp_path: Path):
        path = files.study(grid=GRID)
        first, *_ = runs_of(read_study(path), tmp_path)
        finish(first)
        (files.folder / "model.json").write_text(json.dumps(MODEL | {"intermediate_size": 48}))
        again, *_ = runs_of(read_study(path), tmp_path)
        assert "model: " in stale_runs([again])[0]

    def test_an_unfinished_run_goes_on_from_its_checkpoint_or_starts_again(self, study: Study, tmp_path: Path):
        run, *_ = runs_of(study, tmp_path)
        assert "--overwrite_output_dir True" in " ".join(arguments_of(run))
        checkpoint = run.folder / "checkpoints" / "step-00000002"
        checkpoint.mkdir(parents=True)
        (checkpoint / "manifest.json").write_text("{}")
        assert "--overwrite_output_dir True" in " ".join(arguments_of(run))  # nobody knows whose checkpoint it is
        write_whole(run.folder / "flags.json", json.dumps(run.flags))
        arguments = " ".join(arguments_of(run))
        assert "--resume_from_checkpoint true" in arguments
        assert "--overwrite_output_dir False" in arguments


def start(path: Path, output: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command(path, output), capture_output=True, text=True, timeout=280, check=False)


def command(path: Path, output: Path, *more: str) -> list[str]:
    return [sys.executable, str(SCRIPT), str(path), "--output_dir", str(output), *more]


@pytest.mark.processes
def test_a_study_is_trained_once_and_goes_on_where_it_was(files: Files, tmp_path: Path):
    path, output = files.study(grid=GRID, builtin_vocab_size=512), tmp_path / "study"
    first = start(path, output)
    assert first.returncode == 0, first.stderr
    assert "2 points x 1 seeds, 0 of 2 runs are finished" in first.stdout
    whole, local = (output / "runs" / f"{name}-seed1" for name in ("backprop", "chunked-2-linear"))
    found = json.loads((output / "study.json").read_text())
    assert [len(run["curve"]) for point in found["points"] for run in point["runs"]] == [2, 2]
    assert found["versions"]["torch"]
    assert "| chunked-2-linear | 2 |" in (output / "study.md").read_text()
    assert "chunked-2-linear-seed1" in (output / "report.html").read_text()
    assert (output / "study.png").read_bytes().startswith(b"\x89PNG")

    # on another machine, which gets the results alone
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    shutil.copy(output / "results.json", elsewhere)
    runs = runs_of(read_study(path), elsewhere)
    take_results(runs, elsewhere / "results.json")
    assert train_all(runs, 1, print) == []
    assert [run.result() for run in runs] == [run.result() for run in runs_of(read_study(path), output)]

    # as a run that was stopped leaves its folder
    (local / "result.json").unlink()
    kept, dropped = ((run / "metrics" / "stage-00.jsonl").stat().st_mtime_ns for run in (whole, local))
    said: list[str] = []
    runs = runs_of(read_study(path), output)
    assert train_all(runs, 1, said.append) == []
    assert [line.partition(":")[0] for line in said] == ["chunked-2-linear-seed1"]
    assert (whole / "metrics" / "stage-00.jsonl").stat().st_mtime_ns == kept
    assert (local / "metrics" / "stage-00.jsonl").stat().st_mtime_ns > dropped
    assert [run.result().block_losses[-1] for run in runs] == [point["loss"] for point in found["points"]]

    changed = read_study(files.study(base={"learning_rate": "1e-3"}, grid=GRID, builtin_vocab_size=512))
    with pytest.raises(ConfigError, match=r"learning_rate: 0\.003, now 0\.001"):
        train_all(runs_of(changed, output), 1, said.append)


@pytest.mark.processes
def test_a_study_that_is_stopped_shows_what_is_finished(files: Files, tmp_path: Path):
    path, output = files.study(grid=GRID, builtin_vocab_size=512, base={"max_steps": 500}), tmp_path / "study"
    with subprocess.Popen(command(path, output, "--jobs", "1"), text=True, stderr=subprocess.PIPE) as process:
        assert process.stderr is not None
        lines = iter(process.stderr.readline, "")
        assert any(line.startswith("backprop-seed1: ") for line in lines)
        process.send_signal(signal.SIGINT)
        assert "stopped; the same command goes on" in "".join(lines)
    assert process.wait(60) == 130
    shown = (output / "study.md").read_text()
    assert "| chunked-2-linear | 2 | – (0 of 1 runs) |" in shown
    assert "| backprop | 1 | " in shown
    assert list(json.loads((output / "results.json").read_text())) == ["backprop-seed1"]


def test_results_that_cannot_be_read_are_named(study: Study, tmp_path: Path):
    (tmp_path / "results.json").write_text('{"backprop-seed1": {}}')
    with pytest.raises(ValueError, match=r"results.json has no results of a study \(KeyError\('flags'\)\); remove it"):
        take_results(runs_of(study, tmp_path), tmp_path / "results.json")


@pytest.mark.processes
def test_a_run_that_fails_is_named_and_the_others_go_on(files: Files, tmp_path: Path):
    """The loss of one point is not finite: its learning rate is out of all reason."""
    wild = {"name": "wild", "method": "chunked", "learning_rate": 1e30, "max_grad_norm": 0.0}
    tame = {"name": "tame", "method": "chunked"}
    runs = runs_of(read_study(files.study(points=[wild, tame], builtin_vocab_size=512)), tmp_path)
    said: list[str] = []
    (failure,) = train_all(runs, 2, said.append)
    assert failure.startswith("wild-seed1 failed: llm_local: ")
    assert "is nan at step" in failure
    assert str(runs[0].folder / "log.txt") in failure
    assert [run.is_finished for run in runs] == [False, True]
    assert failure in said


@pytest.mark.processes
def test_settings_that_are_wrong_end_the_study_before_a_run(files: Files, tmp_path: Path):
    found = start(files.study(seeds=[], grid=GRID), tmp_path / "study")
    assert found.returncode == 2
    assert found.stderr.startswith("study.py: the configuration has 1 problem:")
    assert not (tmp_path / "study").exists()


@pytest.mark.parametrize("path", sorted((ROOT / "configs" / "studies").glob("*.yaml")), ids=lambda path: path.stem)
def test_the_studies_at_hand_are_free_of_problems(path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(ROOT)
    content = yaml.safe_load(path.read_text())
    content["base"].pop("bf16", None)  # not every machine has it
    assert len({point.name for point in _read(content, path).points}) >= 8


def _read(content: dict[str, Any], path: Path) -> Study:
    from tempfile import TemporaryDirectory

    with TemporaryDirectory() as folder:
        copy = Path(folder, path.name)
        copy.write_text(yaml.safe_dump(content))
        return read_study(copy)


def test_a_front_is_what_nothing_cheaper_is_as_good_as():
    assert front([(3, 2.0), (1, 4.0), (2, 4.0), (2, 3.0), (4, 2.5), (3, 2.2)]) == [(1, 4.0), (2, 3.0), (3, 2.0)]
    runs = [{"curve": [{"flops": n, "loss": seed / n} for n in (1, 2)]} for seed in (1, 3)]
    assert mean_curve({"runs": runs}, "flops") == [(1, 2.0), (2, 1.0)]
