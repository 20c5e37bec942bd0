"""The name of the running program, as a person has called it, and its flags."""

from __future__ import annotations

import sys
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from pathlib import Path

COMMAND = "llm-local"


def program(file: str) -> str:
    """What a script or its module is called: prepare_data.py, or under the console script llm-local prepare-data."""
    called, script = Path(sys.argv[0]), Path(file)
    by_command = called.name == COMMAND or (called.name == "cli.py" and called.parent.name == "llm_local")
    return f"{COMMAND} {script.stem.replace('_', '-')}" if by_command else script.name


def command_parser(name: str, doc: str | None, allow_abbrev: bool = True) -> ArgumentParser:
    """Of flags; the help shows the module's docstring as it stands."""
    formatter = RawDescriptionHelpFormatter
    return ArgumentParser(prog=name, description=doc, formatter_class=formatter, allow_abbrev=allow_abbrev)
