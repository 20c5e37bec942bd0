"""Makes a Hugging Face model of a checkpoint, on one CPU, without the ranks that wrote it."""

import sys

from llm_local.commands.export import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
