"""A day on a GPU, rehearsed: each step leaves a line, whatever becomes of it, and what is done is not done again."""

from __future__ import annotations

import gzip
import json
import shutil
import subprocess
import sys
import tarfile
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from llm_local.bench import gpu_day, gpu_page, gpu_steps
from llm_local.bench.gpu_bundle import PACKAGES, BundleError, fetch, locked, make_bundle, write_text
from llm_local.bench.gpu_day import MARK, NAMES, Day, Line, Step, run_step
from llm_local.bench.gpu_runs import ROOT, Found, difference, last_words, read_metrics
from llm_local.bench.gpu_speed import simulated
from llm_local.data.tokenizer import builtin_tokenizer_dir
from llm_local.plan.times import StageSeconds


def lines(output: Path) -> list[dict[str, Any]]:
    return [json.loads(text) for text in (output / "day.jsonl").read_text().splitlines()]


@pytest.fixture
def bundle(tmp_path: Path, cache: Path) -> Path:
    """One with text and a tokenizer, but a wheel that is none and losses of another run."""
    folder = tmp_path / "bundle"
    (folder / "wheels").mkdir(parents=True)
    (folder / "wheels/broken-1.0-py3-none-any.whl").write_text("")
    write_text(folder / "text.jsonl.gz", None, 2_000_000)
    shutil.copytree(builtin_tokenizer_dir(cache), folder / "tokenizer")
    others = {"versions": {"torch": "1.0", "transformers": "2.0"}, "losses": [[8.0] * 6] * 2}
    (folder / "reference.json").write_text(json.dumps(others))
    return folder


@pytest.mark.processes
@pytest.mark.timeout(900)
def test_a_rehearsal(tmp_path: Path, bundle: Path, capsys: pytest.CaptureFixture[str]):
    output = tmp_path / "day"
    day = ["--output", str(output), "--rehearse", "--bundle", str(bundle), "--limit", "facts=0.5"]
    steps = ["install", "facts", "data", "fp32", "tests", "mfu", "study"]
    assert gpu_day.main([*day, "--only", *steps]) == 1
    found = {line["step"]: line for line in lines(output)}
    assert list(found) == steps
    assert found["install"]["status"] == "failed"
    assert "broken-1.0" in found["install"]["error"], "and the next steps run"
    assert found["facts"]["status"] == "over its limit"
    assert "not done within 0.5 s" in found["facts"]["error"]
    assert found["data"]["status"] == "ok"
    assert found["data"]["figures"]["tokens"] > 10_000
    equal = found["fp32"]["figures"]
    assert found["fp32"]["status"] == "failed"
    assert "those of the carried by" in found["fp32"]["error"]
    assert equal["difference, cpu here"] == 0
    assert [len(losses) for losses in equal["fp32-device"]["losses"]] == [6, 6]
    assert found["tests"]["status"] == "needs a GPU"
    assert found["mfu"]["status"] == "ok"
    speed = found["mfu"]["figures"]
    assert speed[speed["best"]]["tflops"] > 0
    assert speed["profile"]["rows"]
    assert min(speed["zero3"]["passes"][kind] for kind in ("ForwardPass", "BackwardPass", "OptimizerStep")) > 0
    curve = found["study"]["figures"]["chunked-4-shared-seed1"]["evals"]
    assert [(step, len(losses)) for step, losses in curve] == [(3, 4), (6, 4)]
    assert all(line["rehearsal"] for line in found.values())
    assert "over its limit" in (output / "day.txt").read_text()
    with tarfile.open(output / "logs.tgz") as logs:
        assert "runs/fp32-device/metrics/stage-01.jsonl" in logs.getnames()

    capsys.readouterr()
    gpu_day.main([*day, "--minutes", "0.01"])
    again = {line["step"]: line["status"] for line in lines(output)[len(steps) :]}
    assert again == {name: "no time" for name in NAMES if name not in ("data", "tests", "mfu", "study")}
    assert capsys.readouterr().out.count("done before") == 4

    assert gpu_page.main([str(output / "day.jsonl"), "-o", str(tmp_path / "gpu.md")]) == 0
    assert (tmp_path / "gpu.md").read_text().startswith("# A CPU rehearsal's figures, not a GPU's: ")


def test_nothing_is_left_of_a_step_over_its_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Not even what has made a process group of its own, as launchers do for their ranks."""
    sleeper = "import subprocess, sys, time; subprocess.Popen(['sleep', '60'], start_new_session=True); time.sleep(60)"
    monkeypatch.setattr(gpu_day.sys, "executable", str(tmp_path / "python"))
    (tmp_path / "python").write_text(f'#!/bin/sh\nexec {sys.executable} -c "{sleeper}"\n')
    (tmp_path / "python").chmod(0o755)
    marks: list[str] = []
    own = Day.environment
    monkeypatch.setattr(Day, "environment", lambda day, mark: marks.append(mark) or own(day, mark))
    day = Day(tmp_path, tmp_path, None, True, time.monotonic() + 60, {})
    line = run_step(day, Step("facts", 1, ""), 1.0)
    assert line.status == "over its limit"
    left = [each for each in psutil.process_iter() if marks[0] == environment_of(each).get(MARK)]
    assert left == []


def environment_of(process: psutil.Process) -> dict[str, str]:
    try:
        return process.environ()
    except psutil.Error:
        return {}


def test_the_driver_needs_no_package():
    """What the steps need may be in the bundle, which the first step installs."""
    told = f"import sys; sys.path.insert(0, {str(ROOT)!r}); import llm_local.bench.gpu_day"
    subprocess.run([sys.executable, "-S", "-c", told], check=True)


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["--output", "{tmp}/new", "--only", "fly"], "there is no step fly; choose of install, facts"),
        (["--output", "{tmp}/new", "--limit", "fly=3"], "there is no step fly"),
        (["--output", "{tmp}/new", "--bundle", "{tmp}"], "lacks wheels, text.jsonl.gz, tokenizer, reference.json"),
        (["--output", "{tmp}"], "holds other files and no day.jsonl; give another folder"),
        (["--output", "{tmp}/file"], "is a file; give a folder"),
        (["--output", "{tmp}/rehearsed"], "is of a rehearsal; give another folder"),
        (["--output", "{tmp}/other"], "is not of gpu_day.py"),
        (["--make_bundle", "{tmp}"], "holds other files; give another folder"),
        (["--make_bundle", "{tmp}/new", "--text", "{tmp}/none.txt"], "there is no such file"),
    ],
)
def test_what_cannot_be_is_one_line(
    arguments: list[str], line: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    (tmp_path / "file").write_text("")
    for name, content in (
        ("rehearsed", json.dumps({"step": "data", "status": "ok", "rehearsal": True})),
        ("other", "1"),
    ):
        (tmp_path / name).mkdir()
        (tmp_path / name / "day.jsonl").write_text(content + "\n")
    assert gpu_day.main([part.format(tmp=tmp_path) for part in arguments]) == 2
    said = capsys.readouterr().err
    assert line in said
    assert said.count("\n") == 1
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    "arguments", [[], ["--output", "a", "--minutes", "0"], ["--output", "a", "--make_bundle", "b"]]
)
def test_flags_that_do_not_go_together(arguments: list[str]):
    with pytest.raises(SystemExit) as caught:
        gpu_day.main(arguments)
    assert caught.value.code == 2


def test_the_bundle_has_what_the_lock_names():
    lock = (ROOT / "requirements.lock").read_text()
    assert all(locked(lock, name) for name in PACKAGES)
    assert locked("a==1.0 \\\na==2.0 ; python\n", "a") == "2.0", "that of the newest Python"
    with pytest.raises(BundleError, match=r"requirements\.lock has no nothing; run `make lock`"):
        locked(lock, "nothing")


def test_a_wheel_that_is_there_is_not_fetched_again(tmp_path: Path):
    for name in ("Py_CPUinfo-9.0.0-py3-none-any", "xxhash-4.1.0-cp312-cp312-manylinux_2_28_x86_64"):
        (tmp_path / f"{name}.whl").write_text("")
    fetch("py-cpuinfo==9.0.0", tmp_path, None)
    fetch("xxhash==4.1.0", tmp_path, "3.12")
    assert len(list(tmp_path.iterdir())) == 2


def test_a_wheel_that_cannot_be_had_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    (tmp_path / "xxhash-4.1.0-cp311-cp311-manylinux_2_28_x86_64.whl").write_text("")
    with pytest.raises(BundleError, match=r"^fetching xxhash==4\.1\.0 failed: .*No matching distribution"):
        fetch("xxhash==4.1.0", tmp_path, "3.12")
    assert list(tmp_path.iterdir()) == [], "that of another Python is gone"


def test_text_of_a_bundle(tmp_path: Path):
    source, target = tmp_path / "text.jsonl", tmp_path / "out.jsonl.gz"
    source.write_text("".join(json.dumps({"text": "é" * 10}) + "\n" for _ in range(100)))
    assert write_text(target, source, 200) == 6
    assert len(gzip.decompress(target.read_bytes())) <= 200
    (tmp_path / "empty.txt").write_text("")
    with pytest.raises(BundleError, match=r"empty\.txt has no text"):
        write_text(target, tmp_path / "empty.txt", 200)
    with pytest.raises(BundleError, match=r"--text .*picture\.png: give \.txt"):
        write_text(target, tmp_path / "picture.png", 200)
    source.write_text("no json\n")
    with pytest.raises(BundleError, match="line 1: not JSON"):
        write_text(target, source, 200)


def test_a_bundle_too_large_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from llm_local.bench import gpu_bundle

    monkeypatch.setattr(gpu_bundle, "PACKAGES", ())
    monkeypatch.setattr(gpu_bundle, "MOST_BYTES", 1000)
    monkeypatch.setattr(gpu_bundle, "train_tokenizer", lambda text, target: target.mkdir())
    monkeypatch.setattr(gpu_bundle, "_reference", lambda folder, work: [[1.0]])
    with pytest.raises(BundleError, match="and may have 0; give fewer --megabytes"):
        make_bundle(tmp_path / "new", None, 0.1)


def test_a_reference_run_that_fails_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from llm_local.bench import gpu_bundle

    monkeypatch.setattr(gpu_bundle, "PACKAGES", ())
    monkeypatch.setattr(gpu_bundle, "train_tokenizer", lambda text, target: target.mkdir())
    monkeypatch.setattr(gpu_bundle, "train", lambda job, paths: Found(tmp_path, error="a line\nno memory"))
    with pytest.raises(BundleError, match="the reference run failed: no memory"):
        make_bundle(tmp_path / "new", None, 0.1)


def test_a_step_before_the_data_says_what_to_do(tmp_path: Path):
    told = {"work": str(tmp_path), "bundle": "", "rehearse": True, "result": str(tmp_path / "result.json")}
    assert gpu_steps.main("fp32", json.dumps(told)) == 1
    found = json.loads((tmp_path / "result.json").read_text())
    assert found["problems"] == ["there is no text yet: run the step data first"]


def test_losses_are_compared_as_they_lie():
    assert difference([[2.0, 4.0]], [[2.0, 5.0]]) == pytest.approx(0.2)
    assert difference([[2.0]], [[2.0, 5.0]]) == difference([], []) == float("inf")


def test_the_last_words_of_a_run_are_its_own(tmp_path: Path):
    log = tmp_path / "log"
    log.write_text(
        "stage 0 ends: no memory\n\nTraceback (most recent call last):\n  run(args)\nChildFailedError:\n====\n"
    )
    assert last_words(log) == "stage 0 ends: no memory"
    log.write_text("Traceback (most recent call last):\n  here\nKeyError: 1\n")
    assert last_words(log).endswith("KeyError: 1")


def test_a_record_half_written_is_left_out(tmp_path: Path):
    (tmp_path / "metrics").mkdir()
    (tmp_path / "metrics/stage-00.jsonl").write_text('{"step": 1}\n{"st')
    assert read_metrics(tmp_path) == [[{"step": 1}]]


def test_equal_stages_simulated():
    found = simulated(StageSeconds((1.0,), (2.0,)), StageSeconds((2.0,), (4.0,)), 2)
    assert found == {"local": 24.0, "1f1b": 27.0, "1f1b / local": 27 / 24}


def test_the_page_of_a_day():
    run = {"evals": [[40, [6.0, 5.0]]], "step": 50, "max_steps": 400, "step_seconds": 0.1}
    found = gpu_page.page(
        {
            "facts": Line(
                "facts", "ok", 9.0, {"device": "NVIDIA H200", "cores": 16, "memory_bytes": 1e9, "python": "3.12"}
            ),
            "mfu": Line("mfu", "failed", 9.0, {"peak_tflops": 989.0, "zero1": SPEED}, "File /a/b/c.py\nOutOfMemory"),
            "study": Line("study", "over its limit", 200.0, {"backprop-seed1": run}, "not done within 200 s"),
        }
    )
    assert found.startswith("# One GPU: NVIDIA H200\n")
    assert "| zero1 | 0.1000 | 445 | 45.0% | 9.00 GB |" in found
    assert "| backprop-seed1 | 50 of 400 | 5.0000 | 5.0000 | 0.100 |" in found
    assert "5.000 (40)" in found
    assert "**mfu**, failed:\n\n```text\nFile c.py\nOutOfMemory\n```" in found, "folders are the machine's own"
    assert "**study**, over its limit" in found


SPEED = {"tflops": 445.0, "step_seconds": 0.1, "peak_memory_bytes": 9e9}


@pytest.mark.parametrize(("content", "line"), [("", "has no line yet"), ("{}\n", "is not of gpu_day.py")])
def test_no_page_of_nothing(content: str, line: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "day.jsonl").write_text(content)
    assert gpu_page.main([str(tmp_path / "day.jsonl"), "-o", str(tmp_path / "gpu.md")]) == 2
    assert line in capsys.readouterr().err
    assert gpu_page.main([str(tmp_path / "none.jsonl")]) == 2
    assert not (tmp_path / "gpu.md").exists()
