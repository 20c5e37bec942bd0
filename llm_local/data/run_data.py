"""What a run trains and evaluates on, once it is found and read."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

from transformers import BaseImageProcessor, PreTrainedTokenizerBase

from llm_local.config import Config, some_of
from llm_local.data.encoding import never_text
from llm_local.data.images import Images
from llm_local.data.mixture import BUILTIN, DIGITS, Source, local_path
from llm_local.data.packing import Packed, PackedSource
from llm_local.data.prepared import Prepared
from llm_local.data.sequences import Sequences
from llm_local.data.streams import StreamedSequences
from llm_local.tasks.task import Ask

ProcessingClass: TypeAlias = "PreTrainedTokenizerBase | BaseImageProcessor"  # transformers' word
VALIDATION_SEED = 0  # mixed, so that a short evaluation sees many documents; the same in every run
OTHER_TEXT = "change the text, or use another tokenizer"


@dataclass(frozen=True)
class ValidationSet:
    """Sequences to evaluate on. bytes_per_token: UTF-8 bytes of its text by those of its tokens that are predicted, EOS
    included: see _predicted; 0: there is no text, or only some are."""

    name: str
    sequences: Sequences
    bytes_per_token: float
    tokens: Prepared | None = None  # of one source


@dataclass(frozen=True)
class SourceData:
    """What a source gives to train on; tokens and how they are packed are not known of a stream. title: what it is
    called away from this machine; extent: see PackedSource."""

    name: str
    weight: float
    sequences: Sequences
    tokens: Prepared | None = None
    packed: Packed | None = None
    title: str = ""
    extent: str = ""

    def describe(self) -> str:
        """In a line for a person."""
        is_stream = isinstance(self.sequences, StreamedSequences)
        how = self.packed.describe() if self.packed else "a stream, packed as it is read" if is_stream else self.extent
        return f"{self.name}: {how}"

    def facts(self) -> PackedSource:
        """What can be kept of it."""
        return PackedSource(self.title or self.name, self.weight, self.packed, self.extent)


@dataclass(frozen=True)
class Data:
    """What a run trains and evaluates on. The first validation set is the one that a single number speaks of. images:
    those of which the rows are numbers."""

    train: Sequences
    validation: tuple[ValidationSet, ...]
    sources: tuple[SourceData, ...] = ()
    warnings: tuple[str, ...] = ()
    images: Images | None = None

    def asker(self, config: Config, processing_class: ProcessingClass) -> Ask | None:
        """Makes of rows what a model is asked; None: they are as they stand."""
        if self.images is not None:
            assert isinstance(processing_class, BaseImageProcessor)
            return self.images.asker(processing_class, config.data)
        assert isinstance(processing_class, PreTrainedTokenizerBase)
        return config.task.asker(processing_class, config.data)

    def counts(self) -> dict[str, tuple[int, int]]:
        """Documents and tokens of each that is on disk, by name; of images their number and that of classes."""
        if self.images is not None:
            return self.images.counts()
        named = {each.name: each.tokens for each in self.sources}
        named |= {f"{each.name} (validation)": each.tokens for each in self.validation}
        return {name: (tokens.documents, tokens.tokens) for name, tokens in named.items() if tokens is not None}

    def spelled_in_streams(self, processing_class: ProcessingClass) -> tuple[str, ...]:
        """Lines on the special tokens that were made of text in what was read of streams so far."""
        if not isinstance(processing_class, PreTrainedTokenizerBase):
            return ()
        read = [(each.name, each.sequences) for each in self.sources if isinstance(each.sequences, StreamedSequences)]
        found = {name: sequences.spelled for name, sequences in read if sequences.spelled}
        return tuple(
            f"{name}: {taken(processing_class)}, {count:,} times in what was read of the stream; {OTHER_TEXT}"
            for name, count in found.items()
        )


def taken(tokenizer: PreTrainedTokenizerBase) -> str:
    """That text makes special tokens."""
    return f"text that spells {some_of(never_text(tokenizer))} is taken for the token by this tokenizer"


def title_of(source: Source) -> str:
    """What a source is called away from this machine."""
    if source.kind == "object":
        return source.field
    is_public = source.kind in (BUILTIN, DIGITS) or (source.kind == "hub" and local_path(source.source) is None)
    return source.source if is_public else Path(source.source).name
