"""Benchmarks: what is compared trains alike, counts are right, and what is wrong is said before a start."""

from __future__ import annotations

import fcntl
import importlib.util
import json
import os
import socket
import sys
import threading
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from conftest import TINY, Trainer
from ranks import run_ranks
from torch.distributed.pipelining import schedules
from transformers import LlamaConfig, LlamaForCausalLM

from llm_local.bench import cases as benchmark
from llm_local.bench import hosts, relay
from llm_local.bench.calibration import stage_seconds
from llm_local.bench.cases import BenchmarkError, Case, Spread, ratios, run_case, table
from llm_local.bench.curves import evaluations, steps_until, train
from llm_local.bench.hosts import two_hosts
from llm_local.bench.largest import DEVICES, LAYOUTS, largest
from llm_local.bench.relay import MTU, Relay
from llm_local.bench.saved_bytes import saved_bytes
from llm_local.config import parse
from llm_local.plan.times import Link, StageSeconds

SCRIPTS = Path(__file__).parents[1] / "scripts"


def script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, SCRIPTS / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[name] = importlib.util.module_from_spec(spec)  # where a dataclass looks for its module
    spec.loader.exec_module(module)
    return module


def measured(measure: str, system: str, flags: dict[str, Any], steps: int, rounds: int) -> dict[str, Any]:
    from llm_local.bench.measures import MEASURES
    from llm_local.bench.task import Task

    return MEASURES[measure](Task(measure, system, flags, steps, "", warmup=1, rounds=rounds))


def measure(trainer: Trainer, name: str, system: str, steps: int = 2, ranks: int = 2, **settings: Any) -> list[Any]:
    flags = parse(trainer.flags(f"{name}-{system}-{ranks}", **{"num_stages": ranks, **settings})).flat()
    given = {k: v for k, v in flags.items() if v is not None}
    return run_ranks(measured, ranks, name, system, given, steps, 2)


@pytest.mark.processes
def test_the_pipelines_compared_are_one_model(trainer: Trainer):
    """The same rows, and the same losses: what differs is the order of passes."""
    batch = {"gradient_accumulation_steps": 4, "max_grad_norm": 0.0}
    whole = measure(trainer, "rate", "deepspeed", method="backprop", **batch)[1]["losses"]
    one = measure(trainer, "rate", "torch-1f1b", **batch)[1]["losses"]
    vee = measure(trainer, "rate", "torch-zbv", **batch)[0]["losses"]
    assert one == pytest.approx(whole, rel=1e-4)
    assert vee == pytest.approx(one, rel=1e-6)
    local = measure(trainer, "rate", "local", **batch)[1]
    assert len(local["seconds"]) == len(local["losses"]) == 2
    assert local["losses"] != pytest.approx(whole, rel=1e-6)


@pytest.mark.processes
def test_systems_that_share_a_curve_are_one_arithmetic(trainer: Trainer):
    """A core alone, two stages of 1F1B, and two replicas with and without ZeRO-1: a step's loss is the same."""
    module = script("bench_time_to_loss")
    alike = {name: system for name, system in module.SYSTEMS.items() if system.learning == "backprop"}
    assert len(alike) == 4
    settings = {
        "per_device_train_batch_size": 8,
        "eval_batches": 1,
        "learning_rate": 1e-2,
        "overwrite_output_dir": True,
    }
    found = {}
    for name, system in alike.items():
        ranks = measure(trainer, "rate", "deepspeed", steps=4, ranks=system.ranks, **module.flags_of(system, settings))
        of_steps = zip(*(rank["losses"] for rank in ranks), strict=True)
        found[name] = [sum(losses) / len(losses) for losses in of_steps]
    alone = found.pop("one core alone")
    assert alone[-1] < alone[0] - 0.01, "it learns"
    for losses in found.values():
        assert losses == pytest.approx(alone, rel=1e-4)


@pytest.mark.processes
def test_a_step_of_replicas_that_meet_is_a_mean_over_meetings(trainer: Trainer):
    flags = {"method": "backprop", "num_stages": 1, "replica_sync_steps": 2, "max_grad_norm": 1.0}
    for rank in measure(trainer, "whole", "local", **flags):
        assert rank["seconds"] > 0
        assert rank["sent_bytes"] < 10_000, "a meeting is a megabyte, and has not left this host"


@pytest.mark.processes
def test_a_stage_fed_from_memory_does_its_steps(trainer: Trainer):
    for found in measure(trainer, "efficiency", "local"):
        assert len(found["piped"]) == len(found["fed"]) == len(found["waiting"]) == 2
        assert min(found["piped"] + found["fed"]) > 0


@pytest.mark.processes
def test_traffic_is_what_links_carry_and_what_a_pipeline_sends(trainer: Trainer):
    tokens, width = 2 * 32, TINY["hidden_size"]
    local = measure(trainer, "traffic", "local", wire_dtype="int8")
    assert [found["bytes_a_step"] for found in local] == [80 + tokens * (width + 4 + 4), 0]
    pipe = measure(trainer, "traffic", "deepspeed", method="backprop")
    assert [found["bytes_a_step"] for found in pipe] == [tokens * width * 4] * 2


@pytest.mark.processes
def test_memory_grows_with_the_stages_of_backpropagation_alone(trainer: Trainer):
    batch = {"gradient_accumulation_steps": 4, "config_overrides": "num_hidden_layers=4"}
    local = [
        measure(trainer, "memory", "local", ranks=n, stage_layers=cut, **batch)
        for n, cut in ((2, "1,3"), (4, "1,1,1,1"))
    ]
    pipe = [
        measure(trainer, "memory", "deepspeed", ranks=n, stage_layers=cut, method="backprop", **batch)
        for n, cut in ((2, "1,3"), (4, "1,1,1,1"))
    ]
    ours, theirs = ([found[0]["peak_saved_bytes"] for found in each] for each in (local, pipe))
    assert ours[0] == ours[1]
    assert theirs[1] == 2 * theirs[0]


@pytest.mark.processes
def test_seconds_of_passes(trainer: Trainer):
    for found in measure(trainer, "passes", "local"):
        assert min(found["seconds"][name] for name in ("ForwardPass", "BackwardPass", "OptimizerStep")) > 0


def test_ranks_measure_by_turns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Nobody begins while another one still warms up."""
    from llm_local.bench.task import TURNS, wait_for_turn

    monkeypatch.setenv(TURNS, str(tmp_path / "turns"))
    other = os.open(tmp_path / "turns", os.O_RDWR | os.O_CREAT)
    fcntl.flock(other, fcntl.LOCK_SH)
    mine = threading.Thread(target=wait_for_turn, args=(True,))
    mine.start()
    mine.join(0.2)
    assert mine.is_alive()
    os.close(other)
    mine.join(30)
    assert not mine.is_alive()


def test_what_belongs_to_a_pass():
    found = {"LoadMicroBatch": 1.0, "ForwardPass": 2.0, "SendActivation": 4.0, "BackwardPass": 8.0}
    found |= {"ReduceGrads": 16.0, "OptimizerStep": 32.0}
    assert stage_seconds(found, with_messages=False) == StageSeconds((3.0,), (8.0,), 48.0)
    assert stage_seconds(found, with_messages=True) == StageSeconds((7.0,), (8.0,), 48.0)


def test_what_a_slow_link_is_predicted_to_cost():
    slowdown, stages = script("bench_slow_link").slowdown, [StageSeconds((1.0,), (2.0,))] * 2
    delay, rate = Link(latency_seconds=0.1), Link(seconds_per_byte=0.6)
    assert slowdown("local", stages, delay, 40.0) == pytest.approx(1)
    assert slowdown("local", stages, rate, 40.0) == pytest.approx(2), "6 s for a packet, 3 s for its passes"
    assert slowdown("deepspeed", stages, delay, 40.0) == pytest.approx((5 * 3 + 8 * 0.1) / (5 * 3))


@pytest.mark.processes
def test_a_case_that_fails_says_why():
    with pytest.raises(BenchmarkError, match=r"(?s)^broken failed:.*no model config in /nowhere"):
        run_case(Case("broken", 1, "rate", "local", {"config_name": "/nowhere"}))


def test_a_case_that_hangs_is_ended(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(benchmark, "SECONDS", 0.5)
    with pytest.raises(BenchmarkError, match=r"slow: not done after 0\.5 s"):
        run_case(Case("slow", 1, "rate", "local", {}), [[sys.executable, "-c", "import time; time.sleep(60)"]])


def test_bytes_that_graphs_hold():
    x = torch.ones(4, 8, requires_grad=True)
    with saved_bytes() as saved:
        y = x.exp()  # keeps its result
        assert saved.now == 4 * 8 * 4
        y.sum().backward()
        del y
        assert saved.now == 0
    assert saved.peak == 4 * 8 * 4


def packets_over(limits: dict[str, float], sent: list[bytes]) -> list[tuple[float, bytes]]:
    """Each with the seconds until it came."""
    (here, one), (there, other) = (socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM) for _ in range(2))
    for end in (one, other):
        end.setblocking(False)
    cable = Relay(one.fileno(), other.fileno())
    vars(cable).update(limits)
    start, came = time.monotonic(), []
    for packet in sent:
        here.send(packet)
    there.settimeout(30)
    for _ in sent:
        packet = there.recv(MTU)
        came.append((time.monotonic() - start, packet))
    there.send(b"back")
    here.settimeout(30)
    assert here.recv(MTU) == b"back"
    cable.stop()
    return came


def test_a_relay_holds_packets_back_for_as_long_as_a_slow_link_would():
    sent = [bytes([number]) * 100 for number in range(4)]
    assert [packet for _, packet in packets_over({}, sent)] == sent
    slow = packets_over({"bytes_a_second": 1000, "delay_seconds": 0.05}, sent)
    assert [packet for _, packet in slow] == sent
    assert [seconds >= 0.1 * number + 0.15 for number, (seconds, _) in enumerate(slow)] == [True] * 4


def test_steps_until_a_loss():
    curve = [(50, 5.0), (100, 4.0), (150, 4.5), (200, 3.0)]
    assert steps_until(curve, 4.25) == pytest.approx(87.5), "where it first is as low"
    assert steps_until(curve, 5.5) == 50
    assert steps_until(curve, 3.0) == 200
    assert steps_until(curve, 2.9) is None


@pytest.mark.processes
def test_a_curve_is_trained_once(trainer: Trainer, tmp_path: Path):
    flags = parse(trainer.flags("curve", eval_batches=1, eval_steps=2, max_steps=4)).flat()
    told = {k: v for k, v in flags.items() if v is not None and k != "output_dir"}
    train(tmp_path / "curve", 1, told)
    found = evaluations(tmp_path / "curve")
    assert [step for step, _ in found] == [2, 4]
    train(tmp_path / "curve", 1, {"config_name": "/nowhere"})  # is there already
    assert evaluations(tmp_path / "curve") == found
    with pytest.raises(BenchmarkError, match=r"(?s)^another failed:.*no model config in /nowhere"):
        train(tmp_path / "another", 1, {"config_name": "/nowhere"})


def test_the_largest_model_that_fits_a_device():
    """A stage of two needs no more than the whole, and twice the device has more room."""
    flags = {"config_name": str(SCRIPTS.parent / "configs/studies/long.json"), "seq_length": 128, "bf16": True}
    whole, half = ({**flags, "method": method, "num_stages": n} for method, n in (("backprop", 1), ("chunked", 2)))
    assert 0 < largest(whole, 1, 8e9) < largest(whole, 1, 16e9)
    assert largest(half, 2, 8e9) > largest(whole, 1, 8e9)
    assert largest(whole, 1, 8e9) < 8e9 / 16, "as many bytes a parameter at least"
    assert largest(whole, 1, 1e6) == 0


def test_the_page_of_the_time_to_a_loss(tmp_path: Path):
    """Steps of a curve times seconds of a step; what never gets there has no minutes."""
    module = script("bench_time_to_loss")
    ends = {name: 4.0 + 0.1 * number for number, name in enumerate(module.LEARNING)}
    curves = {n: {"rate": 8e-3, "ends": {}, "losses": [(0, 6.0), (600, end)]} for n, end in ends.items()}
    seconds = {name: {"seconds": 1.0, "sent": 7.0} for name in module.SYSTEMS}
    slow = {name: {"seconds": 2.0, "sent": 7.0} for name in module.SYSTEMS}
    slow["DiLoCo, 50 steps"]["seconds"] = 0.5
    one = {link: seconds if link == module.FREE else slow for link in module.LINKS}
    taken = {name: {"counted": 2e6, "resident": 3e6} for name in module.SYSTEMS}
    sizes = {name: {str(size): 5e8 for size in DEVICES} for name in LAYOUTS}
    module.save({"curves": curves, "rounds": [one] * 3, "memory": taken, "largest": sizes}, tmp_path)
    page = (tmp_path / "time_to_loss.md").read_text()
    assert (tmp_path / "time_to_loss.png").exists()
    worst, middle = max(ends.values()), sorted(ends.values())[(len(ends) - 1) // 2]
    last = next(name for name, system in module.SYSTEMS.items() if ends[system.learning] == worst)
    every, some = page.split("## Minutes until ")[1:]
    assert every.startswith(f"{worst:.3f} nats")
    assert some.startswith(f"{middle:.3f} nats")
    assert f"| {last} | 600 | 10.0 (10.0–10.0) | 20.0 (20.0–20.0) | 20.0 (20.0–20.0) |" in every
    assert f"| {last} |  |  |  |  |" in some
    assert "no limit: one core alone; 20 Mb/s, 20 ms: DiLoCo, 50 steps; 2 Mb/s" in every
    assert f"| {last} | 3 | 2 | 7 | 1.00 (1.00–1.00) | 2.00 (2.00–2.00) | 2.00 (2.00–2.00) |" in page


@pytest.mark.processes
@pytest.mark.skipif(bool(hosts.missing()), reason="network namespaces need root")
def test_what_leaves_a_host_is_counted(trainer: Trainer, tmp_path: Path):
    """Two replicas under ZeRO-1, one on each host: a gradient's sum takes 4 bytes a parameter, and the weights 2."""
    module = script("bench_time_to_loss")
    system = module.SYSTEMS["data parallel, ZeRO-1"]
    settings = {"per_device_train_batch_size": 4, "eval_batches": 0}
    flags = parse(trainer.flags("hosts", **module.flags_of(system, settings))).flat()
    told = {k: v for k, v in flags.items() if v is not None and k not in ("output_dir", "max_steps")}
    with two_hosts() as pair:
        ranks = pair.run(
            Case("zero1", 2, "whole", "local", {**told, "overwrite_output_dir": True}, steps=2), 1e8, 0.001
        )
    parameters = sum(p.numel() for p in LlamaForCausalLM(LlamaConfig(**TINY)).parameters())
    for rank in ranks:
        assert rank["sent_bytes"] == pytest.approx(6 * parameters, rel=0.05)
        assert rank["seconds"] > 6 * parameters / 1e8


def test_hosts_need_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """Before anything is trained, also where no part is named."""
    monkeypatch.setattr(hosts.os, "geteuid", lambda: 1000)
    for name, given in (
        ("bench_slow_link", []),
        ("bench_time_to_loss", []),
        ("bench_time_to_loss", ["--only", "steps"]),
    ):
        with pytest.raises(SystemExit) as caught:
            script(name).main([*given, "--output", str(tmp_path)])
        assert caught.value.code == 2
        assert "network namespaces need root and ip" in capsys.readouterr().err


def test_without_tun_devices_there_is_no_slow_link(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    module = script("bench_slow_link")
    monkeypatch.setattr(relay, "_DEVICE", "/nowhere")
    monkeypatch.setattr(hosts.os, "geteuid", lambda: 0)
    monkeypatch.setattr(hosts.shutil, "which", lambda name: name)
    monkeypatch.setattr(hosts, "sh", lambda *command: None)
    assert module.main([]) == 1
    assert "bench_slow_link.py: no TUN device can be made" in capsys.readouterr().err


def test_ratios_are_those_of_rounds():
    assert ratios([2.0, 9.0, 4.0], [1.0, 3.0, 4.0]) == Spread(2.0, 1.0, 3.0)
    assert Spread(2.0, 1.0, 3.0).text() == "2.00 (1.00–3.00)"


def test_a_table():
    assert table(["a", "b"], [["1", "2"]]) == "| a | b |\n|---|---|\n| 1 | 2 |"


@pytest.mark.parametrize(
    ("name", "arguments", "line"),
    [
        ("bench_throughput", ["--systems", "megatron"], "--systems megatron: choose of deepspeed, torch-1f1b"),
        ("bench_throughput", ["--repeats", "0"], "0: give 1 or more"),
        ("bench_slow_link", ["--shares", "0,1"], "--shares 0,1 --delays_ms 0,20: give shares above 0"),
        ("bench_time_to_loss", ["--curve_steps", "0"], "0: give 1 or more"),
        ("bench_time_to_loss", ["--only", "links"], "invalid choice: 'links' (choose from"),
        ("bench_mfu", ["--peak_tflops", "0"], "--peak_tflops 0: give a number above 0"),
        ("bench_mfu", ["--configs", "zero9"], "--configs zero9: not in configs/ds"),
    ],
)
def test_wrong_arguments_are_refused(name: str, arguments: list[str], line: str, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as caught:
        script(name).main(arguments)
    assert caught.value.code == 2
    assert line in capsys.readouterr().err


def test_a_pipeline_that_torch_has_not_is_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.delattr(schedules, "ScheduleZBVZeroBubble")
    with pytest.raises(SystemExit):
        script("bench_throughput").main([])
    assert "torch-zbv needs ScheduleZBVZeroBubble of torch.distributed.pipelining" in capsys.readouterr().err


@pytest.mark.parametrize("name", sorted(path.stem for path in SCRIPTS.glob("bench_*.py")))
def test_the_results_are_there(name: str):
    """Each benchmark's page and figures, but of what has not been measured."""
    if name in ("bench_division", "bench_mfu", "bench_time_to_loss"):
        pytest.skip("not measured yet")
    folder = SCRIPTS.parent / "docs/bench"
    assert json.loads((folder / f"{name.removeprefix('bench_')}.json").read_text())["machine"]
    assert (folder / f"{name.removeprefix('bench_')}.md").exists()
