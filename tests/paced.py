"""A rank of the fault campaign: llm-local pretrain, but each of its steps takes as long as the file CAMPAIGN_PACE says.

Nothing waits where there is no such variable or no such file. So a run of a model that is tiny, and is trained without
faults in a minute, lasts as long as there are faults to come.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import Any

from llm_local.ancestors import end_with_launcher

PACE = "CAMPAIGN_PACE"


def main(arguments: list[str]) -> int:
    end_with_launcher()
    os.environ["DS_ACCELERATOR"] = "cpu"
    from transformers import TrainerCallback

    from llm_local import train

    class Pace(TrainerCallback):
        """Sleeps before each step."""

        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            try:
                time.sleep(float(Path(os.environ[PACE]).read_text()))
            except (OSError, ValueError):  # there is none any more, or it is being written
                return

        def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            state.log_history.clear()  # else each checkpoint has all of it

    return train.main(arguments, [Pace()] if PACE in os.environ else [])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
