"""The steps of a day on a GPU, each in a process of its own that gpu_day starts and ends.

python -m llm_local.bench.gpu_steps STEP '{"work": ..., "bundle": ..., "rehearse": false, "result": ...}'

A step writes what it has found so far to its result file again and again, so that one that is ended leaves that.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import platform
import re
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from threading import Lock
from typing import Any

from llm_local.bench.gpu_bundle import REFERENCE, BundleError, install, train_tokenizer, write_text
from llm_local.bench.gpu_runs import NEEDS_GPU, ROOT, Found, Job, Paths, difference, last_words, side_by_side, train

TOLERANCE = 1e-4
PACKAGES = ("torch", "triton", "deepspeed", "transformers", "datasets", "accelerate", "tokenizers", "safetensors")
PACKAGES += ("numpy", "pyarrow", "sentencepiece", "huggingface_hub", "pydantic", "pytest")
IMPORTS = ("deepspeed", "datasets", "sentencepiece", "llm_local.train", "llm_local.study.runs", "llm_local.plan.times")
# ZeRO's files: all of them, and those of a rehearsal
ZERO = ("zero0", "zero1", "zero2", "zero3", "zero2_offload", "zero3_offload")
FEW_ZERO = ("zero1", "zero3_offload")
TINY = "hidden_size=64,intermediate_size=128,num_hidden_layers=4,num_attention_heads=2,num_key_value_heads=2"


@dataclass
class Report:
    """What a step has found; every change of it is on disk before the next. status: where it is not simply done."""

    path: Path
    figures: dict[str, Any] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    status: str = ""
    _lock: Lock = field(default_factory=Lock)

    def add(self, name: str, value: Any) -> None:
        with self._lock:
            self.figures[name] = value
            self._write()

    def problem(self, text: str) -> None:
        with self._lock:
            self.problems.append(text)
            self._write()

    def _write(self) -> None:
        draft = self.path.with_suffix(".draft")
        draft.write_text(json.dumps({"figures": self.figures, "problems": self.problems, "status": self.status}))
        os.replace(draft, self.path)


@dataclass(frozen=True)
class Context:
    """What a step is told, and where it writes."""

    work: Path
    bundle: Path | None
    rehearse: bool
    report: Report

    @property
    def paths(self) -> Paths:
        """Raises ValueError where the step `data` has not been."""
        try:
            told = json.loads((self.work / "data.json").read_text())
        except FileNotFoundError:
            raise ValueError("there is no text yet: run the step data first") from None
        return Paths(self.work, Path(told["text"]), Path(told["tokenizer"]))

    @property
    def at_once(self) -> int:
        """Runs of two ranks side by side."""
        return max(1, len(os.sched_getaffinity(0)) // 2)

    def small(self, steps: int, **more: Any) -> dict[str, Any]:
        """Flags of a short run of a small model on two stages; greatly smaller still in a rehearsal."""
        flags = {**REFERENCE, "max_steps": steps, "learning_rate": 4e-3, **more}
        if self.rehearse:
            flags |= {"config_overrides": TINY, "seq_length": 64, "per_device_train_batch_size": 2}
        return flags


def install_step(context: Context) -> None:
    """Wheels of the bundle into WORK/site, which the other steps' PYTHONPATH begins with."""
    assert context.bundle is not None
    context.report.add("wheels", install(context.bundle / "wheels", context.work / "site"))


def facts(context: Context) -> None:
    """Machine, devices, versions, seconds of imports, and what a plain product of matrices reaches."""
    report = context.report
    report.add("python", platform.python_version())
    report.add("cores", len(os.sched_getaffinity(0)))
    report.add("memory_bytes", os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    report.add("versions", {name: _version(name) for name in PACKAGES})
    for name in IMPORTS:
        begun = time.monotonic()
        try:
            importlib.import_module(name)
        except Exception as error:  # of whatever library; the other imports are tried all the same
            report.problem(f"import {name}: {type(error).__name__}: {error}")
        report.add("import_seconds", {**report.figures.get("import_seconds", {}), name: time.monotonic() - begun})
    from llm_local.bench.gpu_speed import product_tflops
    from llm_local.device import describe_device, local_device, supports

    device = local_device(0)
    report.add("device", describe_device())
    report.add("device_type", device.type)
    report.add("device_facts", _device_facts())
    report.add("supports", {name: supports(name) for name in ("bf16", "fp16")})
    report.add("product_tflops", product_tflops(device, 256 if context.rehearse else 8192))
    if importlib.util.find_spec("llm_local.commands.doctor"):
        said = subprocess.run(
            [sys.executable, "-m", "llm_local.cli", "doctor"], capture_output=True, text=True, cwd=ROOT
        )
        report.add("doctor", said.stdout[-3000:] or said.stderr[-1000:])


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return ""


def _device_facts() -> dict[str, Any]:
    """Of CUDA; nothing where there is none."""
    import torch

    if not torch.accelerator.is_available():
        return {}
    module = torch.get_device_module()
    properties = module.get_device_properties(0)
    about = {"count": torch.accelerator.device_count(), "memory_bytes": properties.total_memory}
    about |= {"cuda": torch.version.cuda, "capability": list(module.get_device_capability(0))}
    query = ["nvidia-smi", "--query-gpu=driver_version,clocks.max.sm", "--format=csv,noheader"]
    try:
        about["nccl"] = ".".join(map(str, module.nccl.version()))
        about["driver"] = subprocess.run(query, capture_output=True, text=True).stdout.strip()
    except (AttributeError, OSError) as error:
        about["not_found"] = str(error)
    return about


def data(context: Context) -> None:
    """Text, tokenizer and tokens: the bundle's, or made of Python's own sources."""
    work, bundle = context.work, context.bundle
    text, tokenizer = (
        folder / name for folder, name in ((bundle or work, "text.jsonl.gz"), (bundle or work, "tokenizer"))
    )
    if bundle is None:
        context.report.add("documents", write_text(text, None, 2_000_000 if context.rehearse else 18_000_000))
        train_tokenizer(text, tokenizer)
    workers = min(10, len(os.sched_getaffinity(0)))
    flags = {**Paths(work, text, tokenizer).flags(), "preprocessing_num_workers": workers}
    given = [part for name, value in flags.items() for part in (f"--{name}", str(value))]
    script = [sys.executable, str(ROOT / "scripts/prepare_data.py"), *given]
    done = subprocess.run(script, capture_output=True, text=True, cwd=ROOT)
    if done.returncode:
        context.report.problem(done.stderr.strip()[-800:])
        return
    tokens = re.search(r"([\d,]+) tokens", done.stdout)
    context.report.add("tokens", int(tokens[1].replace(",", "")) if tokens else 0)
    (work / "data.json").write_text(json.dumps({"text": str(text), "tokenizer": str(tokenizer)}))


def fp32(context: Context) -> None:
    """Two stages on one device beside the same on this machine's CPU, and beside losses that were carried here."""
    report, found = context.report, {}

    def one(job: Job) -> None:
        found[job.name] = train(job, context.paths)
        report.add(job.name, found[job.name].figures() | {"losses": found[job.name].losses})
        if found[job.name].error:
            report.problem(f"{job.name}: {found[job.name].error}")

    jobs = [Job("fp32-device", REFERENCE), Job("fp32-cpu", REFERENCE, on_cpu=True)]
    side_by_side([partial(one, job) for job in jobs], context.at_once)
    losses = {name: each.losses for name, each in found.items()}
    others = {"cpu here": losses["fp32-cpu"]}
    if context.bundle is not None:
        carried = json.loads((context.bundle / "reference.json").read_text())
        others["carried"] = carried["losses"]
        report.add("carried_versions", carried["versions"])
    for name, theirs in others.items():
        apart = difference(losses["fp32-device"], theirs)
        report.add(f"difference, {name}", apart)
        if not apart <= TOLERANCE:
            report.problem(f"losses differ from those of the {name} by {apart:.2g}, more than {TOLERANCE:g}")


def zero(context: Context) -> None:
    """bf16 with each of ZeRO's files: 8 steps, resumed after 4, bit for bit, and the exports checked by the runs."""

    def one(name: str) -> None:
        # flash kernels add up in an order that changes, and then nothing is equal bit for bit
        json_file = {"deepspeed": f"configs/ds/{name}.json", "attn_implementation": "eager"}
        flags = context.small(8, bf16="true", save_steps=4, **json_file)
        whole = train(Job(name, flags), context.paths)
        figures = whole.figures() | {"exported": bool(whole.export)}
        context.report.add(name, figures)
        _check(context, name, whole)
        if whole.error:
            return
        middle = whole.folder / "checkpoints/step-00000004"
        again = train(Job(f"{name}-resumed", flags | {"resume_from_checkpoint": str(middle)}), context.paths)
        ends = [losses[4:] for losses in whole.losses]
        equal = again.losses == ends and again.export == whole.export
        apart = difference(again.losses, ends)
        context.report.add(name, figures | {"resumed_equal": equal, "resumed_difference": apart})
        if again.error:
            context.report.problem(f"{name} resumed: {again.error}")
        elif not equal:
            context.report.problem(f"{name} resumed: losses differ by {apart:.2g}, or the exported weights")

    names = FEW_ZERO if context.rehearse else ZERO
    side_by_side([partial(one, name) for name in names], context.at_once)


def _check(context: Context, name: str, found: Found) -> None:
    """A run that fails, exports nothing or learns nothing is a problem."""
    train_losses = found.losses
    if found.error:
        context.report.problem(f"{name}: {found.error}")
    elif not found.export:
        context.report.problem(f"{name}: nothing was exported")
    elif not all(losses[-1] < losses[0] for losses in train_losses):
        context.report.problem(f"{name}: the losses have not fallen: {train_losses}")


def variants(context: Context) -> None:
    """What else a stage may be told, a short run each."""
    small = partial(context.small, 8)
    jobs = [
        # the first steps are skipped until the loss scale is small enough
        Job("fp16-zero1", small(fp16="true", max_steps=30, deepspeed="configs/ds/zero1.json")),
        Job("compiled", small(bf16="true", torch_compile="true", deepspeed="configs/ds/zero1.json")),
        Job("overlapping", small(bf16="true", method="overlapping", layers_per_block=3, block_stride=2)),
        Job("shared-head", small(bf16="true", head="shared", head_layers=1, head_refresh_steps=2)),
        Job("int8-wire", small(bf16="true", wire_dtype="int8")),
    ]

    def one(job: Job) -> None:
        if job.flags.get("fp16") and context.rehearse:
            context.report.add(job.name, {"status": NEEDS_GPU})
            return
        found = train(job, context.paths)
        context.report.add(job.name, found.figures())
        _check(context, job.name, found)

    side_by_side([partial(one, job) for job in jobs], context.at_once)


def tests(context: Context) -> None:
    """The tests that carry the mark gpu, of the files that have one, in shares side by side."""
    files = [str(path) for path in sorted((ROOT / "tests").glob("test_*.py")) if "mark.gpu" in path.read_text()]
    plugins = ["-p", "no:cacheprovider", "-p", "pytest_timeout"]  # and none that happens to be installed
    pytest = [sys.executable, "-m", "pytest", "-m", "gpu", *plugins]
    told: dict[str, Any] = {"cwd": ROOT, "env": {**os.environ, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}}
    listed = subprocess.run([*pytest, "-q", "--collect-only", *files], capture_output=True, text=True, **told)
    names = [line for line in listed.stdout.splitlines() if "::" in line]
    if not names:
        context.report.problem(f"no test was found: {(listed.stdout or listed.stderr).strip()[-800:]}")
        return
    running = []
    for number in range(min(len(names), context.at_once)):
        log = context.work / f"steps/tests-{number}.log"
        command = [*pytest, "-v", *names[number :: context.at_once]]
        with log.open("w") as file:
            running.append((log, subprocess.Popen(command, stdout=file, stderr=file, **told)))
    alive = True
    while alive:
        alive = any([process.poll() is None for _, process in running])
        said = "".join(log.read_text(errors="replace") for log, _ in running)
        counts = {word.lower(): len(re.findall(f" {word} ", said)) for word in ("PASSED", "FAILED", "SKIPPED", "ERROR")}
        if context.rehearse and not counts["passed"]:
            context.report.status = NEEDS_GPU
        context.report.add("tests", {word: count for word, count in counts.items() if count})
        time.sleep(1)
    for log, process in running:
        if process.returncode:
            context.report.problem(last_words(log))


def _speed(name: str) -> Callable[[Context], None]:
    def step(context: Context) -> None:
        from llm_local.bench import gpu_speed

        getattr(gpu_speed, name)(context.report, context.paths, context.rehearse)

    return step


TASKS: dict[str, Callable[[Context], None]] = {
    "install": install_step,
    "facts": facts,
    "data": data,
    "fp32": fp32,
    "zero": zero,
    "variants": variants,
    "tests": tests,
    "mfu": _speed("mfu"),
    "passes": _speed("passes"),
    "study": _speed("study"),
}


def main(name: str, text: str) -> int:
    told = json.loads(text)
    report = Report(Path(told["result"]))
    bundle = Path(told["bundle"]) if told["bundle"] else None
    context = Context(Path(told["work"]), bundle, told["rehearse"], report)
    try:
        TASKS[name](context)
    except (ValueError, BundleError) as error:
        report.problem(str(error))
    return 1 if report.problems else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2]))
