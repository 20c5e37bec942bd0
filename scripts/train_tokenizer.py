"""Trains a tokenizer on the data that a run's flags name: a directory for --tokenizer_name and AutoTokenizer."""

import sys

from llm_local.commands.train_tokenizer import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
