"""The name of the running program, as a person has called it."""

from __future__ import annotations

import sys
from pathlib import Path

COMMAND = "llm-local"


def program(file: str) -> str:
    """What a script or its module is called: prepare_data.py, or under the console script llm-local prepare-data."""
    called, script = Path(sys.argv[0]), Path(file)
    by_command = called.name == COMMAND or (called.name == "cli.py" and called.parent.name == "llm_local")
    return f"{COMMAND} {script.stem.replace('_', '-')}" if by_command else script.name
