"""Tokenises a run's data once, before the run: pretrain.py with the same flags then only maps it."""

import signal
import sys

from llm_local.commands.prepare_data import main

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # finished parts are kept, and there is nothing to tidy up
    sys.exit(main(sys.argv[1:]))
