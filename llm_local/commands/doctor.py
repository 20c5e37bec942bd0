"""Shows what this machine has for a run, and what to mend before one: llm-local doctor [--ranks N] [--num_stages N]

For several machines run it on each. The exit status is 1 where something is to be mended.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import socket
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version

import psutil
import torch

from llm_local.checks.devices import device_problems, device_warnings
from llm_local.config import from_flat
from llm_local.device import (
    DTYPES,
    DeviceName,
    describe_device,
    local_device,
    memory_bytes,
    missing_for_compile,
    runtime_versions,
    supports,
    take_the_cpu_if_alone,
)
from llm_local.launch import PORT
from llm_local.links.transports import transport
from llm_local.place import Place
from llm_local.program import command_parser, program

NAME = program(__file__)
_PACKAGES = ("transformers", "deepspeed", "datasets", "accelerate")
_TOOLS = ("g++", "ninja", "nvcc")
_WAYS = {"nccl": "NCCL, from GPU to GPU", "gloo": "gloo, through host memory"}


@dataclass(frozen=True)
class Report:
    """What was found, what is worth knowing of it, and each thing to mend with its repair."""

    found: dict[str, str]
    notes: tuple[str, ...]
    mend: tuple[str, ...]

    def lines(self) -> list[str]:
        width = max(map(len, self.found))
        lines = [f"{name.ljust(width)}  {value}" for name, value in self.found.items()]
        lines += [f"note: {each}" for each in self.notes]
        return lines + ([f"to mend: {each}" for each in self.mend] or ["nothing to mend"])


def main(arguments: list[str]) -> int:
    parser = command_parser(NAME, __doc__)
    parser.add_argument("--ranks", type=_number, default=2, help="of a run on this machine (2)")
    parser.add_argument("--num_stages", type=_number, help="of that run (as many as ranks)")
    parser.add_argument("--port", type=_number, default=PORT, help=f"of the rendezvous, as in --master_port ({PORT})")
    parser.add_argument("--json", action="store_true", help="print JSON")
    given = parser.parse_args(arguments)
    num_stages = given.num_stages or given.ranks
    if given.ranks % num_stages:
        print(f"{NAME}: --num_stages {num_stages} does not divide --ranks {given.ranks}", file=sys.stderr)
        return 2
    take_the_cpu_if_alone()
    report = examine(given.ranks, num_stages, given.port, os.environ)
    print(json.dumps(asdict(report)) if given.json else "\n".join(report.lines()))
    return 1 if report.mend else 0


def _number(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number above 0")
    return int(text)


def examine(ranks: int, num_stages: int, port: int, environ: Mapping[str, str]) -> Report:
    """What a run of so many ranks would find here."""
    devices = [local_device(rank) for rank in range(ranks)]
    names = [DeviceName.of(device) for device in devices]
    place = Place(0, (ranks // num_stages,) * num_stages)
    config = from_flat({"config_name": "-", "num_stages": num_stages})
    address, is_free, lacks = _address(socket.gethostname()), _is_free(port), missing_for_compile()
    found = {
        "versions": ", ".join([*_runtime(), *(f"{name} {version(name)}" for name in _PACKAGES)]),
        "devices": _devices(devices),
        "precisions": ", ".join(name for name in DTYPES if supports(name)),
        "torch_compile": f"lacks {lacks}" if lacks else "works",
        "compilers": f"{_tools()}; needed by --torch_compile and by optimizers of DeepSpeed's own",
        "memory": f"{psutil.virtual_memory().available / 2**30:.1f} GiB free of the host's",
        "port": f"{port} is {'free' if is_free else 'in use'}",
        "address": f"{socket.gethostname()} is {address or 'not known by its name'}",
        "network": ", ".join(_interfaces()),
    }
    found |= {f"link {link}": _WAYS[way] for link, way in links(place, names).items()}
    notes = _network_notes(address, environ)
    mend = [] if is_free else [f"port {port} is in use; give the launcher --master_port with another"]
    if devices[0].type != "cpu":
        notes += device_warnings(place, names)
        mend += device_problems(config, place, names)
    return Report(found, tuple(notes), tuple(mend))


def links(place: Place, names: Sequence[DeviceName]) -> dict[str, str]:
    """The transport of each link of a launch, by its name."""
    found = {}
    for stage in place.stages[:-1]:
        for replica in range(place.replicas[stage]):
            ends = place.rank_of(stage, replica), place.rank_of(stage + 1, replica)
            found[f"{stage}→{stage + 1}, replica {replica}"] = transport(names[ends[0]], names[ends[1]])
    return found


def _runtime() -> list[str]:
    return [f"Python {platform.python_version()}", f"torch {torch.__version__}"]  # which also names its build


def _devices(devices: Sequence[torch.device]) -> str:
    if devices[0].type == "cpu":
        return f"no GPU: {describe_device()}"
    different = list(dict.fromkeys(devices))
    size = memory_bytes(different[0]) / 2**30
    return f"{len(different)} x {describe_device()}, {size:.0f} GiB; {runtime_versions()}"


def _tools() -> str:
    return ", ".join(f"{name} {'is there' if shutil.which(name) else 'is not'}" for name in _TOOLS)


def _address(host: str) -> str:
    try:
        return socket.gethostbyname(host)
    except OSError:
        return ""


def _interfaces() -> list[str]:
    """Those with an IPv4 address, and that."""
    found = psutil.net_if_addrs().items()
    return [f"{name} {each.address}" for name, all_of in found for each in all_of if each.family == socket.AF_INET]


def _network_notes(address: str, environ: Mapping[str, str]) -> list[str]:
    others = [name for name in psutil.net_if_addrs() if name != "lo"]
    if not others or environ.get("GLOO_SOCKET_IFNAME") or (address and not address.startswith("127.")):
        return []
    return [
        f"of several machines the others cannot reach {address or 'a name without address'}: set GLOO_SOCKET_IFNAME "
        f"and NCCL_SOCKET_IFNAME there (here one of {', '.join(others)})"
    ]


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except OSError:
            return False
    return True
