"""The built-in tokenizer returns every text exactly, and load_tokenizer picks the right one."""

import json
import shutil
from concurrent.futures import ThreadPoolExecutor

import pytest
import sentencepiece
from transformers import AutoTokenizer

from llm_local.config import ConfigError, from_flat
from llm_local.data import corpus
from llm_local.data.tokenizer import VOCAB_SIZE, builtin_tokenizer_dir, load_tokenizer
from llm_local.files import Unwritten

TEXTS = {
    "indentation": "class A:\n    def f(self):\n        return 1\n\n\n    \n",
    "tabs": "\tif x:\n\t\ty\t=\t1\n",
    "windows line ends": "a\r\nb\r\n\r\n",
    "runs of spaces": "a  b   c    d" + " " * 37 + "e  ",
    "leading space": " x",
    "many leading spaces": "     x",
    "only spaces": "   ",
    "only newlines": "\n\n\n",
    "space before punctuation": "Hello , world ! do n't 's .",
    "emoji": "ok 👩‍👩‍👧 🇫🇮 😀",
    "NUL and control": "a\0b\x01\x7f\x85",
    "mixed scripts": "Grüße, Ελλάδα, Москва, 漢字かな, العربية, ไทย",
    "combining": "e\u0301 \u00e9 \ufb01 \u2028 \ufeff",
    "sentencepiece's space mark": "a ▁b▁▁ c",
    "byte piece spelled out": "<0x0A><0xFF>",
    "special pieces of others": "<s>x</s><unk><pad>",
    "digits": "3.14159 0x7fff 1_000",
    "empty": "",
}


@pytest.fixture(scope="module")
def small_folder(tmp_path_factory):
    """Sixteen small modules: the tokenizer looks at every eighth."""
    folder = tmp_path_factory.mktemp("library")
    for number in range(16):
        (folder / f"module_{number:02}.py").write_text(f"def function_{number}(x):\n    return x + {number}\n" * 40)
    return folder


@pytest.fixture(scope="module")
def builtin(tmp_path_factory):
    return builtin_tokenizer_dir(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="module")
def tokenizer(builtin):
    return AutoTokenizer.from_pretrained(builtin)


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS.keys())
def test_text_comes_back_exactly(tokenizer, text):
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.decode(ids, skip_special_tokens=True) == text
    assert not {tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id} & set(ids)


def test_library_sources_come_back_exactly_with_sentencepiece_ids(builtin, tokenizer):
    model = sentencepiece.SentencePieceProcessor(model_file=str(builtin / "tokenizer.model"))
    texts = list(corpus.documents(corpus.stdlib_folder() / "json"))
    assert len(texts) >= 5
    for text in texts:
        assert tokenizer.decode(tokenizer.encode(text)) == text
        assert tokenizer.encode(text) == model.encode(text)


def test_vocabulary(tokenizer):
    assert len(tokenizer) == tokenizer.vocab_size == VOCAB_SIZE == 4096
    assert [tokenizer.unk_token, tokenizer.bos_token, tokenizer.eos_token] == ["<|unk|>", "<|bos|>", "<|eos|>"]
    assert len({tokenizer.unk_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id}) == 3
    assert tokenizer.clean_up_tokenization_spaces is False
    assert tokenizer.tokenize("2024") == ["2", "0", "2", "4"]
    assert tokenizer.tokenize("        ") == ["        "], "an indentation is one token"
    source = "    def __init__(self, name):\n        self.name = name\n"
    assert len(tokenizer.encode(source)) < len(source) / 2.5


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "qwen3", "mistral", "gpt_neox"])
def test_it_stays_exact_beside_a_model(builtin, tmp_path, model_type):
    """transformers takes a tokenizer's class from config.json for some models; an export holds both."""
    export = shutil.copytree(builtin, tmp_path / "export")
    (export / "config.json").write_text(json.dumps({"model_type": model_type}))
    tokenizer = AutoTokenizer.from_pretrained(export)
    for text in TEXTS.values():
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_trained_once(small_folder, tmp_path):
    first = builtin_tokenizer_dir(tmp_path, small_folder, vocab_size=300)
    (first / "mark").touch()
    assert builtin_tokenizer_dir(tmp_path, small_folder, vocab_size=300) == first
    assert (first / "mark").exists()
    assert [path.name for path in first.parent.iterdir()] == [first.name], "nothing unfinished is left"


def test_other_settings_or_sources_are_another_tokenizer(small_folder, tmp_path):
    first = builtin_tokenizer_dir(tmp_path / "cache", small_folder, vocab_size=300)
    assert builtin_tokenizer_dir(tmp_path / "cache", small_folder, vocab_size=310) != first
    changed = shutil.copytree(small_folder, tmp_path / "library")
    (changed / "module_00.py").write_text("x = 1\n" * 100)
    assert builtin_tokenizer_dir(tmp_path / "cache", changed, vocab_size=280) != first


def test_two_at_a_time_get_the_same(small_folder, tmp_path):
    with ThreadPoolExecutor(2) as pool:
        runs = [pool.submit(builtin_tokenizer_dir, tmp_path, small_folder, 300) for _ in range(2)]
    one, other = [run.result() for run in runs]
    assert one == other
    assert len(AutoTokenizer.from_pretrained(one)) == 300
    assert [path.name for path in one.parent.iterdir()] == [one.name]


def test_a_directory_that_cannot_be_put_in_place_is_an_error(small_folder, tmp_path):
    target = builtin_tokenizer_dir(tmp_path, small_folder, vocab_size=300)
    shutil.rmtree(target)
    target.write_text("in the way")
    with pytest.raises(Unwritten, match="could not be written"):
        builtin_tokenizer_dir(tmp_path, small_folder, vocab_size=300)
    assert [path.name for path in target.parent.iterdir()] == [target.name]


def test_tokenizer_name_wins_over_the_model_wins_over_the_builtin(builtin, small_folder, tmp_path):
    small = str(builtin_tokenizer_dir(tmp_path, small_folder, vocab_size=300))
    named = load_tokenizer(from_flat({"tokenizer_name": small, "model_name_or_path": str(builtin)}))
    assert len(named) == 300
    assert len(load_tokenizer(from_flat({"model_name_or_path": small}))) == 300
    cache = str(builtin.parent.parent)
    assert len(load_tokenizer(from_flat({"cache_dir": cache}))) == 4096


@pytest.mark.parametrize("field", ["tokenizer_name", "model_name_or_path"])
def test_a_folder_without_a_tokenizer_is_named(field, tmp_path):
    with pytest.raises(ConfigError, match="has no tokenizer that can be loaded; give a directory with") as caught:
        load_tokenizer(from_flat({field: str(tmp_path)}))
    assert f"{field}={str(tmp_path)!r}" in str(caught.value)


BROKEN = {
    "no JSON": ("tokenizer.json", "{", "cannot be read (Expecting property name"),
    "another JSON": ("tokenizer.json", '{"version": "1.0"}', "cannot be read (Model missing"),
    "a list": ("tokenizer_config.json", "[1]", "holds a JSON list, not an object"),
    "a list beside it": ("special_tokens_map.json", "[1]", "holds a JSON list, not an object"),
    "a model's config": ("config.json", "", "cannot be read (Expecting value"),
    "no class": ("tokenizer_config.json", '{"tokenizer_class": 7}', "says; give a directory"),
    "no token": ("tokenizer_config.json", '{"eos_token": 5}', "Special token eos_token has to be"),
    "no length": ("tokenizer_config.json", '{"model_max_length": "long"}', "says; give a directory"),
    "no package": ("tokenizer_config.json", '{"tokenizer_class": "XLMTokenizer"}', "needs a package which is not here"),
}


@pytest.mark.parametrize(("file", "content", "said"), BROKEN.values(), ids=BROKEN)
def test_a_broken_file_is_one_line_with_the_reason(builtin, tmp_path, file: str, content: str, said: str):
    folder = shutil.copytree(builtin, tmp_path / "broken")
    (folder / file).write_text(content)
    with pytest.raises(ConfigError) as caught:
        load_tokenizer(from_flat({"tokenizer_name": str(folder)}))
    (problem,) = caught.value.problems
    assert problem.startswith(f"tokenizer_name={str(folder)!r} has a ")
    assert str(folder / file) in problem or said.startswith("needs")
    assert said in problem
    assert "\n" not in problem


def test_a_folder_with_a_broken_sentencepiece_model_alone(builtin, tmp_path):
    folder = shutil.copytree(builtin, tmp_path / "broken")
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer.model").write_bytes(b"no model")
    with pytest.raises(ConfigError, match=r"has a broken file: .*tokenizer.model cannot be read \("):
        load_tokenizer(from_flat({"tokenizer_name": str(folder)}))


def test_a_class_without_files_is_no_tokenizer(tmp_path):
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "LlamaTokenizer"}')
    with pytest.raises(ConfigError, match="has a tokenizer without a vocabulary; give a directory"):
        load_tokenizer(from_flat({"tokenizer_name": str(tmp_path)}))
