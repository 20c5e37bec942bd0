"""llm-local doctor: what a machine has, and what is to be mended."""

from __future__ import annotations

import json
import socket
from types import SimpleNamespace

import pytest
import torch
from fake_gpu import cuda

from llm_local.commands import doctor
from llm_local.place import Place


def test_a_cpu(capsys: pytest.CaptureFixture):
    with socket.socket() as free:
        free.bind(("", 0))
        port = free.getsockname()[1]
    assert doctor.main(["--port", str(port)]) == 0
    said = capsys.readouterr().out
    assert f"torch {torch.__version__}" in said
    assert f"{port} is free" in said
    assert "link 0→1, replica 0  gloo, through host memory\n" in said
    assert said.endswith("nothing to mend\n")


def test_a_port_in_use(capsys: pytest.CaptureFixture):
    with socket.socket() as held:
        held.bind(("", 0))
        held.listen()
        port = held.getsockname()[1]
        assert doctor.main(["--json", "--port", str(port)]) == 1
    report = json.loads(capsys.readouterr().out)
    assert report["mend"] == [f"port {port} is in use; give the launcher --master_port with another"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--ranks", "3", "--num_stages", "2"], "--num_stages 2 does not divide --ranks 3"),
        (["--ranks", "0"], "'0' is no whole number above 0"),
    ],
)
def test_numbers_that_are_none(capsys: pytest.CaptureFixture, arguments: list[str], said: str):
    try:
        code: object = doctor.main(arguments)
    except SystemExit as error:
        code = error.code
    assert code == 2
    assert said in capsys.readouterr().err


def pretend_gpus(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    known = {
        "local_device": lambda rank: torch.device("cuda", rank % count),
        "DeviceName": SimpleNamespace(of=lambda device: cuda(f"GPU-{device.index}")),
        "memory_bytes": lambda device: 80 * 2**30,
        "describe_device": lambda: "NVIDIA H100",
        "runtime_versions": lambda: "CUDA 13.0, NCCL 2.28.9",
    }
    for name, value in known.items():
        monkeypatch.setattr(doctor, name, value)


def test_gpus(monkeypatch: pytest.MonkeyPatch):
    pretend_gpus(monkeypatch, 2)
    report = doctor.examine(2, 2, 1, {})
    assert report.found["devices"] == "2 x NVIDIA H100, 80 GiB; CUDA 13.0, NCCL 2.28.9"
    assert report.found["link 0→1, replica 0"] == "NCCL, from GPU to GPU"
    pretend_gpus(monkeypatch, 1)
    report = doctor.examine(4, 2, 1, {})
    assert report.found["link 0→1, replica 1"] == "gloo, through host memory"
    assert any("4 ranks share 1 GPU: good for trying out" in note for note in report.notes)
    assert any("ranks 0 and 1, replicas of a stage, share GPU-0" in each for each in report.mend)


def test_an_address_that_others_cannot_reach(monkeypatch: pytest.MonkeyPatch):
    there = {"lo": [], "eth0": []}
    monkeypatch.setattr(doctor.psutil, "net_if_addrs", lambda: there)
    monkeypatch.setattr(doctor.socket, "gethostbyname", lambda host: "127.0.1.1")
    (note,) = doctor.examine(1, 1, 1, {}).notes
    assert note.startswith("of several machines the others cannot reach 127.0.1.1: set GLOO_SOCKET_IFNAME")
    assert doctor.examine(1, 1, 1, {"GLOO_SOCKET_IFNAME": "eth0"}).notes == ()


def test_links_of_every_boundary():
    names = [cuda("1"), cuda("2"), cuda("2"), cuda("3", "b")]
    assert doctor.links(Place(0, (1,) * 4), names) == {
        "0→1, replica 0": "nccl",
        "1→2, replica 0": "gloo",
        "2→3, replica 0": "gloo",
    }
