"""What a run writes down at its start for those who look at it: OUTPUT/metrics/run.json."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict

from llm_local.costs import count_flops
from llm_local.cut import run_setting, run_shape
from llm_local.data.packing import PackedSource
from llm_local.export.model_card import installed_versions
from llm_local.files import Json, write_json
from llm_local.report.notes import FORMAT, facts_path
from llm_local.setup import Setup


def write_facts(setup: Setup, replicas: Sequence[int], sources: Sequence[PackedSource]) -> None:
    """Raises Unwritten."""
    path = facts_path(setup.config.output_dir)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, facts_of(setup, replicas, sources, time.time()))


def facts_of(setup: Setup, replicas: Sequence[int], sources: Sequence[PackedSource], started: float) -> Json:
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
