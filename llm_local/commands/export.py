"""Makes a Hugging Face model of a checkpoint, on one CPU, without the ranks that wrote it.

llm-local export runs/quickstart/checkpoints/step-00000200 OUT [--exit stage-00] [--dtype fp32]

Without --exit it is the whole model. An OUT that exists is replaced once the new one is complete.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

os.environ["DS_ACCELERATOR"] = "cpu"  # nothing here runs on a GPU

from llm_local.checkpoint.manifest import MANIFEST, BrokenCheckpoint
from llm_local.config import ConfigError
from llm_local.files import Unwritten, ends_with_a_line, writing
from llm_local.model.anatomy import SliceError
from llm_local.offline_export import NoSuchExit, export_checkpoint
from llm_local.program import program
from llm_local.screen import quiet_libraries

NAME = program(__file__)


@ends_with_a_line(Unwritten)
def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog=NAME, description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("checkpoint", type=Path, help="Folder of a checkpoint, with a manifest.json.")
    parser.add_argument("out", type=Path, help="Folder of the model.")
    parser.add_argument("--exit", help="Stage whose exit is wanted, as stage-00; default: the whole model.")
    parser.add_argument("--dtype", default="auto", choices=("auto", "fp32", "bf16", "fp16"), help="Of the weights.")
    given = parser.parse_args(arguments)
    quiet_libraries()
    try:
        if not (given.checkpoint / MANIFEST).is_file():
            raise ConfigError([f"{given.checkpoint} has no {MANIFEST}: it is no checkpoint, or half written"])
        with writing(given.out, reads=True):
            export_checkpoint(given.checkpoint, given.out, given.exit, given.dtype, say)
    except ConfigError as error:
        say("; ".join(error.problems))
        return 2
    except (BrokenCheckpoint, NoSuchExit, SliceError) as error:
        say(str(error))
        return 2
    say(f"model: {given.out}")
    return 0


def say(line: str) -> None:
    print(f"{NAME}: {line}", file=sys.stderr, flush=True)
