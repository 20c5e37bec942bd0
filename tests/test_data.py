"""From text to sequences: nothing lost, nothing twice, the same order for everybody, and plain words when it fails."""

import json
import os
from dataclasses import asdict

import pytest
import torch
from datasets import Dataset, are_progress_bars_disabled
from documents import in_file_order, write_jsonl
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from llm_local.config import ConfigError
from llm_local.data.feed import SOURCES, changed_since
from llm_local.data.sequences import PackedTokens
from llm_local.data.sets import prepare, prepare_all, tokenizer_key
from llm_local.model.document_mask import DocumentMask


def decoded(sequences, tokenizer, whole):
    """One pass over stored sequences as text, EOS spelled out, put back into the order that they have in `whole`."""
    rows = [sequences.batch(number, 1)[0] for number in range(sequences.num_sequences)]
    return "".join(sorted((tokenizer.decode(row.tolist()) for row in rows), key=whole.index))


# --- what a sequence holds


def test_validation_is_the_text_with_eos_behind_each_document(settings, tokenizer, tmp_path, jsonl):
    held = ["  one\n\ttwo ", "", "three 😀", "four " * 20]
    config = settings(train_file=jsonl, validation_file=write_jsonl(tmp_path / "held.jsonl", held))
    _, validation = prepare(config, tokenizer)
    whole = "".join(text + tokenizer.eos_token for text in held if text)
    text = decoded(validation, tokenizer, whole)
    assert whole.startswith(text), "only the tail that fills no sequence is missing"
    assert len(tokenizer.encode(whole)) - validation.num_sequences * 16 < 16


def test_batches_are_int64_rows_of_seq_length(settings, tokenizer, jsonl):
    for sequences in prepare(settings(train_file=jsonl), tokenizer):
        batch = sequences.batch(0, 3)
        assert batch.shape == (3, 16)
        assert batch.dtype == torch.int64


def test_a_txt_file_is_one_text_with_its_newlines(settings, tokenizer, tmp_path):
    lines = [f"line {n}\n" if n % 7 else "\n" for n in range(900)]
    (tmp_path / "train.txt").write_text("".join(lines))
    config = settings(train_file=str(tmp_path / "train.txt"), validation_split_percentage=10)
    train, validation = prepare(config, tokenizer)
    rows = torch.cat([train.batch(n, 1) for n in range(train.num_sequences)])
    assert (rows == tokenizer.eos_token_id).sum() <= 1, "EOS is at the end alone"
    assert tokenizer.eos_token not in "".join(lines)
    held_out = "".join(lines[810:])
    assert held_out.startswith(decoded(validation, tokenizer, held_out)), "the last lines are the validation"
    kept = "".join(lines[:810])
    assert all(tokenizer.decode(row.tolist()).removesuffix(tokenizer.eos_token) in kept for row in rows)


@pytest.mark.parametrize("most", [5, 10_000])
def test_so_many_sequences_are_the_first_of_the_data_and_come_again(settings, tokenizer, jsonl, most: int):
    flags = {"train_file": jsonl, "validation_split_percentage": 10}
    every = prepare(settings(**flags), tokenizer)[0]
    some, validation = prepare(settings(**flags, max_train_samples=most), tokenizer)
    count = min(most, every.num_sequences)
    assert some.num_sequences == count
    in_order = load_training_rows(settings(**flags), tokenizer)
    for epoch in range(2):
        rows = {tuple(some.batch(epoch * count + n, 1)[0].tolist()) for n in range(count)}
        assert rows == set(in_order[:count])
    assert torch.equal(validation.batch(0, 2), prepare(settings(**flags), tokenizer)[1].batch(0, 2))


def load_training_rows(config, tokenizer):
    """The training rows in the data's own order."""
    tokens = prepare_all(config, tokenizer).sources[0].tokens
    assert tokens is not None
    packed = PackedTokens(tokens.pieces, config.data.seq_length)
    return [tuple(packed.row(n).tolist()) for n in range(packed.num_rows)]


def test_training_follows_the_seed_of_the_run(settings, tokenizer, jsonl):
    first, again, other = (prepare(settings(train_file=jsonl, seed=s), tokenizer)[0].batch(0, 8) for s in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


# --- text that spells a special token


@pytest.mark.parametrize("streaming", [False, True])
def test_text_that_spells_a_special_token_is_text(settings, tokenizer, tmp_path, streaming: bool):
    held = write_jsonl(tmp_path / "held.jsonl", ["write <|eos|> here, <|bos|> and <|unk|>"])
    config = settings(train_file=held, validation_file=held, streaming=streaming, packing="none", seq_length=64)
    data = prepare_all(config, tokenizer)
    assert data.warnings == ()
    for sequences in (data.train, data.validation[0].sequences):
        row = sequences.batch(0, 1)
        text = row[row >= 0]
        assert tokenizer.decode(text.tolist()) == "write <|eos|> here, <|bos|> and <|unk|><|eos|>"
        assert text.tolist().count(tokenizer.eos_token_id) == 1
        mask = DocumentMask(tokenizer.eos_token_id)
        assert mask.positions(text[None])[0].tolist() == list(range(len(text))), "one document stays one"


@pytest.fixture
def of_words():
    """A tokenizer that has its special tokens as words, and so makes them of text as well."""
    ids = {"</s>": 0, "<s>": 1, "write": 2, "here": 3, "<unk>": 4}
    made = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"eos_token": "</s>", "bos_token": "<s>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=made, **special)


@pytest.mark.parametrize("kind", ["jsonl", "txt"])
def test_what_a_tokenizer_cannot_take_for_text_is_counted(settings, of_words, tmp_path, kind: str):
    texts = ["write </s> here", "<unk> write", "here <s> and </s>"] * 4
    write_jsonl(tmp_path / "a.jsonl", texts)
    (tmp_path / "a.txt").write_text("\n".join(texts))
    held = write_jsonl(tmp_path / "held.jsonl", ["write here"] * 9)
    config = settings(train_file=str(tmp_path / f"a.{kind}"), validation_file=held)
    (said,) = prepare_all(config, of_words).warnings
    why = f"train_file={tmp_path}/a.{kind}: text that spells </s> and 1 more is taken for the token by this tokenizer"
    assert said == f"{why}, 12 times; change the text, or use another tokenizer"
    assert (said,) == prepare_all(config, of_words).warnings, "the next start, too, which reads no text"
    stream = settings(train_file=config.data.train_file, validation_file=held, streaming=True)
    data = prepare_all(stream, of_words)
    assert data.warnings == (f"{why}, which is counted as the stream is read",)
    assert data.spelled_in_streams(of_words) == (), "nothing was read yet"
    (only,) = data.sources
    only.sequences.batch(0, 2)
    read = f"{why}, 12 times in what was read of the stream"
    assert data.spelled_in_streams(of_words) == (f"{read}; change the text, or use another tokenizer",)


def test_what_a_stream_counted_is_kept_and_counted_once(settings, of_words, tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", ["write </s> here now"] * 400)
    config = settings(train_file=path, validation_file=path, streaming=True)
    first, again, older = (prepare_all(config, of_words).sources[0].sequences for _ in range(3))
    first.batch(0, 30)
    state = json.loads(json.dumps(first.state()))
    assert again.restore(state)
    assert again.spelled == first.spelled > 0
    assert torch.equal(first.batch(0, 60, first=30), again.batch(0, 60, first=30))
    assert again.spelled == first.spelled > state["spelled"]
    first.batch(0, 1)
    assert first.spelled < again.spelled, "what is read from the start again is counted from there"
    assert older.restore({name: value for name, value in state.items() if name != "spelled"})


# --- cache


def test_tokens_are_made_once_and_again_when_the_file_changes(settings, tokenizer, tmp_path, texts):
    path = tmp_path / "train.jsonl"
    config = settings(train_file=write_jsonl(path, texts))
    folder = config.cache_dir / "tokens"
    prepare(config, tokenizer)
    made = sorted(os.listdir(folder))
    assert len(made) == 2
    prepare(config, tokenizer)
    assert sorted(os.listdir(folder)) == made
    write_jsonl(path, [*texts, "one more document"])
    train, _ = prepare(config, tokenizer)
    assert len(os.listdir(folder)) == 4
    sources = (train, prepare(config, tokenizer)[1])
    rows = [source.batch(n, 1)[0].tolist() for source in sources for n in range(source.num_sequences)]
    assert any("one more" in tokenizer.decode(row) for row in rows)


def test_a_saved_folder_is_only_read(settings, tokenizer, tmp_path, texts):
    Dataset.from_dict({"text": texts}).save_to_disk(str(tmp_path / "saved"))
    before = sorted(os.listdir(tmp_path / "saved"))
    prepare(settings(dataset_name=str(tmp_path / "saved")), tokenizer)
    assert sorted(os.listdir(tmp_path / "saved")) == before


def test_the_key_of_a_tokenizer_is_what_it_does(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path / "copy")
    copy = AutoTokenizer.from_pretrained(tmp_path / "copy")
    key = tokenizer_key(tokenizer)
    copy(["short", "a longer one"], padding=False, truncation=True, max_length=2)
    assert tokenizer_key(copy) == key
    copy.add_tokens(["<|new|>"])
    assert tokenizer_key(copy) != key


def test_the_key_of_a_tokenizer_without_a_backend_is_its_content():
    assert tokenizer_key({"a": 1}) == tokenizer_key({"a": 1}) != tokenizer_key({"a": 2})


def test_progress_bars_are_left_as_they_were(settings, tokenizer, jsonl, tmp_path, capfd):
    before = are_progress_bars_disabled()
    prepare(settings(train_file=jsonl), tokenizer)
    assert "tokenising" not in capfd.readouterr().err
    prepare(settings(train_file=jsonl, cache_dir=str(tmp_path / "other")), tokenizer, progress=True)
    assert "tokenising" in capfd.readouterr().err
    assert are_progress_bars_disabled() == before


# --- data that is not what it was


@pytest.mark.parametrize("streaming", [False, True])
def test_a_source_that_grew_is_named_with_both_figures(settings, tokenizer, tmp_path, texts, streaming: bool):
    path, held = tmp_path / "a.jsonl", write_jsonl(tmp_path / "held.jsonl", texts)
    config = settings(train_file=write_jsonl(path, texts), validation_file=held, streaming=streaming)
    then, size = prepare_all(config, tokenizer).sources, path.stat().st_size
    saved = {SOURCES: [asdict(source.facts()) for source in then]}
    assert changed_since(prepare_all(config, tokenizer).sources, saved, tmp_path / "step-3") == ()
    write_jsonl(path, [*texts, "one more"])
    now = prepare_all(config, tokenizer).sources
    (said,) = changed_since(now, saved, tmp_path / "step-3")
    counts = (path.stat().st_size, size) if streaming else [f.tokens.tokens for f in (*now, *then) if f.tokens]
    figures = (
        ("{:,} bytes", "{:,} bytes") if streaming else ("61 documents of {:,} tokens", "60 documents of {:,} tokens")
    )
    has, had = (figure.format(count) for figure, count in zip(figures, counts, strict=True))
    assert said.startswith(f"train_file={path} has {has}, and had {had} when {tmp_path}/step-3 was written: ")
    del saved[SOURCES][0]["extent"]
    assert changed_since(now, saved, tmp_path) == (), "an older checkpoint does not say"


# --- streams


@pytest.fixture
def stream(settings, tokenizer, jsonl):
    def start(**flags):
        return prepare(settings(train_file=jsonl, streaming=True, **flags), tokenizer)[0]

    return start


def test_a_stream_is_the_same_at_each_start_and_however_it_is_sliced(stream):
    whole = torch.cat([stream().batch(0, 48)])
    parts, resumed = stream(), stream()
    assert torch.equal(torch.cat([parts.batch(index, 6) for index in range(8)]), whole)
    assert torch.equal(resumed.batch(5, 8), whole[40:]), "a later batch is reached by reading up to it"
    assert torch.equal(resumed.batch(1, 8), whole[8:16]), "an earlier one by starting again"
    assert resumed.num_sequences is None


def test_a_stream_s_epochs_hold_the_same_documents_in_another_order(stream, tokenizer, settings, jsonl):
    documents = in_file_order(settings(train_file=jsonl, streaming=True), 0)
    tokens = sum(len(tokenizer.encode(text)) + 1 for text in documents)
    length = tokens // 16
    rows = stream().batch(0, 2 * length)
    first, second = (
        tokenizer.decode(part.flatten().tolist()).split(tokenizer.eos_token) for part in (rows[:length], rows[length:])
    )
    assert set(first[:-1]) <= set(documents)
    assert set(second[:-1]) <= set(documents)
    assert len(set(first)) == len(first) >= len(documents) - 2, "no document twice, none missing but in the tail"
    assert first != second


def test_a_stream_follows_the_seed_of_the_run(stream):
    assert not torch.equal(stream(seed=1).batch(0, 8), stream(seed=2).batch(0, 8))


def test_a_streamed_txt_keeps_its_order(settings, tokenizer, tmp_path):
    lines = [f"line {n}\n" for n in range(1000)]
    (tmp_path / "train.txt").write_text("".join(lines))
    config = settings(train_file=str(tmp_path / "train.txt"), streaming=True, validation_split_percentage=10)
    train, validation = prepare(config, tokenizer)
    held_out = "".join(lines[:100])
    assert held_out.startswith(decoded(validation, tokenizer, held_out))
    text = tokenizer.decode(train.batch(0, 20).flatten().tolist())
    assert "".join(lines[100:]).startswith(text)


def test_a_stream_without_one_sequence_is_an_error_and_no_endless_loop(settings, tokenizer, tmp_path):
    path = write_jsonl(tmp_path / "short.jsonl", ["a", "b", "c"])
    train, _ = prepare(settings(train_file=path, streaming=True, eval_batches=0), tokenizer)
    with pytest.raises(ValueError, match=r"short\.jsonl: the whole stream holds fewer than the 16 tokens"):
        train.batch(0, 1)


# --- too little, or without EOS


def test_too_little_text_names_the_file_and_both_numbers(settings, tokenizer, tmp_path):
    short = write_jsonl(tmp_path / "short.jsonl", ["a", "b", "c"])
    long = write_jsonl(tmp_path / "long.jsonl", ["words " * 50])
    with pytest.raises(
        ConfigError, match=r"train_file=.*short\.jsonl holds 6 tokens, one sequence needs 16; give more"
    ):
        prepare(settings(train_file=short, validation_file=long), tokenizer)
    with pytest.raises(ConfigError, match=r"validation_file=.*short\.jsonl \(validation\) holds 6 tokens"):
        prepare(settings(train_file=long, validation_file=short), tokenizer)


def test_a_run_that_never_evaluates_needs_no_validation_text(settings, tokenizer, tmp_path):
    short = write_jsonl(tmp_path / "short.jsonl", ["a", "b", "c"])
    long = write_jsonl(tmp_path / "long.jsonl", ["words " * 50])
    config = settings(train_file=long, validation_file=short, eval_batches=0)
    train, validation = prepare(config, tokenizer)
    assert train.num_sequences
    assert validation.num_sequences == 0
    with pytest.raises(ValueError, match="no sequence to read: 6 tokens are less than 16"):
        validation.batch(0, 1)


def test_a_tokenizer_without_eos_is_named(settings, tokenizer, tmp_path, jsonl):
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    without = AutoTokenizer.from_pretrained(tmp_path / "tokenizer", eos_token=None)
    without.eos_token = None
    with pytest.raises(ConfigError, match=r"tokenizer .*tokenizer has no EOS token to end a document; set eos_token"):
        prepare(settings(train_file=jsonl), without)


def test_prepare_says_what_the_check_says(settings, tokenizer, tmp_path):
    with pytest.raises(ConfigError, match=r"missing\.txt does not exist"):
        prepare(settings(train_file=str(tmp_path / "missing.txt")), tokenizer)
