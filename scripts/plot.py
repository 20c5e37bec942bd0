"""Draws the losses of every stage of one run, or of several side by side: RUN/metrics/loss.png."""

import sys

from llm_local.commands.plot import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
