"""Two hosts on one machine: network namespaces with a cable between them whose rate and delay can be set."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

from llm_local.bench.cases import BenchmarkError, Case, run_case
from llm_local.bench.relay import MTU, Relay, open_tun

ADDRESSES = ("10.213.77.1", "10.213.77.2")
PORT = 29533


def missing() -> str:
    """Why there can be no hosts here; '' if there can."""
    return "network namespaces need root and ip" if os.geteuid() or not shutil.which("ip") else ""


def sh(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise BenchmarkError(f"{' '.join(command)}: {done.stderr.strip()}")


@dataclass(frozen=True)
class TwoHosts:
    """The cable, and what starts a node's ranks on each host."""

    relay: Relay
    launchers: list[list[str]]

    def run(self, case: Case, bytes_a_second: float | None = None, delay_seconds: float = 0.0) -> list[dict[str, Any]]:
        """What each rank measured, one on a host. bytes_a_second, delay_seconds: of the cable in each direction; None:
        no limit."""
        self.relay.bytes_a_second, self.relay.delay_seconds = bytes_a_second, delay_seconds
        return run_case(case, self.launchers)


@contextmanager
def two_hosts() -> Iterator[TwoHosts]:
    """Raises BenchmarkError where they cannot be made. Needs root, and goes with the process that makes them."""
    with ExitStack() as stack:
        ends = []
        for number, address in enumerate(ADDRESSES):
            name = _name(number)
            sh("ip", "netns", "add", name)
            stack.callback(subprocess.run, ["ip", "netns", "del", name], capture_output=True, check=False)
            try:
                ends.append(open_tun(name))
            except OSError as error:
                raise BenchmarkError(f"no TUN device can be made: {error}") from error
            stack.callback(os.close, ends[-1])
            sh("ip", "link", "set", name, "netns", name)
            for command in (
                ["addr", "add", f"{address}/24", "dev", name],
                ["link", "set", name, "mtu", str(MTU), "up"],
                ["link", "set", "lo", "up"],
            ):
                sh("ip", "-n", name, *command)
        relay = Relay(*ends)
        stack.callback(relay.stop)
        yield TwoHosts(relay, [_launcher(number) for number in (0, 1)])


def _name(number: int) -> str:
    """Of a host, and of its end of the cable; no other process's."""
    return f"llm{os.getpid()}n{number}"  # a device's name has 15 letters at most


def _launcher(number: int) -> list[str]:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc_per_node=1"]
    torchrun += [f"--node_rank={number}", f"--master_addr={ADDRESSES[0]}", f"--master_port={PORT}"]
    return ["ip", "netns", "exec", _name(number), "env", f"GLOO_SOCKET_IFNAME={_name(number)}", *torchrun]
