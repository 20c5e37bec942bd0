"""The page of a run: what it says, and what is said of folders that hold none."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from reports import facts_of, falling, make_run, train_record

from llm_local.commands.report import NAME, main
from llm_local.report import library
from llm_local.report.charts import charts_of, token_axes
from llm_local.report.curves import evenly, extremes, smoothed, tokens_until
from llm_local.report.library import NoCharts, uplot
from llm_local.report.notes import add_sample
from llm_local.report.page import write_report
from llm_local.report.read import RunReader, read_runs, short_names
from llm_local.report.tables import Table, alarms, best_exit, headline, parts_of, tables_of


def one(folder: Path):
    return read_runs([folder])[0]


def table(name: str, *folders: Path) -> Table:
    return next(each for each in tables_of(read_runs([*folders])) if each.id == name)


def test_a_long_curve_keeps_its_extremes_and_gaps():
    values: list[float | None] = [float(n % 7) for n in range(100_000)]
    values[31_234], values[71_000], values[50_000] = 99.0, -99.0, None
    chosen = extremes(values, 300)
    assert len(chosen) <= 3 * 300 + 2
    kept = [values[n] for n in chosen]
    assert {99.0, -99.0, None} <= set(kept)
    assert (chosen[0], chosen[-1]) == (0, 99_999)
    assert extremes(values[:100]) == list(range(100))


def test_a_long_curve_is_read_evenly_to_its_last_value():
    chosen = evenly(100_000, 300)
    assert (chosen[0], chosen[-1]) == (0, 99_999)
    assert len(chosen) == 301
    assert evenly(3) == [0, 1, 2]
    assert evenly(0) == []


def test_smoothing_has_no_bias_at_the_start_and_leaves_gaps():
    assert smoothed([5.0] * 40) == pytest.approx([5.0] * 40)
    values = smoothed([1.0, None, 1.0])
    assert values[1] is None
    assert values[2] == pytest.approx(1.0)


def test_tokens_of_steps_between_records_count():
    assert tokens_until([1, 10, 20], [100.0, 100.0, 50.0]) == [100.0, 1000.0, 1500.0]


def test_charts_of_a_run(tmp_path: Path):
    charts = {chart.id: chart for chart in charts_of([one(make_run(tmp_path / "run"))])}
    assert list(charts) == ["loss", "set-0", "rate", "wait", "sent", "memory", "norm", "lr"]
    labels = [(curve.label, curve.kind) for curve in charts["loss"].curves]
    assert ("stage 1", "raw") in labels
    assert ("stage 1", "line") in labels
    assert ("stage 1, validation", "points") in labels
    assert charts["set-0"].title == "Loss on code"
    assert [curve.label for curve in charts["sent"].curves] == ["stage 0"], "the last stage has nobody to send to"
    assert [curve.y[-1] for curve in charts["rate"].curves] == pytest.approx([1024 / 0.3] * 2, rel=1e-3)


def test_two_runs_are_told_apart_by_colour_and_their_stages_by_dashes(tmp_path: Path):
    runs = read_runs([make_run(tmp_path / "a" / "run"), make_run(tmp_path / "b" / "run", steps=100, learning_rate=0.1)])
    assert [run.name for run in runs] == ["a/run", "b/run"]
    curves = [curve for curve in charts_of(runs)[0].curves if curve.kind == "line"]
    assert [(c.label, c.colour, c.dash) for c in curves] == [
        ("a/run, stage 0", 0, 0),
        ("a/run, stage 1", 0, 1),
        ("b/run, stage 0", 1, 0),
        ("b/run, stage 1", 1, 1),
    ]
    differing = table("flags", runs[0].folder, runs[1].folder)
    assert differing.rows == [("max_steps", "200", "100"), ("learning_rate", "0.0005", "0.1")]
    assert [axis["tokens"][-1] for axis in token_axes(runs)] == [200 * 1024, 100 * 1024]


def test_blocks_of_a_stage_have_a_chart(tmp_path: Path):
    run = one(make_run(tmp_path, stages=1))
    for record in run.stages[0]:
        record["block_losses"] = [record["loss"] + 1, record["loss"]]
    blocks = next(chart for chart in charts_of([run]) if chart.id == "blocks")
    assert [curve.label for curve in blocks.curves] == ["block 0", "block 1"]


def test_the_exit_to_keep(tmp_path: Path):
    whole = one(make_run(tmp_path / "whole"))
    assert best_exit(whole) == (1, pytest.approx(falling(200, 1) + 0.1), True)
    assert ("keep", "the whole model") in headline(whole)
    early = one(make_run(tmp_path / "early", loss=lambda step, stage: falling(step, 0) + stage))
    assert ("keep", "the exit of stage 0") in headline(early)
    exits = table("exits", early.folder)
    assert exits.marked == (0,)
    assert exits.rows[0][:2] == ("stage 0", "0–3")
    assert exits.rows[1][1] == "0–7"
    near = one(make_run(tmp_path / "near", loss=lambda step, stage: falling(step, 0) + 0.005 * stage))
    assert best_exit(near) == (1, pytest.approx(falling(200, 0) + 0.105), True)


def test_exits_show_what_the_task_measures(tmp_path: Path):
    text, images = make_run(tmp_path / "text"), make_run(tmp_path / "images")
    for path in (images / "metrics").glob("stage-*.jsonl"):
        records = [json.loads(line) for line in path.read_text().splitlines()]
        for record in records:
            if record.pop("perplexity", None) and record.pop("bits_per_byte"):
                record |= {"accuracy": 0.875, "top_5_accuracy": 1.0}
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
    assert table("exits", text).columns[4:] == ("perplexity", "bits a byte", "step", "")
    found = table("exits", images)
    assert found.columns[4:] == ("accuracy", "of 5", "step", "")
    assert found.rows[0][4:6] == ("87.50%", "100.00%")
    assert table("exits", text, images).columns[4:8] == ("perplexity", "bits a byte", "accuracy", "of 5")


def test_tables_of_a_run(tmp_path: Path):
    run = make_run(tmp_path / "run", learning_rate=0.125)
    assert ("learning_rate", "0.125", "0.0005") in table("flags", run).rows
    assert table("speed", run).rows[1][:4] == ("stage 1", "0.300", "3,413", "3.3")
    assert table("cut", run).rows[0] == ("stage 0", "0–3", "1 head", "1", "0.24", "1.0")
    assert [part.share for part in parts_of(one(run))] == [0.5, 0.5]
    assert table("data", run).rows[0][:4] == ("builtin", "100.0", "concat", "100")
    assert table("versions", run).rows == [("torch", "2.13.0")]


def test_a_run_that_diverged_says_so(tmp_path: Path):
    run = one(make_run(tmp_path, loss=lambda step, stage: math.nan if step > 150 and stage else falling(step, stage)))
    assert alarms(run) == ["the loss of stage 1 is not finite (nan) at step 151"]
    raw = next(c for c in charts_of([run])[0].curves if (c.kind, c.stage) == ("raw", 1))
    assert raw.y[-1] is None
    write_report([tmp_path], tmp_path / "report.html")


def test_jobs_of_a_run_are_one_run(tmp_path: Path):
    for stage in (0, 1):
        job = make_run(tmp_path / f"stage-{stage:02d}")
        (job / "metrics" / f"stage-{1 - stage:02d}.jsonl").unlink()
        status = {"stage": stage, "life": stage + 1, "step": 10, "time": 1.0}
        (job / "status.json").write_text(json.dumps({str(stage): status}))
    run = one(tmp_path)
    assert list(run.stages) == [0, 1]
    assert [each["life"] for each in run.status] == [1, 2]
    alone = one(tmp_path / "stage-01")
    assert list(alone.stages) == [1]
    assert best_exit(one(tmp_path / "stage-00")) is None, "it knows nothing of the others"


def test_what_came_since_is_read_and_no_more(tmp_path: Path):
    run = make_run(tmp_path, stages=1, steps=4)
    path, reader = run / "metrics" / "stage-00.jsonl", RunReader(run)
    assert len(reader.read().stages[0]) == 12
    line = json.dumps(train_record(5, 0, 3.0, False))
    with path.open("a") as file:
        file.write(f"{line}\n{line[:30]}")
    found = reader.read()
    assert len(found.stages[0]) == 13
    assert found.faults == [f"{path}, line 14, is half written; left out"]
    with path.open("a") as file:
        file.write(f"{line[30:]}\n")
    found = reader.read()
    assert (len(found.stages[0]), found.faults) == (14, [])
    path.write_text(f"{line}\n")
    assert len(reader.read().stages[0]) == 1, "a run that was begun anew"


def test_a_damaged_line_is_named_and_the_rest_is_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    path = make_run(tmp_path) / "metrics" / "stage-00.jsonl"
    lines = path.read_text().splitlines()
    path.write_text("\n".join([*lines[:3], "{", *lines[3:]]) + "\n" + lines[0][:20])
    assert main([str(tmp_path)]) == 0
    said = capsys.readouterr().err.splitlines()
    assert said == [
        f"{NAME}: {path}, line 4, is damaged; left out",
        f"{NAME}: {path}, line {len(lines) + 2}, is half written; left out",
    ]
    assert said[0].removeprefix(f"{NAME}: ") in (tmp_path / "report.html").read_text()


@pytest.mark.parametrize("record", ['{"step": 1, "split": "train", "stage": 0}', "[1]", '{"loss": "low"}'])
def test_metrics_of_another_version_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str], record: str):
    path = make_run(tmp_path) / "metrics" / "stage-01.jsonl"
    path.write_text(f"{record}\n")
    assert main([str(tmp_path)]) == 2
    (said,) = capsys.readouterr().err.splitlines()
    assert said.startswith(f"{NAME}: {path}, line 1, is no record of this version (")
    assert said.endswith("read it with the version of llm_local that wrote it")
    assert not (tmp_path / "report.html").exists()


def test_a_folder_that_is_no_run_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    make_run(tmp_path / "run")
    assert main([str(tmp_path / "run"), str(tmp_path / "nothing")]) == 2
    (said,) = capsys.readouterr().err.splitlines()
    assert said.startswith(f"{NAME}: {tmp_path / 'nothing'} has no metrics/stage-*.jsonl with a record; name")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "is damaged; cut, data and versions are left out"),
        (json.dumps(facts_of(2) | {"format": 9}), "is of format 9, not 1; cut, data and versions are left out"),
    ],
)
def test_facts_that_cannot_be_read_are_left_out(tmp_path: Path, text: str, said: str):
    path = make_run(tmp_path) / "metrics" / "run.json"
    path.write_text(text)
    assert one(tmp_path).faults == [f"{path} {said}"]
    assert not parts_of(one(tmp_path))


def test_a_damaged_configuration_is_left_out(tmp_path: Path):
    path = make_run(tmp_path) / "run.yaml"
    path.write_text("- 1")
    assert one(tmp_path).faults == [f"{path} is damaged; the configuration is left out"]


def test_the_page_stays_small(tmp_path: Path):
    make_run(tmp_path / "long", stages=8, steps=25_000)
    write_report([tmp_path / "long"], tmp_path / "report.html")
    assert (tmp_path / "report.html").stat().st_size < 700_000


def test_samples_are_kept_in_order_and_replaced(tmp_path: Path):
    run = make_run(tmp_path)
    for step, text in ((100, "import os"), (200, "import re"), (200, "import sys")):
        add_sample(run, step, "import ", text)
    assert [(each["step"], each["text"]) for each in one(run).samples] == [(100, "os"), (200, "sys")]


def test_names_that_no_end_tells_apart(tmp_path: Path):
    assert short_names([tmp_path / "x", tmp_path / "y"]) == ["x", "y"]
    assert short_names([tmp_path / "x", tmp_path / "x"]) == ["x (1)", "x (2)"]


def test_a_chart_library_that_is_another_one_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    script, _ = uplot()
    assert "</script" not in script
    monkeypatch.setattr(library, "_FILES", {"uplot.iife.min.js": "0" * 64})
    with pytest.raises(NoCharts, match=r"the uplot.iife.min.js of the package youplot is not that of uPlot 1\.6\.31"):
        uplot()
    monkeypatch.setattr(library, "_PACKAGE", "no-such-package")
    assert main([str(make_run(tmp_path))]) == 1


def test_without_the_chart_library_it_is_said_how_to_have_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(library, "_PACKAGE", "no-such-package")
    assert main([str(make_run(tmp_path))]) == 1
    said = "the package no-such-package, from which a page has its charts, is not there; pip install"
    assert said in capsys.readouterr().err


def test_a_page_that_cannot_be_written_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    run = make_run(tmp_path / "run")
    (tmp_path / "file").touch()
    assert main([str(run), "--output", str(tmp_path / "file" / "report.html")]) == 1
    (said,) = capsys.readouterr().err.splitlines()
    assert "could not be written" in said


def test_a_run_without_facts_or_flags_has_a_page(tmp_path: Path):
    """As of earlier versions."""
    run = make_run(tmp_path / "run", facts=False)
    (run / "run.yaml").unlink()
    write_report([run], tmp_path / "report.html")
    assert [each.id for each in tables_of([one(run)])] == ["exits", "speed"]


@pytest.mark.processes
def test_a_run_leaves_its_page(trainer: Any):
    run = trainer.run("run", 2, num_stages=2, trace=True, sample_prompt="def ")
    found = one(run)
    assert [part.layers for part in parts_of(found)] == ["0–1", "2–3"]
    assert [sample["prompt"] for sample in found.samples] == ["def "]
    assert [row[0] for row in table("data", run).rows] == ["text.txt", "validation (validation)"]
    page = (run / "report.html").read_text()
    for shown in ("keep", "Timeline", "What it writes", "Versions"):
        assert shown in page


@pytest.mark.processes
def test_checkpoints_write_for_the_page(trainer: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    run = trainer.run("run", 2, num_stages=2, save_steps=2, sample_prompt="def ")
    assert main([str(run), "--sample_prompt", "import "]) == 0
    assert [(each["step"], each["prompt"]) for each in one(run).samples] == [(2, "import "), (4, "import ")]
    assert all(each["text"] for each in one(run).samples)
    assert "<b>import </b>" in (run / "report.html").read_text()
    none = make_run(tmp_path / "none")
    assert main([str(none), "--sample_prompt", "import "]) == 2
    assert "has no complete checkpoint to write with" in capsys.readouterr().err


@pytest.mark.processes
def test_a_page_that_cannot_be_written_does_not_fail_a_run(trainer: Any, capfd: pytest.CaptureFixture[str]):
    (trainer.folder / "run" / "report.html").mkdir(parents=True)
    run = trainer.run("run", 1)
    assert (run / "export" / "config.json").exists()
    said = [line for line in capfd.readouterr().err.splitlines() if "report.html" in line]
    assert len(said) == 1
    assert f"llm_local: warning: {run}/report.html was not written: " in said[0]
