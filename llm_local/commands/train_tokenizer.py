"""Trains a tokenizer on the data that a run's flags name: a directory for --tokenizer_name and AutoTokenizer.

llm-local train-tokenizer [CONFIG.yaml] --kind bpe --vocab_size 32000 --output my_tokenizer --train_file a.txt

unigram and bpe are sentencepiece's, with byte fallback; byte_bpe is a BPE of bytes, as GPT-2's. All return every text
exactly.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path

os.environ["DS_ACCELERATOR"] = "cpu"  # nothing here runs on a GPU

from datasets import disable_progress_bars
from tqdm import tqdm
from transformers.utils import logging

from llm_local.config import ConfigError, Parser, parse, refused
from llm_local.data.sets import data_problems
from llm_local.data.tokenizer_training import KINDS, sample_texts, train_tokenizer
from llm_local.files import Unwritten, ends_with_a_line, writing
from llm_local.problems import text_flag_problems
from llm_local.program import program

NAME = program(__file__)

CHARACTERS = 20_000_000


def make_parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog=NAME,
        description=__doc__,
        epilog="All other flags are those of pretrain that name data; with --task masked-lm a mask token is added.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--output", type=Path, required=True, help="directory to write")
    parser.add_argument("--kind", default="bpe", help=f"{', '.join(KINDS)} (default bpe)")
    parser.add_argument("--vocab_size", type=int, default=32_000, help="pieces (default 32000)")
    parser.add_argument("--characters", type=int, default=CHARACTERS, help=f"of text to learn from ({CHARACTERS:,})")
    return parser


def _counted(texts: Iterator[str], characters: int) -> Iterator[str]:
    """The texts, with a bar on a terminal, and a line when they have been read."""
    read = 0
    with tqdm(total=characters, desc="reading", unit=" characters", unit_scale=True, disable=None) as bar:
        for text in texts:
            yield text
            bar.update(len(text))
            read += len(text)
    print(f"learning from {read:,} characters", flush=True)


@ends_with_a_line(Unwritten)
def main(arguments: list[str]) -> int:
    logging.set_verbosity_error()
    disable_progress_bars()
    try:
        given, rest = make_parser().parse_known_args(arguments)
        config = parse(rest)
        problems = text_flag_problems(config) or data_problems(config)
        if given.characters < 1:
            problems.append(f"characters={given.characters} must be greater than 0")
        if problems:
            raise ConfigError(problems)
        start = time.monotonic()
        with writing(config.cache_dir, reads=True):
            texts = _counted(sample_texts(config, given.characters), given.characters)
            shown, special = sys.stderr.isatty(), config.task.new_tokens
            train_tokenizer(texts, given.kind, given.vocab_size, given.output, shown, special)
    except (ConfigError, OSError) as error:
        return refused(NAME, error)
    seconds = time.monotonic() - start
    print(f"{given.output}: {given.kind} of {given.vocab_size:,} pieces, trained in {seconds:.0f} s")
    return 0
