"""Layouts on a machine: what each takes, which are left out, and what is said of the best."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from planning import planner_of

from llm_local.costs import Setting, Shape, count_flops, count_passes
from llm_local.memory.division import Division, Told
from llm_local.memory.sizes import ModelSizes, read_shares
from llm_local.partition import Span
from llm_local.plan.layouts import Outcome, Planner, fastest
from llm_local.plan.machine import Machine
from llm_local.plan.report import Plan, verdict
from llm_local.plan.stages import PEER_METHODS, Candidate
from llm_local.plan.times import Link

MACHINE = Machine(
    devices=8,
    memory_bytes=80e9,
    flops=1e14,
    memory_bytes_per_second=1e12,
    link_gbps=100,
    local_link_gbps=800,
    link_latency_seconds=1e-5,
)


@pytest.fixture
def planner(model: Path) -> Planner:
    return planner_of(model, MACHINE, rows=4)


def made(planner: Planner, **changes: Any) -> Planner:
    """The same planner on another machine."""
    return replace(planner, machine=replace(planner.machine, **changes))


def test_only_links_that_leave_a_host_are_slow_and_are_shared():
    machine = replace(MACHINE, devices=16, devices_per_host=4)
    inside, alone = Link(0.0, 8 / 800e9), Link(1e-5, 8 / 100e9)
    assert [machine.boundary(1, k) for k in range(5)] == [inside, inside, inside, alone, inside]
    shared = Link(1e-5, 2 * 8 / 100e9)
    assert [machine.boundary(2, k) for k in range(3)] == [inside, shared, inside]
    assert machine.boundary(8, 0) == Link(1e-5, 4 * 8 / 100e9)


@pytest.mark.parametrize(
    ("replicas", "seconds"),
    [(1, 0.0), (2, 0.5 * 8e9 / 800e9), (4, 0.75 * 8e9 / 800e9), (8, 7 / 8 * 8e9 / 100e9 + 2e-5)],
)
def test_a_ring_sends_all_but_one_part(replicas: int, seconds: float):
    machine = replace(MACHINE, devices_per_host=4)
    assert machine.gather_seconds(1e9, replicas) == pytest.approx(seconds)


def test_devices_of_a_replica_tell_each_other_over_what_they_span():
    machine = replace(MACHINE, devices_per_host=4)
    inside, between = 8 / 800e9, 8 / 100e9
    four, eight = machine.group(range(4), Division(layers=4)), machine.group(range(8), Division(layers=8))
    assert (four.num_replicas, four.data_ranks, four.replica_hosts, eight.replica_hosts) == (1, 1, 1, 2)
    assert machine.told_seconds(Told(3e9, 3), four) == pytest.approx(0.75 * 3e9 * inside)
    assert machine.told_seconds(Told(3e9, 3), eight) == pytest.approx(7 / 8 * 3e9 * between + 3 * 2e-5)
    rows = machine.group(range(8), Division(rows=8))
    assert (rows.num_replicas, rows.data_ranks, rows.num_hosts) == (1, 8, 2)
    # each of a host's four devices has four parts of eight for the other host
    assert machine.told_seconds(Told(3e9, 3), rows) == pytest.approx(4 * 4 / 8 * 3e9 * between + 3 * 1e-5)
    assert machine.told_seconds(Told(), four) == 0


def test_the_first_device_of_divided_layers_sends_and_of_divided_rows_each():
    machine = replace(MACHINE, devices_per_host=4)
    assert machine.boundary(1, 0, Division(layers=4)) == Link(1e-5, 8 / 100e9)
    assert machine.boundary(1, 0, Division(rows=4)) == Link(1e-5, 4 * 8 / 100e9)
    assert machine.boundary((2, 1), 0, Division(rows=2)) == Link(1e-5, 2 * 2 * 8 / 100e9)


@pytest.mark.parametrize(("layers", "rows", "sums_or_exchanges"), [(2, 1, 14), (1, 2, 8)])
def test_a_step_of_divided_layers_or_rows_is_its_parts_and_what_they_tell(
    planner: Planner, layers: int, rows: int, sums_or_exchanges: int
):
    """Of two devices, whose links are slow enough to count: in a layer 7 sums of hidden states or 8 exchanges of them,
    of divided layers also one of embeddings and one behind the head, which is computed once more."""
    division, length = Division(layers, rows), 1024
    anatomy, (share,) = read_shares(planner.config.model, length, "bf16", (division,))
    two = replace(made(planner, devices=2, devices_per_host=2, local_link_gbps=10), rows=4, shares={division: share})
    zero = 1 if layers > 1 else 0
    found = two.evaluate(Candidate("data_parallel", 1, 1, zero, "", (), layers, rows))
    assert (found.micro_batches, found.rows) == (1, 4)
    shape = Shape(1024, length, planner.sizes.layer_parameters, planner.sizes.head_parameters)
    flops = count_flops(shape, Setting((Span(0, 8),))).backprop * 4 * length
    again = 2 * planner.sizes.head_parameters * 4 * length * (layers > 1)
    states = 4 * length // rows * 1024 * 2
    told = (8 * sums_or_exchanges + 4 * (layers > 1)) * states / 2 * 8 / 10e9
    reduced = 2 * share.num_parameters * 2 * (rows - 1) / rows * 8 / 10e9
    beside = (2 / 3 * flops) / 1e14 / 2 + told / 2 * (rows > 1)
    optimizer = 30 * share.num_parameters / 1e12 + max(0.0, reduced / 2 - beside) + reduced / 2
    assert found.step_seconds == pytest.approx((flops + again) / 1e14 / 2 + told + optimizer, rel=0.001)
    assert anatomy.num_layers == 8


def test_passes_of_a_block_add_up_to_its_flops():
    shape = Shape(hidden_size=64, seq_length=128, layer_parameters=40_000, head_parameters=30_000)
    blocks = (Span(0, 3), Span(3, 6), Span(6, 8))
    for setting in (
        Setting(blocks),
        Setting(blocks, overlap=1),
        Setting(blocks, frozen_heads=True, token_fraction=0.25),
        Setting(blocks, private_layers=(2, 1, 0), private_parameters=5000, token_fraction=0.5),
    ):
        passes = count_passes(shape, setting)
        assert [p.forward + p.backward + p.from_above for p in passes] == pytest.approx(
            count_flops(shape, setting).blocks
        )
        assert all(0 < p.weights < p.backward and p.layers < p.forward for p in passes)
    whole = count_passes(shape, Setting((Span(0, 8),)))[0]
    assert whole.weights == 2 * (8 * 40_000 + 30_000)  # 2 FLOPs a parameter, none for attention


def test_a_lone_stage_takes_its_flops_and_the_optimizer(planner: Planner):
    found = made(planner, devices=1).evaluate(Candidate("data_parallel", 1, 1, 0))
    sizes = planner.sizes
    shape = Shape(1024, 1024, sizes.layer_parameters, sizes.head_parameters)
    flops = count_flops(shape, Setting((Span(0, 8),))).backprop * 32 * 1024
    assert found.step_seconds == pytest.approx(flops / 1e14 + 30 * sizes.num_parameters / 1e12)


@pytest.mark.parametrize(
    ("method", "ahead", "back"),
    [("chunked", 2 * 1024 + 4, 0), ("overlapping", 2 * 1024 + 4, 2 * 1024), ("1f1b", 2 * 1024, 2 * 1024)],
)
def test_bytes_of_a_token_over_a_boundary(planner: Planner, method: str, ahead: int, back: int):
    head = "linear" if method != "1f1b" else ""
    found = planner.evaluate(Candidate(method, 4, 2, 0, head))
    assert (found.forward_bytes, found.backward_bytes) == (ahead, back)
    assert found.pipe is not None
    messages = found.pipe.simulate(1).messages
    assert found.pipe.forward_bytes * messages[0, 1] == ahead * 16 * 1024  # of one of the two replicas
    assert messages.get((1, 0), 0) == (found.micro_batches if back else 0)


def test_eight_bits_halve_what_goes_ahead_and_leave_gradients(planner: Planner):
    config = replace(planner.config, local=replace(planner.config.local, wire_dtype="int8"))
    found = replace(planner, config=config).evaluate(Candidate("overlapping", 4, 2, 0, "linear"))
    assert (found.forward_bytes, found.backward_bytes) == (1024 + 4 + 4, 2 * 1024)


def test_soft_targets_are_a_few_numbers_a_token(planner: Planner):
    config = replace(planner.config, local=replace(planner.config.local, distillation_weight=1.0))
    found = replace(planner, config=config).evaluate(Candidate("chunked", 4, 2, 0, "linear"))
    assert (found.forward_bytes, found.backward_bytes) == (2 * 1024 + 4, 8 * 16)


def test_every_peer_is_slower_on_free_links_by_its_bubble(planner: Planner):
    """Four equal stages, eight micro-batches; a head is so small here that it hardly matters."""
    small = replace(planner, rows=8 * 8, sizes=replace(planner.sizes, head_parameters=1000, vocab_size=1))
    small = made(
        replace(small, anatomy=replace(small.anatomy, head_parameters=1000)), link_gbps=1e9, link_latency_seconds=0
    )
    layouts = {method: Candidate(method, 4, 2, 0) for method in PEER_METHODS[1:]}
    steps = {m: fastest([small.evaluate(layout)], 1)[0].step_seconds for m, layout in layouts.items()}
    local = fastest([small.evaluate(Candidate("chunked", 4, 2, 0, "linear"))], 1)[0].step_seconds
    assert steps["1f1b"] / local == pytest.approx(11 / 8, rel=0.02)
    assert steps["gpipe"] / local == pytest.approx(11 / 8, rel=0.02)
    assert steps["interleaved"] / local == pytest.approx(9.5 / 8, rel=0.02)
    assert steps["zero_bubble"] / local == pytest.approx(9 / 8, rel=0.03)  # attention's B is more than its W


def test_zero_2_and_3_hide_what_they_move_as_far_as_passes_last(planner: Planner):
    def step(zero: int, gbps: float) -> float:
        return (
            made(planner, link_gbps=gbps, local_link_gbps=1e6)
            .evaluate(Candidate("data_parallel", 1, 8, zero))
            .step_seconds
        )

    fast = [step(zero, 1e6) for zero in range(4)]
    assert fast[2:] == pytest.approx([fast[1]] * 2, rel=0.01)
    assert fast[0] > fast[1]  # every replica runs the whole optimizer
    moved = 2 * planner.sizes.num_parameters * 7 / 8 * 8 / 1e9  # seconds at 1 Gb/s
    assert step(3, 1) == pytest.approx(3 * moved, rel=0.01)
    assert step(2, 1) == pytest.approx(2 * moved, rel=0.1)


def test_what_does_not_fit_is_tried_with_fewer_rows_and_checkpointing(planner: Planner):
    layout = Candidate("data_parallel", 1, 8, 3)
    whole = planner.evaluate(layout)
    assert (whole.rows, whole.micro_batches, whole.recomputes) == (4, 1, False)
    less = made(planner, memory_bytes=whole.most_total - 1).evaluate(layout)
    assert (less.rows, less.micro_batches) in [(2, 2), (4, 1)]
    least = made(planner, memory_bytes=1e9).evaluate(layout)
    assert least.recomputes
    none = made(planner, memory_bytes=1e8).evaluate(layout)
    assert none.problem.startswith("with one row a micro-batch and checkpointing a device needs 1.")


def test_layouts_are_those_that_deepspeed_runs(planner: Planner):
    methods = ("chunked", "overlapping", *PEER_METHODS)
    found = list(planner.layouts(methods, ["linear", "shared"], [1, 2, 8], [0, 1, 2, 3]))
    assert len(set(found)) == len(found)
    assert {layout.zero for layout in found if layout.method == "overlapping"} == {0, 1, 2}
    assert {layout.zero for layout in found if layout.method == "1f1b"} == {0, 1}
    assert {layout.zero for layout in found if layout.method == "data_parallel"} == {0, 1, 2, 3}
    assert all(layout.zero == 0 for layout in found if layout.num_replicas == 1)
    assert not any(layout.method == "chunked" and layout.num_stages == 1 for layout in found)  # backpropagation
    assert {layout.num_stages for layout in found if layout.method == "data_parallel"} == {1}


@pytest.mark.parametrize(
    ("layout", "problem"),
    [
        (Candidate("chunked", 4, 3, 0, "linear"), "32 rows a step are no multiple of 3 replicas x 4 rows"),
        (Candidate("chunked", 16, 1, 0, "linear"), "num_stages=16 is more than the model's 8 layers"),
        (Candidate("interleaved", 3, 1, 0), "interleaving needs a multiple of 3 micro-batches, not 8"),
    ],
)
def test_a_layout_that_cannot_be_says_why(planner: Planner, layout: Candidate, problem: str):
    found = planner.evaluate(layout)
    assert problem in found.problem
    assert fastest([found], 1) == []


def test_a_head_with_more_private_layers_than_there_are_is_no_layout(planner: Planner):
    config = replace(planner.config, local=replace(planner.config.local, head_layers=7))
    found = replace(planner, config=config).evaluate(Candidate("chunked", 2, 4, 0, "decoder"))
    assert "head_layers=7 is more than the 1 layers above the first block" in found.problem
    assert not replace(planner, config=config).evaluate(Candidate("chunked", 2, 4, 0, "linear")).problem


def test_verdicts_where_only_one_side_fits(planner: Planner):
    local = fastest([planner.evaluate(Candidate("chunked", 4, 2, 0, "linear"))], 1)
    peer = fastest([planner.evaluate(Candidate("1f1b", 4, 2, 0))], 1)
    assert (
        verdict(Plan((), tuple(peer), ())) == "No local layout fits; use backpropagation (1f1b, 4 stages x 2, ZeRO 0)."
    )
    alone = verdict(Plan(tuple(local), (), ()))
    assert alone.startswith("Data-parallel backpropagation does not fit. A step of local learning is not worth")
    both = verdict(Plan(tuple(local), tuple(peer), ()))
    assert "times as fast as the best pipeline of backpropagation (1f1b, 4 stages x 2, ZeRO 0)" in both
    nothing = Outcome(Candidate("chunked", 4, 2, 0, "linear"), "it is too large")
    assert "Nearest is chunked, 4 stages x 2, ZeRO 0, linear heads: it is too large" in verdict(
        Plan((), (), (nothing,))
    )


def test_model_sizes_say_how_large_it_is():
    assert ModelSizes(2, 8, 10, 100, 100, 80, 80, True, 16, False, 1).num_parameters == 280
    assert ModelSizes(2, 8, 10, 100, 100, 80, 80, False, 16, False, 1).num_parameters == 360
