"""Text that breaks loaders: each is read as documented, or refused with file and line."""

import gzip
import json
import os

import pyarrow
import pytest
import torch
from conftest import Trainer, records
from documents import in_file_order, write_jsonl
from launching import by_hand
from pyarrow import parquet

from llm_local.config import ConfigError
from llm_local.data import encoding, text_files
from llm_local.data.sets import data_problems, prepare
from llm_local.data.source_problems import CHECKED_BYTES
from llm_local.data.text_files import UnreadableText, pieces_of, read_texts

BOM = b"\xef\xbb\xbf"


def every_token(sequences):
    """One pass over stored sequences, as the sorted list of its tokens."""
    return sorted(sequences.batch(0, sequences.num_sequences).flatten().tolist())


def texts_of(path, kind, whole=False):
    return [row["text"] for row in read_texts(pieces_of(path, whole), kind, "text", whole)]


def test_empty_lines_and_documents_leave_no_trace(settings, tokenizer, tmp_path, texts):
    clean = write_jsonl(tmp_path / "clean.jsonl", texts)
    lines = [json.dumps({"text": text}) for text in texts]
    with_empty = "\n\n".join([*lines[:9], '{"text": ""}', '{"text": null}', "  ", *lines[9:]]) + "\n\n"
    (tmp_path / "empty.jsonl").write_text(with_empty)
    held = write_jsonl(tmp_path / "held.jsonl", texts[:5])
    found = [
        every_token(prepare(settings(train_file=str(path), validation_file=held), tokenizer)[0])
        for path in (clean, tmp_path / "empty.jsonl")
    ]
    assert found[0] == found[1]


def test_a_file_of_empty_documents_alone_is_named(settings, tokenizer, tmp_path):
    path = write_jsonl(tmp_path / "empty.jsonl", [""] * 50)
    with pytest.raises(ConfigError, match=r"empty\.jsonl \(validation\) holds 0 tokens, one sequence needs 16"):
        prepare(settings(train_file=path), tokenizer)


@pytest.mark.processes
@pytest.mark.parametrize("suffix", [".jsonl", ".txt", ".csv"])
def test_a_line_of_50_megabytes_is_read(settings, tmp_path, suffix):
    text = "alpha" * 10_000_000
    path = tmp_path / f"long{suffix}"
    line = {".jsonl": json.dumps({"text": text}), ".txt": text, ".csv": f'text\n"{text}"'}[suffix]
    path.write_text(line + "\n")
    assert data_problems(settings(train_file=str(path))) == []
    assert [len(found.rstrip()) for found in texts_of(path, str(text_files.format_of(path)))] == [len(text)]


@pytest.mark.processes  # tokenises 10 MB
def test_a_line_of_10_megabytes_is_tokenised_in_parts(settings, tokenizer, tmp_path):
    text = "alpha" * 2_000_000  # without a space, where a tokenizer has one word to cut
    path = tmp_path / "long.jsonl"
    path.write_text(json.dumps({"text": text}) + "\n")
    held = write_jsonl(tmp_path / "held.jsonl", ["some words " * 20])
    train, _ = prepare(settings(train_file=str(path), validation_file=held), tokenizer)
    assert len(tokenizer.decode(train.batch(0, 1)[0])) > 16
    assert train.num_tokens > 2_000_000 / 4


def test_a_long_text_is_cut_at_white_space_and_nothing_is_lost(monkeypatch, settings, tokenizer, tmp_path):
    monkeypatch.setattr(encoding, "CUT_CHARACTERS", 5000)
    text = "def alpha(x):\n    return x\n" * 2000
    held = write_jsonl(tmp_path / "held.jsonl", ["some words " * 20])
    config = settings(train_file=write_jsonl(tmp_path / "a.jsonl", [text]), validation_file=held)
    train, _ = prepare(config, tokenizer)
    assert train.num_tokens == len(tokenizer(text, add_special_tokens=False)["input_ids"]) + 1


def test_invalid_utf8_is_refused_with_file_and_line(settings, tmp_path):
    for name, content in {
        "a.txt": b"good\n\xff\xfe\n",
        "a.csv": b"text\n\xe9\n",
        "a.jsonl": b'{"text": ""}\n"\x80"\n',
    }.items():
        (tmp_path / name).write_bytes(content)
        (found,) = data_problems(settings(train_file=str(tmp_path / name)))
        assert found.startswith(f"train_file={tmp_path / name}, line 2: byte ")
        assert "is not UTF-8; save the file as UTF-8" in found


def test_half_of_a_surrogate_pair_is_refused_with_file_and_line(settings, tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "\\ud83d\\ude00"}\n{"text": "\\ud83d"}\n')
    (found,) = data_problems(settings(train_file=str(tmp_path / "a.jsonl")))
    assert "a.jsonl, line 2: 'text' holds \\ud83d, half of a character; write both halves or none" in found


@pytest.mark.parametrize("streaming", [False, True])
def test_a_byte_order_mark_is_dropped_in_every_file(settings, tmp_path, streaming):
    for n in range(3):
        (tmp_path / f"{n}.jsonl").write_bytes(BOM + json.dumps({"text": f"document {n}"}).encode() + b"\n")
    config = settings(train_file=str(tmp_path / "*.jsonl"), streaming=streaming)
    assert sorted(in_file_order(config, 0) + in_file_order(config, 1)) == [f"document {n}" for n in range(3)]
    (tmp_path / "a.csv").write_bytes(BOM + b"text\na\n")
    (tmp_path / "a.txt").write_bytes(BOM + b"a\n")
    assert texts_of(tmp_path / "a.csv", "csv") == ["a"]
    assert texts_of(tmp_path / "a.txt", "text") == ["a\n"]


def test_crlf_is_a_newline(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"one\r\n\r\ntwo\r\n")
    assert "".join(texts_of(tmp_path / "a.txt", "text")) == "one\n\ntwo\n"
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "one"}\r\n\r\n{"text": "two"}\r\n')
    assert texts_of(tmp_path / "a.jsonl", "json") == ["one", "two"]
    (tmp_path / "a.csv").write_bytes(b'id,text\r\n1,one\r\n\r\n2,"two\r\nlines"\r\n')
    assert texts_of(tmp_path / "a.csv", "csv") == ["one", "two\nlines"]


def test_nul_characters_are_left_out(settings, tokenizer, tmp_path, texts):
    held = write_jsonl(tmp_path / "held.jsonl", texts)
    plain = write_jsonl(tmp_path / "plain.jsonl", texts)
    nul = write_jsonl(tmp_path / "nul.jsonl", [f"\0{text[:3]}\0\0{text[3:]}" for text in texts] + ["\0"])
    found = [
        every_token(prepare(settings(train_file=path, validation_file=held), tokenizer)[0]) for path in (plain, nul)
    ]
    assert found[0] == found[1]
    (tmp_path / "a.csv").write_bytes(b"text\na\0b\n")
    assert texts_of(tmp_path / "a.csv", "csv") == ["ab"]


@pytest.mark.parametrize("suffix", [".txt", ".jsonl", ".csv", ".parquet", ".arrow", ".jsonl.gz", ".jsonl.zst"])
def test_a_file_that_is_no_text_is_refused(settings, tmp_path, suffix):
    path = tmp_path / f"picture{suffix}"
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + os.urandom(3000))
    found = data_problems(settings(train_file=str(path)))
    assert found
    assert all(line.startswith(f"train_file={path}") for line in found)
    said = {".parquet": "is not a file of parquet", ".arrow": "is not a file of arrow"}
    packed = ", after line 0: the file is cut short or damaged ("
    assert (
        said.get(suffix, packed if suffix.endswith(("gz", "zst")) else ", line 1: byte 0x89 is not UTF-8") in found[0]
    )


def test_a_missing_column_is_refused(settings, tmp_path):
    (tmp_path / "a.csv").write_text("id,body\n1,a\n")
    (found,) = data_problems(settings(train_file=str(tmp_path / "a.csv")))
    assert "a.csv, line 1: no column 'text', only 'id', 'body'; set text_column_name" in found
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n{"body": "a"}\n')
    (found,) = data_problems(settings(train_file=str(tmp_path / "a.jsonl")))
    assert "a.jsonl, line 2: no column 'text', only 'body'" in found


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ('text\n"a', "line 2: not CSV (unexpected end of data); close every quote, and double one inside a text"),
        ("text\na\nb,c\n", "line 3: 2 fields where the header has 1; put a text with commas in quotes"),
    ],
)
def test_a_broken_csv_is_refused_with_its_line(settings, tmp_path, content, said):
    (tmp_path / "a.csv").write_text(content)
    (found,) = data_problems(settings(train_file=str(tmp_path / "a.csv")))
    assert found.endswith(said)


@pytest.mark.parametrize("suffix", [".jsonl.gz", ".jsonl.zst"])
def test_a_truncated_archive_is_refused_with_the_last_line(settings, tokenizer, tmp_path, suffix):
    path = tmp_path / f"a{suffix}"
    content = b"".join(json.dumps({"text": os.urandom(500).hex()}).encode() + b"\n" for _ in range(300))
    if suffix.endswith("gz"):
        path.write_bytes(gzip.compress(content))
    else:
        with pyarrow.output_stream(str(path), compression="zstd") as file:
            file.write(content)
    path.write_bytes(path.read_bytes()[:-40_000])
    (found,) = data_problems(settings(train_file=str(path)))
    assert found.startswith(f"train_file={path}, after line ")
    assert "the file is cut short or damaged (" in found
    assert found.endswith("; fetch it again")
    with pytest.raises(ConfigError, match="the file is cut short or damaged"):
        prepare(settings(train_file=str(path), streaming=True), tokenizer)


@pytest.mark.parametrize("streaming", [False, True])
def test_a_parquet_file_that_is_damaged_inside_is_refused(settings, tokenizer, tmp_path, streaming):
    """Its footer is whole, so that only reading shows it: gzip has a checksum, where snappy may see empty documents."""
    path = tmp_path / "a.parquet"
    text = [os.urandom(500).hex() for _ in range(300)]
    parquet.write_table(pyarrow.table({"text": text}), path, compression="gzip")
    content = bytearray(path.read_bytes())
    content[1000:60_000] = bytes(59_000)
    path.write_bytes(content)
    config = settings(train_file=str(path), streaming=streaming)
    assert data_problems(config) == []
    with pytest.raises(ConfigError, match=r"train_file=.*a\.parquet: cannot be read \("):
        prepare(config, tokenizer)


def test_a_line_in_the_middle_of_a_large_file_has_its_number(monkeypatch, tmp_path):
    monkeypatch.setattr(text_files, "PIECE_BYTES", 1000)
    lines = [json.dumps({"text": f"{n} " + "x" * (n % 50)}) + "\n" for n in range(500)]
    path = tmp_path / "a.jsonl"
    path.write_text("".join(lines))
    assert len(pieces_of(path, whole=False)) > 20
    assert [text.split()[0] for text in texts_of(path, "json")] == [str(n) for n in range(500)]
    path.write_text("".join([*lines[:333], "bad\n", *lines[334:]]))
    with pytest.raises(UnreadableText, match=r"a\.jsonl, line 334: not JSON"):
        texts_of(path, "json")


@pytest.mark.parametrize("streaming", [False, True])
def test_a_source_that_ends_begins_again(settings, tokenizer, tmp_path, texts, streaming):
    """With another order, and fewer sequences than one batch are no exception."""
    held = write_jsonl(tmp_path / "held.jsonl", texts)
    path = write_jsonl(tmp_path / "a.jsonl", texts[:9])
    train, _ = prepare(settings(train_file=path, validation_file=held, streaming=streaming), tokenizer)
    rows = train.batch(0, 200)
    assert rows.shape == (200, 16)
    assert 1 < len({tuple(row.tolist()) for row in rows}) < 200


def test_a_stream_that_breaks_later_names_file_and_line(settings, tokenizer, tmp_path):
    path = tmp_path / "a.jsonl"
    lines = [json.dumps({"text": f"document {n} " * 20}) for n in range(300)]
    path.write_text("\n".join([*lines, "no JSON", *lines]))
    config = settings(train_file=str(path), streaming=True)
    with pytest.raises(ConfigError, match=r"train_file=.*a\.jsonl, line 301: not JSON"):
        prepare(config, tokenizer)


@pytest.mark.processes
def test_a_stream_that_breaks_in_mid_run_ends_all_stages(trainer: Trainer):
    """It is met by stage 0 alone; the others are told, and do not wait for it."""
    folder, good = trainer.folder / "train", '{"text": "a"}\n'
    folder.mkdir()
    (folder / "a.jsonl").write_text(good.rstrip() + " " * CHECKED_BYTES + "\n")  # the check before training ends here
    (folder / "b.jsonl").write_text(good * 10_500 + '{"text": 7}\n')
    held = trainer.folder / "held.jsonl"
    held.write_text(good * 50)
    flags = trainer.flags("run", num_stages=2, train_file=folder, validation_file=held, streaming=True, max_steps=9999)
    flags += ["--per_device_train_batch_size", "16"]
    with by_hand(2, flags, trainer.folder) as ranks:
        assert [rank.wait(120) for rank in ranks] == [1, 1]
    said = f"{folder / 'b.jsonl'}, line 10501: 'text' holds 7, not text; write a string there"
    assert all(said in rank.text for rank in ranks), [rank.text for rank in ranks]
    assert len(records(trainer.folder / "run", 1)) > 20
    assert not any("Traceback" in rank.text for rank in ranks)


def test_fewer_sequences_than_a_batch_are_all_in_it(settings, tokenizer, tmp_path, texts):
    train, _ = prepare(settings(train_file=write_jsonl(tmp_path / "a.jsonl", texts[:5])), tokenizer)
    rows = train.batch(0, 3 * train.num_sequences)
    assert torch.equal(rows.unique(dim=0), train.batch(0, train.num_sequences).unique(dim=0))
