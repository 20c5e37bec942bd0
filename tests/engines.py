"""A DeepSpeed engine around one tiny block, in a world of one."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from conftest import TINY
from transformers import AutoConfig

from llm_local.block_engine import BlockEngine, make_block_engine
from llm_local.config import from_flat
from llm_local.device import prepare_cpu
from llm_local.ds_config import resolve
from llm_local.model.anatomy import probe
from llm_local.model.stage import Blueprint, build_block
from llm_local.partition import Costs, make_partition


def tiny_engine(settings: dict[str, Any], num_replicas: int = 1, **flags: Any) -> BlockEngine:
    """settings: DeepSpeed's JSON. Only where run_ranks has set the variables of a rank, or in a process group."""
    import deepspeed

    prepare_cpu(torch.device("cpu"), 1)
    deepspeed.init_distributed("gloo", verbose=False)
    config, partition = AutoConfig.for_model(**TINY), make_partition(4, 1, Costs(1.0, 1.0), 1)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "ds.json"
        path.write_text(json.dumps(settings))
        run = from_flat({"config_name": "x.json", "layers_per_block": 1, "deepspeed": str(path), **flags})
        block = build_block(Blueprint(run, config, probe(config, run.model), partition), 0)
        return make_block_engine(run, block, resolve(run, num_replicas, config))
