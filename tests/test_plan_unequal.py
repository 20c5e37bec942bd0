"""Stages with different numbers of replicas, and machines whose devices differ: in the simulation, cut, plan, words."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from itertools import combinations, pairwise
from pathlib import Path

import pytest
from planning import MODEL, planner_of

from llm_local.commands import plan as command
from llm_local.config import parse
from llm_local.partition import Costs, make_partition
from llm_local.plan.layouts import Planner, fastest
from llm_local.plan.machine import Group, Machine, hosts_of, of_each
from llm_local.plan.report import Plan, flags
from llm_local.plan.search import Choices, search
from llm_local.plan.splits import MOST_SPLITS, splits
from llm_local.plan.stages import Candidate
from llm_local.plan.times import Link, Pipe, StageSeconds, estimate_seconds, predict
from llm_local.problems import static_problems

# a host with four fast devices, and one with two slow and small ones
MACHINE = Machine(
    devices=6,
    memory_bytes=of_each([80e9, 24e9], (4, 2)),
    flops=of_each([3e14, 1e14], (4, 2)),
    memory_bytes_per_second=1e12,
    link_gbps=25,
    local_link_gbps=800,
    link_latency_seconds=1e-5,
    devices_per_host=(4, 2),
)


@pytest.fixture
def planner(tmp_path: Path) -> Planner:
    """Of a model whose heads are light beside its 24 layers."""
    path = tmp_path / "deep.json"
    path.write_text(json.dumps({**MODEL, "num_hidden_layers": 24}))
    return planner_of(path, MACHINE, rows=8)


def find(planner: Planner, *replicas: str, methods: tuple[str, ...] = ("chunked",), top: int = 50) -> Plan:
    return search(planner, Choices(methods, ["linear"], None, [0, 1, 2, 3], replicas or None), top)


def test_the_slowest_and_the_smallest_device_of_a_stage_count():
    assert MACHINE.group(range(0, 4)) == Group(4, 1, 80e9, 3e14, 1e12)
    assert MACHINE.group(range(3, 6)) == Group(3, 2, 24e9, 1e14, 1e12)
    assert MACHINE.alike() == [range(0, 4), range(4, 6)]
    assert hosts_of(12, [4]) == (4, 4, 4)
    assert hosts_of(3, [8]) == (3,)
    assert of_each([1.0, 2.0], (4, 2)) == (1.0, 1.0, 1.0, 1.0, 2.0, 2.0)
    assert of_each([5.0] * 6, (4, 2)) == 5.0
    with pytest.raises(ValueError, match="3 numbers; give one, or one for each of the 2 hosts, or of the 6 devices"):
        of_each([1.0, 2.0, 3.0], (4, 2))


def test_replicas_that_send_to_one_share_its_link():
    inside, between = 8 / 800e9, 8 / 25e9
    assert MACHINE.boundary((4, 2), 0) == Link(1e-5, 4 * between)
    assert MACHINE.boundary((3, 1, 2), 0) == Link(0.0, 3 * inside)
    assert MACHINE.boundary((3, 1, 2), 1) == Link(1e-5, 2 * between)
    assert MACHINE.boundary((2, 3, 1), 0) == Link(1e-5, 2 * between)  # both to the one on the other host
    assert MACHINE.boundary(2, 0) == Link(0.0, inside)
    assert MACHINE.gather_seconds(1e9, 2, 2) == pytest.approx(0.5 * 8e9 / 25e9 + 2e-5)


def test_each_replica_of_a_stage_trains_its_share_of_the_micro_batches():
    """A pass of a stage with R replicas takes R seconds of each: one micro-batch a second, on every stage."""
    stages = tuple(StageSeconds((float(count),), (2.0 * count,)) for count in (4, 2, 1))
    pipe = Pipe("local", stages, 8, replicas=(4, 2, 1))
    found = predict(pipe)
    assert found.step_seconds == pytest.approx(3 * 8)
    assert found.idle == pytest.approx([0, 0, 0])
    assert estimate_seconds(pipe) == pytest.approx(3 * 8)
    assert found.timeline is not None
    one = pipe.simulate(1)
    numbers = [[span.micro_batch for span in spans if span.kind == "F"] for spans in one.spans]
    assert list(map(len, numbers)) == [2, 2, 2, 2, 4, 4, 8]
    assert one.messages == {(0, 4): 2, (1, 5): 2, (2, 4): 2, (3, 5): 2, (4, 6): 4, (5, 6): 4}
    slow_first = replace(pipe, stages=(StageSeconds((8.0,), (16.0,)), *stages[1:]))
    assert predict(slow_first).step_seconds == pytest.approx(3 * 16)
    assert predict(slow_first).idle == pytest.approx([0, 0.5, 0.5])


def test_formulas_for_unequal_replicas_are_near_the_simulation():
    generator = random.Random(7)
    for _ in range(30):
        replicas = tuple(generator.choice([1, 2, 3, 4]) for _ in range(generator.randint(2, 4)))
        stages = tuple(
            StageSeconds((r * (1 + generator.random()),), (r * 2.0,), generator.choice([0.0, 0.5])) for r in replicas
        )
        link = Link(0.02, generator.choice([1e-9, 1e-7]))
        pipe = Pipe("local", stages, 12 * generator.randint(1, 2), (link,), 2e7, replicas=replicas)
        assert estimate_seconds(pipe) == pytest.approx(pipe.simulate(8).step_time, rel=0.05)


def test_replicas_must_share_the_micro_batches():
    stage = StageSeconds((1.0,), (2.0,))
    for wrong in ((4, 3), (4, 2, 1)):
        with pytest.raises(ValueError, match="give one number for each of the 2 stages that divides the 8 micro-batch"):
            Pipe("local", (stage, stage), 8, replicas=wrong)


@pytest.mark.parametrize("layers_per_block", [None, 1, 2])
@pytest.mark.parametrize("speeds", [(4.0, 2.0, 1.0), (1.0, 3.0), (1.0, 1.0, 2.5), (1e14, 5e13)])
def test_no_cut_has_a_cheaper_costliest_stage_where_speeds_differ(speeds, layers_per_block):
    for num_layers in range(6, 12):
        costs, unit = Costs(layer=2.0, head=3.0), layers_per_block or 1

        def worst(cuts, costs=costs, num_layers=num_layers, unit=unit):
            heads = 1 if layers_per_block is None else 0
            return max(
                (costs.layer * (b - a) + costs.head * (heads or -(-(b - a) // unit))) / speed
                for (a, b), speed in zip(pairwise([0, *cuts, num_layers]), speeds, strict=True)
            )

        found = make_partition(num_layers, len(speeds), replace(costs, stage_speeds=speeds), layers_per_block)
        cuts = [found.layers_of(k).start for k in range(1, len(speeds))]
        least = min(worst(each) for each in combinations(range(unit, num_layers, unit), len(speeds) - 1))
        assert worst(cuts) == pytest.approx(least)


def test_slower_stages_get_fewer_layers():
    cut = make_partition(14, 3, Costs(1.0, 0.0, stage_speeds=(4, 2, 1)))
    assert [len(cut.layers_of(k)) for k in range(3)] == [8, 4, 2]


def test_splits_are_few_and_share_the_rows():
    assert splits([range(0, 1), range(1, 2), range(2, 3)], 24, 8) == [(1, 2), (2, 1)]
    found = splits(MACHINE.alike(), 48, 24)
    assert {(4, 2), (4, 1, 1), (2, 1, 1, 2)} < set(found)
    assert (2, 3, 1) not in found  # a fast device and a slow one, while there are others of both
    assert all(sum(split) == 6 and len(set(split)) > 1 for split in found)
    assert (4, 2, 1) in splits([range(7)], 28, 8)
    assert not any(7 in split or 3 in split for split in splits([range(7)], 16, 8))
    assert max(map(len, splits(MACHINE.alike(), 48, 3))) == 3
    for many in ([range(64)], [range(k * 8, k * 8 + 8) for k in range(8)], [range(k, k + 1) for k in range(64)]):
        assert len(splits(many, 1 << 12, 64)) <= MOST_SPLITS


def test_on_a_fast_and_a_slow_host_the_best_layout_has_unequal_replicas(planner: Planner):
    machine = replace(MACHINE, devices=5, devices_per_host=(4, 1))
    machine = replace(machine, memory_bytes=(80e9,) * 4 + (24e9,), flops=(3e14,) * 4 + (1.5e14,))
    plan = find(replace(planner, machine=machine, rows=5 * 8))
    best = plan.best[0]
    equal = next(outcome for outcome in plan.best if not outcome.layout.stage_replicas)
    assert best.layout.stage_replicas == (4, 1)
    assert best.prediction is not None
    assert best.prediction.timeline is not None
    assert best.step_seconds < 0.85 * equal.step_seconds  # five stages, and a head on each
    assert best.stage_layers[0] > 4 * best.stage_layers[1]  # 1,200 TFLOP/s beside 150
    assert str(best.layout).startswith("chunked, 2 stages x 4,1, ZeRO ")
    assert all(memory.total <= room for memory, room in zip(best.memory, (80e9, 24e9), strict=True))
    assert not any(outcome.layout.stage_replicas for outcome in plan.peers)
    assert len({outcome.tokens for outcome in plan.best}) == 1


def test_three_machines_that_differ_train_a_stage_each(planner: Planner):
    speeds = (1e14, 5e13, 2.5e13)
    machine = replace(MACHINE, devices=3, memory_bytes=80e9, flops=speeds, devices_per_host=1)
    three = replace(planner, machine=machine, rows=24)
    best = find(three).best[0]
    assert best.layout.replicas == (1, 1, 1)
    assert [round(layers / best.stage_layers[2]) for layers in best.stage_layers] == [5, 2, 1]  # and a head each
    said = flags(three, best)
    assert "--stage_layers " + ",".join(map(str, best.stage_layers)) in said
    config = parse(["--config_name", str(planner.config.model.config_name), *said.split()])
    assert static_problems(config, 3, True, True) == []
    alike = replace(three, machine=replace(machine, flops=1e14))
    assert "--stage_layers" not in flags(alike, find(alike).best[0])


def test_a_small_device_is_not_given_more_than_it_holds(planner: Planner):
    """Equally fast, but the second host has no room for its half of the layers."""
    small = replace(planner, machine=replace(MACHINE, flops=1e14, memory_bytes=of_each([80e9, 1.5e9], (4, 2))))
    refused = small.evaluate(Candidate("chunked", 2, 4, 0, "linear", (4, 2)))
    assert "with one row a micro-batch and checkpointing stage 1 needs" in refused.problem
    assert "a device has 1.5 GB" in refused.problem
    assert all(outcome.memory[-1].total <= 1.5e9 for outcome in find(small).best)


def test_packets_and_logs_are_those_of_all_pairs(planner: Planner):
    one, four = (
        planner.evaluate(Candidate("chunked", len(each), max(each), 1, "linear", each)) for each in ((2, 4), (4, 2))
    )
    assert not one.problem
    assert not four.problem
    assert one.memory[0].packets / one.rows == 2 * four.memory[0].packets / four.rows
    assert four.memory[1].packets / four.rows == 2 * one.memory[1].packets / one.rows


def test_layouts_that_cannot_be_say_why(planner: Planner):
    asked = find(planner, "4,2", methods=("overlapping",))
    assert {outcome.problem for outcome in asked.refused if outcome.layout.stage_replicas} == {
        "what comes back over its boundaries needs as many replicas of each stage"
    }
    odd = find(planner, "5,1")
    assert odd.best == ()
    assert "48 rows a step are no multiple of 5 replicas x 8 rows" in {outcome.problem for outcome in odd.refused}
    assert fastest(odd.refused, 1) == []


def test_evaluations_are_shared_by_unequal_replicas_too(planner: Planner):
    found = replace(planner, rows=48).evaluate(Candidate("chunked", 3, 3, 0, "linear", (3, 2, 1)))
    assert "--stage_replicas 3,2,1 " in flags(planner, found)
    assert "--eval_batches" not in flags(planner, found)  # 8 on each of 3 are 24, which 2 can share
    odd = replace(planner, config=replace(planner.config, train=replace(planner.config.train, eval_batches=5)))
    assert "--eval_batches 6 " in flags(odd, found)


def run(model: Path, *given: str) -> int:
    whole = ["--tensor_parallel_size", "1", "--sequence_parallel_size", "1"]  # nobody divides layers or rows
    return command.main(["--model", str(model), "--seq_length", "512", "--devices", "6", *whole, *given])


def test_an_unequal_plan_in_words_and_numbers(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    out, trace = tmp_path / "plan.json", tmp_path / "trace.json"
    machine = "--devices-per-host 4 2 --device-tflops 300 100 --memory-gb 80 24"
    assert run(model, *f"{machine} --stage_replicas 4,1,1 --picture --json {out} --trace {trace}".split()) == 0
    said = capsys.readouterr().out
    assert "4 devices of 80 GB at 300 TFLOP/s, 2 of 24 GB at 100 TFLOP/s; 4 and 2 a host" in said
    assert "chunked, 3 stages x 4,1,1, ZeRO " in said
    assert "--stage_replicas 4,1,1 --stage_layers " in said
    assert "stage 0, replica 3 | F" in said
    plan = json.loads(out.read_text())
    best = plan["local"][0]
    assert (best["stage_replicas"], best["num_replicas"]) == ([4, 1, 1], 4)
    assert sum(best["stage_layers"]) == MODEL["num_hidden_layers"]
    assert best["flags"] in said
    assert plan["machine"]["memory_bytes"] == [80e9] * 4 + [24e9] * 2
    assert {tuple(outcome["stage_replicas"]) for outcome in plan["backpropagation"]} <= {
        (6,),
        (3, 3),
        (2,) * 3,
        (1,) * 6,
    }
    threads = {(e["pid"], e["tid"]) for e in json.loads(trace.read_text())["traceEvents"] if e["ph"] == "X"}
    assert threads == {(0, 0), (0, 1), (0, 2), (0, 3), (1, 0), (2, 0)}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("--device-tflops 1 2 3 4", "--device-tflops 1 2 3 4 are 4 numbers; give one, or one for each of the 6 hosts"),
        ("--devices-per-host 4 2 --memory-gb 80 24 8", "are 3 numbers; give one, or one for each of the 2 hosts"),
        ("--memory-gb 80 0 80 80 80 80", "--memory-gb 0 must be more than 0"),
        ("--devices-per-host 4 3", "--devices-per-host 4 3 are 7 devices, --devices is 6"),
        ("--devices-per-host 6 0", "--devices-per-host 0 must be more than 0"),
        ("--stage_replicas 4,3", "--stage_replicas 4,3 are 7 devices, --devices is 6"),
        ("--stage_replicas 6,0", "--stage_replicas 6,0 is neither a list of 1 or more for each stage, such as 4,2,1"),
        ("--stage_replicas many", "--stage_replicas many is neither a list of 1 or more for each stage, such as 4,2,1"),
        ("--stage_replicas 4,2 --num_stages 3", "--stage_replicas 4,2 names 2 stages, --num_stages is 3"),
        ("--num_stages 4", "--num_stages 4 does not divide the 6 devices; use one of 1, 2, 3, 6"),
    ],
)
def test_bad_input_is_one_clear_line(model: Path, capsys: pytest.CaptureFixture, given: str, message: str):
    assert run(model, *given.split()) == 2
    said = capsys.readouterr().err.strip()
    assert message in said
    assert "\n" not in said
