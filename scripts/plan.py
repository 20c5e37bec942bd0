"""Ranks the layouts of a model on a machine, by simulation: stages x replicas x ZeRO stage x head."""

import sys

from llm_local.commands.plan import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
