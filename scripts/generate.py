"""Writes text with an exported model, and measures what one of its exits saves as the draft of the whole."""

import sys

from llm_local.commands.generate import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
