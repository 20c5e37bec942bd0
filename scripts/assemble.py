"""Makes a Hugging Face model, and its exits, of the parts that the jobs of a run have left on their machines."""

import sys

from llm_local.commands.assemble import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
