"""A run that cannot work is refused before anything is written: every problem in one error, printed once."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import TINY, TINY_BERT, Trainer
from launching import by_hand, deepspeed, job
from transformers.utils import is_flash_attn_2_available

from llm_local.checks.preflight import preflight
from llm_local.config import ConfigError, parse
from llm_local.train import REFUSED, main

DS = Path(__file__).parent.parent / "configs" / "ds"


@pytest.fixture
def problems(trainer: Trainer, tmp_path: Path) -> Callable[..., list[str]]:
    """problems(ranks=2, **flags) → what the run is refused for; asserts that nothing was written."""

    def problems(ranks: int = 1, **settings: Any) -> list[str]:
        before = sorted(tmp_path.rglob("*"))
        with pytest.raises(ConfigError) as refusal:
            preflight(parse(trainer.flags("run", **settings)), ranks)
        assert sorted(tmp_path.rglob("*")) == before
        return refusal.value.problems

    return problems


@pytest.fixture
def write(tmp_path: Path) -> Callable[[str, Any], Path]:
    """write(name, text or JSON) → its path."""

    def write(name: str, content: Any) -> Path:
        path = tmp_path / name
        path.write_text(content if isinstance(content, str) else json.dumps(content))
        return path

    return write


def test_a_good_run_is_not_refused(trainer: Trainer, tmp_path: Path):
    plan = preflight(parse(trainer.flags("run", num_stages=2)), 2)
    assert plan.partition.num_stages == 2
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("ranks", "settings", "said"),
    [
        (
            3,
            {"num_stages": 2},
            "3 ranks cannot be divided into num_stages=2 stages of equal size; start a multiple of 2",
        ),
        (5, {"num_stages": 5}, "4 layers"),
        (1, {"method": "layerwise"}, "method='layerwise' is unknown; choose one of backprop, chunked, delayed, greedy"),
        (1, {"head": "mlp"}, "head='mlp' is unknown; choose one of decoder, linear"),
        (2, {"num_stages": 2, "wire_dtype": "int2"}, "wire_dtype='int2' is unknown; choose one of auto, fp32, bf16"),
        (1, {"seq_length": 128}, "seq_length=128 is longer than the model's 64 positions; shorten it, or set max_pos"),
        (1, {"config_overrides": "vocab_size=500"}, "500 has no row for the tokenizer's highest id 4095; set vocab"),
        (1, {"config_overrides": "no_such=1"}, "config_overrides='no_such=1'"),
        (1, {"config_name": "missing.json"}, "config_name=missing.json: no such file"),
        (1, {"train_file": "missing.txt"}, "train_file=missing.txt does not exist; check the path"),
        (2, {"num_stages": 2, "method": "backprop", "deepspeed": DS / "zero2.json"}, "ZeRO stage 2 does not work with"),
        (1, {"method": "overlapping", "deepspeed": DS / "zero3.json"}, "ZeRO stage 3 does not work with method=over"),
        (1, {"method": "overlapping", "deepspeed": DS / "zero2_offload.json"}, "offload_optimizer does not work with"),
        (1, {"distillation_weight": 1, "deepspeed": DS / "zero3.json"}, "ZeRO stage 3 does not work with distillat"),
        (1, {"distillation_weight": 1, "distillation_top_k": 4097}, "distillation_top_k=4097 is more than the model"),
        (1, {"distillation_sampling": True}, "distillation_sampling=True needs distillation_weight above 0"),
        (1, {"distillation_weight": -1}, "distillation_weight=-1.0 must not be negative"),
        (1, {"distillation_weight": 1, "distillation_top_k": 0}, "distillation_top_k=0 must be greater than 0"),
        (1, {"distillation_weight": 1, "method": "overlapping"}, "distillation_weight=1.0 does not work with method"),
        (1, {"distillation_weight": 1, "head_token_fraction": 0.5}, "distillation_weight=1.0 needs every position of"),
        (1, {"head": "shared", "head_refresh_steps": 0}, "head_refresh_steps=0 must be greater than 0"),
        (2, {"num_stages": 2, "method": "backprop", "deepspeed": DS / "zero3.json"}, "ZeRO stage 3 does not work with"),
        (
            1,
            {"tokenizer_name": "/no/such"},
            "tokenizer_name='/no/such' has no tokenizer that can be loaded; give a dir",
        ),
    ],
)
def test_each_problem_is_named(problems, ranks: int, settings: dict[str, Any], said: str):
    found = problems(ranks, **settings)
    assert len(found) == 1, found
    assert said in found[0]


def test_fp16_on_a_cpu(problems):
    from llm_local.device import supports

    if supports("fp16"):
        pytest.skip("this machine's GPU trains in fp16")
    assert problems(fp16=True) == ["fp16 is not supported on this device; use bf16, or neither for fp32"]


def test_a_bad_data_file(problems, write):
    assert problems(train_file=write("empty.txt", ""))[0].endswith("empty.txt is empty; give a file with text")
    path = write("rows.jsonl", '{"text": "good"}\n{"body": "no text"}\n')
    assert problems(train_file=path) == [
        f"train_file={path}, line 2: no column 'text', only 'body'; set text_column_name"
    ]


@pytest.mark.processes
@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (
            {"model_type": "t5", "d_model": 32, "vocab_size": 4096},
            "task=causal-lm: transformers has no causal language model",
        ),
        (
            {**TINY, "model_type": "gemma3n_text", "num_hidden_layers": 20, "intermediate_size": [64] * 20},
            "model type 'gemma3n_text' cannot be cut into stages: its layers share keys and values",
        ),
        ({**TINY, "model_type": "no_such_model"}, "no model config in "),
        ({"hidden_size": 32}, "no model config in "),
    ],
)
def test_a_model_that_cannot_be_cut(problems, write, model: dict[str, Any], reason: str):
    found = problems(config_name=write("model.json", model))
    assert len(found) == 1, found
    assert found[0].startswith(reason)
    assert len(found[0]) > len(reason) + 20, "no reason was given"


@pytest.mark.processes
@pytest.mark.parametrize(
    ("task", "model", "reason"),
    [
        (
            "masked-lm",
            TINY,
            "task=masked-lm: transformers has no masked language model of model type 'llama'; train it with "
            "task=causal-lm",
        ),
        (
            "causal-lm",
            {"model_type": "modernbert"},
            "task=causal-lm: transformers has no causal language model of model type 'modernbert'; train it with "
            "task=masked-lm",
        ),
        (
            "masked-lm",
            TINY_BERT | {"is_decoder": True},
            "task=masked-lm: model type 'bert' does not read later tokens; set is_decoder=false in config_overrides",
        ),
        (
            "causal-lm",
            TINY_BERT,
            "model type 'bert' reads later tokens, so that predicting them is copying; set is_decoder=true in "
            "config_overrides, or task=masked-lm",
        ),
    ],
)
def test_a_model_of_another_task_is_refused(problems, write, task: str, model: dict[str, Any], reason: str):
    assert problems(task=task, config_name=write("model.json", model)) == [reason]


@pytest.mark.processes
def test_rows_longer_than_the_positions_behind_padding(problems, write):
    model = write("model.json", TINY_BERT | {"model_type": "roberta"})
    flags = {"task": "masked-lm", "config_name": model, "config_overrides": "pad_token_id=1"}
    said = (
        "seq_length=63 is longer than the model's 62 positions, which begin behind pad_token_id=1; shorten it, or set "
    )
    assert problems(seq_length=63, **flags) == [f"{said}max_position_embeddings=65 in config_overrides"]


@pytest.mark.processes
@pytest.mark.parametrize("in_config", [False, True])
@pytest.mark.parametrize(
    ("kernel", "reason"), [("flash_attention_2", "FlashAttention2"), ("flesh_attention", "is not supported")]
)
def test_an_attention_kernel_that_is_not_there(problems, write, kernel: str, reason: str, in_config: bool):
    if is_flash_attn_2_available():
        pytest.skip("this machine has flash attention")
    config = write("model.json", TINY | {"attn_implementation": kernel})
    (found,) = problems(config_name=config) if in_config else problems(attn_implementation=kernel)
    assert found.startswith(f"attn_implementation={kernel} cannot be used (")
    assert reason in found
    assert found.endswith("; install what it needs, or use sdpa or eager")


@pytest.mark.parametrize(
    ("settings", "flags", "said"),
    [
        ("{,", {}, "ds.json is not JSON: line 1"),
        ([], {}, "ds.json holds list, not settings"),
        ({"zero_optimization": {"stage": 4}}, {}, "zero_optimization.stage=4 in "),
        ({"train_micro_batch_size_per_gpu": 5}, {}, "write 'auto' there"),
        ({"gradient_clipping": 5.0}, {"max_grad_norm": 1.0}, "write 'auto' there"),
        ({"bf16": {"enabled": True}}, {}, "write 'auto' there, or give the flag (--bf16)"),
        ({"zero_optimization": {"stage": 1, "allgather_bucket_size": "auto"}}, {}, "is 'auto', but no flag has its"),
        ({"pipeline": {"seed_layers": True}}, {}, "the pipeline section of "),
    ],
)
def test_a_deepspeed_file_that_is_wrong_or_contradicts_a_flag(problems, write, settings, flags, said: str):
    found = problems(deepspeed=write("ds.json", settings), **flags)
    assert len(found) == 1, found
    assert "ds.json" in found[0]
    assert said in found[0]


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"zero_optimization": 2}, "zero_optimization is 2, not a section {...}"),
        (
            {"zero_optimization": {"stage": 2, "reduce_bucket_sise": 5}},
            "reduce_bucket_sise is no setting of",
        ),
        (
            {"optimizer": {"type": "AdamWW", "params": {"lr": "auto"}}},
            "optimizer.type='AdamWW' is unknown; use Ad",
        ),
        ({"scheduler": {"type": "WarmupRL"}}, "scheduler.type='WarmupRL' is unknown; use LRRangeTest, OneCycle, "),
        ({"scheduler": {"type": "ReduceLROnPlateau"}}, "waits for a measure that no run gives it; use LRRangeTest, "),
        ({"scheduler": {"params": {}}}, "scheduler has no type; name one, or remove scheduler: the flags have one"),
    ],
)
def test_a_deepspeed_file_that_deepspeed_would_refuse(problems, write, settings: dict[str, Any], said: str):
    (found,) = problems(deepspeed=write("ds.json", settings))
    assert re.search(said.replace("{...}", r"\{...\}"), found), found


def test_the_batch_of_all_replicas_may_stand_in_the_deepspeed_file(trainer: Trainer, write):
    flags = trainer.flags("run", num_stages=2, deepspeed=write("ds.json", {"train_batch_size": 4}))
    assert preflight(parse(flags), world_size=4).partition.num_stages == 2
    with pytest.raises(ConfigError, match="ds train_batch_size=4 vs hf"):
        preflight(parse(flags), world_size=2)


def test_a_deepspeed_file_that_is_missing(problems):
    said = f"deepspeed=missing.json (relative to {Path.cwd()}): No such file or directory"
    assert problems(deepspeed="missing.json") == [said]


def test_a_folder_with_another_run(problems, tmp_path: Path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run.yaml").write_text("seed: 1\n")
    found = problems()
    assert len(found) == 1
    assert found[0].startswith(f"output_dir={tmp_path / 'run'} holds another run; go on with it (--resume_from_checkpo")
    (tmp_path / "file").write_text("")
    assert problems(output_dir=tmp_path / "file") == [f"output_dir={tmp_path / 'file'} is a file; name a folder"]
    assert problems(resume_from_checkpoint="false")[0].startswith(f"output_dir={tmp_path / 'run'} holds another run")


def test_folders_that_cannot_be_written(problems, tmp_path: Path):
    (tmp_path / "file").write_text("")
    cases = ((tmp_path / "file" / "in", "Not a directory"), (Path("/proc/new"), "No such file or directory"))
    for name in ("output_dir", "cache_dir"):
        for folder, reason in cases:
            assert problems(**{name: folder}) == [
                f"{name}={folder} cannot be written ({reason}); choose another, or change its permissions"
            ]


@pytest.mark.parametrize(
    ("name", "where"),
    [
        ("config_name", "export/config.json"),
        ("model_name_or_path", "export"),
        ("tokenizer_name", "export/exits/stage-00"),
        ("train_file", "metrics/text.txt"),
        ("dataset_name", "checkpoints/data"),
        ("deepspeed", "run.yaml"),
        ("cache_dir", "csv/cache"),
    ],
)
def test_what_a_run_reads_is_not_overwritten_by_it(trainer: Trainer, tmp_path: Path, name: str, where: str):
    path = tmp_path / "run" / where
    (path.parent if path.suffix else path).mkdir(parents=True)
    if path.suffix:
        path.write_text("{}")
    settings = {"config_name": None, "train_file": None, name: path, "overwrite_output_dir": True}
    with pytest.raises(ConfigError) as refusal:
        preflight(parse(trainer.flags("run", **settings)), 1)
    entry = tmp_path / "run" / Path(where).parts[0]
    said = f"{name}={path} lies in {entry}, which overwrite_output_dir removes before the run reads it; choose another"
    assert [line for line in refusal.value.problems if line.startswith(said)]
    again = trainer.flags("run", **(settings | {"overwrite_output_dir": False}))
    with pytest.raises(ConfigError) as refusal:
        preflight(parse(again), 1)
    assert "removes" not in str(refusal.value)


def test_a_checkpoint_that_is_not_there_or_half_written(problems, tmp_path: Path):
    assert problems(resume_from_checkpoint="true") == [
        f"resume_from_checkpoint=true: no complete checkpoint in {tmp_path / 'run' / 'checkpoints'}"
    ]
    half = tmp_path / "run" / "checkpoints" / "step-00000002"
    half.mkdir(parents=True)
    assert problems(resume_from_checkpoint=half) == [
        f"resume_from_checkpoint={half} has no manifest.json: it is missing or half written"
    ]
    assert "no complete checkpoint in" in problems(resume_from_checkpoint=tmp_path / "run")[0]


@pytest.mark.processes
def test_a_checkpoint_of_another_layout(trainer: Trainer, problems, tmp_path: Path):
    output = trainer.run("first", 2, num_stages=2, max_steps=2, save_steps=2, eval_batches=0)
    (checkpoint,) = (output / "checkpoints").iterdir()
    found = problems(1, resume_from_checkpoint=output, num_stages=1, seq_length=16, max_steps=1)
    text = "\n".join(found)
    assert f"{checkpoint} was written with seq_length=32, this run has seq_length=16: rows of another length" in text
    assert f"{checkpoint} is beyond max_steps=1; raise max_steps" in text
    assert "num_stages" not in text, "another layout is none of the problems"


BAD: dict[str, Any] = {"num_stages": 3, "method": "layerwise", "seq_length": 128, "train_file": "missing.txt"}
BAD_LINES = (
    "llm_local: the configuration has 4 problems:",
    "  - method='layerwise' is unknown",
    "  - 2 ranks cannot be divided into num_stages=3",
    "  - train_file=missing.txt does not exist",
    "  - seq_length=128 is longer than the model's 64 positions",
)


@pytest.mark.processes
def test_all_problems_are_printed_once_under_a_launcher(trainer: Trainer, tmp_path: Path):
    with job(deepspeed(2), trainer.flags("run", **BAD), tmp_path) as run:
        assert run.wait(60) not in (0, None)
        for line in BAD_LINES:
            assert run.text.count(line) == 1, run.text
        assert "Traceback" not in run.text
        assert " ends: " not in run.text
    assert not (tmp_path / "run").exists()


@pytest.mark.processes
def test_all_ranks_end_after_a_refusal_without_a_launchers_help(trainer: Trainer, tmp_path: Path):
    """The others wait for rank 0 at the rendezvous, and would until --ddp_timeout."""
    with by_hand(2, trainer.flags("run", **BAD, ddp_timeout=600), tmp_path) as ranks:
        assert [rank.wait(30) for rank in ranks] == [REFUSED, REFUSED], [rank.text for rank in ranks]
        for line in BAD_LINES:
            assert ranks[0].text.count(line) == 1, ranks[0].text
        assert "llm_local: " not in ranks[1].text, ranks[1].text


def test_an_unknown_flag(trainer: Trainer, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("RANK", raising=False)
    assert main([*trainer.flags("run"), "--num_stagse=2"]) == REFUSED
    assert "1 problem:\n  - unknown argument '--num_stagse=2'" in capsys.readouterr().err
