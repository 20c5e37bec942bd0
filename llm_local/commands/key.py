"""Makes the key of a run, which all of its jobs show each other: llm-local key FILE

Copy the file to the other machines as you would a private key of ssh. Who has it can take the place of a stage.
"""

from __future__ import annotations

from pathlib import Path

from llm_local.config import refused
from llm_local.files import Unwritten, ends_with_a_line
from llm_local.jobs.key import make_key
from llm_local.program import command_parser, program

NAME = program(__file__)


@ends_with_a_line(Unwritten)
def main(arguments: list[str]) -> int:
    parser = command_parser(NAME, __doc__)
    parser.add_argument("file", type=Path, help="to be made; --run_key_file names it")
    path: Path = parser.parse_args(arguments).file
    try:
        make_key(path)
    except FileExistsError as error:
        return refused(NAME, ValueError(*error.args))
    print(f"key: {path}")
    return 0
