"""A start that cannot fit in memory is refused with what would fit, and one that can is not."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from planning import MODEL
from transformers import AutoConfig

from llm_local.checks.memory_check import MemoryCheck, Room
from llm_local.checks.preflight import preflight
from llm_local.checks.sequence_trial import undividable
from llm_local.config import Config, ConfigError
from llm_local.cut import plan_partition
from llm_local.memory.division import Division
from llm_local.memory.sizes import ModelSizes, read_model, read_shares
from llm_local.room import host_room
from llm_local.sequence_problems import sequence_problems
from llm_local.tensor_problems import tensor_problems

GB = 1e9


def check_of(model: Path, room: Room, world_size: int = 2) -> MemoryCheck:
    base = Config()
    config = replace(base.model, config_name=str(model))
    anatomy = read_model(config)[0]
    made = AutoConfig.from_pretrained(model)

    def sizes_of(division: Division) -> ModelSizes:
        return read_shares(config, 1024, "fp32", (division,))[1][0]

    def others(run: Config) -> list[str]:
        return tensor_problems(run) + sequence_problems(run)

    return MemoryCheck(made, anatomy, sizes_of, world_size, room, others, lambda run: undividable(run, made, anatomy))


def config_of(rows: int, num_stages: int) -> Config:
    base = Config()
    train = replace(base.train, per_device_train_batch_size=rows)
    return replace(
        base, data=replace(base.data, seq_length=1024), train=train, local=replace(base.local, num_stages=num_stages)
    )


def problems_of(check: MemoryCheck, config: Config) -> tuple[list[str], list[str]]:
    return check.problems(config, check.of(config, plan_partition(config, check.anatomy)))


@pytest.mark.parametrize(
    ("left", "rows", "repair"),
    [
        (9.0, 16, "per_device_train_batch_size=8 with gradient_accumulation_steps=2 would fit"),
        (5.0, 15, "gradient_checkpointing=True would fit"),
        (1.5, 1, "num_stages=2 would fit"),
        (0.5, 1, "no flags make it fit: use a smaller model, shorter rows, or more devices"),
    ],
)
def test_a_run_that_cannot_fit_names_what_takes_most_and_the_nearest_that_fits(
    model: Path, left: float, rows: int, repair: str
):
    check = check_of(model, Room(left * 2 * GB, 2))
    problems, warnings = problems_of(check, config_of(rows, num_stages=1))
    assert not warnings
    assert problems[0].startswith("a rank of stage 0 needs ")
    assert f"and this host has {left * 2:.1f} GB left for 2 ranks, {left:.1f} GB each; " in problems[0]
    assert problems[0].endswith(repair)


@pytest.mark.parametrize(
    ("world_size", "num_stages", "zero", "repair"),
    [(4, 2, 2, "tensor_parallel_size=2 would fit"), (16, 8, 3, "sequence_parallel_size=2 would fit")],
)
def test_ranks_that_divide_layers_or_rows_may_be_the_nearest_that_fits(
    model: Path, world_size: int, num_stages: int, zero: int, repair: str
):
    """ZeRO-3 does not go with divided layers; and of 8 layers there are no more stages than 8."""
    config = config_of(3, num_stages)
    config = replace(config, deepspeed_json={"zero_optimization": {"stage": zero}})
    checkpointing = replace(config, train=replace(config.train, gradient_checkpointing=True))
    check = check_of(model, Room(1e12, world_size), world_size)
    name = repair.partition("=")[0]
    divided = replace(checkpointing, local=replace(checkpointing.local, **{name: 2}))
    needed = [sum(m.whole for m in check.of(c, plan_partition(c, check.anatomy))) for c in (checkpointing, divided)]
    assert needed[1] < needed[0] / 1.11
    ranks = world_size // num_stages
    room = Room(needed[1] * ranks * 1.01, world_size)
    problems, _ = problems_of(replace(check, room=room), checkpointing)
    assert problems[0].endswith(f"; {repair}")


def test_within_a_tenth_it_is_a_warning_and_with_room_it_is_nothing(model: Path):
    config = config_of(2, num_stages=2)
    check = check_of(model, Room(1e12, 2))
    assert problems_of(check, config) == ([], [])
    needed = sum(memory.whole for memory in check.of(config, plan_partition(config, check.anatomy)))
    for share, expected in [(1.05, (0, 1)), (0.95, (0, 1)), (0.85, (0, 0)), (1.15, (1, 0))]:
        problems, warnings = problems_of(replace(check, room=Room(needed / share, 2)), config)
        assert (len(problems), len(warnings)) == expected, share
        assert all(line.startswith("memory will be tight: a rank of stage ") for line in warnings)


def test_a_gpu_is_shared_by_its_ranks_and_offloading_needs_the_host(model: Path):
    config = replace(config_of(1, num_stages=2), deepspeed_json={"zero_optimization": {"stage": 1}})
    fits = Room(1e12, 2, gpu=10 * GB)
    assert problems_of(check_of(model, fits), config)[0] == []
    problems, _ = problems_of(check_of(model, replace(fits, gpu=2 * GB, sharing=2)), config)
    assert "of GPU memory, and has 1.0 GB" in problems[0]
    offloaded = {"stage": 2, "offload_optimizer": {"device": "cpu"}}
    config = replace(config, deepspeed_json={"zero_optimization": offloaded}, train=replace(config.train, bf16=True))
    problems, _ = problems_of(check_of(model, replace(fits, host=1 * GB)), config)
    assert "(offloaded " in problems[0]
    assert "of host memory, and this host has 1.0 GB left" in problems[0]


def test_the_room_of_a_host_is_what_its_groups_leave(tmp_path: Path):
    """Files that a group has in memory go first."""
    whole = host_room(tmp_path)
    assert whole > 0
    own, group = tmp_path / "cgroup", tmp_path / "jobs" / "7"
    own.write_text("0::/jobs/7\n")
    group.mkdir(parents=True)
    for name, text in [
        ("memory.max", "max"),
        ("memory.current", "600"),
        ("memory.stat", "anon 1\ninactive_file 100\n"),
    ]:
        (group / name).write_text(text)
        (group.parent / name).write_text(text)
    assert host_room(tmp_path, own) == pytest.approx(whole, rel=0.2)
    (group.parent / "memory.max").write_text("1000")
    assert host_room(tmp_path, own) == 500
    assert host_room(tmp_path, tmp_path / "none") > 500


def test_a_start_looks_at_the_memory_of_its_own_host(tmp_path: Path):
    """No machine has 40 TB for each of two ranks."""
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**MODEL, "num_hidden_layers": 24, "hidden_size": 65536, "intermediate_size": 180224}))
    base = Config()
    config = replace(
        base,
        model=replace(base.model, config_name=str(path)),
        train=replace(base.train, output_dir=str(tmp_path / "run"), per_device_train_batch_size=1),
    )
    with pytest.raises(ConfigError, match=r"a rank of stage 0 needs .* of host memory.*no flags make it fit"):
        preflight(config, 1)
    assert not (tmp_path / "run").exists()
    setup = preflight(replace(config, train=replace(config.train, ignore_memory_check=True)), 1)
    assert any("a rank of stage 0 needs" in warning for warning in setup.warnings)
    assert setup.memory[0].whole > 1e13


def test_frozen_stages_and_adapters_need_no_optimizer_for_what_stays(model: Path):
    check, config = check_of(model, Room(1e12, 2)), config_of(1, num_stages=2)
    cut = plan_partition(config, check.anatomy)
    trained = check.of(config, cut)
    frozen = check.of(replace(config, local=replace(config.local, freeze_stages="0")), cut)
    assert frozen[0].optimizer == 0 < trained[0].optimizer
    assert (frozen[0].weights, frozen[1]) == (trained[0].weights, trained[1])
    adapted = check.of(replace(config, local=replace(config.local, lora_rank=4)), cut)
    assert adapted[1].optimizer < trained[1].optimizer / 20
    assert adapted[1].weights == pytest.approx(trained[1].weights, rel=0.02)
