"""What lies beside a run's metrics for those who look at it: its facts (report/facts.py), and text samples."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from llm_local.files import Json, write_json, write_whole
from llm_local.records import FOLDER, read_records

FILE, SAMPLES = "run.json", "samples.jsonl"
FORMAT = 1


def facts_path(output_dir: Path) -> Path:
    return output_dir / FOLDER / FILE


def note_end(output_dir: Path, cause: str) -> None:
    """Keeps what ended the run before its time, until it is started again. Raises Unwritten."""
    path = facts_path(output_dir)
    write_json(path, json.loads(path.read_text()) | {"ended": cause})


def add_sample(output_dir: Path, step: int, prompt: str, text: str) -> None:
    """Keeps what the model wrote after a step, behind what it wrote after earlier ones. Raises Unwritten."""
    kept = [each for each in read_samples(output_dir) if each["step"] < step]
    write_samples(output_dir, [*kept, sample_record(step, prompt, text)])


def sample_record(step: int, prompt: str, text: str) -> Json:
    """text: with the prompt that it goes on from."""
    return {"step": step, "prompt": prompt, "text": text.removeprefix(prompt)}


def read_samples(output_dir: Path) -> list[Json]:
    """In the order of their steps."""
    return read_records(output_dir / FOLDER / SAMPLES)


def write_samples(output_dir: Path, samples: Iterable[Json]) -> None:
    """Raises Unwritten."""
    text = "".join(json.dumps(each) + "\n" for each in sorted(samples, key=lambda each: each["step"]))
    write_whole(output_dir / FOLDER / SAMPLES, text)
