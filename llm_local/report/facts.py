"""What a run writes down for those who look at it: at its start OUTPUT/metrics/run.json, at its end a text sample."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from llm_local.costs import Setting, Shape, count_flops, setting_of
from llm_local.data.packing import PackedSource
from llm_local.export.model_card import installed_versions
from llm_local.files import write_json, write_whole
from llm_local.metrics import FOLDER, read_records
from llm_local.model.heads.head import head_of
from llm_local.setup import Setup

FILE, SAMPLES = "run.json", "samples.jsonl"
FORMAT = 1


def write_facts(setup: Setup, replicas: Sequence[int], sources: Sequence[PackedSource]) -> None:
    """Raises Unwritten."""
    folder = setup.config.output_dir / FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / FILE, facts_of(setup, replicas, sources, time.time()))


def add_sample(output_dir: Path, step: int, prompt: str, text: str) -> None:
    """Keeps what the model wrote after a step, behind what it wrote after earlier ones. Raises Unwritten."""
    path = output_dir / FOLDER / SAMPLES
    kept = [sample for sample in read_records(path) if sample["step"] < step]
    kept.append({"step": step, "prompt": prompt, "text": text.removeprefix(prompt)})
    write_whole(path, "".join(json.dumps(sample) + "\n" for sample in kept))


def facts_path(output_dir: Path) -> Path:
    return output_dir / FOLDER / FILE


def facts_of(setup: Setup, replicas: Sequence[int], sources: Sequence[PackedSource], started: float) -> dict[str, Any]:
    """The cut of the model, its data and the versions, ready for JSON. started: seconds since 1970."""
    partition, anatomy, flops = setup.partition, setup.anatomy, _flops(setup)
    stages = []
    for stage, blocks in enumerate(partition.stages):
        private = [
            len(partition.private_layers(block, setup.config.head_layers_schedule))
            for block in range(blocks.start, blocks.stop)
        ]
        stages.append(
            {
                "blocks": [[span.start, span.stop] for span in partition.blocks_of(stage)],
                "replicas": replicas[stage],
                "private_layers": private if setup.config.method.has_local_losses else [0] * len(private),
                "flops": sum(flops[blocks.start : blocks.stop]) if flops else None,
            }
        )
    return {
        "format": FORMAT,
        "started": started,
        "model_type": setup.model["model_type"],
        "hidden_size": anatomy.hidden_size,
        "layer_parameters": anatomy.layer_parameters,
        "head_parameters": anatomy.head_parameters,
        "has_local_heads": setup.config.method.has_local_losses,
        "stages": stages,
        "sources": [asdict(each) | {"padding": each.packed.padding if each.packed else None} for each in sources],
        "counts": setup.counts,
        "versions": installed_versions(),
        "warnings": list(setup.warnings),
    }


def _flops(setup: Setup) -> tuple[float, ...]:
    """Of each block, for a token; () for heads of low rank, whose matrices are not known here."""
    config, anatomy = setup.config, setup.anatomy
    local, length = config.local, config.data.seq_length
    if local.head_rank is not None:
        return ()
    shape = Shape(anatomy.hidden_size, length, anatomy.active_layer_parameters, anatomy.head_parameters)
    setting = Setting(setup.partition.blocks, token_fraction=0.0)
    if config.method.has_local_losses:
        setting = setting_of(
            setup.partition,
            config.head_layers_schedule,
            frozen_heads=head_of(config).shares_matrix,
            token_fraction=local.head_token_fraction,
        )
    return count_flops(shape, setting).blocks
