"""Training's options over real processes: DeepSpeed's own sections, checkpointed activations, streams, monitors."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import TINY, Trainer, block_losses, records
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import PreTrainedTokenizerFast

from llm_local.checks.preflight import preflight
from llm_local.config import ConfigError, from_flat, parse
from llm_local.device import missing_for_compile
from llm_local.records import Record

pytestmark = pytest.mark.processes

COUNTED_ON_LINKS = ("wait_seconds", "sent_bytes", "received_bytes", "sent_gradient_bytes")
DEEPSPEED: dict[str, Any] = {
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
    "zero_optimization": {"stage": 1},
    "optimizer": {
        "type": "AdamW",
        "params": {"lr": "auto", "betas": "auto", "eps": "auto", "weight_decay": "auto"},
    },
    "scheduler": {
        "type": "WarmupDecayLR",
        "params": {
            "total_num_steps": "auto",
            "warmup_min_lr": "auto",
            "warmup_max_lr": "auto",
            "warmup_num_steps": "auto",
            "warmup_type": "linear",
        },
    },
}


def test_an_optimizer_and_a_scheduler_of_the_json_are_used(trainer: Trainer):
    path = trainer.folder / "ds.json"
    path.write_text(json.dumps(DEEPSPEED))
    output = trainer.run("run", 2, num_stages=2, deepspeed=path, warmup_steps=2, max_steps=6, learning_rate=1e-3)
    lrs = [r["lr"] for r in records(output, 1)]
    assert max(lrs) == pytest.approx(1e-3)
    assert lrs[-1] < max(lrs), "WarmupDecayLR decays"


def test_the_flags_schedule_and_decay_are_used_without_them(trainer: Trainer):
    settings = {"lr_scheduler_type": "linear", "warmup_steps": 2, "max_steps": 4, "learning_rate": 1e-3}
    output = trainer.run("run", 1, **settings)
    assert [r["lr"] for r in records(output, 0)] == pytest.approx([0.0, 5e-4, 1e-3, 5e-4])


@pytest.mark.parametrize("zero", [1, 3])
def test_checkpointed_activations_change_nothing(trainer: Trainer, zero: int):
    """Every weight of a later stage gets its gradient although the received hidden states need none."""
    settings = {"num_stages": 2, "deepspeed": f"configs/ds/zero{zero}.json"}
    plain = trainer.run("plain", 2, **settings)
    recomputed = trainer.run("recomputed", 2, **settings, gradient_checkpointing=True)
    assert block_losses(recomputed, 2) == block_losses(plain, 2)
    assert [r["grad_norm"] for r in records(recomputed, 1)] == [r["grad_norm"] for r in records(plain, 1)]


def test_compiled_layers_change_nothing(trainer: Trainer):
    """But the order of sums. Layers are alike, so there is one to compile for both blocks."""
    if missing_for_compile():
        pytest.skip("no compiler")
    settings = {"method": "chunked", "layers_per_block": 2, "max_steps": 2}
    plain, compiled = (trainer.run(str(on), 1, **settings, torch_compile=on) for on in (False, True))
    torch.testing.assert_close(
        torch.tensor(block_losses(compiled, 1)), torch.tensor(block_losses(plain, 1)), rtol=1e-5, atol=0.0
    )


def test_compiling_without_a_compiler_is_refused(trainer: Trainer, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("torch._inductor.config.cpp.cxx", ("no-such-compiler",))
    with pytest.raises(ConfigError, match=r"torch_compile=True needs a C\+\+ compiler, as g\+\+, which is not there"):
        preflight(parse(trainer.flags("run", torch_compile=True)), 1)


def test_a_stream_trains_through_two_stages(trainer: Trainer):
    path = trainer.folder / "documents.jsonl"
    text = trainer.text.read_text()
    documents = [text[i : i + 500] for i in range(0, len(text), 500)]
    path.write_text("".join(json.dumps({"text": document}) + "\n" for document in documents))
    output = trainer.run("run", 2, num_stages=2, train_file=path, streaming=True)
    assert len(records(output, 1)) == 4
    assert len(records(output, 1, "eval")) == 1


def test_run_yaml_is_a_config_and_records_have_every_field(trainer: Trainer):
    output = trainer.run("run", 2, num_stages=2, eval_steps=2)
    flat = yaml.safe_load((output / "run.yaml").read_text())
    assert from_flat(flat) == parse([str(output / "run.yaml")])
    fields = list(Record.__dataclass_fields__)
    of_others = ["sent_replica_bytes", "name", "perplexity", "bits_per_byte", "accuracy", "top_5_accuracy"]
    for stage in (0, 1):
        for record in records(output, stage):
            assert list(record) == fields
            assert [name for name in fields if record[name] is None] == of_others
            assert 0 <= record["wait_seconds"] <= record["step_seconds"]
        assert [r["step"] for r in records(output, stage, "eval")] == [2, 4]


def test_backprop_writes_to_the_monitor_too(trainer: Trainer):
    output = trainer.run("run", 2, num_stages=2, method="backprop", report_to="csv")
    assert (output / "csv" / "stage-00" / "train_loss.csv").exists()
    for record in records(output, 0):
        assert record["step_seconds"] > 0
        assert {record[name] for name in COUNTED_ON_LINKS} == {None}, "nothing counts what DeepSpeed's pipeline sends"


@pytest.mark.parametrize("reporter", ["tensorboard", "csv"])
def test_deepspeeds_monitor_writes_the_losses_of_every_stage(trainer: Trainer, reporter: str):
    output = trainer.run("run", 2, num_stages=2, layers_per_block=1, report_to=reporter)
    for stage in (0, 1):
        folder = output / reporter / f"stage-{stage:02d}"
        wanted = [r["loss"] for r in records(output, stage)]
        if reporter == "tensorboard":
            events = EventAccumulator(str(folder)).Reload()
            found = [event.value for event in events.Scalars("train/loss")]
        else:
            lines = (folder / "train_loss.csv").read_text().splitlines()[1:]
            found = [float(line.split(",")[1]) for line in lines]
        assert found == pytest.approx(wanted, rel=1e-5)


def test_a_tokenizer_that_the_export_would_lose_is_warned_of(trainer: Trainer):
    """transformers forces a tokenizer class on a few model types, whatever the files say."""
    path = trainer.model(TINY | {"model_type": "qwen2"})
    (warning,) = preflight(parse(trainer.flags("checked", config_name=path)), 1).warnings
    assert "beside a 'qwen2' model AutoTokenizer reads this tokenizer as Qwen2Tokenizer" in warning
    output = trainer.run("run", 1, config_name=path)
    again = PreTrainedTokenizerFast.from_pretrained(output / "export")
    assert again.decode(again("def f():\n    pass").input_ids) == "def f():\n    pass"


def test_resuming_a_finished_run_only_exports(trainer: Trainer):
    flags = {"num_stages": 2, "save_steps": 2, "report_to": "csv"}
    trainer.run("run", 2, **flags)
    (trainer.folder / "run/export/config.json").unlink()
    output = trainer.run("run", 2, **flags, resume_from_checkpoint="true")
    assert (output / "export/config.json").exists()
    assert [r["step"] for r in records(output, 0)] == [1, 2, 3, 4]
    assert [r["step"] for r in records(output, 0, "eval")] == [4]
    assert steps_in_csv(output) == {"train": ["step", "1", "2", "3", "4"], "eval": ["step", "4"]}
    shutil.rmtree(output / "checkpoints/step-00000004")
    trainer.run("run", 2, **flags, resume_from_checkpoint="true")
    assert steps_in_csv(output) == {"train": ["step", "1", "2", "3", "4"], "eval": ["step", "4"]}


def steps_in_csv(output: Path) -> dict[str, list[str]]:
    """The first column of DeepSpeed's csv files of losses, which is the same for both stages."""
    found = {}
    for split in ("train", "eval"):
        files = [output / f"csv/stage-{stage:02d}/{split}_loss.csv" for stage in (0, 1)]
        found[split], same = ([line.partition(",")[0] for line in file.read_text().splitlines()] for file in files)
        assert found[split] == same
    return found


def test_fewer_bits_on_the_wire_are_close_to_fp32(trainer: Trainer):
    whole = trainer.run("fp32", 2, num_stages=2)
    for wire in ("bf16", "int8", "int4"):
        fewer = trainer.run(wire, 2, num_stages=2, wire_dtype=wire)
        ours, theirs = torch.tensor(block_losses(fewer, 2)), torch.tensor(block_losses(whole, 2))
        assert torch.equal(ours[:, 0], theirs[:, 0]), wire
        assert not torch.equal(ours[:, 1], theirs[:, 1]), wire
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=0.0, msg=wire)


def test_a_residual_stream_in_float32_trains_in_bf16(trainer: Trainer):
    """Mamba keeps its residual in float32 whatever the weights are."""
    config = {"model_type": "mamba", "vocab_size": 4096, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 8}
    output = trainer.run("run", 2, num_stages=2, config_name=trainer.model(config), bf16=True, max_steps=2)
    assert len(records(output, 1)) == 2
