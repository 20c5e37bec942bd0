"""Shows what a model will see: packed rows as text with their borders, lengths, tokens of each source, throughput."""

import sys

from llm_local.commands.inspect_data import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
