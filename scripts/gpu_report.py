"""A page of what a day on a GPU has found: python scripts/gpu_report.py DIR/day.jsonl [-o docs/gpu.md]"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from llm_local.bench.gpu_page import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
