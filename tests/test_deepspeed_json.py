"""What DeepSpeed's JSON asks for is done, or refused in one line before the start."""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from conftest import Trainer, block_losses
from ranks import run_ranks

from llm_local.checks.preflight import preflight
from llm_local.config import ConfigError, from_flat, parse
from llm_local.ds_config import resolve

DS = Path(__file__).parent.parent / "configs" / "ds"


@pytest.fixture
def refusal(trainer: Trainer):
    def found(settings: dict[str, Any], **flags: Any) -> str:
        path = trainer.folder / "ds.json"
        path.write_text(json.dumps(settings))
        with pytest.raises(ConfigError) as error:
            preflight(parse(trainer.flags("run", deepspeed=path, **flags)), 1)
        (problem,) = error.value.problems
        assert problem.startswith(str(path))
        return problem

    return found


def zero(**settings: Any) -> dict[str, Any]:
    return {"zero_optimization": settings}


def optimizer(kind: str, **settings: Any) -> dict[str, Any]:
    return {"optimizer": {"type": kind, "params": settings}}


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"gradient_cliping": 1.0}, "gradient_cliping is no setting of DeepSpeed's; did you mean gradient_cl"),
        ({"my_own": 1}, "my_own is no setting of DeepSpeed's; remove it"),
        (
            {"optimizer": {"type": "AdamW", "parms": {}}},
            "optimizer.parms is no setting of DeepSpeed's; did you mean",
        ),
        (
            {"activation_checkpointing": {"cpu_checkpointing": True}},
            "give --gradient_checkpointing true, and remove it",
        ),
        ({"data_efficiency": {"enabled": True}}, "data_efficiency does nothing in a run: the data flags"),
        (
            {"torch_autocast": {"enabled": True, "dtype": "bfloat16"}},
            "torch_autocast does nothing in a run: give -",
        ),
        ({"compile": {"deepcompile": True}}, "compile does nothing in a run: give --torch_compile true"),
        ({"tensor_parallel": {"autotp_size": 2}}, "tensor_parallel.autotp_size=2, the run has tensor_parallel_size=1"),
        (zero(stage=2, zenflow={"topk_ratio": 0.1}), "zero_optimization.zenflow does nothing in a run"),
        (zero(stage=3, offload_param={"device": "nvme", "nvme_path": "/tmp"}), "offload_param.device=nvme is where no"),
    ],
)
def test_what_nothing_would_do_is_refused(refusal, settings: dict[str, Any], said: str):
    assert said in refusal(settings)


@pytest.mark.processes
@pytest.mark.parametrize(
    ("settings", "flags", "said"),
    [
        (optimizer("AdamW", lrr=1), {}, "cannot train with it: TypeError: .* unexpected keyword argument 'lrr'"),
        (zero(stage=1) | optimizer("SGD"), {}, "cannot train with it: AssertionError: .*zero_allow_untested_optimizer"),
        (optimizer("Lion"), {}, "cannot train with it: "),
        (optimizer("Lamb"), {}, "cannot train with it: "),
        (optimizer("LBFGS"), {}, "cannot train with it: TypeError: .*closure"),
        (optimizer("Adafactor"), {"save_steps": 2}, "Adafactor keeps row_var of .* in a shape that no checkpoint"),
        (zero(stage=2, offload_optimizer={"device": "cpu", "ratio": 0.3}), {}, "offload"),
        (zero(stage=3, zero_hpz_partition_size=2), {}, "zero_hpz_partition_size=2 does not divide the 1 replicas"),
        ({"scheduler": {"type": "OneCycleLR", "params": {"max_lr": 1, "total_steps": 3}}}, {}, "Tried to step"),
        ({"scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": 0}}}, {}, "warmup_num_steps"),
        ({"scheduler": {"type": "StepLR", "params": {"step": 3}}}, {}, "unexpected keyword argument 'step'"),
        (
            zero(stage=1) | optimizer("Muon"),
            {"max_grad_norm": 1.0},
            "max_grad_norm=1.0 with Muon under ZeRO",
        ),
    ],
)
def test_what_no_engine_takes_is_one_line_before_the_start(refusal, settings, flags, said: str):
    found = refusal(settings, **flags)
    assert re.search(said, found), found
    assert "\n" not in found


def test_a_rate_below_a_schedules_end_is_refused(trainer: Trainer):
    flags = trainer.flags("run", lr_scheduler_type="polynomial", learning_rate=1e-8)
    with pytest.raises(ConfigError, match=r"polynomial with learning_rate=1e-08: .*; raise learning_rate"):
        preflight(parse(flags), 1)


def test_what_an_optimizer_leaves_out_is_the_flags(tmp_path: Path):
    flags = {"learning_rate": 5e-4, "weight_decay": 0.3, "adam_beta2": 0.95, "warmup_steps": 7, "max_steps": 50}

    def params(settings: dict[str, Any], section: str) -> dict[str, Any]:
        path = tmp_path / "ds.json"
        path.write_text(json.dumps(settings))
        config = from_flat({"config_name": "x.json", "deepspeed": str(path), **flags})
        return resolve(config, 1, SimpleNamespace(hidden_size=8))[section]["params"]

    ours = {"lr": 5e-4, "weight_decay": 0.3}
    assert params({"optimizer": {"type": "Adam"}}, "optimizer") == {
        **ours,
        "betas": [0.9, 0.95],
        "eps": 1e-8,
        "torch_adam": True,
    }
    assert params(optimizer("Lion", lr=5e-4), "optimizer") == ours
    assert params(optimizer("Rprop"), "optimizer") == {"lr": 5e-4}
    schedule = params({"scheduler": {"type": "WarmupDecayLR"}}, "scheduler")
    assert schedule == {"warmup_max_lr": 5e-4, "total_num_steps": 50, "warmup_num_steps": 7}


@pytest.mark.parametrize(
    ("variables", "flags", "said"),
    [
        ({"MIXED_PRECISION": "bf16"}, {}, "asks for mixed_precision=bf16, the run has fp32: give --bf16 true"),
        ({"USE_FSDP": "true"}, {}, "asks for use_fsdp=true, the run has None: give --deepspeed"),
        (
            {"USE_DEEPSPEED": "true", "DEEPSPEED_ZERO_STAGE": "3"},
            {},
            "zero_stage=3, the run has 0: give --d",
        ),
        (
            {"USE_DEEPSPEED": "true", "GRADIENT_ACCUMULATION_STEPS": "4", "GRADIENT_CLIPPING": "1.0"},
            {"deepspeed": DS / "zero2.json"},
            "asks for gradient_accumulation_steps=4, the run has 1: give --gradient_accumulation_steps 4, or remove it",
        ),
        (
            {"USE_DEEPSPEED": "true", "DEEPSPEED_CONFIG_FILE": "my.json"},
            {},
            "=my.json, the run has None: give",
        ),
    ],
)
def test_what_accelerates_file_asks_for_is_not_passed_over(trainer: Trainer, monkeypatch, variables, flags, said: str):
    for name, value in {"MIXED_PRECISION": "no", "DYNAMO_BACKEND": "NO", **variables}.items():
        monkeypatch.setenv(f"ACCELERATE_{name}", value)
    with pytest.raises(ConfigError) as error:
        preflight(parse(trainer.flags("run", **flags)), 1)
    (problem,) = error.value.problems
    assert said in problem


def test_accelerates_micro_batches_are_of_equal_replicas(trainer: Trainer, monkeypatch):
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "1")
    preflight(parse(trainer.flags("run", num_stages=2, stage_replicas="2,1")), 3)


def train(arguments: list[str]) -> int:
    from torch._dynamo import config

    from llm_local.train import main

    config.disable = True  # compiling Muon's update takes a minute on a CPU
    return main(arguments)


@pytest.mark.processes
def test_muon_trains_and_goes_on_elsewhere(trainer: Trainer):
    """Its momentum under ZeRO is of whole matrices, where masters are stretches of them."""
    path = trainer.folder / "ds.json"
    path.write_text(json.dumps(zero(stage=2) | optimizer("Muon", momentum=0.9)))
    common = {"deepspeed": path, "max_steps": 6, "eval_batches": 0, "max_grad_norm": 0, "save_steps": 3}
    found = []
    for ranks, more in ((2, {}), (1, {"resume_from_checkpoint": trainer.folder / "with-2/checkpoints/step-00000003"})):
        settings = {**common, **more, "num_stages": 1, "per_device_train_batch_size": 4 // ranks}
        assert run_ranks(train, ranks, trainer.flags(f"with-{ranks}", **settings)) == [0] * ranks
        found.append([loss for (loss,) in block_losses(trainer.folder / f"with-{ranks}", 1)])
    straight, again = found
    assert again == pytest.approx(straight[3:], rel=1e-3)
    assert straight[-1] < straight[0]


@pytest.mark.parametrize(
    ("stage", "replicas", "flags", "kept"),
    [(1, 1, {}, 0), (2, 1, {}, 0), (3, 1, {}, 3), (1, 2, {}, 1), (1, 1, {"bf16": True}, 1), (2, 1, {"fp16": True}, 2)],
)
def test_one_rank_in_float32_does_without_shards(tmp_path: Path, stage: int, replicas: int, flags: dict, kept: int):
    """ZeRO 1 and 2 would copy its weights and gradients to and fro."""
    path = tmp_path / "ds.json"
    path.write_text(json.dumps(zero(stage=stage)))
    config = from_flat({"config_name": "x.json", "deepspeed": str(path), **flags})
    assert resolve(config, replicas, SimpleNamespace(hidden_size=8))["zero_optimization"]["stage"] == kept
