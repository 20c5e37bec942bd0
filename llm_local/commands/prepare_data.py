"""Tokenises a run's data once, before the run: pretrain with the same flags then only maps it.

llm-local prepare-data [CONFIG.yaml] [--output FOLDER] --train_file text.jsonl --preprocessing_num_workers 8

Takes the flags of pretrain; those of data, tokenizer, packing and --cache_dir matter. What is interrupted goes on
where it was when it is started again.

--output FOLDER puts the tokens there, too: pretrain --dataset_name FOLDER --tokenizer_name FOLDER/tokenizer trains
on them wherever the folder is copied, without the text, in any --seq_length and --packing.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

os.environ["DS_ACCELERATOR"] = "cpu"  # nothing here runs on a GPU

from transformers.utils import logging

from llm_local.config import Config, ConfigError, Parser, parse, refused
from llm_local.data.mixture import TOKENS, training_sources
from llm_local.data.sets import Data, prepare_all
from llm_local.data.token_folder import TOKENIZER, TRAIN, VALIDATION, output_problems, write_token_folder
from llm_local.data.tokenizer import load_tokenizer
from llm_local.files import Unwritten, ends_with_a_line, writing
from llm_local.problems import text_flag_problems
from llm_local.program import program

NAME = program(__file__)


def prepare(config: Config, output: Path | None = None) -> Data:
    """Raises ConfigError with all that is wrong with the flags, or the first thing that is with the data, and Unwritten
    where there is no room for it."""
    problems = text_flag_problems(config)
    if not problems:
        problems = [
            f"{source.named} is a stream (streaming=True), which is tokenised as it is read; leave streaming out"
            for source in training_sources(config)
            if source.streaming
        ]
        problems += _output_problems(config, output) if output is not None else []
    if problems:
        raise ConfigError(problems)
    tokenizer = load_tokenizer(config)
    if output is not None and getattr(tokenizer, "backend_tokenizer", None) is None:
        kind = type(tokenizer).__name__
        raise ConfigError(
            [f"output={output} needs a tokenizer with a tokenizer.json, which {kind} has not; leave it out"]
        )
    data = prepare_all(config, tokenizer, progress=True)
    if output is not None:
        source, validation = data.sources[0].tokens, data.validation[0].tokens
        assert source is not None
        assert validation is not None
        about = training_sources(config)[0]
        sets, percentage = (
            {TRAIN: source.folder, VALIDATION: validation.folder},
            config.data.validation_split_percentage,
        )
        with writing(output):
            write_token_folder(output, sets, tokenizer, about.named, about.text_column, percentage)
    return data


def _output_problems(config: Config, output: Path) -> list[str]:
    sources = training_sources(config)
    problems = output_problems(output)
    if len(sources) > 1:
        problems.append(f"output={output} takes one source; write a folder for each, and name them in data_mixture")
    elif sources[0].kind == TOKENS:
        problems.append(f"{sources[0].named} is such a folder already; copy it")
    if config.data.validation_files:
        problems.append(
            f"output={output} has one set to validate on; give validation_files to {program('pretrain.py')}"
        )
    return problems


def parse_arguments(arguments: list[str]) -> tuple[Config, Path | None]:
    """The run's flags, and --output. Raises ConfigError."""
    parser = Parser(prog=NAME, add_help=False, allow_abbrev=False)
    parser.add_argument("--output", type=Path)
    given, rest = parser.parse_known_args(arguments)
    return parse(rest), given.output


@ends_with_a_line(Unwritten)
def main(arguments: list[str]) -> int:
    if "--help" in arguments:
        print(__doc__)
        return 0
    logging.set_verbosity_error()
    start = time.monotonic()
    try:
        config, output = parse_arguments(arguments)
        with writing(config.cache_dir, reads=True):
            data = prepare(config, output)
    except (ConfigError, OSError) as error:
        return refused(NAME, error)
    for line in data.warnings:
        print(f"{NAME}: warning: {line}", file=sys.stderr)
    for source in data.sources:
        assert source.tokens is not None
        print(f"{source.describe()}\n  {source.tokens.tokens:,} tokens in {source.tokens.folder}")
    for each in data.validation:
        print(f"{each.name}: {each.sequences.num_sequences or 'mixed'} rows")
    flags = f"--dataset_name {output} --tokenizer_name {output / TOKENIZER}" if output else "these flags"
    print(f"ready in {time.monotonic() - start:.1f} s; {program('pretrain.py')} with {flags} trains on it")
    return 0
