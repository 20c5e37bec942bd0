"""Steps of a day on a GPU that measure: what a stage reaches, what its passes take, and a study of a 43M model.

Processes of one step start side by side, as imports and compilers take most of their time, and measure by turns.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from functools import partial
from statistics import median
from typing import Any, Protocol

import torch
import yaml

from llm_local.bench.calibration import stage_seconds
from llm_local.bench.cases import BenchmarkError, Case, run_case
from llm_local.bench.gpu_runs import ROOT, Job, Paths, last_words, read_metrics, side_by_side, start
from llm_local.bench.mfu import LARGE, TINY, flops_a_step
from llm_local.bench.task import TURNS
from llm_local.device import describe_device, finish_queued_work
from llm_local.plan.times import Pipe, StageSeconds, predict
from llm_local.study.points import read_study
from llm_local.study.runs import StudyRun, runs_of

PEAK_TFLOPS = {"H200": 989, "H100": 989, "H800": 989, "A100": 312, "L40": 362, "B200": 2250}  # dense bf16, data sheets
GOAL = 0.45
CUTS, FEW_CUTS = (2, 4, 8), (2,)
MICRO_BATCHES = 8
POLL_SECONDS = 2.0
STUDY = "configs/studies/gpu.yaml"
SEEDS = (1, 2)
POINTS = (
    {"name": "backprop", "method": "backprop"},
    {"name": "chunked-2", "method": "chunked", "layers_per_block": 6},
    {"name": "chunked-4-shared", "method": "chunked", "layers_per_block": 3, "head": "shared", "head_layers": 1},
)


class Report(Protocol):
    """As gpu_steps.Report."""

    figures: dict[str, Any]

    def add(self, name: str, value: Any) -> None: ...

    def problem(self, text: str) -> None: ...


def product_tflops(device: torch.device, size: int, repeats: int = 20) -> float:
    """What a product of two square matrices of random numbers in bf16 reaches."""
    a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    for _ in range(3):
        torch.mm(a, b)
    finish_queued_work(device)
    begun = time.perf_counter()
    for _ in range(repeats):
        torch.mm(a, b)
    finish_queued_work(device)
    return 2 * size**3 * repeats / (time.perf_counter() - begun) / 1e12


def peak_tflops() -> float | None:
    """The device's in bf16, if it is a known one."""
    name = describe_device()
    return next((float(peak) for part, peak in PEAK_TFLOPS.items() if part in name), None)


def _flags(paths: Paths, rehearse: bool, layers: int | None = None, **more: Any) -> dict[str, Any]:
    """Of a stage in bf16 with so many layers, by default all."""
    sizes = TINY if rehearse else LARGE
    changes = {**sizes, "num_hidden_layers": layers or sizes["num_hidden_layers"]}
    text = ",".join(f"{name}={value}" for name, value in changes.items())
    rows = {"seq_length": 64, "per_device_train_batch_size": 2} if rehearse else {}
    shape = {"config_name": str(ROOT / "configs/bench/model.json"), "config_overrides": text}
    batch = {"seq_length": 2048, "per_device_train_batch_size": 8, **rows}
    return {**paths.flags(), **shape, **batch, "bf16": True, "deepspeed": str(ROOT / "configs/ds/zero1.json"), **more}


def _measure(report: Report, paths: Paths, cases: Mapping[str, dict[str, Any]], rehearse: bool) -> dict[str, Any]:
    """What each case's rank found; a case that fails is a problem and the others go on."""
    found: dict[str, Any] = {}
    os.environ[TURNS] = str(paths.work / "turns")

    def one(name: str) -> None:
        case = Case(name, 1, "stage", "local", cases[name], 2 if rehearse else 8)
        try:
            found[name] = run_case(case)[0]
        except BenchmarkError as error:
            report.problem(str(error)[-1200:])
            return
        work = flops_a_step(cases[name])
        tflops = work / found[name]["step_seconds"] / 1e12
        numbers = {key: value for key, value in found[name].items() if key != "profile"}
        report.add(name, {**numbers, "tflops": tflops})

    side_by_side([partial(one, name) for name in cases], 2 if rehearse else len(cases))
    return found


def mfu(report: Report, paths: Paths, rehearse: bool) -> None:
    """A stage of 350M, plain and compiled, with ZeRO 1 and 3, and the profile of the fastest."""
    settings = {"zero1": {}, "zero1, compiled": {"torch_compile": True}}
    third = str(ROOT / "configs/ds/zero3.json")
    settings |= {"zero3": {"deepspeed": third}, "zero3, compiled": {"deepspeed": third, "torch_compile": True}}
    if rehearse:
        del settings["zero1, compiled"], settings["zero3, compiled"]
    report.add("peak_tflops", peak_tflops())
    found = _measure(
        report, paths, {name: _flags(paths, rehearse, **more) for name, more in settings.items()}, rehearse
    )
    if found:
        best = min(found, key=lambda name: found[name]["step_seconds"])
        report.add("best", best)
        report.add("profile", found[best]["profile"])


def passes(report: Report, paths: Paths, rehearse: bool) -> None:
    """Stages of 2, 4 and 8 cuts by themselves, and what the simulator makes of their passes; the whole model in one
    process, in two blocks and by backpropagation."""
    cuts = FEW_CUTS if rehearse else CUTS
    whole = int((TINY if rehearse else LARGE)["num_hidden_layers"])
    cases = {f"{cut} stages": _flags(paths, rehearse, whole // cut) for cut in cuts}
    cases["backprop"] = _flags(paths, rehearse, method="backprop")
    cases["chunked"] = _flags(paths, rehearse, method="chunked", layers_per_block=whole // 2)
    found = _measure(report, paths, cases, rehearse)
    if {"backprop", "chunked"} <= set(found):
        report.add("chunked / backprop", found["chunked"]["step_seconds"] / found["backprop"]["step_seconds"])
    for cut in cuts:
        if {"backprop", f"{cut} stages"} <= set(found):
            alone = stage_seconds(found[f"{cut} stages"]["passes"], with_messages=False)
            undivided = stage_seconds(found["backprop"]["passes"], with_messages=False)
            report.add(f"simulated, {cut} stages", simulated(alone, undivided, cut))


def simulated(alone: StageSeconds, undivided: StageSeconds, cut: int) -> dict[str, float]:
    """Seconds of a step of MICRO_BATCHES on equal stages: local learning's, each as measured alone, and 1F1B's, each an
    equal part of the undivided model. Links count nothing."""
    part = StageSeconds((undivided.forward[0] / cut,), (undivided.backward[0] / cut,), undivided.optimizer / cut)
    local = predict(Pipe("local", [alone] * cut, MICRO_BATCHES)).step_seconds
    peer = predict(Pipe("1f1b", [part] * cut, MICRO_BATCHES)).step_seconds
    return {"local": local, "1f1b": peer, "1f1b / local": peer / local}


def study(report: Report, paths: Paths, rehearse: bool) -> None:
    """All runs at a time on the same tokens; curves are kept from their first evaluation on, whenever they end."""
    running = {run.folder.name: (run, *start(_job(run), paths)) for run in _study_runs(paths, rehearse)}
    while True:
        alive = [name for name, (_, process, _, _) in running.items() if process.poll() is None]
        for name, (run, _, folder, _) in running.items():
            report.add(name, curve(read_metrics(folder), run))
        if not alive:
            break
        time.sleep(POLL_SECONDS)
    for name, (_, process, _, log) in running.items():
        if process.returncode:
            report.problem(f"{name}: {last_words(log)}")


def _study_runs(paths: Paths, rehearse: bool) -> list[StudyRun]:
    base = yaml.safe_load((ROOT / STUDY).read_text())["base"]
    base |= {**paths.flags(), "max_steps": 400, "warmup_steps": 40, "eval_steps": 40, "eval_batches": 8}
    seeds, points = SEEDS, POINTS
    if rehearse:
        seeds, points = SEEDS[:1], POINTS[-1:]
        base |= {"config_overrides": "hidden_size=64,intermediate_size=128,num_attention_heads=2,num_key_value_heads=2"}
        base |= {"max_steps": 6, "eval_steps": 3, "eval_batches": 1, "logging_steps": 1, "warmup_steps": 1}
        base |= {"seq_length": 64, "per_device_train_batch_size": 2}
    file = paths.work / "study.yaml"
    file.write_text(yaml.safe_dump({"base": base, "seeds": list(seeds), "points": list(points)}))
    return runs_of(read_study(file), paths.work / "runs")


def _job(run: StudyRun) -> Job:
    flags = {name: value for name, value in run.config.flat().items() if name != "output_dir"}
    return Job(f"study/{run.folder.name}", flags)


def curve(stages: list[list[dict[str, Any]]], run: StudyRun) -> dict[str, Any]:
    """Validation losses of all blocks by step, so far, and the seconds of a step."""
    records = stages[0] if stages else []
    train = [each for each in records if each["split"] == "train"]
    seconds = [each["step_seconds"] for each in train[1:] or train]
    return {
        "max_steps": run.config.train.max_steps,
        "step": train[-1]["step"] if train else 0,
        "evals": [[each["step"], each["block_losses"]] for each in records if each["split"] == "eval"],
        "step_seconds": median(seconds) if seconds else None,
        "peak_memory_bytes": train[-1]["peak_memory_bytes"] if train else None,
    }
