"""Writes docs/flags.md: what becomes of each flag of transformers' Trainer and of run_clm.py.

python scripts/flags.py    (the table is llm_local/trainer_flags.py; flags that it does not know yet are printed)
"""

from __future__ import annotations

import sys
from pathlib import Path

from transformers import TrainingArguments, __version__

from llm_local.trainer_flags import new_flags, page

PAGE = Path(__file__).parents[1] / "docs" / "flags.md"


def main() -> int:
    PAGE.write_text(page())
    print(PAGE)
    for name in new_flags(TrainingArguments):
        print(f"new in transformers {__version__}, and not in the table: {name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
