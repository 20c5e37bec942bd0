"""What each rank of a test would import, look up and build anew, done once in the fork server that all are copies of.

It runs there alone: it is the last module of ranks.PRELOAD. No thread may be left by it, and no backward pass be run:
a fork has no threads, and autograd refuses to go on without its own.
"""

from __future__ import annotations

import ctypes
import gc
import os
import tempfile
from contextlib import redirect_stderr, redirect_stdout, suppress
from importlib import import_module
from pathlib import Path

import imports
import pytest
import torch
from conftest import Trainer

from llm_local.checks.preflight import preflight
from llm_local.config import parse
from llm_local.export.model_card import installed_versions
from llm_local.export.model_folder import original_names
from llm_local.model.stage import Blueprint, build_blocks
from llm_local.report.page import template
from llm_local.setup import Setup

# found by what a rank imports after its start; some are missing in other versions
LATE = [
    "launching",
    "torch.nn.modules.linear_cross_entropy",
    "deepspeed.module_inject.auto_ep_config",
    "deepspeed.module_inject.auto_ep_layer",
    "datasets.io.generator",
]


def rehearse(folder: Path) -> None:
    """A start, and a forward pass of a stage."""
    trainer = Trainer(folder, folder / "cache")
    setup = Setup.from_json(preflight(parse(trainer.flags("run", num_stages=2)), 2).to_json())
    blocks = build_blocks(Blueprint(setup.config, setup.model_config(), setup.anatomy, setup.partition), stage=0)
    with torch.no_grad():
        blocks[0](torch.arange(64).reshape(2, 32), None)
    installed_versions()
    for name in ("page.html", "main.html"):
        template(name)
    original_names(blocks[0].body.model, blocks[0].body.model.state_dict())


torch.set_num_threads(1)
for name in LATE:
    with suppress(ImportError):
        import_module(name)
with tempfile.TemporaryDirectory() as folder, open(os.devnull, "w") as nothing, pytest.MonkeyPatch.context() as patch:
    patch.setenv("TOKENIZERS_PARALLELISM", "false")  # else it makes threads
    with redirect_stdout(nothing), redirect_stderr(nothing):
        rehearse(Path(folder))
gc.collect()
with suppress(AttributeError):  # of another C library
    ctypes.CDLL(None).malloc_trim(0)  # so that memory that a rank takes is its own
imports.are_done()  # else every collection of a rank looks through all of this, and so copies its pages
