"""A trace that is read back: its numbers, its clock, its picture, and what is refused."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest

from llm_local.timeline.chrome_trace import write_chrome_trace
from llm_local.timeline.measured import measured, read_trace, stage_times
from llm_local.timeline.replay import simulated
from llm_local.trace import COMPUTE, RECEIVE, STEP, Event, Reading, TraceHeader, Tracer

SCRIPTS = Path(__file__).parent.parent / "scripts"
NOW = Reading(0.0, 0.0, 0.0)
# of a step of ten seconds, by stage: two micro-batches, one block, an optimizer step
FIRST = [
    ("LoadMicroBatch", 0.0, 0.5, 0),
    ("ForwardPass", 0.5, 2.0, 0),
    ("SendActivation", 2.0, 2.5, 0),
    ("BackwardPass", 2.5, 4.0, 0),
    ("LoadMicroBatch", 4.0, 4.5, 1),
    ("ForwardPass", 4.5, 6.0, 1),
    ("SendActivation", 6.0, 6.5, 1),
    ("BackwardPass", 6.5, 8.0, 1),
    ("ReduceGrads", 8.0, 8.0, None),
    ("OptimizerStep", 8.0, 9.0, None),
]
SECOND = [
    ("RecvActivation", 0.0, 2.6, 0),
    ("ForwardPass", 2.6, 4.1, 0),
    ("BackwardPass", 4.1, 5.6, 0),
    ("RecvActivation", 5.6, 6.6, 1),
    ("ForwardPass", 6.6, 7.1, 1),
    ("BackwardPass", 7.1, 8.6, 1),
    ("ReduceGrads", 8.6, 8.6, None),
    ("OptimizerStep", 8.6, 9.6, None),
]


def header(stage: int, run: str = "a") -> TraceHeader:
    return TraceHeader(run, stage, 0, 2, 1, "chunked", 4, "here/cpu")


def write(
    run: Path, stage: int, run_id: str = "a", steps: int = 3, begins: Reading = NOW, ends: Reading | None = None
) -> Path:
    """A stage's file, as its tracer writes it; without a last reading, that of a run which was killed."""
    tracer = Tracer(run, header(stage, run_id), None)
    tracer.start(begins)
    for step in range(1, steps + 1):
        start = 10.0 * step + begins.at
        for name, first, last, index in FIRST if stage == 0 else SECOND:
            tracer.record(Event(COMPUTE, name, start + first, start + last, "train", step, index))
        if stage == 1:
            tracer.record(Event(RECEIVE, "Packet", start + 2.1, start + 2.5, "train", step, 0, source=0))
        tracer.record(Event(STEP, "train", start, start + 10, "train", step))
    if ends is None:
        tracer.flush()
    else:
        tracer.close(ends)
    return tracer.path


@pytest.fixture
def run(tmp_path: Path) -> Path:
    for stage in (0, 1):
        write(tmp_path / "run", stage, ends=NOW)
    return tmp_path / "run"


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(SCRIPTS))
    import timeline  # pyright: ignore[reportMissingImports]

    return timeline


def refusal(run: Path) -> str:
    with pytest.raises(ValueError, match=re.escape(str(run))) as caught:
        read_trace(run)
    return str(caught.value)


class TestNumbers:
    def test_bubble_and_link_wait_are_shares_of_a_step(self, run: Path):
        trace = read_trace(run)
        first, second = stage_times(measured(trace, trace.steps))
        assert first.step_seconds == second.step_seconds == pytest.approx(10)
        assert first.compute_seconds == pytest.approx(8)
        assert first.bubble == pytest.approx(0.2)
        assert first.wait_share == pytest.approx(0.1)
        assert second.bubble == pytest.approx(1 - 6 / 10)
        assert second.wait_seconds == pytest.approx(3.6)

    def test_the_simulation_follows_the_recorded_instructions_with_mean_durations(self, run: Path):
        """Stage 0 computes 7 seconds a step without its loads, stage 1 waits for its packets."""
        trace = read_trace(run)
        first, second = simulated(trace, [2, 3])
        assert [bar.kind for bar in first.bars] == 2 * ["forward", "backward", "forward", "backward", "optimizer"]
        assert [bar.micro_batch for bar in second.bars] == 2 * [0, 0, 1, 1, None]
        assert [bar.step for bar in second.bars] == 5 * [2] + 5 * [3]
        times = stage_times([first, second])
        assert times[0].step_seconds == pytest.approx(7)
        assert times[0].bubble == pytest.approx(0)
        assert times[1].compute_seconds == pytest.approx(2 * (1.0 + 1.5) + 1)
        assert times[1].step_seconds == pytest.approx(7)

    def test_times_are_those_of_the_first_ranks_clock(self, tmp_path: Path):
        """The second rank's clock is 100 s behind and, over 30 s, loses another 3 ms."""
        write(tmp_path, 0, ends=NOW)
        begins = Reading(-100.0, 100.0, 2e-4)
        write(tmp_path, 1, begins=begins, ends=replace(begins, at=-70.0, offset_seconds=100.003, error_seconds=3e-4))
        other = read_trace(tmp_path).ranks[1]
        assert other.error_seconds == 3e-4
        assert other.steps[1][0] == pytest.approx(10.001)
        assert other.steps[3][0] == pytest.approx(30.003)

    def test_steps_are_those_that_all_stages_ended(self, tmp_path: Path):
        write(tmp_path, 0, steps=3)
        path = write(tmp_path, 1, steps=3)
        text = path.read_text()
        path.write_text(text[: text.rindex('"lane": "step"') + 20])  # killed in the middle of the last line
        assert read_trace(tmp_path).steps == [1, 2]


class TestChrome:
    def test_every_event_has_what_the_format_asks_for(self, run: Path):
        content = json.loads(write_chrome_trace(read_trace(run)).read_text())
        events = content["traceEvents"]
        spans = [event for event in events if event["ph"] == "X"]
        assert len(spans) == 3 * (len(FIRST) + len(SECOND) + 2 + 1)
        assert all({"name", "cat", "ts", "dur", "pid", "tid"} <= set(event) for event in spans)
        assert min(event["ts"] for event in spans) == 0
        assert [e["args"]["name"] for e in events if e["name"] == "process_name"] == ["stage 0", "stage 1"]
        forward = next(e for e in spans if e["name"] == "ForwardPass" and e["pid"] == 1)
        assert forward["dur"] == pytest.approx(1.5e6)
        assert forward["args"] == {"step": 1, "split": "train", "micro_batch": 0}

    def test_an_arrow_leads_from_each_send_to_its_receive(self, run: Path):
        events = json.loads(write_chrome_trace(read_trace(run)).read_text())["traceEvents"]
        begins, ends = ({e["id"]: e for e in events if e["ph"] == phase} for phase in ("s", "f"))
        assert len(begins) == 6
        assert set(begins) == set(ends)
        assert all((begins[key]["pid"], ends[key]["pid"]) == (0, 1) for key in begins)
        assert all(begins[key]["ts"] <= ends[key]["ts"] for key in begins)


class TestRefusals:
    def test_a_run_without_a_trace(self, tmp_path: Path):
        assert refusal(tmp_path) == (
            f"{tmp_path} has no trace/stage-*.jsonl; name the --output_dir of a run with --trace true"
        )

    def test_files_of_two_runs(self, run: Path):
        path = write(run, 1, run_id="b", ends=NOW)
        assert refusal(run) == (
            f"{path} is of another run than stage-00-replica-00.jsonl; keep the files of one run in a folder"
        )

    def test_a_stage_that_is_missing(self, run: Path):
        (run / "trace/stage-01-replica-00.jsonl").unlink()
        assert refusal(run) == (
            f"{run / 'trace'} lacks stage-01-replica-00.jsonl, one of 2 files of this run; copy it there"
        )

    def test_a_file_under_another_name(self, run: Path):
        path = run / "trace/stage-01-replica-00.jsonl"
        path.write_text((run / "trace/stage-00-replica-00.jsonl").read_text())
        assert refusal(run) == (f"{path} is what its run wrote as stage-00-replica-00.jsonl; give it that name again")

    @pytest.mark.parametrize(
        "content",
        [b"", b"hello\n", b'{"step": 1}\n', b"[]\n", b"\xff\xfe\x00", b'{"llm_local_trace": 99, "clock": {}}\n'],
        ids=["empty", "text", "metrics", "list", "binary", "version"],
    )
    def test_a_file_that_is_no_trace(self, run: Path, content: bytes):
        path = run / "trace/stage-01-replica-00.jsonl"
        path.write_bytes(content)
        assert refusal(run) == f"{path} is no trace: its first line is not the header that --trace true writes"

    @pytest.mark.parametrize(
        ("line", "reason"),
        [
            ("{nothing", "Expecting"),
            ('{"lane": "compute", "name": "Dance", "start": 1, "end": 2}', "there is no compute Dance"),
            ('{"lane": "hall", "name": "ForwardPass", "start": 1, "end": 2}', "there is no hall ForwardPass"),
            ('{"lane": "compute", "name": "ForwardPass", "start": 2, "end": 1}', "ForwardPass ends before it starts"),
            ('{"lane": "compute", "name": "ForwardPass"}', "missing"),
        ],
    )
    def test_a_damaged_line_in_the_middle(self, run: Path, line: str, reason: str):
        path = run / "trace/stage-01-replica-00.jsonl"
        lines = path.read_text().splitlines()
        path.write_text("\n".join([*lines[:4], line, *lines[4:]]) + "\n")
        text = refusal(run)
        assert text.startswith(f"{path}, line 5, is damaged: ")
        assert re.search(reason, text)
        assert "\n" not in text

    def test_no_step_that_came_to_its_end(self, tmp_path: Path):
        write(tmp_path, 0, steps=1)
        write(tmp_path, 1, steps=0)
        assert refusal(tmp_path) == (
            f"{tmp_path / 'trace'} has no training step that all stages ended; a run writes it as it goes"
        )


class TestScript:
    @pytest.mark.parametrize(("name", "begins"), [("t.png", b"\x89PNG"), ("t.svg", b"<?xml")])
    def test_it_prints_a_table_and_draws(
        self, script: ModuleType, run: Path, name: str, begins: bytes, capsys: pytest.CaptureFixture[str]
    ):
        picture = run / name
        assert script.main([str(run), "--steps", "2-3", "--output", str(picture)]) == 0
        assert picture.read_bytes().startswith(begins)
        assert (run / "trace/trace.json").exists()
        lines = capsys.readouterr().out.splitlines()
        assert lines[0].startswith(f"{run}: chunked, 2 stages x 1 replicas, steps 2-3")
        assert lines[2].split() == ["0", "10000.0", "8000.0", "1000.0", "10.0%", "20.0%", "|", "7000.0", "0.0%"]
        assert lines[3].split()[:6] == ["1", "10000.0", "6000.0", "3600.0", "36.0%", "40.0%"]

    def test_by_default_all_steps_but_the_first_count(
        self, script: ModuleType, run: Path, capsys: pytest.CaptureFixture[str]
    ):
        assert script.main([str(run)]) == 0
        assert "steps 2-3" in capsys.readouterr().out
        assert (run / "trace/timeline.png").read_bytes().startswith(b"\x89PNG")

    @pytest.mark.parametrize(
        ("arguments", "text"),
        [
            (["--steps", "7-9"], "--steps 7-9: {run}/trace has the steps 1-3"),
            (["--steps", "two"], "--steps two: give one step, or the first and the last of some, as 5-8"),
            (["--steps", "5-"], "--steps 5-: give one step, or the first and the last of some, as 5-8"),
            (["--output", "t.bmp"], "--output t.bmp: end the name in one of .png, .svg, .pdf"),
        ],
    )
    def test_a_bad_argument_is_named(
        self, script: ModuleType, run: Path, arguments: list[str], text: str, capsys: pytest.CaptureFixture[str]
    ):
        assert script.main([str(run), *arguments]) == 2
        assert capsys.readouterr().err == f"timeline.py: {text.format(run=run)}\n"
