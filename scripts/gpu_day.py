"""Nine minutes on a GPU: proves what no CPU can, step by step, into DIR/day.jsonl.

python scripts/gpu_day.py --make_bundle .bundle [--text FILE]        before, on a machine with network
python scripts/gpu_day.py --output DIR --bundle .bundle              on the machine with the GPU
python scripts/gpu_day.py --output DIR --rehearse                    the same on a CPU, with tiny sizes
"""

import signal
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from llm_local.bench.gpu_day import main

if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # what a step has started ends with it
    sys.exit(main(sys.argv[1:]))
