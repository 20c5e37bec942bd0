"""Many files, several sources with weights, and the files under configs/data."""

import gzip
import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pyarrow
import pytest
import torch
import yaml
from datasets import Dataset, DatasetDict
from documents import in_file_order, write_jsonl

from llm_local.config import ConfigError
from llm_local.data.mixture import Source, training_sources, validation_sources
from llm_local.data.sequences import CYCLE, MixedSequences, shares
from llm_local.data.sets import data_problems, prepare, prepare_all
from llm_local.data.sources import load_training

PRESETS = Path(__file__).parent.parent / "configs" / "data"
# What the hub's data sets have beside the text, and the splits that the presets name
SCHEMAS = {
    "lm1b": ({}, ("train", "test")),
    "wikitext-103": ({}, ("train", "validation", "test")),
    "openwebtext": ({}, ("train",)),
    "c4": ({"timestamp": "2019-04-25T12:57:54Z", "url": "http://a"}, ("train", "validation")),
    "fineweb-edu": ({"id": "a", "dump": "b", "url": "c", "token_count": 7, "score": 3.5, "int_score": 4}, ("train",)),
    "slimpajama": ({"meta": {"redpajama_set_name": "RedPajamaC4"}}, ("train", "validation", "test")),
    "tinystories": ({}, ("train", "validation")),
}


def mix(folder, *entries):
    path = folder / "mix.yaml"
    path.write_text(yaml.safe_dump(list(entries)))
    return str(path)


def numbered(folder, name, count, word):
    """A file of documents that can be told apart by their word and number."""
    return write_jsonl(folder / name, [f"{word} {n} " + f"{word} " * 20 for n in range(count)])


# --- files


def packed(path, content):
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(content))
    elif path.suffix == ".zst":
        with pyarrow.output_stream(str(path), compression="zstd") as file:
            file.write(content)
    else:
        path.write_bytes(content)


def content_of(kind, texts):
    if kind == "csv":
        rows = "".join(f'{n},"{text}"\n' for n, text in enumerate(texts))
        return f"id,text\n{rows}".encode()
    return "".join(json.dumps({"id": n, "text": text}) + "\n" for n, text in enumerate(texts)).encode()


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz", ".jsonl.zst", ".csv", ".csv.gz", ".arrow", ".parquet"])
@pytest.mark.parametrize("streaming", [False, True])
def test_a_directory_of_files_gives_all_documents(settings, tmp_path, texts, suffix, streaming):
    folder = tmp_path / "data"
    (folder / "deeper").mkdir(parents=True)
    for place, part in ((folder / f"a{suffix}", texts[:20]), (folder / "deeper" / f"b{suffix}", texts[20:])):
        table = Dataset.from_dict({"text": part, "id": range(len(part))})
        if suffix == ".parquet":
            table.to_parquet(str(place))
        elif suffix == ".arrow":
            with pyarrow.OSFile(str(place), "wb") as file, pyarrow.ipc.new_file(file, table.data.schema) as writer:
                writer.write_table(table.data.table)
        else:
            packed(place, content_of(suffix.split(".")[1], part))
    (folder / ".hidden.txt").write_text("no")
    (folder / "README.md").write_text("no")
    (folder / f"empty{suffix}").write_text("")
    config = settings(train_file=str(folder), streaming=streaming)
    assert data_problems(config) == []
    assert sorted(in_file_order(config, 0) + in_file_order(config, 1)) == sorted(texts)


def test_a_glob_gives_the_files_that_it_matches_in_order(settings, tmp_path, texts):
    for name in ("a-1", "a-2", "b-1"):
        write_jsonl(tmp_path / f"{name}.jsonl", [f"{name} {n}" for n in range(3)])
    config = settings(train_file=str(tmp_path / "a-*.jsonl"), validation_file=str(tmp_path / "b-1.jsonl"))
    assert in_file_order(config, 0) == [f"a-{file} {n}" for file in (1, 2) for n in range(3)]


def test_of_several_txt_files_each_is_a_document(settings, tokenizer, tmp_path):
    for n in range(4):
        (tmp_path / f"{n}.txt").write_text(f"book {n}\n\nends\n")
    config = settings(train_file=str(tmp_path / "*.txt"), eval_batches=0, seq_length=4)
    assert sorted(in_file_order(config, 0) + in_file_order(config, 1)) == [f"book {n}\n\nends\n" for n in range(4)]
    train, _ = prepare(config, tokenizer)
    rows = train.batch(0, train.num_sequences)
    assert (rows == tokenizer.eos_token_id).sum() >= 2


def test_files_that_are_read_differently_are_named(settings, tmp_path):
    write_jsonl(tmp_path / "a.jsonl", ["a"])
    (tmp_path / "b.txt").write_text("b")
    (found,) = data_problems(settings(train_file=str(tmp_path)))
    assert found.endswith("holds a.jsonl and b.txt, which are read differently; give files of one kind")


def test_a_bad_line_in_one_of_many_files_is_named(settings, tmp_path):
    write_jsonl(tmp_path / "a.jsonl", ["a"])
    (tmp_path / "b.jsonl").write_text('{"text": "b"}\n{"text": 3}\n')
    (found,) = data_problems(settings(train_file=str(tmp_path)))
    assert f"train_file={tmp_path}: {tmp_path / 'b.jsonl'}, line 2: 'text' holds 3, not text" in found


def test_a_saved_folder_as_files_is_named(settings, tmp_path):
    Dataset.from_dict({"text": ["a"]}).save_to_disk(str(tmp_path / "saved"))
    (found,) = data_problems(settings(train_file=str(tmp_path / "saved")))
    assert found.endswith("saved is a folder from save_to_disk, which goes into dataset_name")


# --- splits and revisions


def test_the_split_to_train_on_can_be_named(settings, tmp_path, texts):
    splits = DatasetDict(first=Dataset.from_dict({"text": texts[:9]}), second=Dataset.from_dict({"text": texts[9:]}))
    splits.save_to_disk(str(tmp_path / "saved"))
    config = settings(dataset_name=str(tmp_path / "saved"), dataset_split="second")
    assert sorted(in_file_order(config, 0) + in_file_order(config, 1)) == sorted(texts[9:])
    (found,) = data_problems(settings(dataset_name=str(tmp_path / "saved"), dataset_split="third"))
    assert found.endswith("no split 'third', only 'first', 'second'; name one of them (dataset_split)")
    Dataset.from_dict({"text": texts}).save_to_disk(str(tmp_path / "one"))
    (found,) = data_problems(settings(dataset_name=str(tmp_path / "one"), dataset_split="second"))
    assert found.endswith("has no splits, and 'second' was asked for; leave the split out")


# --- mixtures


def owners(sequences, tokenizer, rows, words):
    """How many of the first rows are of each word."""
    decoded = [tokenizer.decode(row.tolist()) for row in sequences.batch(0, rows)]
    return Counter(next(word for word in words if word in text) for text in decoded)


@pytest.mark.parametrize("streaming", [False, True])
def test_sources_have_their_weights_share_of_the_tokens(settings, tokenizer, tmp_path, streaming):
    """The source of less text is repeated, so that its share lasts."""
    long, short = numbered(tmp_path, "long.jsonl", 200, "alpha"), numbered(tmp_path, "short.jsonl", 20, "omega")
    path = mix(tmp_path, {"source": long, "weight": 1, "streaming": streaming}, {"source": short, "weight": 3})
    config = settings(data_mixture=path)
    train, validation = prepare(config, tokenizer)
    found = owners(train, tokenizer, 1000, ("alpha", "omega"))
    assert found["omega"] == pytest.approx(750, abs=50)
    assert set(owners(validation, tokenizer, 50, ("alpha", "omega"))) == {"alpha", "omega"}
    again, _ = prepare(config, tokenizer)
    assert torch.equal(again.batch(7, 10), train.batch(7, 10)), "deterministic by seed"
    other, _ = prepare(settings(data_mixture=path, seed=7), tokenizer)
    assert not torch.equal(other.batch(0, 10), train.batch(0, 10))


def test_a_mixture_of_kinds_with_columns_of_their_own(settings, tokenizer, tmp_path, texts):
    Dataset.from_dict({"content": texts}).save_to_disk(str(tmp_path / "saved"))
    (tmp_path / "one.txt").write_text("a running text\n" * 300)
    path = mix(
        tmp_path,
        {"source": str(tmp_path / "saved"), "text_column": "content"},
        {"source": str(tmp_path / "one.txt")},
        {"source": write_jsonl(tmp_path / "a.jsonl", texts, column="body"), "text_column": "body"},
    )
    config = settings(data_mixture=path)
    assert [source.kind for source in training_sources(config)] == ["saved", "files", "files"]
    train, _ = prepare(config, tokenizer)
    assert train.batch(0, 30).shape == (30, 16)


class Numbers:
    """Sequences that say where they are from."""

    num_sequences = None

    def __init__(self, number):
        self.number = number

    def batch(self, index, rows, first=0):
        start = first + index * rows
        return torch.tensor([[self.number, place] for place in range(start, start + rows)])


def test_a_mixture_skips_nothing_and_repeats_nothing_however_it_is_sliced():
    def fresh():
        return MixedSequences([Numbers(n) for n in range(3)], [1, 2, 7], seed=5)

    whole = fresh().batch(0, 2 * CYCLE + 600)
    for number, share in enumerate([0.1, 0.2, 0.7]):
        places = whole[whole[:, 0] == number][:, 1].tolist()
        assert places == list(range(len(places)))
        assert (whole[:CYCLE, 0] == number).sum() == round(share * CYCLE)
    assert torch.equal(fresh().batch(0, 500, first=CYCLE - 123), whole[CYCLE - 123 : CYCLE + 377])
    assert torch.equal(fresh().batch(3, 1000), whole[3000:4000])


def test_shares_add_up_and_leave_nobody_out():
    assert shares([1, 1, 1]) == [3334, 3333, 3333]
    assert shares([1e-9, 1, 1e-9]) == [1, CYCLE - 2, 1]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("[", "is not YAML: "),
        ("[]", "holds an empty list, not a list of sources; write '- source: ...' for each"),
        ("source: a", "holds dict, not a list of sources"),
        ("- a", "source 1: 'a' is not 'key: value' lines; write 'source: ...'"),
        ("- weight: 1", "source 1: no source; name a data set, a file, a directory or a glob"),
        ("- {source: a, name: b}", "source 1: unknown key 'name'; use one of source, text_column, config, revision"),
        ("- {source: a, weight: 0}", "source 1: weight: 0 is not a number greater than 0"),
        ("- {source: a, weight: much}", "source 1: weight: 'much' is not a number greater than 0"),
        ("- {source: a, streaming: 1}", "source 1: streaming: 1 is not true or false"),
        ("- {source: a, config: 1.0}", "source 1: config: 1.0 is not text; put it in quotes"),
        ("- {source: ./not/there}", "source 1=./not/there does not exist; check the path"),
    ],
)
def test_what_is_wrong_with_a_mixture_file_is_named(settings, tmp_path, content, said):
    (tmp_path / "mix.yaml").write_text(content)
    (found,) = data_problems(settings(data_mixture=str(tmp_path / "mix.yaml")))
    assert found.startswith(f"data_mixture={tmp_path / 'mix.yaml'}")
    assert said in found


def test_a_mixture_file_that_is_not_there_is_named(settings, tokenizer):
    config = settings(data_mixture="mix.yaml")
    with pytest.raises(ConfigError, match=r"data_mixture=mix\.yaml cannot be read \(No such file.*; check the path"):
        prepare(config, tokenizer)


def test_a_mixture_file_may_lie_in_configs(settings):
    assert validation_sources(settings()) == {}
    assert training_sources(settings(data_mixture=str(PRESETS / "c4.yaml")))[0].kind == "hub"


# --- configs/data


def test_every_preset_is_tried():
    assert sorted(path.stem for path in PRESETS.glob("*.yaml")) == sorted(SCHEMAS)


@pytest.mark.parametrize("name", sorted(SCHEMAS))
def test_a_preset_reads_a_data_set_of_its_schema(settings, tokenizer, tmp_path, texts, name):
    others, splits = SCHEMAS[name]
    rows = {split: [{"text": f"{split} {text}\n", **others} for text in texts] for split in splits}
    DatasetDict({s: Dataset.from_list(part) for s, part in rows.items()}).save_to_disk(str(tmp_path / "copy"))
    (source,) = training_sources(settings(data_mixture=str(PRESETS / f"{name}.yaml")))
    assert source.kind == "hub"
    local = replace(source, source=str(tmp_path / "copy"))
    train, validation = load_training(settings(), local, divide=True)
    held = source.validation_split or "train"
    for documents, split in ((train, "train"), (validation, held)):
        lines = [line for row in documents.rows for line in (row["text"] if documents.running_text else [row["text"]])]
        assert lines
        assert all(line.startswith(f"{split} ") for line in lines)
    entry = {k: v for k, v in vars(local).items() if k != "field" and v is not None}
    data = prepare_all(settings(data_mixture=mix(tmp_path, entry)), tokenizer)
    assert data.train.batch(0, 4).shape == (4, 16)
    assert data.validation[0].bytes_per_token > 1


def test_a_source_knows_its_kind(tmp_path):
    kinds = {"builtin": "builtin", "a/b": "hub", "wikitext": "hub", "x/*.jsonl": "files", "a.jsonl.gz": "files"}
    assert {name: Source("data_mixture=m, source 1", name, "text").kind for name in kinds} == kinds
