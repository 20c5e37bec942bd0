"""Looks inside a trained local run: local against true gradients, the loss of every exit, and what a linear readout"""

import sys

from llm_local.commands.probe import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
