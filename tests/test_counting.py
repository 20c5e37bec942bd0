"""What is counted of rows with padding, or with documents kept apart: tokens, nats, bytes, shares."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Trainer, records
from documents import write_jsonl
from transformers import AutoModelForCausalLM

from llm_local.config import parse
from llm_local.data.feed import BatchSize, Feed, RowUse, trained_tokens
from llm_local.data.packing import count_openings, inputs_of, mark_of, pack
from llm_local.data.sequences import PackedTokens, StoredSequences
from llm_local.data.sets import prepare_all
from llm_local.data.tokenizer import load_tokenizer
from llm_local.examine import Readout
from llm_local.links.packet import CHECK, EVAL, TRAIN, Packet
from llm_local.model.document_mask import DocumentMask
from llm_local.offline_export import export_checkpoint
from llm_local.place import Place
from llm_local.progress import Progress

PAD = mark_of(2)


# --- tokens


class Padded:
    """Row n has n % 4 places of padding, of 8."""

    num_sequences = None

    def batch(self, index: int, rows: int, first: int = 0) -> torch.Tensor:
        numbers = first + index * rows + torch.arange(rows)
        return torch.full((rows, 8), 5).masked_fill(torch.arange(8) >= 8 - numbers[:, None] % 4, PAD)

    def state(self) -> dict[str, Any]:
        return {}

    def restore(self, state: dict[str, Any]) -> bool:
        return not state


def test_a_feed_counts_the_tokens_of_all_replicas_in_the_steps_that_were_trained():
    feeds = [Feed(Padded(), [Padded()], Place(r, (2,)), BatchSize(1, 2, 1)) for r in (0, 1)]
    for feed in feeds:
        for kind, step, index in ((TRAIN, 1, 0), (TRAIN, 1, 1), (EVAL, 1, 0), (TRAIN, 2, 0), (TRAIN, 2, 1)):
            feed(kind, step, index)
        feed(CHECK, 0, 0)
        assert (feed.step_tokens(2), feed.tokens) == (4 * 8 - 6, 2 * (4 * 8 - 6))


def test_a_resumed_feed_goes_on_counting_and_an_export_is_no_step():
    state = json.loads(json.dumps({"tokens": 50, "sources": []}))
    feed = Feed(Padded(), [], Place(0, (1,)), BatchSize(4, 1, 0), start=(2, 8))
    assert feed.restore(state), "what is not of the data is kept from it"
    feed(CHECK, 0, 0)
    assert feed.state(2) == {"tokens": 50}
    feed(TRAIN, 3, 0)
    assert feed.state(3) == {"tokens": 50 + 26}


def test_a_checkpoint_without_a_count_has_that_of_its_rows():
    assert trained_tokens({}, rows=6, seq_length=8) == 48
    assert trained_tokens({"tokens": 40}, rows=6, seq_length=8) == 40


def test_a_packet_knows_its_tokens():
    rows = torch.tensor([[5, 6, 2, PAD], [7, 8, 9, 2]])
    assert Packet(TRAIN, 1, 0, **inputs_of(rows)).num_tokens == 7
    assert Packet(TRAIN, 1, 0, **inputs_of(rows[1:])).num_tokens == 4


def test_tokens_a_second_are_those_of_text(capsys: pytest.CaptureFixture[str]):
    class Store(dict):
        place = Place(0, (1,))
        publish = dict.__setitem__
        peek = dict.get

    world: Any = Store()
    progress = Progress(world, max_steps=2, first_step=0)
    progress.step(1.5, tokens=40)
    progress.publish("train", 2, [3.5])
    progress.step(0.5, tokens=20)
    assert capsys.readouterr().err == "step 2/2  30 tokens/s, loss by stage: 3.500\n"


# --- bits a byte


def test_rows_that_begin_with_a_document_are_counted():
    sizes = np.array([3, 10, 5, 4, 1])
    packed = pack(sizes, 5, "best_fit")  # 0-2 | 3-7 | 8-12 | 13-17 | 18-21, 22: the third goes on with the second
    assert count_openings(packed, [sizes]) == count_openings(packed, [sizes[:2], sizes[2:4], sizes[4:]]) == 4
    assert count_openings(pack(sizes, 5, "none"), [sizes]) == 4, "a document of one token has no row"
    assert count_openings(pack(sizes[:0], 5, "best_fit"), []) == 0


@pytest.mark.parametrize(
    ("packing", "document_mask", "not_predicted"),
    [("concat", False, 0), ("concat", True, 9), ("none", False, 9), ("none", True, 9), ("best_fit", True, 9)],
)
def test_the_bytes_are_all_and_the_tokens_those_that_are_predicted(
    settings, tokenizer, tmp_path, texts, packing: str, document_mask: bool, not_predicted: int
):
    held = [*texts[:8], "alpha " * 200]  # the last is longer than a row
    files = {"train_file": write_jsonl(tmp_path / "a.jsonl", texts)}
    files["validation_file"] = write_jsonl(tmp_path / "held.jsonl", held)
    config = settings(seq_length=40, packing=packing, document_mask=document_mask, **files)
    (found,) = prepare_all(config, tokenizer).validation
    tokens = sum(len(tokenizer(text, add_special_tokens=False)["input_ids"]) + 1 for text in held)
    text_bytes = sum(len(text.encode()) for text in held)
    assert found.bytes_per_token == pytest.approx(text_bytes / (tokens - not_predicted), rel=1e-12)


def test_documents_that_follow_others_in_a_row_are_predicted(settings, tokenizer, tmp_path, texts):
    config = settings(seq_length=64, packing="best_fit", train_file=write_jsonl(tmp_path / "a.jsonl", texts))
    data = prepare_all(config, tokenizer)
    (found,) = data.validation
    rows = found.sequences.batch(0, found.sequences.num_sequences or 0)
    held = [t for row in rows for t in tokenizer.decode(row[row >= 0]).split(tokenizer.eos_token)[:-1]]
    predicted = int((rows >= 0).sum()) - len(rows)
    assert len(held) > len(rows)
    assert found.bytes_per_token == pytest.approx(sum(len(text.encode()) for text in held) / predicted, rel=1e-12)


def test_of_a_mixture_every_source_has_the_bytes_of_its_rows(settings, tokenizer, tmp_path):
    """Rows of one source hold four times as many tokens as those of the other."""
    texts = {"a": ["alpha " * 6] * 40, "b": ["alpha " * 24] * 40}
    entries = [f"- source: {write_jsonl(tmp_path / f'{n}.jsonl', found)}\n" for n, found in texts.items()]
    (tmp_path / "mix.yaml").write_text("".join(entries))
    config = settings(data_mixture=str(tmp_path / "mix.yaml"), packing="none", seq_length=200)
    (found,) = prepare_all(config, tokenizer).validation
    one_each = [text[0] for text in texts.values()]
    tokens = sum(len(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in one_each)  # and EOS less first
    assert found.bytes_per_token == pytest.approx(sum(len(text.encode()) for text in one_each) / tokens, rel=1e-12)


def documents(trainer: Trainer, name: str, first: int, count: int) -> Path:
    lines = [line for line in trainer.text.read_text().splitlines() if len(line) > 8]
    return Path(write_jsonl(trainer.folder / name, lines[first : first + count]))


EIGHT_ROWS = {"none": 8, "best_fit": 18}  # documents that fill so many


def nats_of(folder: Path, texts: list[str], tokenizer: Any) -> tuple[float, int]:
    """Sum over the documents, each by itself, and how many tokens were predicted."""
    model: Any = AutoModelForCausalLM.from_pretrained(folder)
    nats, count = 0.0, 0
    for text in texts:
        ids = torch.tensor([[*tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]])
        assert ids.shape[1] <= 32
        with torch.no_grad():
            nats += float(model(input_ids=ids, labels=ids).loss) * (ids.shape[1] - 1)
        count += ids.shape[1] - 1
    return nats, count


@pytest.mark.processes
@pytest.mark.parametrize(
    ("ranks", "settings"),
    [
        (2, {"packing": "none", "num_stages": 2}),
        (2, {"packing": "none", "num_stages": 1}),
        (1, {"packing": "best_fit", "document_mask": True}),
        (2, {"packing": "none", "num_stages": 2, "method": "backprop"}),
        (4, {"packing": "best_fit", "num_stages": 2, "method": "backprop", "document_mask": True}),
    ],
    ids=["stages", "replicas", "masked", "backprop", "backprop-masked"],
)
def test_a_record_is_of_the_text_that_was_evaluated(trainer: Trainer, ranks: int, settings: dict[str, Any]):
    """All rows of a set are evaluated: loss, tokens and bits a byte are those of its documents, taken one by one."""
    stages, rows = settings.get("num_stages", 1), 8
    replicas = ranks // stages
    train, held = (
        documents(trainer, "train.jsonl", 0, 90),
        documents(trainer, "held.jsonl", 90, EIGHT_ROWS[settings["packing"]]),
    )
    flags = {"train_file": train, "validation_file": held, "learning_rate": 0.02, **settings}
    flags |= {"per_device_train_batch_size": 1, "max_steps": 8, "eval_batches": rows // replicas}
    config = parse(trainer.flags("run", **flags))
    tokenizer = load_tokenizer(config)
    assert prepare_all(config, tokenizer).validation[0].sequences.num_sequences == rows
    run = trainer.run("run", ranks, **flags)
    texts = [json.loads(line)["text"] for line in held.read_text().splitlines()]
    (record,) = records(run, stages - 1, "eval")
    nats, count = nats_of(run / "export", texts, tokenizer)
    assert record["loss"] == pytest.approx(nats / count, rel=1e-5)
    assert record["tokens"] == count + len(texts)
    assert record["padding"] == pytest.approx(1 - record["tokens"] / (rows * 32))
    text_bytes = sum(len(text.encode()) for text in texts)
    assert record["bits_per_byte"] == pytest.approx(nats / math.log(2) / text_bytes, rel=1e-5)
    steps = [[(r["tokens"], r["padding"]) for r in records(run, stage)] for stage in range(stages)]
    assert steps[0] == steps[-1]
    assert all(padding == pytest.approx(1 - tokens / (replicas * 32)) for tokens, padding in steps[0])
    assert sum(tokens for tokens, _ in steps[0]) < 8 * replicas * 32, "steps are of text, too"


@pytest.mark.processes
def test_rows_end_to_end_are_counted_as_ever(trainer: Trainer):
    run = trainer.run("run", 2, num_stages=2, save_steps=4)
    for stage in (0, 1):
        assert [(r["tokens"], r["padding"]) for r in records(run, stage)] == [(64, 0.0)] * 4
        (record,) = records(run, stage, "eval")
        assert (record["tokens"], record["padding"]) == (2 * 64, 0.0)
    card = (run / "export/README.md").read_text()
    assert "| tokens | 256 |" in card
    assert "| text.txt | 100.0% | concat | 1 |" in card


@pytest.mark.processes
def test_a_resumed_run_has_counted_from_its_first_step(trainer: Trainer):
    """In the model's card, too, and in that of a model from a checkpoint."""
    both = [documents(trainer, f"{name}.jsonl", first, 60) for name, first in (("a", 0), ("b", 60))]
    mixture = trainer.folder / "mix.yaml"
    mixture.write_text("".join(f"- source: {path}\n  weight: {n}\n" for n, path in enumerate(both, start=1)))
    flags = {"train_file": None, "data_mixture": mixture, "packing": "none", "num_stages": 2, "save_steps": 2}
    run = trainer.run("run", 2, **flags)
    (straight,) = (line for line in (run / "export/README.md").read_text().splitlines() if line.startswith("| tokens"))
    shutil.rmtree(run / "checkpoints/step-00000004")
    trainer.run("run", 2, **flags, resume_from_checkpoint="true")
    tokens = sum(r["tokens"] for r in records(run, 1))
    wanted = f"| tokens | {tokens}, and {1 - tokens / (4 * 64):.1%} of the rows' places padding |"
    assert straight == wanted
    export_checkpoint(run / "checkpoints/step-00000004", trainer.folder / "out", None, "auto")
    for folder in (run / "export", trainer.folder / "out"):
        lines = (folder / "README.md").read_text().splitlines()
        assert wanted in lines
        (first,) = (line for line in lines if line.startswith("| a.jsonl |"))
        assert first.startswith("| a.jsonl | 33.3% | none | 5"), "five percent are held out"
        assert any(line.startswith("| b.jsonl | 66.7% | none |") for line in lines)
        assert str(trainer.folder) not in "".join(line for line in lines if ".jsonl |" in line)


# --- a step


LAYOUTS = {  # of a step of 4 rows: ranks, stages, rows of a micro-batch, micro-batches
    "whole": (1, 1, 4, 1),
    "replicas": (2, 1, 2, 1),
    "stages": (2, 2, 1, 4),
    "both": (4, 2, 1, 2),
}


@pytest.mark.processes
@pytest.mark.parametrize(
    ("layouts", "settings"),
    [
        (["whole", "replicas", "stages"], {"packing": "none", "layers_per_block": 2}),
        (["whole", "both"], {"packing": "best_fit", "document_mask": True, "method": "backprop"}),
    ],
    ids=["local", "backprop"],
)
def test_a_step_is_a_mean_over_its_positions_in_any_layout(trainer: Trainer, layouts: list[str], settings: dict):
    """A micro-batch that is half padding counts half, on whatever replica it is."""
    flags = {"train_file": documents(trainer, "train.jsonl", 0, 90), "learning_rate": 0.02, **settings}
    found = []
    for name in layouts:
        ranks, stages, rows, micro_batches = LAYOUTS[name]
        layout = {"per_device_train_batch_size": rows, "gradient_accumulation_steps": micro_batches}
        layout["eval_batches"] = micro_batches
        run = trainer.run(name, ranks, num_stages=stages, max_steps=8, **layout, **flags)
        found.append([[record["loss"] for record in records(run, stages - 1, split)] for split in ("train", "eval")])
    for others in found[1:]:
        for losses, same in zip(found[0], others, strict=True):
            assert losses == pytest.approx(same, rel=1e-5)


def test_micro_batches_count_by_what_is_scored_in_them():
    """Row n has 8 - n % 4 tokens, of which the first is not predicted."""
    feeds = [Feed(Padded(), [Padded()], Place(r, (2,)), BatchSize(2, 2, 1)) for r in (0, 1)]
    weights = [[feed(TRAIN, 1, index).weight for index in (0, 1)] for feed in feeds]
    assert weights == [[12 / 11] * 2, [10 / 11] * 2]
    use = RowUse(documents=DocumentMask(5))  # a document a token
    apart = Feed(Padded(), [], Place(0, (1,)), BatchSize(1, 4, 0), use=use)
    assert [apart(TRAIN, 1, index).weight for index in range(4)] == [0.0] * 4


# --- other means


def test_a_stored_list_has_no_padding_to_count():
    rows = StoredSequences(PackedTokens([np.arange(64, dtype=np.int32)], 8), seed=1)
    feed = Feed(rows, [], Place(0, (1,)), BatchSize(2, 1, 0))
    feed(TRAIN, 1, 0)
    assert feed.tokens == feed.step_tokens(1) == 16


def test_a_readout_is_scored_where_an_exit_is():
    readout, ids = Readout(4, 7), torch.tensor([[1, 2, 3, 4, 5, 6]])
    torch.nn.init.normal_(readout.output.weight)
    features, labels = torch.randn(1, 6, 4), ids.masked_fill(ids == 4, -100)
    logits = readout.output(readout.norm(features))[0, :-1]
    wanted = torch.nn.functional.cross_entropy(logits[[0, 1, 3, 4]], ids[0, [1, 2, 4, 5]])
    torch.testing.assert_close(readout(features, labels), wanted)
