"""Copies the configurations that come with llm_local into a folder, to be edited: llm-local configs [FOLDER]

They name each other as configs/..., so runs are started beside a folder of that name, which is the default.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

from llm_local.files import Unwritten, ends_with_a_line, writing
from llm_local.program import command_parser, program

NAME = program(__file__)
CONFIGS = Path(__file__).parents[1] / "configs"


@ends_with_a_line(Unwritten)
def main(arguments: list[str]) -> int:
    parser = command_parser(NAME, __doc__)
    parser.add_argument("folder", nargs="?", type=Path, default=Path("configs"), help="to be made (configs)")
    folder: Path = parser.parse_args(arguments).folder
    if folder.exists():
        print(f"{NAME}: {folder} exists; name another folder", file=sys.stderr)
        return 2
    with writing(folder):
        shutil.copytree(CONFIGS, folder)
    print(f"configurations: {folder}")
    return 0
