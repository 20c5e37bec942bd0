"""From a run's data flags to the numbers of its images, shuffled, mixed and divided as text is."""

from __future__ import annotations

from collections.abc import Sequence

from llm_local.config import Config
from llm_local.data.images import ImageRows, check_images, read_images
from llm_local.data.mixture import training_sources
from llm_local.data.run_data import VALIDATION_SEED, Data, SourceData, ValidationSet, title_of
from llm_local.data.sequences import MixedSequences, Sequences, StoredSequences


def prepare_images(config: Config) -> Data:
    """The run's rows: numbers of images. Raises ConfigError for all that is wrong with its data."""
    images = read_images(config)
    check_images(images, config)
    sources, train_seed = training_sources(config), config.train.seed
    rows = (ImageRows(first, len(each)) for first, each in zip(images.firsts, images.sets, strict=True))
    parts = []
    for source, each in zip(sources, images.train, strict=True):
        order = StoredSequences(next(rows), train_seed, config.data.max_train_samples)
        title, extent = title_of(source), images.extent(each)
        parts.append(SourceData(each.rows.named, source.weight, order, title=title, extent=extent))
    weights, validation = [part.weight for part in parts], []
    for name, several in images.validation.items():
        held = [StoredSequences(next(rows), VALIDATION_SEED) for _ in several]
        validation.append(ValidationSet(name, _mixed(held, weights, VALIDATION_SEED), bytes_per_token=0.0))
    train = _mixed([part.sequences for part in parts], weights, train_seed)
    return Data(train, tuple(validation), tuple(parts), images=images)


def _mixed(rows: Sequence[Sequences], weights: list[float], seed: int) -> Sequences:
    return rows[0] if len(rows) == 1 else MixedSequences(rows, weights, seed)
