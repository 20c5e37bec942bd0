"""Model types in stages: a part of what scripts/coverage.py tries, and the page that it writes."""

from __future__ import annotations

import re
from importlib.metadata import version
from pathlib import Path

import pytest
from transformers import AutoConfig, PretrainedConfig

import llm_local
from llm_local.checks.class_problems import class_problems
from llm_local.checks.tiny import NUM_LAYERS, tiny_config
from llm_local.config import Config
from llm_local.coverage.model_type import EXACT, REFUSED, UNTRIED, WRONG, Finding, compare, examine, one_line
from llm_local.coverage.report import all_types, chosen_types, counts, page, page_name, table
from llm_local.coverage.run import examine_all
from llm_local.flags import ModelArguments
from llm_local.model.anatomy import SliceError, probe
from llm_local.model.slices import try_slices
from llm_local.registry import TASKS

DOCS = Path(llm_local.__file__).parents[1] / "docs"
IMAGES, SEEING = "image-classification", ["vit", "deit"]
MASKED = "bert deberta-v2 distilbert electra modernbert roberta".split()  # noqa: SIM905
TYPES = """
bert bloom cohere2 deepseek_v3 falcon falcon_h1 gemma2 gemma3 gemma3_text glm4 gpt2 gpt_neox gpt_oss granite llama
llama4_text mamba mamba2 mixtral mpt nemotron olmo2 opt phi3 qwen2_moe qwen3 qwen3_moe smollm3 stablelm starcoder2
""".split()  # noqa: SIM905


def text_of(task: str) -> str:
    """The committed page."""
    return (DOCS / page_name(task)).read_text()


def statuses(task: str) -> dict[str, str]:
    """Of each model type, as the committed page has it."""
    return dict(re.findall(r"^\| (\S+) \| (exact|refused|wrong|not tried) \|", text_of(task), flags=re.MULTILINE))


@pytest.mark.processes
@pytest.mark.parametrize(
    ("model_type", "task"),
    [(kind, task) for task, types in (("causal-lm", TYPES), ("masked-lm", MASKED), (IMAGES, SEEING)) for kind in types],
)
def test_a_type_is_exact_in_stages_and_exported(model_type: str, task: str):
    found = examine(model_type, task)
    assert (found.status, found.reason, found.exits) == (EXACT, "", EXACT)
    assert found.ties[:1] == (() if task == IMAGES else ("untied",))


@pytest.mark.processes
def test_layers_that_depend_on_their_number_make_exits_no_models():
    """Of all minicpm3's stages together the model is exact; an exit of two layers is scaled otherwise."""
    found = examine("minicpm3")
    assert found.status == EXACT
    assert found.exits.startswith("refused: its logits differ")


@pytest.mark.parametrize(
    ("model_type", "reason"),
    [
        ("apertus", "model type 'apertus' leaves model.layers.0.mlp.act_fn.alpha_n and .* unset in a new model; start"),
        ("cpmant", "layer 1 also takes argument 2, which depends on parameters outside it"),
        ("glm_moe_dsa", "a side output of an earlier layer"),
        ("mllama", "its layers are not called once each and in order"),
        ("prophetnet", "it uses prophetnet.decoder.ngram_embeddings.weight without calling the module"),
        ("xlnet", "transformer has parameters of its own, beside its layers"),
    ],
)
def test_a_type_that_cannot_be_cut_is_refused_with_the_reason(model_type: str, reason: str):
    found = examine(model_type)
    assert found.status == REFUSED
    assert re.search(reason, found.reason), found.reason
    assert "\n" not in found.reason


def test_an_embedding_that_returns_a_pair_is_refused():
    """I-BERT's has a scale beside; a trial of two rows would unpack them as the pair."""
    assert "a slice of it does not run (ValueError: " in examine("ibert", "masked-lm").reason


def test_a_type_without_a_tiny_model_is_not_tried():
    found = examine("musicgen")
    assert found.status == UNTRIED
    kinds = ("AttributeError", "StrictDataclassFieldValidationError")  # of transformers 5.24, and of 5.17
    assert found.reason.startswith(tuple(f"no tiny model: {kind}: " for kind in kinds))


def test_a_model_that_stays_large_is_not_tried_but_refused_all_the_same(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("llm_local.coverage.model_type.MOST_PARAMETERS", 1000)
    assert re.fullmatch(r"the tiny model still has [\d,]+ parameters", examine("gpt2").reason)
    assert examine("resnet", IMAGES).status == REFUSED


def test_a_config_with_values_by_layer_is_refused_in_a_line():
    """Gemma 4's assistant refuses to be asked for those by name."""
    assert examine("gemma4_unified_assistant").status in (REFUSED, UNTRIED)


def test_an_encoder_is_refused_with_the_repair():
    found = compare(tiny_config("bert", "masked-lm"))
    assert found.status == REFUSED
    assert found.reason.startswith("model type 'bert' reads later tokens, so that predicting them is copying; set is_")


def test_a_causal_model_with_all_weights_set_has_no_problems():
    config = tiny_config("llama")
    assert class_problems(Config(), config, probe(config, ModelArguments())) == []


def test_a_class_that_needs_its_own_layers_is_refused():
    """As rwkv does, in evaluation: it divides the weights of all layers, here of those that are elsewhere as well."""
    config = tiny_config("rwkv")
    config.rescale_every = 2
    with pytest.raises(SliceError, match="layer 2 does not take layer 1's output as exactly one of its arguments"):
        probe(config, ModelArguments(), try_slices)


def test_a_trial_that_fails_is_a_refusal():
    def trial(model: object, anatomy: object) -> None:
        try_slices(model, anatomy)  # pyright: ignore[reportArgumentType]
        try_slices(model, anatomy)  # pyright: ignore[reportArgumentType] - of no use afterwards

    with pytest.raises(SliceError, match=r"'gpt2' cannot be cut into stages: a slice of it does not run \(\w+: "):
        probe(tiny_config("gpt2"), ModelArguments(), trial)  # pyright: ignore[reportArgumentType]


def test_a_class_that_converts_its_parameters_itself_is_watched():
    """Inkling makes its convolutions float32 since transformers 5.24; they are already."""
    assert probe(tiny_config("inkling_text"), ModelArguments()).num_layers == NUM_LAYERS


def test_tied_is_what_the_class_does():
    for model_type, tied in (("llama", True), ("moshi", False)):
        config: PretrainedConfig = tiny_config(model_type)
        config.tie_word_embeddings = True
        assert probe(config, ModelArguments()).tied is tied


def test_tiny_configs_are_small_and_quiet():
    config = AutoConfig.for_model("gpt2")
    tiny = tiny_config("gpt2")
    assert (config.n_layer, tiny.n_layer, tiny.n_embd, tiny.vocab_size) == (12, NUM_LAYERS, 32, 256)
    assert (tiny.resid_pdrop, tiny.embd_pdrop, tiny.attn_pdrop) == (0.0, 0.0, 0.0)
    assert tiny_config("gemma3").text_config.hidden_size == 32


@pytest.mark.processes
def test_each_type_has_a_process_a_time_and_a_memory():
    llama, gone = examine_all(["llama", "musicgen"], jobs=2)
    assert (llama.model_type, llama.status, gone.status) == ("llama", EXACT, UNTRIED)
    assert examine_all(["llama"], jobs=1, seconds=0)[0].reason == "took longer than 0 s"
    assert examine_all(["llama"], jobs=1, memory=1 << 20)[0].status != EXACT


def test_the_list_of_types():
    assert chosen_types("llama, gpt2,") == ["llama", "gpt2"]
    with pytest.raises(ValueError, match=r"--types lama: transformers \S+ has no causal language model of that type"):
        chosen_types("lama")
    assert chosen_types("modernbert", "masked-lm") == ["modernbert"]
    with pytest.raises(ValueError, match="--types ',' names no model type"):
        chosen_types(",")


def test_the_table_says_what_came_out():
    findings = [
        Finding("b", REFUSED, "model type 'b' cannot be cut into stages: it | is <odd>"),
        Finding("a", EXACT, "", ("untied", "tied"), EXACT, "a note"),
        Finding("c", UNTRIED, "x" * 500),
    ]
    rows = table(findings).splitlines()[2:]
    assert rows[0] == "| a | exact | untied, tied | exact | a note |"
    assert rows[1] == "| b | refused |  |  | it \\| is &lt;odd> |"
    assert len(rows[2]) < 300
    assert counts(findings) == "1 exact, 1 refused, 0 wrong, 1 not tried, of 3 model types"
    assert counts(findings) in page(findings, 60)
    other = page(findings, 84, "masked-lm")
    assert "Made by `python scripts/coverage.py --task masked-lm` in 1.4 minutes" in other
    assert "`AutoModelForMaskedLM` loads" in other


def test_an_error_is_one_line():
    assert one_line(ValueError("a\n  b")) == "ValueError: a b"
    assert one_line(SliceError("a\nb")) == "a b"


@pytest.mark.parametrize(
    ("task", "least", "types"),
    [("causal-lm", 130, TYPES), ("masked-lm", 20, MASKED), (IMAGES, 20, SEEING)],
)
def test_the_committed_page_has_none_that_is_wrong(task: str, least: int, types: list[str]):
    found = statuses(task)
    assert WRONG not in found.values()
    assert sum(status == EXACT for status in found.values()) >= least
    assert {found[name] for name in types} == {EXACT}


@pytest.mark.parametrize("task", TASKS)
def test_the_committed_page_has_every_type_of_the_version_that_it_names(task: str):
    named = re.search(r"transformers (\S+) on a CPU", text_of(task))
    assert named is not None
    if named[1] != version("transformers"):
        new = sorted(set(all_types(task)).difference(statuses(task)))
        pytest.skip(f"the page is of transformers {named[1]}; new since: {', '.join(new) or 'none'}")
    assert set(all_types(task)) == set(statuses(task))
