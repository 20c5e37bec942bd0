"""Asks an exported model that writes no text: what stands for a mask, what an image shows."""

import sys

from llm_local.commands.predict import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
