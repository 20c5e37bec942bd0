"""What is written down of a run for those who look at it: at its start OUTPUT/metrics/run.json, and text samples."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from llm_local.costs import count_flops
from llm_local.cut import run_setting, run_shape
from llm_local.data.packing import PackedSource
from llm_local.export.model_card import installed_versions
from llm_local.files import write_json, write_whole
from llm_local.metrics import FOLDER, read_records
from llm_local.setup import Setup

FILE, SAMPLES = "run.json", "samples.jsonl"
FORMAT = 1


def write_facts(setup: Setup, replicas: Sequence[int], sources: Sequence[PackedSource]) -> None:
    """Raises Unwritten."""
    folder = setup.config.output_dir / FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / FILE, facts_of(setup, replicas, sources, time.time()))


def note_end(output_dir: Path, cause: str) -> None:
    """Keeps what ended the run before its time, until it is started again. Raises Unwritten."""
    path = output_dir / FOLDER / FILE
    write_json(path, json.loads(path.read_text()) | {"ended": cause})


def add_sample(output_dir: Path, step: int, prompt: str, text: str) -> None:
    """Keeps what the model wrote after a step, behind what it wrote after earlier ones. Raises Unwritten."""
    kept = [each for each in read_samples(output_dir) if each["step"] < step]
    write_samples(output_dir, [*kept, sample_record(step, prompt, text)])


def sample_record(step: int, prompt: str, text: str) -> dict[str, Any]:
    """text: with the prompt that it goes on from."""
    return {"step": step, "prompt": prompt, "text": text.removeprefix(prompt)}


def read_samples(output_dir: Path) -> list[dict[str, Any]]:
    """In the order of their steps."""
    return read_records(output_dir / FOLDER / SAMPLES)


def write_samples(output_dir: Path, samples: Iterable[dict[str, Any]]) -> None:
    """Raises Unwritten."""
    text = "".join(json.dumps(each) + "\n" for each in sorted(samples, key=lambda each: each["step"]))
    write_whole(output_dir / FOLDER / SAMPLES, text)


def facts_path(output_dir: Path) -> Path:
    return output_dir / FOLDER / FILE


def facts_of(setup: Setup, replicas: Sequence[int], sources: Sequence[PackedSource], started: float) -> dict[str, Any]:
    """The cut of the model, its data and the versions, ready for JSON. started: seconds since 1970."""
    config, partition, anatomy = setup.config, setup.partition, setup.anatomy
    flops = count_flops(run_shape(config, anatomy), run_setting(config, partition, anatomy.layer_matrices)).blocks
    stages = []
    for stage, blocks in enumerate(partition.stages):
        private = [
            len(partition.private_layers(block, config.head_layers_schedule))
            for block in range(blocks.start, blocks.stop)
        ]
        stages.append(
            {
                "blocks": [[span.start, span.stop] for span in partition.blocks_of(stage)],
                "replicas": replicas[stage],
                "private_layers": private if config.method.has_local_losses else [0] * len(private),
                "flops": sum(flops[blocks.start : blocks.stop]),
                "frozen": stage in config.frozen_stages,
            }
        )
    return {
        "format": FORMAT,
        "started": started,
        "model_type": setup.model["model_type"],
        "hidden_size": anatomy.hidden_size,
        "layer_parameters": anatomy.layer_parameters,
        "head_parameters": anatomy.head_parameters,
        "has_local_heads": config.method.has_local_losses,
        "score": config.task.score,
        "stages": stages,
        "sources": [asdict(each) | {"padding": each.packed.padding if each.packed else None} for each in sources],
        "counts": setup.counts,
        "versions": installed_versions(),
        "warnings": list(setup.warnings),
    }
