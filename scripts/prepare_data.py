"""Tokenises a run's data once, before the run: pretrain.py with the same flags then only maps it.

python scripts/prepare_data.py [CONFIG.yaml] --train_file text.jsonl --preprocessing_num_workers 8

Takes the flags of pretrain.py; those of data, tokenizer, packing and --cache_dir matter. What is interrupted goes on
where it was when it is started again.
"""

from __future__ import annotations

import signal
import sys
import time

from transformers.utils import logging

from llm_local.config import ConfigError, RunConfig, parse
from llm_local.data import Data, prepare_all
from llm_local.mixture import training_sources
from llm_local.problems import data_flag_problems
from llm_local.tokenizer import load_tokenizer


def prepare(config: RunConfig) -> Data:
    """Raises ConfigError with all that is wrong with the flags, or the first thing that is with the data."""
    problems = data_flag_problems(config)
    if not problems:
        problems = [
            f"{source.named} is a stream (streaming=True), which is tokenised as it is read; leave streaming out"
            for source in training_sources(config)
            if source.streaming
        ]
    if problems:
        raise ConfigError(problems)
    return prepare_all(config, load_tokenizer(config), progress=True)


def main(arguments: list[str]) -> int:
    if "--help" in arguments:
        print(__doc__)
        return 0
    logging.set_verbosity_error()
    start = time.monotonic()
    try:
        config = parse(arguments)
        data = prepare(config)
    except ConfigError as error:
        print(f"prepare_data.py: {'; '.join(error.problems)}", file=sys.stderr)
        return 2
    for source in data.sources:
        assert source.tokens is not None
        print(f"{source.describe()}\n  {source.tokens.tokens:,} tokens in {source.tokens.folder}")
    for each in data.validation:
        print(f"{each.name}: {each.sequences.num_sequences or 'mixed'} rows")
    print(f"ready in {time.monotonic() - start:.1f} s; pretrain.py with these flags trains on it")
    return 0


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # finished parts are kept, and there is nothing to tidy up
    sys.exit(main(sys.argv[1:]))
