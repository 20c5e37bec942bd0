"""What a terminal shows of a run: a bar for each stage. Output that is piped has lines, as other tests read them."""

from __future__ import annotations

import io
import os
import pty
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from llm_local.bars import Bars

ROOT = Path(__file__).parent.parent
CODES = re.compile(r"\x1b\[[\d;?]*[A-Za-z]")


def lines(text: str) -> list[str]:
    return [line.rstrip() for line in CODES.sub("", text).splitlines()]


def test_each_stage_has_a_line_and_what_is_said_stands_above():
    screen = io.StringIO()
    bars = Bars(range(2), 10, 2, Console(file=screen, force_terminal=True, width=100))
    bars.move(0, 7, "loss 3.250, 100 tokens/s")
    bars.move(1, 4, "loss [bold]")
    bars.say("saved [/nothing]")
    bars.close()
    text = screen.getvalue()
    said = lines(text)
    assert "saved [/nothing]" in said, "as it is, though it looks like markup"
    first, second = [line for line in said if line.startswith("stage")][-2:]
    assert re.match(r"stage 0 \S+ +7/10 loss 3.250, 100 tokens/s +0:00:0\d ", first)
    assert re.match(r"stage 1 \S+ +4/10 loss \[bold\] ", second)
    assert text.rfind("\x1b[?25h") > text.rfind("\x1b[?25l"), "the cursor is there"


def test_the_cursor_is_there_while_it_runs():
    """A run may be ended from outside."""
    screen = io.StringIO()
    bars = Bars(range(1), 10, 0, Console(file=screen, force_terminal=True, width=100))
    assert screen.getvalue().rfind("\x1b[?25h") > screen.getvalue().rfind("\x1b[?25l")
    bars.close()


@pytest.mark.processes
def test_a_run_in_a_terminal(trainer: Any):
    ours, theirs = pty.openpty()
    command = [sys.executable, str(ROOT / "scripts/pretrain.py"), *trainer.flags("run", eval_batches=1)]
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "120"}
    process = subprocess.Popen(command, stdout=theirs, stderr=theirs, env=environment)
    os.close(theirs)
    data = b""
    while True:
        try:
            data += os.read(ours, 1 << 16)
        except OSError:  # Linux' way to say that nobody writes any more
            break
    os.close(ours)
    assert process.wait() == 0
    said = lines(data.decode())
    assert any(re.match(r"stage 0 \S+ 4/4 loss \d\.\d{3}, [\d,]+ tokens/s ", line) for line in said)
    assert any(line.startswith("step 4  validation loss by stage: ") for line in said)
    assert said[-1].startswith("report: ")
