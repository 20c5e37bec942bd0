"""Makes a Hugging Face model, and its exits, of the parts that the jobs of a run have left on their machines.

llm-local assemble siteA/stage-00 siteB/stage-01 siteC/stage-02 OUT [--export_dtype fp32]

A PART is what a job has exported, its output folder, or one of its checkpoints; in any order. An OUT with a model in it
is replaced once the new one is complete.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

os.environ["DS_ACCELERATOR"] = "cpu"  # nothing here runs on a GPU

from llm_local.checkpoint.manifest import BrokenCheckpoint
from llm_local.config import ConfigError
from llm_local.export.model_folder import INDEX, WrongExport
from llm_local.files import Unwritten, ends_with_a_line, writing
from llm_local.model.anatomy import SliceError
from llm_local.offline_export import assemble
from llm_local.program import program
from llm_local.screen import quiet_libraries

NAME = program(__file__)


@ends_with_a_line(Unwritten, WrongExport)
def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog=NAME, description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("parts", type=Path, nargs="+", metavar="PART", help="Export, output or checkpoint of a job.")
    parser.add_argument("out", type=Path, help="Folder of the model.")
    parser.add_argument(
        "--export_dtype", choices=("fp32", "bf16", "fp16"), help="Of the weights; default: as the run's flags say."
    )
    parser.add_argument(
        "--trust_remote_code",
        nargs="?",
        const="true",
        default="false",
        choices=("true", "false"),
        help="Whether code that a part brings along may run.",
    )
    given = parser.parse_args(arguments)
    quiet_libraries()
    try:
        if given.out.exists() and not ((given.out / INDEX).is_file() or _is_empty(given.out)):
            raise ConfigError([f"{given.out} is there, and is no model to replace; name a new folder behind the parts"])
        with writing(given.out, reads=True):
            assemble(given.parts, given.out, given.export_dtype, given.trust_remote_code == "true", say)
    except ConfigError as error:
        for problem in error.problems:
            say(problem)
        return 2
    except SliceError as error:
        say(str(error))
        return 2
    except BrokenCheckpoint as error:
        say(f"{error.what}; copy the part again, or name an earlier checkpoint of each job")
        return 1
    say(f"model: {given.out}")
    return 0


def _is_empty(folder: Path) -> bool:
    return folder.is_dir() and not any(folder.iterdir())


def say(line: str) -> None:
    print(f"{NAME}: {line}", file=sys.stderr, flush=True)
