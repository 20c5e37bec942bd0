"""Ranks the layouts of a model on a machine, by simulation: stages x replicas x devices that divide layers or rows x
ZeRO stage x head; nothing is trained.

llm-local plan --model CONFIG.json --devices 64 --memory-gb 80 --link-gbps 25 [--seq_length 2048 ...]

All flags of pretrain that matter for speed or memory mean here what they mean there. --gradient_accumulation_steps
is that of data parallelism on all devices: every layout trains on as many rows a step.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from dataclasses import asdict, replace
from pathlib import Path

os.environ["DS_ACCELERATOR"] = "cpu"  # nothing here runs on a GPU

from llm_local.config import Config, ConfigError, Parser, parse, refused
from llm_local.files import Unwritten, ends_with_a_line, writing
from llm_local.memory.sizes import read_model
from llm_local.methods.method import local_methods
from llm_local.plan import failing
from llm_local.plan.layouts import Planner
from llm_local.plan.machine import Machine, hosts_of, of_each
from llm_local.plan.report import Plan, as_json, draw, short, text, trace_events, verdict
from llm_local.plan.search import Choices, check_plan, search
from llm_local.program import program
from llm_local.registry import HEADS
from llm_local.screen import quiet_libraries

NAME = program(__file__)


def make_parser() -> argparse.ArgumentParser:
    p = Parser(prog=NAME, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    machine = p.add_argument_group("machine")
    machine.add_argument("--devices", type=int, required=True, help="devices, in the order of ranks")
    machine.add_argument(
        "--devices-per-host", nargs="+", type=int, default=[1], help="of them on each host (1), or on each in turn"
    )
    for name, default, about in (
        ("--memory-gb", 80, "GB of a device that tensors may take"),
        ("--memory-tb-per-second", 1.5, "of a device, for the optimizer"),
        ("--device-tflops", 100, "that a device reaches in training"),
    ):
        about = f"{about} ({default}); or one number for each host, or for each device"
        machine.add_argument(name, nargs="+", type=float, default=[default], help=about)
    machine.add_argument("--link-gbps", type=float, default=25, help="Gb/s of a host's network, each direction (25)")
    machine.add_argument("--local-link-gbps", type=float, default=2400, help="Gb/s between devices of a host (2400)")
    machine.add_argument("--link-latency-us", type=float, default=20, help="microseconds from host to host (20)")
    what = p.add_argument_group("layouts")
    what.add_argument("--model", required=True, help="JSON of the model's config, or its directory")
    what.add_argument(
        "--method", nargs="+", default=["chunked"], choices=local_methods(), help="local methods (chunked)"
    )
    what.add_argument("--head", nargs="+", choices=HEADS, help="heads (linear and shared)")
    what.add_argument("--num_stages", nargs="+", type=int, help="stages (all that divide the devices)")
    what.add_argument(
        "--stage_replicas",
        nargs="+",
        help="replicas of each stage, as 4,2,1; any: such splits are searched, too (any where devices differ)",
    )
    for name, what_of in (("tensor_parallel_size", "layer"), ("sequence_parallel_size", "row")):
        about = f"devices that divide each {what_of} (all numbers that the model allows)"
        what.add_argument(f"--{name}", nargs="+", type=int, help=about)
    what.add_argument("--zero", nargs="+", type=int, default=[0, 1, 2, 3], choices=range(4), help="ZeRO stages (all)")
    what.add_argument("--precision", choices=("bf16", "fp16", "fp32"), help="of training (bf16)")
    faults = p.add_argument_group("failures")
    faults.add_argument("--mtbf_hours", type=float, help="mean time between two failures of a stage (none)")
    faults.add_argument("--restart_seconds", type=float, default=60, help="until it trains again (60)")
    out = p.add_argument_group("output")
    out.add_argument("--top", type=int, default=5, help="layouts that are shown (5)")
    out.add_argument("--json", type=Path, help="file for everything in numbers")
    out.add_argument("--trace", type=Path, help="file for the best layout's steps, for Perfetto or chrome://tracing")
    out.add_argument("--picture", action="store_true", help="draw the best layout's steps")
    return p


def make_planner(given: argparse.Namespace, rest: list[str]) -> Planner:
    """Raises ConfigError with all that is wrong with the flags and the model."""
    flags = parse(["--model_name_or_path" if Path(given.model).is_dir() else "--config_name", given.model, *rest])
    precision = given.precision or ("fp16" if flags.train.fp16 else "bf16")
    train = replace(flags.train, bf16=precision == "bf16", fp16=precision == "fp16")
    config = Config(flags.model, flags.data, flags.local, train)
    check_plan(vars(given), config)
    hosts = hosts_of(given.devices, given.devices_per_host)
    machine = Machine(
        devices=given.devices,
        memory_bytes=of_each([each * 1e9 for each in given.memory_gb], hosts),
        flops=of_each([each * 1e12 for each in given.device_tflops], hosts),
        memory_bytes_per_second=of_each([each * 1e12 for each in given.memory_tb_per_second], hosts),
        link_gbps=given.link_gbps,
        local_link_gbps=given.local_link_gbps,
        link_latency_seconds=given.link_latency_us * 1e-6,
        devices_per_host=hosts if len(set(hosts)) > 1 else given.devices_per_host[0],
    )
    anatomy, sizes = read_model(config.model, config.data.seq_length, config.precision)
    if anatomy.num_tokens:
        config = replace(config, data=replace(config.data, seq_length=anatomy.num_tokens))
    rows = given.devices * train.per_device_train_batch_size * train.gradient_accumulation_steps
    return Planner(anatomy, sizes, machine, config, rows)


def write(given: argparse.Namespace, planner: Planner, plan: Plan) -> None:
    print(text(planner, plan))
    numbers = as_json(planner, plan)
    if given.mtbf_hours is not None:
        times = (given.mtbf_hours * 3600, given.restart_seconds)
        found = failing.shares(planner.config, plan.best, plan.peers, *times)
        numbers["failures"] = [asdict(each) for each in found]
        print(f"\n{failing.text(found, *times)}")
    if given.json:
        with writing(given.json):
            given.json.write_text(json.dumps(numbers, indent=1) + "\n")
    shown = next(iter((*plan.best, *plan.peers)), None)
    if shown is None or shown.pipe is None or not (given.picture or given.trace):
        return
    timeline, count = short(shown.pipe)
    print(f"\n{shown.layout}: two steps of {count} micro-batches")
    if given.picture:
        print(draw(shown.pipe, timeline))
    if given.trace:
        with writing(given.trace):
            given.trace.write_text(json.dumps(trace_events(shown.pipe, timeline)) + "\n")
        print(f"trace: {given.trace}")


@ends_with_a_line(Unwritten)
def main(arguments: list[str]) -> int:
    quiet_libraries()
    try:
        given, rest = make_parser().parse_known_args(arguments)
        planner = make_planner(given, rest)
        sizes = (given.tensor_parallel_size, given.sequence_parallel_size)
        choices = Choices(given.method, given.head, given.num_stages, given.zero, given.stage_replicas, *sizes)
        plan = search(planner, choices, given.top)
        write(given, planner, plan)
    except (ConfigError, OSError) as error:
        return refused(NAME, error)
    if not plan.best and not plan.peers:
        print(f"{NAME}: {verdict(plan)}", file=sys.stderr)
        return 2
    return 0
