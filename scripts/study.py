"""Trains a grid of settings and seeds on the same tokens, and compares them: OUTPUT/study.md, .json and .png."""

import sys

from llm_local.commands.study import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
