"""A run watched while it goes on: what each stage does now, and the page that renews itself."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import pytest
from browser import MISSING, chromium, console, resize
from reports import make_run, train_record

from llm_local.commands.watch import NAME, main
from llm_local.report.now import ago, ends, now_of
from llm_local.report.read import RunData

NOON = 1_800_000_000.0


def run_of(**steps: int) -> RunData:
    """Of stages that have come to these steps."""
    run = RunData(Path("run"), "run", flags={"max_steps": 100})
    for stage, last in enumerate(steps.values()):
        run.stages[stage] = [train_record(step, stage, 3.0, True) for step in range(1, last + 1)]
        run.written[stage] = NOON - 5
    return run


def rows(run: RunData) -> dict[str, dict[str, str]]:
    table = now_of([run], NOON)
    return {row[0]: dict(zip(table.columns[1:], row[1:], strict=True)) for row in table.rows}


def test_a_launch_by_its_records():
    found = rows(run_of(a=60, b=52))
    assert found["stage 1"]["step"] == "52 of 100"
    assert found["stage 1"]["behind"] == "8"
    assert found["stage 1"]["tokens a second"] == "3,413"
    assert found["stage 1"]["ends"].startswith("in 14 s, at ")
    assert found["stage 0"]["last heard of"] == "5 s ago"
    assert "life" not in found["stage 0"]


def test_a_stage_that_is_through_and_one_that_says_nothing():
    run = run_of(a=100, b=52)
    run.written[1] = NOON - 4000
    found = rows(run)
    assert (found["stage 0"]["state"], found["stage 0"]["ends"]) == ("trained", "–")
    assert (found["stage 1"]["state"], found["stage 1"]["ends"]) == ("silent", "–")


def test_jobs_as_they_tell_it():
    run = run_of(a=60, b=52)
    job: dict[str, Any] = {"max_steps": 100, "tokens_per_second": 3000.0, "log_bytes": 2e6, "error": "", "time": NOON}
    run.status = [
        job | {"stage": 0, "state": "training", "life": 1, "step": 61},
        job | {"stage": 1, "state": "training", "life": 3, "step": 52, "time": NOON - 600, "error": "no route"},
    ]
    found = rows(run)
    assert (found["stage 1"]["life"], found["stage 1"]["behind"]) == ("3", "9")
    assert (found["stage 1"]["state"], found["stage 1"]["last error"]) == ("away", "no route")
    assert (found["stage 0"]["log"], found["stage 0"]["state"]) == ("2.0 MB", "training")


def test_spans_of_time_are_said_as_people_do():
    assert [ago(each) for each in (8.4, 300.0, 7200.0, 4e5)] == ["8 s", "5 min", "2.0 h", "4.6 days"]
    assert ends(10, 10, 1.0, NOON) == "–"
    assert ends(0, 10, None, NOON) == "–"
    assert ", at " in ends(0, 10**6, 1.0, NOON)


@contextmanager
def watching(run: Path) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    command = [sys.executable, "-m", "llm_local.cli", "watch", str(run), "--port", "0"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        yield process.stdout.readline().removeprefix("watch: ").strip(), process
    finally:
        process.kill()
        process.wait()


@pytest.mark.processes
def test_the_page_is_for_this_machine_alone(tmp_path: Path):
    run = make_run(tmp_path / "run", steps=20, max_steps=40)
    with watching(run) as (address, _):
        assert "stage 1" in urlopen(address, timeout=30).read().decode()
        news = json.loads(urlopen(f"{address}/news", timeout=30).read())
        assert set(news) == {"main", "data"}
        for path, host, status in (("/", "elsewhere.example:80", 403), ("/run.yaml", "localhost", 404)):
            with pytest.raises(HTTPError) as refused:
                urlopen(Request(f"{address}{path}", headers={"Host": host}), timeout=30)
            assert refused.value.code == status
        (run / "metrics" / "stage-00.jsonl").write_text("[1]\n")
        time.sleep(1.5)
        with pytest.raises(HTTPError, match="is no record of this version"):
            urlopen(f"{address}/news", timeout=30)


def test_what_cannot_be_watched_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert main([str(tmp_path)]) == 2
    assert capsys.readouterr().err.startswith(f"{NAME}: {tmp_path} has no metrics/")
    run = make_run(tmp_path / "run", steps=4)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert main([str(run), "--port", str(port)]) == 2
        said = f"{NAME}: cannot listen on port {port} (Address already in use); name another one, or 0\n"
        assert capsys.readouterr().err == said
    assert main([str(run), "--port", "70000"]) == 2
    assert "cannot listen on port 70000" in capsys.readouterr().err


@pytest.mark.processes
@pytest.mark.skipif(bool(MISSING), reason=MISSING)
def test_the_page_renews_itself(tmp_path: Path):
    from selenium.webdriver.support.ui import WebDriverWait

    run = make_run(tmp_path / "run", steps=20, max_steps=40)
    with watching(run) as (address, process), chromium(tmp_path / "profile") as browser:
        resize(browser, 390, 900)
        browser.get(address)
        shown = "return document.querySelector('#now').innerText + document.querySelector('.u-legend').innerText"
        assert "20 of 40" in browser.execute_script(shown)
        with (run / "metrics" / "stage-01.jsonl").open("a") as file:
            file.write(json.dumps(train_record(31, 1, 2.0, False)) + "\n")
        wait = WebDriverWait(browser, 30)
        wait.until(lambda _: "31 of 40" in browser.execute_script(shown))
        wait.until(lambda _: "step31" in browser.execute_script(shown))
        assert console(browser) == []
        assert browser.execute_script("return document.documentElement.scrollWidth") == 390
        process.kill()
        gone = "return getComputedStyle(document.querySelector('.gone')).display"
        wait.until(lambda _: browser.execute_script(gone) == "block")
