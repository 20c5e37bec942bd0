"""The order of the data is one for all layouts, and a resumed run goes on in it: nothing lost, nothing seen twice."""

import itertools
import json
import re
from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from conftest import Trainer, records, weights
from datasets import Dataset, IterableDataset, load_dataset
from launching import by_hand, until_step
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from llm_local.checkpoint.manifest import BrokenCheckpoint, read_data_state
from llm_local.data import streams, text_files
from llm_local.data.feed import BatchSize, Feed
from llm_local.data.sequences import MixedSequences, PackedTokens, StoredSequences
from llm_local.data.sets import prepare
from llm_local.data.streams import RowPacking, StreamedSequences, TokensOf
from llm_local.data.text_files import UnreadableText, pieces_of, read_texts
from llm_local.links.packet import EVAL, TRAIN
from llm_local.place import Place

LENGTH = 4
DOCUMENTS = 3000


def encode(texts):
    """A document is its number, as often as a sequence is long: so a sequence tells which document it is."""
    return [[int(text)] * LENGTH for text in texts if text]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Files of numbered documents, in many pieces."""
    monkeypatch.setattr(text_files, "PIECE_BYTES", 2000)
    monkeypatch.setattr(streams, "WINDOW", 700)
    numbers = iter(range(DOCUMENTS))
    for file in range(3):
        lines = [json.dumps({"text": f"{next(numbers)}"}) + "\n" for _ in range(DOCUMENTS // 3)]
        (tmp_path / f"{file}.jsonl").write_text("".join(lines))
        Dataset.from_list([json.loads(line) for line in lines]).to_parquet(str(tmp_path / f"{file}.parquet"))
    return tmp_path


def text_rows(folder):
    pieces = [piece for path in sorted(folder.glob("*.jsonl")) for piece in pieces_of(path, whole=False)]
    options = {"pieces": pieces, "kind": "json", "column": "text"}
    rows = IterableDataset.from_generator(read_texts, gen_kwargs=options)
    assert rows.num_shards > 20
    return rows


def parquet_rows(folder):
    files = [str(path) for path in sorted(folder.glob("*.parquet"))]
    return load_dataset("parquet", data_files={"train": files}, split="train", streaming=True)


SOURCES = {
    "text": text_rows,
    "text behind held-out documents": lambda folder: text_rows(folder).skip(100),
    "parquet": parquet_rows,
    "parquet behind held-out documents": lambda folder: parquet_rows(folder).skip(100),
    "saved": lambda folder: Dataset.from_dict({"text": [str(n) for n in range(DOCUMENTS)]}).to_iterable_dataset(),
}


def stream(folder, kind="text", seed=1):
    return StreamedSequences(SOURCES[kind](folder), TokensOf(encode), RowPacking(LENGTH), seed=seed, source="numbers")


def stored(seed=1, first=0):
    ids = np.arange(first, first + DOCUMENTS, dtype=np.int32).repeat(LENGTH)
    return StoredSequences(PackedTokens([ids], LENGTH), seed)


def feeds(make, replicas, start=(0, 0), state=None):
    found = [Feed(make(), [stored(0)], Place(r, (replicas,)), BatchSize(2, 3, 1), start=start) for r in range(replicas)]
    for feed in found:
        assert state is None or feed.restore(json.loads(json.dumps(state)))
    return found


def step_ids(found, step):
    """The documents that all replicas together read in a step, in the order of the global batch."""
    shares = [torch.cat([feed(TRAIN, step, index).input_ids for index in range(3)]) for feed in found]
    return torch.stack(shares, dim=1).flatten(0, 1)[:, 0].tolist()


@pytest.mark.parametrize("make", [stored, stream], ids=["map", "stream"])
def test_the_global_order_does_not_depend_on_the_number_of_replicas(folder, make):
    source = stored if make is stored else lambda: stream(folder)
    one, three = (feeds(source, replicas) for replicas in (1, 3))
    by_one = [i for step in range(1, 31) for i in step_ids(one, step)]
    by_three = [i for step in range(1, 11) for i in step_ids(three, step)]
    assert by_one == by_three
    other = feeds(lambda: stored(2) if make is stored else stream(folder, seed=2), 1)
    assert step_ids(other, 1) != by_one[:6], "but on the seed"


@pytest.mark.processes
@pytest.mark.parametrize("kind", sorted(SOURCES))
@pytest.mark.parametrize("stop", [1, 36, 130])
def test_kill_and_resume_with_other_replicas_loses_nothing_and_repeats_nothing(folder, kind, stop):
    """A stream of an epoch and more, by 2 replicas up to the kill, by 3 after it."""
    in_epoch = DOCUMENTS - (100 if "held-out" in kind else 0)
    before = feeds(lambda: stream(folder, kind), 2)
    seen = [i for step in range(1, stop + 1) for i in step_ids(before, step)]
    state = before[0].state(stop)
    assert state == before[1].state(stop)
    after = feeds(lambda: stream(folder, kind), 3, start=(stop, len(seen)), state=state)
    step = stop
    while len(seen) < 2 * in_epoch:
        step += 1
        seen += step_ids(after, step)
    first, second = Counter(seen[:in_epoch]), Counter(seen[in_epoch : 2 * in_epoch])
    assert first == second
    assert set(first.values()) == {1}
    assert len(first) == in_epoch
    assert seen[:in_epoch] != seen[in_epoch : 2 * in_epoch] != sorted(seen[:in_epoch])
    straight = feeds(lambda: stream(folder, kind), 1)
    assert [i for n in range(1, len(seen) // 6 + 1) for i in step_ids(straight, n)] == seen[: len(seen) // 6 * 6]


def test_a_resumed_stream_does_not_read_what_lies_before(folder):
    """But the documents that waited to be drawn from."""
    opened = []

    def counted(pieces, kind, column):
        opened.extend(pieces)
        yield from read_texts(pieces, kind, column)

    def make():
        pieces = [piece for path in sorted(folder.glob("*.jsonl")) for piece in pieces_of(path, whole=False)]
        rows = IterableDataset.from_generator(counted, gen_kwargs={"pieces": pieces, "kind": "json", "column": "text"})
        return StreamedSequences(rows, TokensOf(encode), RowPacking(LENGTH), seed=1, source="numbers")

    first = make()
    expected = first.batch(0, 2800)[2500:]
    everything = len(set(opened))
    begun = make()
    begun.batch(0, 2500)
    state = json.loads(json.dumps(begun.state()))
    opened.clear()
    resumed = make()
    assert resumed.restore(state)
    assert torch.equal(resumed.batch(0, 300, first=2500), expected)
    assert len(set(opened)) < everything / 3


def test_a_mixture_of_streams_and_maps_resumes(folder):
    def make():
        return MixedSequences([stream(folder), stored(), stream(folder, "parquet")], [1, 2, 1], seed=3)

    whole = make().batch(0, 4000)
    begun = make()
    assert torch.equal(begun.batch(0, 1234), whole[:1234])
    again = make()
    assert again.restore(json.loads(json.dumps(begun.state())))
    assert torch.equal(again.batch(0, 2766, first=1234), whole[1234:])
    assert not make().restore({"parts": []})


def test_a_running_text_resumes(settings, tokenizer, tmp_path):
    (tmp_path / "a.txt").write_text("".join(f"line {n}\n" for n in range(5000)))
    config = settings(train_file=str(tmp_path / "a.txt"), streaming=True)
    first, again = (prepare(config, tokenizer)[0] for _ in range(2))
    first.batch(0, 700)
    state = json.loads(json.dumps(first.state()))
    assert again.restore(state)
    assert torch.equal(again.batch(0, 2000, first=700), first.batch(0, 2000, first=700))


def test_a_state_of_another_stream_is_not_taken(folder):
    assert not stream(folder).restore({})
    assert not stream(folder, seed=2).restore(stream(folder).state())
    lost = stream(folder)
    assert not lost.restore(stream(folder, "parquet").state())
    assert torch.equal(lost.batch(3, 50), stream(folder).batch(3, 50)), "it reads up to the place instead"


def test_documents_are_shuffled_beyond_their_neighbours(folder):
    order = stream(folder).batch(0, DOCUMENTS)[:, 0].tolist()
    assert sorted(order) == list(range(DOCUMENTS))
    assert len({number // 1000 for number in order[:100]}) > 1, "pieces of several files"
    steps = [abs(a - b) for a, b in itertools.pairwise(order)]
    assert sum(step > 50 for step in steps) > len(steps) / 2


def test_an_evaluation_reads_the_set_that_was_chosen():
    sets = [stored(first=DOCUMENTS * n) for n in range(2)]
    feed = Feed(stored(), sets, Place(0, (1,)), BatchSize(2, 1, 2))
    for number in (1, 0, 1):
        feed.validate_on(number)
        assert (feed(EVAL, 7, 1).input_ids // DOCUMENTS == number).all()


def test_a_library_that_fails_while_a_stream_is_read_is_explained():
    def rows():
        yield {"text": "1"}
        raise RuntimeError("the line\nis down")

    failing = IterableDataset.from_generator(rows)
    sequences = StreamedSequences(failing, TokensOf(encode), RowPacking(LENGTH), seed=None, source="a/b")
    with pytest.raises(UnreadableText, match=r"a/b, 1 documents further on in epoch 0: cannot be read \(the line is"):
        sequences.batch(0, 1)
    without = IterableDataset.from_generator(lambda: iter([{"body": "1"}]))
    with pytest.raises(UnreadableText, match="a/b: no column 'text', only 'body'; set text_column_name"):
        StreamedSequences(without, TokensOf(encode), RowPacking(LENGTH), seed=None, source="a/b").batch(0, 1)


def test_a_damaged_state_is_named(tmp_path):
    assert read_data_state(tmp_path) == {}
    (tmp_path / "stage-00").mkdir()
    (tmp_path / "stage-00" / "data.json").write_text("{")
    with pytest.raises(BrokenCheckpoint, match=r"data\.json: .*; resume from an earlier checkpoint"):
        read_data_state(tmp_path)


# --- whole runs


def same_bits(one, other):
    mine, theirs = weights(one / "export"), weights(other / "export")
    assert all(torch.equal(mine[name], theirs[name]) for name in theirs)


@pytest.mark.processes
def test_a_streamed_mixture_goes_on_where_it_was_killed(trainer: Trainer):
    """Killed in the middle, resumed from the last checkpoint: the weights are those of a run that never stopped."""
    words = trainer.text.read_text().split()
    for name, part in (("a", words[:3000]), ("b", words[3000:])):
        lines = [json.dumps({"text": " ".join(part[n : n + 40])}) for n in range(0, len(part), 40)]
        (trainer.folder / f"{name}.jsonl").write_text("\n".join(lines))
    mixture = trainer.folder / "mix.yaml"
    entries = [{"source": str(trainer.folder / f"{n}.jsonl"), "weight": w} for n, w in (("a", 1), ("b", 2))]
    mixture.write_text(yaml.safe_dump(entries))
    common = {"num_stages": 2, "train_file": None, "data_mixture": mixture, "streaming": True, "save_steps": 2}
    straight = trainer.run("straight", 4, max_steps=40, **common)
    flags = trainer.flags("killed", max_steps=40, **common)
    killed = trainer.folder / "killed"
    with by_hand(4, flags, trainer.folder) as ranks:
        until_step(6, killed, 2, lambda: ranks[0].text)
    assert not (killed / "export").exists()
    trainer.run("killed", 4, max_steps=40, resume_from_checkpoint="true", **common)
    same_bits(killed, straight)
    assert [r["loss"] for r in records(killed, 1)] == [r["loss"] for r in records(straight, 1)]
    state = read_data_state(straight / "checkpoints" / "step-00000040")
    assert sum(part["position"] for part in state["parts"]) == 40 * 2 * 2


@pytest.mark.processes
def test_a_resumed_run_says_how_often_a_stream_spelled_special_tokens(trainer: Trainer, capfd):
    """In all that it read, before and behind the checkpoint."""
    words = ["</s>", "<s>", "<unk>", "now", *(f"word{n}" for n in range(20))]
    made = Tokenizer(models.WordLevel({word: n for n, word in enumerate(words)}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"eos_token": "</s>", "bos_token": "<s>", "unk_token": "<unk>"}
    PreTrainedTokenizerFast(tokenizer_object=made, **special).save_pretrained(trainer.folder / "words")
    lines = [json.dumps({"text": "now </s> " + " ".join(words[4:])}) + "\n" for _ in range(4000)]
    (trainer.folder / "a.jsonl").write_text("".join(lines))
    common = {"train_file": trainer.folder / "a.jsonl", "tokenizer_name": trainer.folder / "words", "streaming": True}
    common |= {"num_stages": 1, "save_steps": 40, "eval_batches": 0, "logging_steps": 20}
    found = re.compile(r"warning: train_file=\S+: text that spells .*, ([\d,]+) times in what was read of the stream")

    def times(name: str, steps: int, **more: Any) -> int:
        trainer.run(name, 1, max_steps=steps, **common, **more)
        (said,) = found.findall(capfd.readouterr().err)
        return int(said.replace(",", ""))

    first, straight = times("a", 40), times("straight", 80)
    assert 40 * 2 * 32 // 23 <= first < straight
    assert times("a", 80, resume_from_checkpoint="true") == straight


@pytest.mark.processes
def test_a_run_says_when_its_place_is_of_another_stream(trainer: Trainer):
    """It is read from its start then, which is no reason to refuse the run."""
    for name, word in (("a", "alpha"), ("b", "beta")):
        lines = [json.dumps({"text": f"{word} {n} " * 30}) for n in range(200)]
        (trainer.folder / f"{name}.jsonl").write_text("\n".join(lines))
    common = {"num_stages": 1, "streaming": True, "save_steps": 2, "eval_batches": 0}
    trainer.run("run", 1, max_steps=2, train_file=trainer.folder / "a.jsonl", **common)
    checkpoint = trainer.folder / "run" / "checkpoints" / "step-00000002"
    said = f"warning: {checkpoint} has no place in this stream; it is read from its start, past 4 sequences, which may"
    for name, steps in (("a", 3), ("b", 4)):
        flags = trainer.flags("run", max_steps=steps, train_file=trainer.folder / f"{name}.jsonl", **common)
        with by_hand(1, [*flags, "--resume_from_checkpoint", str(checkpoint)], trainer.folder) as (rank,):
            assert rank.wait(120) == 0, rank.text
            assert (said in rank.text) == (name == "b"), rank.text
