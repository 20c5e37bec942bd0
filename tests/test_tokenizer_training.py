"""Tokenizers from outside and new ones: exact, loaded by AutoTokenizer beside a model, or else refused."""

from __future__ import annotations

import importlib.util
import io
import json
import random
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import sentencepiece
from conftest import Trainer
from documents import write_jsonl
from test_tokenizer import TEXTS
from transformers import AutoTokenizer

from llm_local.checks.preflight import preflight
from llm_local.config import ConfigError, from_flat, parse
from llm_local.data import corpus
from llm_local.data.encoding import encode, never_text
from llm_local.data.tokenizer import load_tokenizer
from llm_local.data.tokenizer_training import KINDS, cut_runs, sample_texts, train_tokenizer

SCRIPT = Path(__file__).parent.parent / "scripts" / "train_tokenizer.py"
SIZE = 700
MORE = {
    "every byte": bytes(range(256)).decode("latin-1"),
    "byte pieces spelled out": "<0x0A><0xff><0xFF> < 0x41> <<0x41>>",
    "a long word": "ab" * 3000,
    "nothing but spaces in the middle": "a" + " " * 5000 + "b",
}


@pytest.fixture(scope="module")
def sources():
    return list(corpus.documents(corpus.stdlib_folder() / "json"))


@pytest.fixture(scope="module", params=KINDS)
def trained(request, tmp_path_factory, sources) -> Path:
    return train_tokenizer(sources, request.param, SIZE, tmp_path_factory.mktemp("trained") / request.param)


@pytest.mark.parametrize("text", [*TEXTS.values(), *MORE.values()], ids=[*TEXTS, *MORE])
def test_text_comes_back_exactly(trained: Path, text: str):
    tokenizer = AutoTokenizer.from_pretrained(trained)
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert not {tokenizer.bos_token_id, tokenizer.eos_token_id} & set(ids)
    assert len(tokenizer) == SIZE


def test_it_learned_from_the_text(trained: Path, sources):
    tokenizer = AutoTokenizer.from_pretrained(trained)
    text = "".join(sources)
    assert len(tokenizer.encode(text)) < len(text) / 2
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_sentencepiece_s_ids_are_its_own(trained: Path, sources):
    if not (trained / "tokenizer.model").exists():
        pytest.skip("byte_bpe is not sentencepiece's")
    tokenizer = AutoTokenizer.from_pretrained(trained)
    model = sentencepiece.SentencePieceProcessor(model_file=str(trained / "tokenizer.model"))
    for text in [*sources, *(text for text in TEXTS.values() if "▁" not in text)]:
        assert tokenizer.encode(text) == model.encode(text)


def test_special_tokens_of_it_can_be_text(trained: Path):
    tokenizer = AutoTokenizer.from_pretrained(trained)
    assert never_text(tokenizer) == {}
    text = "write <|eos|> here,<|bos|>"
    (ids,), _ = encode([text], tokenizer, None)
    assert tokenizer.decode(ids) == text
    assert not {tokenizer.bos_token_id, tokenizer.eos_token_id} & set(ids)
    if (trained / "tokenizer.model").exists():
        assert ids == sentencepiece.SentencePieceProcessor(model_file=str(trained / "tokenizer.model")).encode(text)  # pyright: ignore[reportAttributeAccessIssue]


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "qwen3", "mistral", "gpt_neox", "gemma3_text", "t5"])
def test_it_stays_exact_beside_a_model(trained: Path, tmp_path, model_type: str):
    export = shutil.copytree(trained, tmp_path / "export")
    (export / "config.json").write_text(json.dumps({"model_type": model_type}))
    tokenizer = AutoTokenizer.from_pretrained(export)
    for text in TEXTS.values():
        assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text


def test_ids_with_holes_need_rows_up_to_the_highest(trainer: Trainer, trained: Path, tmp_path):
    """A pruned vocabulary: 700 tokens, of which one has the id 899."""
    pruned = shutil.copytree(trained, tmp_path / "pruned")
    rules = json.loads((pruned / "tokenizer.json").read_text())
    vocabulary = rules["model"]["vocab"]
    if not isinstance(vocabulary, dict):
        pytest.skip("a unigram's ids are places in a list")
    vocabulary[max(vocabulary, key=lambda token: vocabulary[token])] = 899
    (pruned / "tokenizer.json").write_text(json.dumps(rules))
    with pytest.raises(ConfigError, match=r"vocabulary of 700 has no row .* highest id 899; set vocab_size=900 in"):
        preflight(parse(trainer.flags("run", tokenizer_name=pruned, config_overrides="vocab_size=700")), 1)
    preflight(parse(trainer.flags("run", tokenizer_name=pruned, config_overrides="vocab_size=900")), 1)


def test_a_class_that_reads_other_tokens_from_the_same_file_is_warned_of(trainer: Trainer, trained: Path, tmp_path):
    config = parse(trainer.flags("run", tokenizer_name=trained, config_overrides="vocab_size=900"))
    other = shutil.copytree(trained, tmp_path / "other")
    settings = json.loads((other / "tokenizer_config.json").read_text()) | {"tokenizer_class": "Qwen2Tokenizer"}
    (other / "tokenizer_config.json").write_text(json.dumps(settings))
    runs = config, replace(config, model=replace(config.model, tokenizer_name=str(other)))
    none, (said,) = ([line for line in preflight(run, 1).warnings if "tokenizer.json says" in line] for run in runs)
    assert not none
    assert said.startswith("Qwen2Tokenizer gets other tokens of ")
    assert f"than {other / 'tokenizer.json'} says" in said


@pytest.mark.parametrize("kind", KINDS)
def test_text_without_white_space_is_learned_from(kind: str, tmp_path):
    """Its words are cut for that alone, so that this ends, whatever the length, and comes back exactly."""
    draw = random.Random(0)
    text = "".join(draw.choices(["alpha", "beta", "gamma", "delta", "ά漢", "0123"], k=40_000))
    folder = train_tokenizer([text], kind, 320, tmp_path / kind)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert len(ids) < len(text) / 2
    assert "".join(cut_runs(text)) == text
    assert max(map(len, cut_runs(text))) == 64


# --- a .model file


def model_file(folder: Path, sources: list[str], **settings: Any) -> Path:
    model, lines = io.BytesIO(), (line for text in sources for line in text.splitlines() if line)
    options = {"model_type": "unigram", "vocab_size": 600, "hard_vocab_limit": False, "minloglevel": 2} | settings
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=lines, model_writer=model, **options)  # pyright: ignore[reportAttributeAccessIssue]
    path = folder / "other.model"
    path.write_bytes(model.getvalue())
    return path


ELSEWHERE = {
    "sentencepiece's defaults": {},
    "bpe": {"model_type": "bpe"},
    "as Llama's": {
        "model_type": "bpe",
        "byte_fallback": True,
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
    },
    "a symbol of the user's": {
        "user_defined_symbols": ["<mask>"],
        "byte_fallback": True,
        "add_dummy_prefix": False,
        "remove_extra_whitespaces": False,
    },
    "with a pad": {"pad_id": 3},
}


@pytest.mark.parametrize("settings", ELSEWHERE.values(), ids=ELSEWHERE)
def test_a_model_of_someone_else_has_sentencepiece_s_ids_and_text(tmp_path, sources, settings: dict[str, Any]):
    path = model_file(tmp_path, sources, **settings)
    theirs = sentencepiece.SentencePieceProcessor(model_file=str(path))
    loaded = load_tokenizer(from_flat({"tokenizer_name": str(path)}))
    loaded.save_pretrained(tmp_path / "saved")
    for tokenizer in (loaded, AutoTokenizer.from_pretrained(tmp_path / "saved")):
        assert tokenizer.eos_token_id == theirs.eos_id()
        for text in ["  def  f(x):\n    return 1", "Grüße ﬁn 漢字", "a <mask> b", *sources[:2]]:
            ids = tokenizer.encode(text, add_special_tokens=False)
            assert ids == theirs.encode(text)
            # what has no piece, and no bytes either, is lost; each writes something else in its place
            assert tokenizer.unk_token_id in ids or tokenizer.decode(ids) == theirs.decode(ids)
    assert (loaded.pad_token_id or -1) == theirs.pad_id()


def test_a_model_file_trains_and_goes_into_the_export(trainer: Trainer, sources):
    (folder := trainer.folder / "spm").mkdir()
    path = model_file(folder, sources, byte_fallback=True)
    run = trainer.run("run", 1, tokenizer_name=path, max_steps=1)
    exported = AutoTokenizer.from_pretrained(run / "export")
    theirs = sentencepiece.SentencePieceProcessor(model_file=str(path))
    text = "def f(x):\n    return x"
    assert exported.encode(text, add_special_tokens=False) == theirs.encode(text)


def refusal(path: Path) -> str:
    with pytest.raises(ConfigError) as caught:
        load_tokenizer(from_flat({"tokenizer_name": str(path)}))
    (line,) = caught.value.problems
    assert line.startswith(f"tokenizer_name={str(path)!r}")
    return line


def test_model_files_that_will_not_do_are_named(tmp_path, sources):
    assert "cannot be read (No such file or directory); check the path" in refusal(tmp_path / "none.model")
    (tmp_path / "text.model").write_text("this is text")
    assert "is not a sentencepiece model; give one that was trained as unigram or bpe" in refusal(
        tmp_path / "text.model"
    )
    words = model_file(tmp_path, sources, model_type="word")
    assert "it is a sentencepiece model of type 'word', neither unigram nor bpe; give a dir" in refusal(words)
    behind = model_file(tmp_path, sources, treat_whitespace_as_suffix=True)
    assert "it keeps its spaces in another way than in front of words" in refusal(behind)
    symbol = model_file(tmp_path, sources, user_defined_symbols=["<mask>"])
    assert "it cuts 'a <mask> b'... in a way that a fast tokenizer does not reproduce; give a dir" in refusal(symbol)
    anywhere = model_file(tmp_path, sources, normalization_rule_name="nmt_nfkc_cf", split_by_whitespace=False)
    loaded = load_tokenizer(from_flat({"tokenizer_name": str(anywhere)}))
    theirs = sentencepiece.SentencePieceProcessor(model_file=str(anywhere))
    assert loaded.encode("Return THE value", add_special_tokens=False) == theirs.encode("Return THE value")


# --- the script


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    spec = importlib.util.spec_from_file_location("train_tokenizer", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "train_tokenizer", module)
    spec.loader.exec_module(module)
    return module


def test_the_script_trains_on_any_source(script: ModuleType, tmp_path, sources, capsys):
    path = write_jsonl(tmp_path / "a.jsonl", sources)
    output = tmp_path / "new" / "tokenizer"
    flags = ["--train_file", path, "--kind", "unigram", "--vocab_size", "500", "--output", str(output)]
    assert script.main(flags) == 0
    said = capsys.readouterr().out
    assert f"learning from {sum(map(len, sources)):,} characters" in said
    assert "unigram of 500 pieces, trained in" in said
    assert len(AutoTokenizer.from_pretrained(output)) == 500
    assert [entry.name for entry in output.parent.iterdir()] == [output.name], "nothing unfinished is left"


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--kind", "wordpiece"], "kind='wordpiece' is unknown; choose one of unigram, bpe, byte_bpe"),
        (["--vocab_size", "100"], "vocab_size=100 has no room for the 259 pieces of bytes and text ends; raise it"),
        (["--vocab_size", "260"], "vocab_size=260: Vocabulary size is smaller than required_chars"),
        (["--vocab_size", "90000"], "vocab_size=90000: Vocabulary size too high (90000)"),
        (["--vocab_size", "90000", "--kind", "byte_bpe"], "pieces; lower it, or give more text"),
        (["--characters", "0"], "characters=0 must be greater than 0"),
        (["--vocab_size", "many"], "argument --vocab_size: invalid int value: 'many'; see train_tokenizer.py --help"),
        (["--train_file", "missing.txt"], "train_file=missing.txt does not exist; check the path"),
        (["--no_such", "1"], "unknown argument '--no_such'"),
        (["--output", "."], "output=. exists; remove it, or choose another"),
    ],
)
def test_bad_input_is_one_line(script: ModuleType, tmp_path, sources, capsys, flags: list[str], said: str):
    path = write_jsonl(tmp_path / "a.jsonl", sources)
    given = ["--train_file", path, "--vocab_size", "500", "--output", str(tmp_path / "out"), *flags]
    assert script.main(given) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_folder_that_cannot_be_written_is_named(script: ModuleType, tmp_path, sources, capsys):
    path = write_jsonl(tmp_path / "a.jsonl", sources)
    flags = ["--train_file", path, "--vocab_size", "500", "--output", f"{path}/inside"]
    assert script.main(flags) == 1
    assert f"{path} could not be written (File exists); make room there" in capsys.readouterr().err


def test_a_mixture_is_sampled_by_weight(settings, tmp_path):
    entries = []
    for name, weight in (("a", 3), ("b", 1)):
        path = write_jsonl(tmp_path / f"{name}.jsonl", [name * 100] * 200)
        entries.append(f"- source: {path}\n  weight: {weight}\n")
    (tmp_path / "mix.yaml").write_text("".join(entries))
    for streaming in (False, True):
        texts = sample_texts(settings(data_mixture=str(tmp_path / "mix.yaml"), streaming=streaming), 4000)
        text = "".join(texts)
        assert (text.count("a"), text.count("b")) == (3000, 1000)
