"""Documents packed into rows: nothing lost, padding marked, masked and ignored, and what it costs counted."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Trainer, block_losses, records
from datasets import IterableDataset
from documents import write_jsonl
from transformers import AutoModelForCausalLM

from llm_local.config import from_flat
from llm_local.data.feed import BatchSize, Feed
from llm_local.data.packing import count_cut, inputs_of, mark_of, marked, pack, rows_of
from llm_local.data.sets import prepare, prepare_all
from llm_local.data.streams import RowPacking, StreamedSequences, TokensOf
from llm_local.links.packet import CHECK, TRAIN
from llm_local.place import Place
from llm_local.problems import static_problems

PAD = mark_of(2)


def lengths(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).geometric(1 / 40, count) + 1


def padding_of(sizes: np.ndarray, room: int, packing: str) -> float:
    pieces = pack(sizes, room, packing)
    return 1 - pieces.sizes.sum() / (len(pieces.ends) * room)


@pytest.mark.parametrize("packing", ["best_fit", "none"])
@pytest.mark.parametrize("room", [2, 7, 64, 1000])
def test_every_token_is_in_one_row_and_no_row_is_too_full(packing: str, room: int):
    sizes = lengths(500)
    pieces = pack(sizes, room, packing)
    seen = np.concatenate([np.arange(s, s + n) for s, n in zip(pieces.starts, pieces.sizes, strict=True)])
    left_out = set(range(int(sizes.sum()))) - set(seen.tolist())
    assert len(seen) == len(set(seen.tolist()))
    # without packing a rest of one token would be a row without a prediction
    alone = set((np.cumsum(sizes) - 1)[sizes % room == 1].tolist())
    assert left_out == (set() if packing == "best_fit" else alone)
    rows = [pieces.of_row(row) for row in range(len(pieces.ends))]
    assert all(0 < sum(size for _, size in row) <= room for row in rows)
    assert packing == "best_fit" or all(len(row) == 1 for row in rows)


def test_a_document_is_cut_only_where_it_is_longer_than_a_row():
    pieces = pack(np.array([3, 10, 5, 4, 1]), 5, "best_fit")
    rows = [pieces.of_row(row) for row in range(len(pieces.ends))]
    assert sorted(rows) == [[(0, 3)], [(3, 5)], [(8, 5)], [(13, 5)], [(18, 4), (22, 1)]]


def test_best_fit_pads_little_and_cuts_few():
    sizes = lengths(20_000)
    assert padding_of(sizes, 256, "best_fit") < 0.001
    assert padding_of(sizes, 256, "none") > 0.8
    assert count_cut(sizes, 256, "best_fit") == (sizes > 256).sum() < 0.01 * len(sizes)
    assert count_cut(sizes, 256, "concat") > 0.1 * len(sizes)


def test_concat_cuts_what_lies_across_a_border_wherever_the_counting_starts():
    sizes = np.array([4, 4, 3, 5])  # 0-3 | 4-7 | 8-10 | 11-15 in rows of 4
    assert count_cut(sizes, 4, "concat") == 1
    assert count_cut(sizes[3:], 4, "concat", before=11) == 1
    assert count_cut(sizes[:2], 4, "concat", before=1) == 2


def test_padding_is_marked_masked_and_ignored():
    (full, short) = rows_of([[5, 6, 7, 8, 2], [9, 2]], 5, "none", PAD)
    rows = torch.from_numpy(np.stack([full, short]))
    told = inputs_of(rows)
    assert told["input_ids"].tolist() == [[5, 6, 7, 8, 2], [9, 2, 2, 2, 2]], "a model reads EOS there"
    assert told["attention_mask"].tolist() == [[1] * 5, [1, 1, 0, 0, 0]]
    assert told["labels"].tolist() == [[5, 6, 7, 8, 2], [9, 2, -100, -100, -100]]
    assert torch.equal(marked(told["input_ids"], told["attention_mask"]), rows)
    assert list(inputs_of(rows[:1])) == ["input_ids"], "nothing else travels where nothing is padded"


# --- from text


def documents_in(rows: torch.Tensor, tokenizer: Any) -> list[str]:
    """The documents of the rows' pieces, cut ones left out."""
    texts = [tokenizer.decode(row[row >= 0].tolist()) for row in rows]
    return [text for row in texts for text in row.split(tokenizer.eos_token)[:-1]]


@pytest.mark.parametrize("streaming", [False, True], ids=["stored", "stream"])
@pytest.mark.parametrize("packing", ["best_fit", "none"])
def test_documents_are_whole_and_all_there(settings, tokenizer, tmp_path, texts, packing: str, streaming: bool):
    path, held = write_jsonl(tmp_path / "a.jsonl", texts), write_jsonl(tmp_path / "held.jsonl", texts[:9])
    flags = {"train_file": path, "validation_file": held, "packing": packing, "streaming": streaming}
    train, validation = prepare(settings(seq_length=60, **flags), tokenizer)
    count = train.num_sequences or len(texts)
    rows = train.batch(0, count)
    found = documents_in(rows, tokenizer)
    assert set(found) == set(texts)
    assert packing == "best_fit" or len(found) == count == len(texts), "a row each"
    assert sorted(documents_in(validation.batch(0, validation.num_sequences or 0), tokenizer)) == sorted(texts[:9])
    row = rows[int((rows < 0).sum(1).argmax())]
    assert (row[row < 0] == mark_of(tokenizer.eos_token_id)).all()
    assert row[row >= 0][-1] == tokenizer.eos_token_id, "padding follows an EOS"


def test_one_running_text_is_cut_whatever_the_packing(settings, tokenizer, tmp_path):
    (tmp_path / "a.txt").write_text("".join(f"line {n}\n" for n in range(900)))
    batches = [
        prepare(settings(train_file=str(tmp_path / "a.txt"), packing=packing), tokenizer)[0].batch(0, 20)
        for packing in ("concat", "best_fit", "none")
    ]
    assert all(torch.equal(batch, batches[0]) for batch in batches)


def test_what_packing_costs_is_counted_the_same_at_each_start(settings, tokenizer, jsonl):
    for packing in ("concat", "best_fit", "none"):
        config = settings(train_file=jsonl, packing=packing, seq_length=40)
        first, again = (prepare_all(config, tokenizer).sources[0] for _ in range(2))
        assert first.describe() == again.describe()
        assert first.packed is not None
        rows = torch.cat([first.sequences.batch(n, 1) for n in range(first.packed.rows)])
        assert first.packed.padding == pytest.approx(float((rows < 0).float().mean()))
        whole = len(documents_in(rows, tokenizer))
        assert packing == "concat" or whole == first.packed.documents
        assert f"({packing}): {first.packed.padding:.1%} padding" in first.describe()


def test_a_packed_stream_resumes(tmp_path):
    def make(packing: str = "best_fit"):
        numbers = IterableDataset.from_generator(lambda: iter({"text": str(n)} for n in range(5000)))
        tokens = TokensOf(lambda texts: [[int(t)] * (int(t) % 7 + 1) for t in texts])
        return StreamedSequences(numbers, tokens, RowPacking(8, packing), 1, "numbers")

    whole = make().batch(0, 3000)
    begun = make()
    begun.batch(0, 777)
    state = json.loads(json.dumps(begun.state()))
    again = make()
    assert again.restore(state)
    assert torch.equal(again.batch(0, 2223, first=777), whole[777:])
    assert not make("none").restore(state), "rows of another packing are other rows"


# --- in a run


def test_the_feed_gives_masks_and_labels_and_checks_exports_without():
    both = torch.tensor([[5, 6, 2, PAD], [7, 8, 9, 2]])

    class Rows:
        num_sequences = None

        def batch(self, index: int, rows: int, first: int = 0) -> torch.Tensor:
            return both[:rows]

        def state(self) -> dict[str, Any]:
            return {}

        def restore(self, state: dict[str, Any]) -> bool:
            return True

    feed = Feed(Rows(), [], Place(0, (1,)), BatchSize(1, 2, 1))
    first, second = (feed(TRAIN, 1, index) for index in range(2))
    assert first.labels is not None
    assert first.labels.tolist() == [[5, 6, 2, -100]]
    assert second.attention_mask is None
    check = feed(CHECK, 0, 0)
    assert check.attention_mask is None
    assert check.input_ids is not None
    assert check.input_ids.tolist() == [[5, 6, 2, 2]]


def test_an_unknown_packing_is_named():
    config = from_flat({"config_name": "x", "packing": "tight"})
    said = "packing='tight' is unknown; choose one of concat, best_fit, none"
    assert said in static_problems(config, 1, fp16_supported=True, bf16_supported=True)


def lines(trainer: Trainer) -> Path:
    found = [line for line in trainer.text.read_text().splitlines() if line.strip()]
    return Path(write_jsonl(trainer.folder / "lines.jsonl", found))


def theirs(run: Path, batch: dict[str, torch.Tensor]) -> float:
    model: Any = AutoModelForCausalLM.from_pretrained(run / "export")
    with torch.no_grad():
        return float(model(**batch).loss)


@pytest.mark.processes
@pytest.mark.parametrize("packing", ["best_fit", "none"])
@pytest.mark.parametrize("document_mask", [False, True], ids=["plain", "masked"])
def test_padded_rows_train_alike_on_any_number_of_stages(trainer: Trainer, packing: str, document_mask: bool):
    settings = {"train_file": lines(trainer), "packing": packing, "document_mask": document_mask, "eval_steps": 2}
    heads = {"head": "decoder", "head_layers_schedule": "1,1,1,0", "head_token_fraction": 0.5}
    local = {"layers_per_block": 1, "final_backprop_steps": 1, **settings, **heads}
    one, two = (trainer.run(f"on-{n}", n, num_stages=n, **local) for n in (1, 2))
    for split in ("train", "eval"):
        ours = torch.tensor(block_losses(two, 2, split))
        torch.testing.assert_close(ours, torch.tensor(block_losses(one, 1, split)), rtol=1e-5, atol=0.0)
    pipeline = trainer.run("pipeline", 2, num_stages=2, method="backprop", **settings)
    undivided = trainer.run("undivided", 1, **settings)
    for split in ("train", "eval"):
        ours = torch.tensor([[r["loss"]] for r in records(pipeline, 1, split)])
        torch.testing.assert_close(ours, torch.tensor(block_losses(undivided, 1, split)), rtol=1e-5, atol=0.0)


@pytest.mark.processes
def test_the_loss_of_padded_rows_is_what_transformers_says(trainer: Trainer):
    settings = {"train_file": lines(trainer), "packing": "none", "eval_batches": 1, "max_steps": 2}
    run = trainer.run("run", 1, **settings)
    from llm_local.config import parse
    from llm_local.data.tokenizer import load_tokenizer

    config = parse(trainer.flags("run", **settings))
    _, validation = prepare(config, load_tokenizer(config))
    batch = inputs_of(validation.batch(0, 2))
    assert "labels" in batch
    (found,) = [r["loss"] for r in records(run, 0, "eval")]
    assert found == pytest.approx(theirs(run, batch), rel=1e-5)


def test_all_pairs_of_pieces_are_ordered_by_row():
    pieces = pack(lengths(300), 100, "best_fit")
    assert all(a < b for a, b in itertools.pairwise(pieces.ends.tolist()))
    assert pieces.ends[-1] == len(pieces.starts) == len(pieces.sizes)
