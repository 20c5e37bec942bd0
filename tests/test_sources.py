"""Every source gives its documents, and training and validation share none."""

from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
import torch
from datasets import Dataset, DatasetDict, IterableDataset, IterableDatasetDict
from documents import in_file_order, write_jsonl
from transformers import AutoTokenizer

from llm_local.config import ConfigError
from llm_local.data import corpus
from llm_local.data.mixture import Source, training_sources
from llm_local.data.sets import data_problems, prepare
from llm_local.data.sources import from_splits, read_hub
from llm_local.data.tokenizer import builtin_tokenizer_dir

PRESETS = Path(__file__).parent.parent / "configs" / "data"


@pytest.mark.parametrize("streaming", [False, True])
def test_held_out_documents_and_training_are_disjoint_and_complete(settings, jsonl, texts, streaming):
    config = settings(train_file=jsonl, validation_split_percentage=10, streaming=streaming)
    train, validation = (in_file_order(config, which) for which in (0, 1))
    assert len(validation) == 6
    assert sorted(train + validation) == sorted(texts)
    assert validation == sorted(validation, key=texts.index)


def test_the_run_s_seed_does_not_change_what_is_held_out(settings, jsonl):
    one, other = (in_file_order(settings(train_file=jsonl, seed=seed), 1) for seed in (1, 2))
    assert one == other


def test_validation_file_leaves_training_whole(settings, jsonl, texts, tmp_path):
    config = settings(train_file=jsonl, validation_file=write_jsonl(tmp_path / "held.jsonl", ["held out"]))
    assert in_file_order(config, 0) == texts
    assert in_file_order(config, 1) == ["held out"]


@pytest.mark.parametrize("streaming", [False, True])
def test_the_validation_split_of_a_saved_folder_is_used(settings, tmp_path, texts, streaming):
    splits = {"train": texts[:50], "validation": texts[50:55], "test": texts[55:]}
    saved = DatasetDict({name: Dataset.from_dict({"text": part, "n": part}) for name, part in splits.items()})
    saved.save_to_disk(str(tmp_path / "saved"))
    config = settings(dataset_name=str(tmp_path / "saved"), streaming=streaming)
    assert in_file_order(config, 0) == texts[:50]
    assert in_file_order(config, 1) == texts[50:55]


def test_one_document_cannot_be_divided(settings, tokenizer, tmp_path):
    for streaming in (False, True):
        config = settings(train_file=write_jsonl(tmp_path / "one.jsonl", ["text " * 99]), streaming=streaming)
        with pytest.raises(ConfigError, match=r"one\.jsonl holds 1 document, which cannot be divided; add validation"):
            prepare(config, tokenizer)


@pytest.mark.parametrize("kind", ["parquet", "arrow"])
@pytest.mark.parametrize("streaming", [False, True])
def test_a_shard_without_a_text_and_any_type_of_string_are_text(settings, tmp_path, texts, kind: str, streaming: bool):
    """Of each column: in the first shard, or in another, it is nothing but null."""
    string_view: Any = pyarrow.string_view()
    shards = [
        {"text": pyarrow.nulls(3), "id": pyarrow.array(range(3))},
        {"text": pyarrow.array(texts[:30], string_view), "id": pyarrow.nulls(30)},
        {"text": pyarrow.array(texts[30:], pyarrow.large_string()), "id": pyarrow.array(range(30))},
        {"text": pyarrow.nulls(2), "id": pyarrow.nulls(2)},
    ]
    (folder := tmp_path / "shards").mkdir()
    for number, shard in enumerate(map(pyarrow.table, shards)):
        path = folder / f"{number}.{kind}"
        if kind == "parquet":
            pyarrow.parquet.write_table(shard, path)
        else:
            with pyarrow.ipc.new_file(str(path), shard.schema) as writer:
                writer.write_table(shard)
    held = write_jsonl(tmp_path / "held.jsonl", ["held out"])
    config = settings(train_file=str(folder), validation_file=held, streaming=streaming)
    assert data_problems(config) == []
    assert in_file_order(config, 0) == [None] * 3 + texts + [None] * 2


@pytest.mark.parametrize("streaming", [False, True])
def test_a_saved_folder_may_have_views_of_strings(settings, tokenizer, tmp_path, texts, streaming: bool):
    for name, kind in (("view", pyarrow.string_view()), ("plain", pyarrow.string())):
        Dataset(pyarrow.table({"text": pyarrow.array(texts, kind)})).save_to_disk(str(tmp_path / name))
    view, again, plain = (
        prepare(settings(dataset_name=str(tmp_path / name), streaming=streaming), tokenizer)[0]
        for name in ("view", "view", "plain")
    )
    assert torch.equal(view.batch(0, 20), plain.batch(0, 20))
    assert not streaming or again.restore(view.state())
    assert torch.equal(again.batch(1, 20), plain.batch(1, 20))


@pytest.mark.parametrize("kind", ["jsonl", "json", "parquet", "folder", "clone"])
@pytest.mark.parametrize("streaming", [False, True])
def test_every_kind_of_source_gives_its_documents(settings, tokenizer, tmp_path, texts, kind, streaming):
    place = tmp_path / (kind if kind == "clone" else f"data[1] {kind}.{kind}")  # brackets are no pattern here
    table = Dataset.from_dict({"body": texts, "id": range(60)})
    if kind == "folder":
        table.save_to_disk(str(place))
    elif kind == "parquet":
        table.to_parquet(str(place))
    elif kind == "clone":
        place.mkdir()
        (place / "README.md").touch()
        table.to_parquet(str(place / "train.parquet"))
    else:
        write_jsonl(place, texts, column="body")
    source = {"dataset_name" if kind in ("folder", "clone") else "train_file": str(place)}
    config = settings(**source, text_column_name="body", streaming=streaming)
    assert data_problems(config) == []
    found = in_file_order(config, 0) + in_file_order(config, 1)
    assert sorted(found) == sorted(texts)
    train, validation = prepare(config, tokenizer)
    assert train.batch(0, 2).shape == validation.batch(0, 2).shape == (2, 16)


@pytest.mark.processes  # tokenises 30 MB
def test_the_builtin_corpus_is_the_default(settings, tmp_path):
    config = settings(seq_length=128)
    real = AutoTokenizer.from_pretrained(builtin_tokenizer_dir(config.cache_dir))
    train, validation = prepare(config, real)
    assert train.num_sequences > 10 * validation.num_sequences > 1000
    text = real.decode(train.batch(0, 16).flatten().tolist())
    assert "    " in text
    assert "def " in text
    again, _ = prepare(settings(seq_length=128, dataset_name="builtin"), real)
    assert torch.equal(again.batch(5, 4), train.batch(5, 4))


def test_the_corpus_is_sorted_and_skips_packages_and_undecodable_files(tmp_path):
    sources = {"b.py": b"b", "a/z.py": b"az", "a.py": b"a", "empty.py": b"", "latin.py": b"\xe9", "a/note.txt": b"n"}
    sources |= {"site-packages/p.py": b"p", "a/__pycache__/c.py": b"c"}
    for name, content in sources.items():
        (tmp_path / "lib" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "lib" / name).write_bytes(content)
    rows = corpus.builtin_corpus(tmp_path / "cache", tmp_path / "lib")
    assert rows["text"][:] == ["a", "az", "b"]
    (tmp_path / "lib" / "b.py").write_text("changed")
    assert corpus.builtin_corpus(tmp_path / "cache", tmp_path / "lib")["text"][:] == ["a", "az", "changed"]


def test_preprocessing_workers_change_nothing(settings, tokenizer, jsonl, tmp_path):
    one, two = (
        prepare(
            settings(train_file=jsonl, preprocessing_num_workers=n, cache_dir=str(tmp_path / f"cache-{n}")), tokenizer
        )[0]
        for n in (1, 2)
    )
    assert torch.equal(one.batch(0, one.num_sequences), two.batch(0, one.num_sequences))


X = Source("dataset_name", "x", "text")


def unknown_columns(rows):
    return IterableDataset.from_generator(lambda: iter(rows))


def test_splits_without_train_are_named():
    with pytest.raises(ConfigError, match=r"dataset_name=x has no split 'train', only 'test', 'dev'; name"):
        from_splits({"test": None, "dev": None}, X)


def test_splits_without_the_column_are_named():
    rows = Dataset.from_dict({"body": ["a"], "id": [1]})
    with pytest.raises(ConfigError, match=r"split 'train': no column 'text', only 'body', 'id'; set text_column_name"):
        from_splits(DatasetDict(train=rows), X)
    with pytest.raises(ConfigError, match=r"column 'id' holds int64, not text; set text_column_name"):
        from_splits(DatasetDict(train=rows), replace(X, text_column="id"))


def test_a_stream_s_validation_split_is_read_at_once():
    rows = [{"text": f"t{n}", "other": n} for n in range(5)]
    splits = IterableDatasetDict(train=unknown_columns(rows), validation=unknown_columns(rows[:2]))
    train, validation = from_splits(splits, X)
    assert isinstance(train.rows, IterableDataset)
    assert validation.rows["text"][:] == ["t0", "t1"]


def test_a_stream_whose_rows_lack_the_column_is_named():
    splits = IterableDatasetDict(train=unknown_columns([]), validation=unknown_columns([{"body": "a"}]))
    with pytest.raises(ConfigError, match="dataset_name=x: no column 'text', only 'body'"):
        from_splits(splits, X)


def test_a_name_that_the_hub_cannot_have_is_named(settings, tokenizer):
    with pytest.raises(ConfigError, match=r"dataset_name=bad name! cannot be loaded \(.*\); check the name"):
        prepare(settings(dataset_name="bad name!"), tokenizer)


@pytest.mark.skipif(find_spec("zstandard") is not None, reason="the package is there")
@pytest.mark.parametrize("streaming", [False, True])
def test_zst_files_without_their_package_are_explained(settings, tmp_path, streaming):
    """As SlimPajama has them: `datasets` needs a package for them, in a folder as on the hub."""
    (tmp_path / "train" / "chunk1").mkdir(parents=True)
    with pyarrow.output_stream(str(tmp_path / "train" / "chunk1" / "0.jsonl.zst"), compression="zstd") as file:
        file.write(b'{"text": "a"}\n' * 9)
    with pytest.raises(
        ConfigError, match=r"dataset_name=.*zstd not supported\); its files are \.zst: pip install zstandard"
    ):
        read_hub(settings(), Source("dataset_name", str(tmp_path), "text", streaming=streaming))


def test_a_repository_with_a_script_is_explained(settings, tmp_path):
    folder = tmp_path / "words"
    folder.mkdir()
    (folder / "words.py").write_text("")
    with pytest.raises(
        ConfigError, match=r"but found words\.py\); set the revision refs/convert/parquet, or give a fold"
    ):
        read_hub(settings(), Source("dataset_name", str(folder), "text"))


def test_a_parquet_branch_has_its_splits_by_folder_and_no_config(settings, tmp_path):
    """The layout of refs/convert/parquet, which configs/data/lm1b.yaml names; `datasets` calls its config default."""
    for split in ("train", "test"):
        (tmp_path / "branch" / "plain_text" / split).mkdir(parents=True)
        Dataset.from_dict({"text": [split] * 9}).to_parquet(
            str(tmp_path / "branch" / "plain_text" / split / "0000.parquet")
        )
    (preset,) = training_sources(settings(data_mixture=str(PRESETS / "lm1b.yaml")))
    splits = read_hub(settings(), replace(preset, source=str(tmp_path / "branch"), revision=None))
    train, validation = from_splits(splits, preset)
    assert validation is not None
    assert [train.rows["text"][:], validation.rows["text"][:]] == [["train"] * 9, ["test"] * 9]
