"""Packed tokens and their order: a batch is a slice of one endless list."""

import numpy as np
import pytest
import torch
from datasets import IterableDataset

from llm_local.data.sequences import PackedTokens, StoredSequences
from llm_local.data.streams import RowPacking, StreamedSequences, TokensOf


def test_a_row_lies_across_pieces():
    pieces = [np.array(part, dtype=np.int32) for part in ([0, 1], [], [2], [3, 4, 5, 6, 7, 8, 9], [10])]
    tokens = PackedTokens(pieces, seq_length=3)
    assert (tokens.num_tokens, tokens.num_rows) == (11, 3)
    assert [tokens.row(n).tolist() for n in range(3)] == [[0, 1, 2], [3, 4, 5], [6, 7, 8]]


def stored(num_rows, seed):
    return StoredSequences(PackedTokens([np.arange(num_rows * 2, dtype=np.int32)], seq_length=2), seed)


def first_tokens(sequences, rows, count):
    """Which rows the first `count` positions hold, read in batches of `rows`."""
    batches = [sequences.batch(index, rows) for index in range(-(-count // rows))]
    return torch.cat(batches)[:count, 0].floor_divide(2).tolist()


def test_each_epoch_is_another_permutation_of_all_rows():
    order = first_tokens(stored(50, seed=3), 1, 150)
    epochs = [order[:50], order[50:100], order[100:]]
    assert all(sorted(epoch) == list(range(50)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]


@pytest.mark.parametrize("rows", [2, 7, 64])
def test_the_order_is_the_same_however_it_is_sliced(rows):
    assert first_tokens(stored(50, seed=3), rows, 128) == first_tokens(stored(50, seed=3), 1, 128)


def test_a_batch_does_not_depend_on_what_was_read_before():
    sequences = stored(50, seed=3)
    later = sequences.batch(9, 8)
    sequences.batch(0, 8)
    assert torch.equal(sequences.batch(9, 8), later)
    assert torch.equal(stored(50, seed=3).batch(9, 8), later)


def test_another_seed_is_another_order():
    assert first_tokens(stored(50, seed=3), 1, 50) != first_tokens(stored(50, seed=4), 1, 50)


def test_an_empty_stream_is_an_error_too():
    rows = IterableDataset.from_generator(lambda: iter(()))
    sequences = StreamedSequences(rows, TokensOf(lambda texts: texts), RowPacking(4), seed=None, source="nothing")
    with pytest.raises(ValueError, match="nothing: the whole stream"):
        sequences.batch(0, 1)
