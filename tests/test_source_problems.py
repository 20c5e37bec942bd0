"""What is wrong with the data is said before training, with the place and the repair."""

import json
import os

import pytest
from datasets import Dataset, DatasetDict
from documents import in_file_order

from llm_local.config import ConfigError, from_flat
from llm_local.data.mixture import Source
from llm_local.data.sets import data_problems
from llm_local.data.source_problems import builtin_problems, file_problems


@pytest.fixture
def settings(tmp_path):
    def make(**flags):
        return from_flat({"cache_dir": str(tmp_path / "cache"), "seq_length": 16, **flags})

    return make


def write_jsonl(path, texts, column="text"):
    path.write_text("".join(json.dumps({"id": n, column: text}) + "\n" for n, text in enumerate(texts)))
    return str(path)


def problems_of(settings, path, content=None, **flags):
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return data_problems(settings(train_file=str(path), **flags))


def test_a_good_file_has_no_problems(settings, tmp_path):
    assert problems_of(settings, tmp_path / "a.txt", "é\n") == []
    assert problems_of(settings, tmp_path / "a.jsonl", b'\xef\xbb\xbf{"text": "a"}\n\n{"text": ""}') == []
    assert problems_of(settings, tmp_path / "a.jsonl", '{"text": "a"}\n{"text": null}\n') == [], "as in parquet"
    assert data_problems(settings()) == []
    assert data_problems(settings(dataset_name="builtin")) == []
    assert data_problems(settings(dataset_name="owner/name")) == [], "a hub name is not looked up"
    assert data_problems(settings(dataset_name="wikitext")) == []


def test_files_that_are_none_are_named(settings, tmp_path):
    missing = tmp_path / "missing.txt"
    assert problems_of(settings, missing) == [
        f"train_file={missing} does not exist; check the path (relative to {os.getcwd()})"
    ]
    assert (
        "is a directory without a file of text; put files there that end in one of .txt,"
        in (problems_of(settings, tmp_path)[0])
    )
    assert "a.txt is empty; give a file with text" in problems_of(settings, tmp_path / "a.txt", "")[0]
    unknown = problems_of(settings, tmp_path / "a.doc", "text\n")
    assert "a.doc has the unknown suffix '.doc'; use one of .txt, .jsonl, .json, .csv, .parquet, .arrow" in unknown[0]
    packed = problems_of(settings, tmp_path / "a.parquet.gz", "text\n")
    assert "a.parquet.gz has the unknown suffix '.parquet.gz'; use one of" in packed[0]
    assert (
        "/*.txt matches no file that holds anything; check the pattern" in problems_of(settings, tmp_path / "*.txt")[0]
    )


def test_both_files_are_looked_at(settings, tmp_path):
    found = problems_of(settings, tmp_path / "a.txt", validation_file=str(tmp_path / "b.txt"))
    assert [line.split("=")[0] for line in found] == ["train_file", "validation_file"]


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{text", "line 2: not JSON (Expecting property name"),
        ('["a"]', "line 2: a JSON list, not an object; write one JSON object a line"),
        ('{"body": "a", "id": 1}', "line 2: no column 'text', only 'body', 'id'; set text_column_name"),
        ("{}", "line 2: no column 'text', only none; set text_column_name"),
        ('{"text": 7}', "line 2: 'text' holds 7, not text; write a string there"),
        (b'{"text": "caf\xe9"}', "line 2: byte 0xe9 is not UTF-8; save the file as UTF-8"),
    ],
)
def test_a_bad_jsonl_line_is_named_with_its_number(settings, tmp_path, line, said):
    raw = line if isinstance(line, bytes) else line.encode()
    found = problems_of(settings, tmp_path / "a.jsonl", b'{"text": "good"}\n' + raw + b'\n{"text": "good"}\n')
    assert len(found) == 1
    assert found[0].startswith(f"train_file={tmp_path / 'a.jsonl'}, {said}")


def test_a_txt_line_that_is_not_utf8_is_named(settings, tmp_path):
    assert "a.txt, line 3: byte 0xff is not UTF-8" in problems_of(settings, tmp_path / "a.txt", b"a\nb\nc\xff\n")[0]


def test_only_the_first_few_lines_are_named(settings, tmp_path):
    assert len(problems_of(settings, tmp_path / "a.jsonl", "no JSON\n" * 50)) == 3


def test_a_bad_line_beyond_the_check_is_named_when_the_file_is_read(settings, tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "good"}\n' * 9 + b"bad\n")
    assert file_problems(Source("train_file", str(path), "text"), checked_bytes=20) == []
    with pytest.raises(ConfigError, match=r"a\.jsonl, line 10: not JSON"):
        in_file_order(settings(train_file=str(path)), 0)
    path.write_bytes(b'{"text": 1}\n' * 9)
    with pytest.raises(ConfigError, match=r"a\.jsonl, line 1: 'text' holds 1, not text"):
        in_file_order(settings(train_file=str(path)), 0)


def test_texts_that_look_like_dates_are_texts(settings, tmp_path):
    dates = [f"2020-01-0{n} 00:00:00" for n in range(1, 5)]
    path = write_jsonl(tmp_path / "dates.jsonl", dates)
    assert len(in_file_order(settings(train_file=path), 0)) == 3


def test_a_parquet_file_s_problems(settings, tmp_path):
    path = tmp_path / "a.parquet"
    assert "a.parquet is not a file of parquet (" in problems_of(settings, path, "text")[0]
    Dataset.from_dict({"body": ["a"], "id": [1]}).to_parquet(str(path))
    assert "no column 'text', only 'body', 'id'; set text_column_name" in problems_of(settings, path)[0]
    assert "column 'id' holds int64, not text" in problems_of(settings, path, text_column_name="id")[0]
    Dataset.from_dict({"text": ["a"]}).select([]).to_parquet(str(path))
    assert problems_of(settings, path)[-1].endswith("a.parquet has no rows; give a data set with text")


def test_a_folder_s_problems(settings, tmp_path):
    def problems(name):
        return data_problems(settings(dataset_name=str(name)))

    (tmp_path / "a.txt").write_text("a")
    assert "a.txt is a file; give it as train_file" in problems(tmp_path / "a.txt")[0]
    assert "missing does not exist; check the path" in problems(tmp_path / "missing")[0]
    said = "is no clone of the hub's and not from save_to_disk; give a folder of files as train_file"
    assert said in problems(tmp_path)[0]
    rows = Dataset.from_dict({"body": [["a"]]})
    rows.save_to_disk(str(tmp_path / "one"))
    assert "no column 'text', only 'body'" in problems(tmp_path / "one")[0]
    assert (
        "column 'body' holds List, not text"
        in (data_problems(settings(dataset_name=str(tmp_path / "one"), text_column_name="body"))[0])
    )
    DatasetDict(test=rows).save_to_disk(str(tmp_path / "no_train"))
    assert (
        "no_train has no split 'train', only 'test'; rename it, or set dataset_split"
        in problems(tmp_path / "no_train")[0]
    )
    good = Dataset.from_dict({"text": ["a"]})
    DatasetDict(train=good, validation=rows).save_to_disk(str(tmp_path / "two"))
    assert "two, split 'validation': no column 'text'" in problems(tmp_path / "two")[0]
    (tmp_path / "one" / "state.json").write_text("{")
    assert "one cannot be read (" in problems(tmp_path / "one")[0]


def test_an_interpreter_without_sources_has_no_builtin_corpus(tmp_path):
    assert builtin_problems(tmp_path) == [
        f"the built-in corpus needs .py files in {tmp_path}, which has none; give train_file or dataset_name"
    ]
