"""Shows what a model will see: packed rows as text with their borders, lengths, tokens of each source, throughput.

llm-local inspect-data [CONFIG.yaml] [--rows 3] [--output lengths.png] --train_file a.jsonl --packing best_fit

Takes the flags of pretrain; those of data, tokenizer, packing and --cache_dir matter.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path

os.environ["DS_ACCELERATOR"] = "cpu"  # nothing here runs on a GPU

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase
from transformers.utils import logging

from llm_local.config import Config, ConfigError, Parser, parse, refused
from llm_local.data.sets import Data, SourceData, prepare_all
from llm_local.data.text_files import UnreadableText
from llm_local.data.tokenizer import load_tokenizer
from llm_local.problems import text_flag_problems
from llm_local.program import program
from llm_local.screen import pyplot_without_screen

NAME = program(__file__)

END, CUT = "⟨end of document⟩", "⟨cut⟩"
FORMATS = (".png", ".svg", ".pdf")
TIMED_BATCHES = 50


def describe_row(row: torch.Tensor, tokenizer: PreTrainedTokenizerBase, characters: int) -> Iterator[str]:
    """Lines that show a row (T,): each document's piece with what ends it, then the padding."""
    padding = int((row < 0).sum())
    ids = row[row >= 0].tolist()
    while ids:
        stop = ids.index(tokenizer.eos_token_id) + 1 if tokenizer.eos_token_id in ids else len(ids)
        piece, ids = ids[:stop], ids[stop:]
        ended = piece[-1] == tokenizer.eos_token_id
        text = str(tokenizer.decode(piece[:-1] if ended else piece))
        yield f"{shortened(text, characters)}{END if ended else CUT}"
    if padding:
        yield f"⟨{padding} of padding⟩"


def shortened(text: str, characters: int) -> str:
    """The text, without its middle if it is longer than so many characters."""
    half = characters // 2
    return text if len(text) <= characters else f"{text[:half]} ⟨...{len(text) - 2 * half:,}...⟩ {text[-half:]}"


def tokens_by_source(data: Data) -> Iterator[str]:
    total = sum(source.weight for source in data.sources)
    for source in data.sources:
        held = f"{source.tokens.tokens:,} tokens" if source.tokens else "tokens unknown"
        yield f"{source.describe()}; {held}, {source.weight / total:.1%} of what is read"


def document_lengths(source: SourceData) -> np.ndarray:
    """Tokens of each document, EOS included; none of a stream."""
    found = list(source.tokens.lengths()) if source.tokens else []
    return np.concatenate(found) if found else np.empty(0, dtype=np.int64)


def quantiles(lengths: np.ndarray) -> str:
    names = {"shortest": 0, "10 %": 0.1, "half": 0.5, "90 %": 0.9, "longest": 1}
    return ", ".join(f"{name} {np.quantile(lengths, share):,.0f}" for name, share in names.items())


def draw(data: Data, seq_length: int, output: Path) -> None:
    """Histogram of the documents' lengths in tokens, a colour a source, with the length of a row."""
    pyplot = pyplot_without_screen()

    figure, panel = pyplot.subplots(figsize=(8, 4.5))
    known = {source.name: lengths for source in data.sources if len(lengths := document_lengths(source))}
    longest = max([seq_length, *(int(lengths.max()) for lengths in known.values())])
    edges = np.geomspace(1, longest + 1, 60)
    for name, lengths in known.items():
        panel.hist(lengths, bins=edges.tolist(), alpha=0.6, label=name)
    panel.axvline(seq_length, color="black", linewidth=1, linestyle="--", label=f"seq_length {seq_length}")
    panel.set_xscale("log")
    panel.set_xlabel("tokens of a document")
    panel.set_ylabel("documents")
    panel.legend(frameon=False)
    figure.tight_layout()
    figure.savefig(output, dpi=120)
    pyplot.close(figure)


def throughput(data: Data, rows: int, batches: int = TIMED_BATCHES) -> float:
    """Places of rows (tokens and padding) that are read a second, in batches of so many rows."""
    start = time.perf_counter()
    read = sum(data.train.batch(number, rows).numel() for number in range(batches))
    return read / (time.perf_counter() - start)


def show(config: Config, given: argparse.Namespace) -> None:
    """Raises ConfigError, or UnreadableText for a stream that breaks off."""
    problems = text_flag_problems(config)
    if given.output.suffix not in FORMATS:
        problems.append(f"output={given.output}: end the name in one of {', '.join(FORMATS)}")
    problems += [
        f"{name}={n} must be greater than 0" for name in ("rows", "characters") if (n := vars(given)[name]) < 1
    ]
    if problems:
        raise ConfigError(problems)
    tokenizer = load_tokenizer(config)
    data = prepare_all(config, tokenizer, progress=sys.stderr.isatty())
    for line in data.warnings:
        print(f"{NAME}: warning: {line}", file=sys.stderr)
    for number, row in enumerate(data.train.batch(0, given.rows)):
        print(f"--- row {number}")
        print("\n".join(describe_row(row, tokenizer, given.characters)))
    print("---")
    for source, line in zip(data.sources, tokens_by_source(data), strict=True):
        lengths = document_lengths(source)
        print(line)
        if len(lengths):
            print(f"  tokens of a document: {quantiles(lengths)}")
    rate = throughput(data, config.train.per_device_train_batch_size)
    print(f"reading: {rate:,.0f} tokens/s in micro-batches of {config.train.per_device_train_batch_size} rows")
    draw(data, config.data.seq_length, given.output)
    print(f"lengths: {given.output}")


def main(arguments: list[str]) -> int:
    parser = Parser(
        prog=NAME, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--rows", type=int, default=3, help="rows that are shown (default 3)")
    parser.add_argument("--characters", type=int, default=400, help="of a document that are shown (default 400)")
    parser.add_argument("--output", type=Path, default=Path("lengths.png"), help="picture (default lengths.png)")
    logging.set_verbosity_error()
    try:
        given, rest = parser.parse_known_args(arguments)
        show(parse(rest), given)
    except (ConfigError, UnreadableText, OSError) as error:
        return refused(NAME, error)
    return 0
