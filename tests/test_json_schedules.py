"""A scheduler of DeepSpeed's JSON, its own or torch's, goes on after a checkpoint as if there had been none."""

from __future__ import annotations

import json
from typing import Any

import pytest
from conftest import Trainer, records
from engines import tiny_engine
from ranks import run_ranks

from llm_local.checkpoint.loader import stand_at
from llm_local.checkpoint.saver import block_state

pytestmark = pytest.mark.processes
STEPS = 12
SCHEDULES: dict[str, dict[str, Any]] = {
    "WarmupLR": {"warmup_max_lr": "auto", "warmup_num_steps": "auto"},
    "WarmupDecayLR": {"warmup_max_lr": "auto", "warmup_num_steps": "auto", "total_num_steps": "auto"},
    "WarmupCosineLR": {"warmup_num_steps": "auto", "total_num_steps": "auto"},
    "OneCycle": {"cycle_min_lr": 1e-4, "cycle_max_lr": 1e-3, "cycle_first_step_size": 4, "decay_step_size": 2},
    "LRRangeTest": {"lr_range_test_min_lr": 1e-4, "lr_range_test_step_size": 3},
    "StepLR": {"step_size": 3, "gamma": 0.3},
    "MultiStepLR": {"milestones": [2, 7]},
    "ConstantLR": {"factor": 0.5, "total_iters": 7},
    "LinearLR": {"total_iters": 8},
    "ExponentialLR": {"gamma": 0.9},
    "PolynomialLR": {"total_iters": STEPS, "power": 2.0},
    "CosineAnnealingLR": {"T_max": 5, "eta_min": 1e-5},
    "CosineAnnealingWarmRestarts": {"T_0": 3, "T_mult": 2},
    "CyclicLR": {"base_lr": 1e-4, "max_lr": 1e-3, "step_size_up": 3, "cycle_momentum": False},
    "OneCycleLR": {"max_lr": 1e-3, "total_steps": STEPS},
}


def settings_of(name: str, stage: int) -> dict[str, Any]:
    optimizer, scheduler = {"type": "AdamW", "params": {"lr": "auto"}}, {"type": name, "params": SCHEDULES[name]}
    return {"optimizer": optimizer, "scheduler": scheduler, "zero_optimization": {"stage": stage}}


def _rates(scheduler: Any) -> list[Any]:
    return [(group["lr"], group["betas"]) for group in scheduler.optimizer.param_groups]


def compare() -> list[str]:
    """Names of the schedulers that do not go on as they would have."""
    wrong = []
    for name in SCHEDULES:
        settings = settings_of(name, 2)
        engine = tiny_engine(settings, learning_rate=1e-3, warmup_steps=4, max_steps=STEPS)
        rates = [_rates(engine.lr_scheduler)]
        for _ in range(STEPS):
            engine.lr_scheduler.step()
            rates.append(_rates(engine.lr_scheduler))
        position = block_state(engine)["scheduler"]
        if position != {"last_epoch": STEPS} or len(set(map(str, rates))) < 2:
            wrong.append(f"{name}: {position}, {rates}")
        for step in (0, 7):
            again = tiny_engine(settings, learning_rate=1e-3, warmup_steps=4, max_steps=STEPS)
            stand_at(again.lr_scheduler, step)
            resumed = [_rates(again.lr_scheduler)]
            again.lr_scheduler.step()
            resumed.append(_rates(again.lr_scheduler))
            if resumed != rates[step : step + 2]:
                wrong.append(f"{name} after step {step}: {resumed} instead of {rates[step : step + 2]}")
    return wrong


def test_every_scheduler_stands_where_it_would():
    assert run_ranks(compare, 1) == [[]]


@pytest.mark.parametrize(
    ("first", "second", "backprop"),
    [("WarmupDecayLR", "WarmupDecayLR", True), (None, "CosineAnnealingLR", False), ("OneCycle", None, False)],
)
def test_a_run_goes_on_at_its_rate(trainer: Trainer, first: str | None, second: str | None, backprop: bool):
    """Also from the flags' scheduler to one of the JSON, and back."""

    def run(name: str, scheduler: str | None, **more: Any) -> list[dict[str, Any]]:
        path = trainer.folder / f"{name}.json"
        path.write_text(json.dumps(settings_of(scheduler, 1) if scheduler else {}))
        flags = {"save_steps": 4, "max_steps": STEPS, "warmup_steps": 4, "learning_rate": 1e-3, "eval_batches": 0}
        layout = {"num_stages": 2, "method": "backprop"} if backprop else {"num_stages": 1}
        return records(trainer.run(name, layout["num_stages"], deepspeed=path, **flags | layout | more), 0)

    straight = run("straight", first)
    other = straight if first == second else run("other", second)
    checkpoint = trainer.folder / "straight/checkpoints/step-00000004"
    again = run("again", second, resume_from_checkpoint=checkpoint)
    assert [r["lr"] for r in again] == [r["lr"] for r in other[4:]]
    if first == second:
        assert [r["loss"] for r in again] == [r["loss"] for r in straight[4:]]
