"""Masked language models: what is masked, what is scored, what is refused, and what others make of the export."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import TINY_BERT, Trainer, records
from documents import write_jsonl
from transformers import PreTrainedTokenizerBase

from llm_local.checks.tiny import tiny_config
from llm_local.commands import prepare_data
from llm_local.commands import probe as probe_command
from llm_local.config import ConfigError, parse
from llm_local.data.feed import BatchSize, Feed, RowUse
from llm_local.data.packing import mark_of, pack
from llm_local.data.sequences import FittedTokens, PackedTokens, StoredSequences
from llm_local.data.sets import prepare_all
from llm_local.data.tokenizer import load_tokenizer
from llm_local.data.tokenizer_training import train_tokenizer
from llm_local.flags import DataArguments, ModelArguments
from llm_local.links.packet import EVAL, TRAIN
from llm_local.model.anatomy import SliceError, probe
from llm_local.model.loss import fit_head, head_loss
from llm_local.model.slices import new_slice
from llm_local.partition import Span
from llm_local.place import Place
from llm_local.registry import TASKS
from llm_local.tasks.task import IGNORED, Parts

MASKED = ModelArguments(task="masked-lm")
DATA = DataArguments(mlm_probability=0.3)
ROW, ROWS = 64, 24
CONFIGS = Path(__file__).parent.parent / "configs"
MODERNBERT = {"global_attn_every_n_layers": 2, "local_attention": 16, "cls_token_id": 1, "sep_token_id": 2}
MODERNBERT |= {name: value for name, value in TINY_BERT.items() if "dropout" not in name} | {"model_type": "modernbert"}


@pytest.fixture(scope="module")
def tokenizer(cache: Path) -> PreTrainedTokenizerBase:
    """The built-in one."""
    return load_tokenizer(parse(["--task", "masked-lm", "--cache_dir", str(cache)]))


def rows() -> StoredSequences:
    """Documents of 40 to 63 tokens, each in a padded row of its own; 1 begins and 2 ends each."""
    lengths = np.arange(40, 40 + ROWS)
    generator = np.random.default_rng(0)
    documents = [np.concatenate([[1], generator.integers(300, 4096, n - 2), [2]]) for n in lengths]
    tokens = PackedTokens([np.concatenate(documents)], ROW)
    return StoredSequences(FittedTokens(tokens, pack(lengths, ROW, "none"), mark_of(2)), seed=1)


def asked(
    tokenizer: PreTrainedTokenizerBase, replicas: int, size: int, kind: int = TRAIN, start=(0, 0), seed: int = 7
) -> list[Parts]:
    """The twelve rows of a step after `start`, in the order of the global batch, as a model is asked them."""
    ask, count = TASKS["masked-lm"].asker(tokenizer, DATA), 12 // replicas // size
    found: list[Parts] = [{}] * 12
    for replica in range(replicas):
        place = Place(replica, (replicas,))
        feed = Feed(rows(), [rows()], place, BatchSize(size, count, count), start, RowUse("masked-lm", ask, seed))
        for index in range(count):
            packet = feed(kind, start[0] + 1, index)
            for n in range(size):
                parts = {name: part[n] for name, part in packet.integer_parts().items()}
                found[(index * size + n) * replicas + replica] = parts
    return found


def same(one: list[Parts], other: list[Parts]) -> bool:
    return all(
        torch.equal(a[name], b[name]) for a, b in zip(one, other, strict=True) for name in ("input_ids", "labels")
    )


def test_what_a_row_is_asked_does_not_depend_on_the_layout(tokenizer: PreTrainedTokenizerBase):
    plain = asked(tokenizer, 1, 12)
    for replicas, size in ((1, 4), (2, 3), (4, 1)):
        assert same(asked(tokenizer, replicas, size), plain)
    assert not same(asked(tokenizer, 1, 12, seed=8), plain)
    later = asked(tokenizer, 1, 12, start=(2, 24))
    assert same(asked(tokenizer, 3, 2, start=(5, 24)), later), "a step of other size, from the same row on"
    assert not same(later, plain), "the second time in another way"
    evaluated = asked(tokenizer, 1, 6, kind=EVAL)
    assert same(asked(tokenizer, 2, 6, kind=EVAL, start=(3, 36), seed=8), evaluated), "in every run the same"


def test_tokens_are_masked_and_no_padding_and_no_special_token(tokenizer: PreTrainedTokenizerBase):
    found = asked(tokenizer, 1, 12)
    truth = [rows().batch(0, 12)[n] for n in range(12)]
    scored = masked = 0
    for parts, row in zip(found, truth, strict=True):
        at = parts["labels"] != IGNORED
        ids = torch.where(row < 0, ~row, row)
        assert torch.equal(parts["labels"][at], ids[at])
        assert torch.equal(parts["input_ids"][~at], ids[~at])
        assert not at[row < 0].any()
        assert not at[(ids == 1) | (ids == 2)].any()
        scored += int(at.sum())
        masked += int((parts["input_ids"] == tokenizer.mask_token_id).sum())
    assert 0.2 < scored / sum(int((row >= 0).sum()) for row in truth) < 0.4
    assert 0.65 < masked / scored < 0.95


def steps(flags: list[str], first: int, last: int, state: dict[str, Any] | None = None) -> tuple[list[Parts], Any]:
    """What a run asks in these steps, four rows each, and the state of its data then; of one that goes on, from `state`
    on."""
    config = parse(["--task", "masked-lm", "--seq_length", "40", *flags])
    tokenizer = load_tokenizer(config)
    data = prepare_all(config, tokenizer)
    start, ask = (first - 1, 4 * (first - 1)), data.asker(config, tokenizer)
    feed = Feed(data.train, [], Place(0, (1,)), BatchSize(4, 1, 0), start, RowUse("masked-lm", ask, 7))
    assert state is None or feed.restore(state)
    return [feed(TRAIN, step, 0).integer_parts() for step in range(first, last + 1)], feed.state(last)


def test_a_folder_of_tokens_is_asked_as_its_text_and_a_stream_goes_on(cache: Path, tmp_path: Path, texts: list[str]):
    files = ["--train_file", write_jsonl(tmp_path / "a.jsonl", texts), "--cache_dir", str(cache)]
    output, task = tmp_path / "tokens", ["--task", "masked-lm", "--seq_length", "40"]
    assert prepare_data.main([*task, *files, "--output", str(output)]) == 0
    folder = ["--dataset_name", str(output), "--tokenizer_name", str(output / "tokenizer"), "--cache_dir", str(cache)]
    of_text, _ = steps(files, 1, 3)
    assert same(steps(folder, 1, 3)[0], of_text)
    stream = [*files, "--validation_file", files[1], "--streaming", "true"]
    straight, _ = steps(stream, 1, 4)
    _, state = steps(stream, 1, 2)
    assert same(steps(stream, 3, 4, state)[0], straight[2:])
    for parts in (*of_text, *straight):
        assert (parts["labels"] != IGNORED).any()


def test_a_micro_batch_in_which_nothing_is_masked_has_no_loss():
    config = tiny_config("bert", "masked-lm")
    last = new_slice(config, probe(config, MASKED), Span(4, 6), 0)
    fit_head(last)
    ids = torch.full((2, 12), 7)
    assert head_loss(last, torch.randn(2, 12, 32), ids, torch.full_like(ids, IGNORED)) == 0


def test_relative_positions_that_all_layers_train_are_refused():
    config = tiny_config("deberta-v2", "masked-lm")
    config.relative_attention, config.position_buckets, config.pos_att_type = True, 8, ["p2c", "c2p"]
    with pytest.raises(SliceError, match=r"it uses deberta.encoder.rel_embeddings.weight without calling the module"):
        probe(config, MASKED)


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        (
            "--seq_length 2",
            "seq_length=2 with task=masked-lm: a document's begin and end leave nothing to mask; use 3 or more",
        ),
        ("--document_mask true", "document_mask=True with task=masked-lm: its masks are causal; leave it out"),
        (
            "--head shared",
            "head=shared with task=masked-lm: a layer stands between its temperature and the output matrix; use "
            "head=linear or decoder",
        ),
        (
            "--head_token_fraction 0.5",
            "head_token_fraction=0.5 with task=masked-lm: a head reads the masked tokens alone already; leave it out",
        ),
        (
            "--distillation_weight 1",
            "distillation_weight=1 with task=masked-lm: soft targets are of what comes next; leave it out",
        ),
        ("--gguf_file a.gguf", "gguf_file=a.gguf with task=masked-lm: GGUF holds causal models; use safetensors"),
        ("--sample_prompt x", "sample_prompt='x' with task=masked-lm: such a model writes no text; leave it out"),
    ],
)
def test_flags_that_mean_nothing_to_it_are_refused(flags: str, reason: str):
    config = parse(["--task", "masked-lm", *flags.split()])
    assert config.task.problems(config.model, config.data, config.local, config.train) == [reason]


def test_a_share_of_masked_tokens_is_refused_elsewhere():
    config = parse(["--mlm_probability", "0.3"])
    said = config.task.problems(config.model, config.data, config.local, config.train)
    assert said == ["mlm_probability=0.3 is for task=masked-lm; leave it out"]


def test_a_tokenizer_without_a_mask_is_refused_and_a_new_one_has_it(tmp_path: Path):
    texts = ["some words of a text that is short, and some more\n"] * 50
    for name, special in (("plain", None), ("masking", TASKS["masked-lm"].new_tokens)):
        train_tokenizer(texts, "byte_bpe", 280, tmp_path / name, special_tokens=special)
    flags = ["--task", "masked-lm", "--tokenizer_name"]
    with pytest.raises(
        ConfigError, match=r"has no mask_token; choose one that has, or train one with .* --task masked-"
    ):
        load_tokenizer(parse([*flags, str(tmp_path / "plain")]))
    assert load_tokenizer(parse([*flags, str(tmp_path / "masking")])).mask_token_id == 280


@pytest.mark.parametrize("trainer", ["masked-lm"], indirect=True)
@pytest.mark.processes
def test_it_learns_and_what_its_export_says(trainer: Trainer, capsys: pytest.CaptureFixture[str]):
    settings = {"num_stages": 2, "max_steps": 12, "learning_rate": 1e-2, "head": "decoder", "head_layers": 1}
    settings |= {"config_name": trainer.model(MODERNBERT), "deepspeed": CONFIGS / "ds" / "zero3.json"}
    output = trainer.run("run", 2, per_device_train_batch_size=4, save_steps=12, **settings)
    losses = [[record["loss"] for record in records(output, stage)] for stage in (0, 1)]
    assert all(found[-1] < found[0] - 0.1 for found in losses)
    evaluated = records(output, 1, "eval")[-1]
    assert evaluated["perplexity"] == pytest.approx(np.exp(evaluated["loss"]))
    assert evaluated["bits_per_byte"] is None, "of a part of the text"
    for folder in (output / "export", output / "export/exits/stage-00"):
        assert not (folder / "generation_config.json").exists()
        assert json.loads((folder / "config.json").read_text())["architectures"] == ["ModernBertForMaskedLM"]
        card = (folder / "README.md").read_text()
        assert "pipeline_tag: fill-mask" in card
        assert "| exit | loss | pseudo-perplexity |" in card
        assert "draft" not in card
    assert probe_command.main([str(output)]) == 2
    assert "was trained with task=masked-lm; a probe reads models of causal-lm alone" in capsys.readouterr().err
