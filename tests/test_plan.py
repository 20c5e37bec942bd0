"""scripts/plan.py: what it says, what it writes, and what it refuses."""

from __future__ import annotations

import json
import sys
from importlib import import_module
from pathlib import Path
from types import ModuleType

import pytest
from planning import MODEL

from llm_local.checks.tiny import tiny_config
from llm_local.export.model_folder import model_without_memory
from llm_local.flags import ModelArguments
from llm_local.memory.sizes import read_model
from llm_local.plan.stages import PEER_METHODS

ROOT = Path(__file__).parent.parent


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    monkeypatch.delitem(sys.modules, "plan", raising=False)
    return import_module("plan")


WHOLE = ("--tensor_parallel_size", "1", "--sequence_parallel_size", "1")  # nobody divides layers or rows


def run(script: ModuleType, model: Path, *flags: str) -> int:
    return script.main(["--model", str(model), "--devices", "8", "--seq_length", "512", *WHOLE, *flags])


def test_a_plan_in_words_and_numbers(script: ModuleType, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    out, trace = tmp_path / "plan.json", tmp_path / "trace.json"
    assert run(script, model, "--top", "2", "--json", str(out), "--trace", str(trace), "--picture") == 0
    said = capsys.readouterr().out
    assert "V/(12h) = 1.00 layers: each block beside the last adds 12.5%" in said
    assert "8 devices of 80 GB at 100 TFLOP/s" in said
    assert "stage 0 | F" in said
    plan = json.loads(out.read_text())
    assert len(plan["local"]) == 2
    assert plan["local"][0]["step_seconds"] <= plan["local"][1]["step_seconds"]
    assert {o["method"] for o in plan["backpropagation"]} == set(PEER_METHODS)
    assert plan["verdict"] in said
    assert plan["head_in_layers"] == 1
    best = plan["local"][0]
    assert best["is_simulated"]
    assert len(best["memory_bytes"]) == len(best["idle"]) == best["num_stages"]
    assert best["step_bytes_per_boundary"] >= plan["rows"] * 512 * (2 * 1024 + 4)
    events = json.loads(trace.read_text())["traceEvents"]
    spans = [event for event in events if event["ph"] == "X"]
    assert {event["pid"] for event in events} == set(range(best["num_stages"]))
    assert all(event["dur"] > 0 and event["ts"] >= 0 for event in spans)
    assert {event["cat"] for event in spans} == {"forward", "backward", "optimizer"}
    assert len(spans) == best["num_stages"] * 2 * (2 * best["gradient_accumulation_steps"] + 1)


@pytest.mark.parametrize(("kind", "size"), [("vit", "6 layers, hidden size 32"), ("swin", "6 layers, hidden size 64")])
def test_a_plan_for_images(script: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture, kind: str, size: str):
    path, task = tmp_path / "model.json", "image-classification"
    path.write_text(json.dumps(tiny_config(kind, task).to_dict()))
    given = ["--model", str(path), "--devices", "2", "--task", task, "--json", str(tmp_path / "plan.json"), *WHOLE]
    assert script.main(given) == 0
    said = capsys.readouterr().out
    assert f"{size}, classes 2" in said
    assert "a step is 16 images of" in said
    plan = json.loads((tmp_path / "plan.json").read_text())
    assert {each["head"] for each in plan["local"]} == {"linear"}
    assert (plan["head_in_layers"] > 0.1) == (kind == "swin"), "the level behind is part of each head"
    whole = sum(parameter.numel() for parameter in model_without_memory(tiny_config(kind, task), task).parameters())
    assert read_model(ModelArguments(task=task, config_name=str(path)))[1].num_parameters == whole


def test_what_is_left_where_stages_fail(script: ModuleType, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    out = tmp_path / "plan.json"
    assert run(script, model, "--mtbf_hours", "2", "--num_stages", "1", "4", "--json", str(out)) == 0
    assert "Throughput that is left when each stage fails every 2 h and is back in 60 s:" in capsys.readouterr().out
    found = json.loads(out.read_text())["failures"]
    assert {each["num_stages"] for each in found if each["as_jobs"] is not None} == {4}
    assert all(each["as_jobs"] > each["in_one_launch"] for each in found if each["as_jobs"] is not None)
    assert run(script, model, "--mtbf_hours", "0") == 2
    assert "--mtbf-hours 0 must be more than 0" in capsys.readouterr().err


def test_devices_may_divide_layers_or_rows(
    script: ModuleType, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture
):
    """Of a host with fast links, whose devices have too little memory for a whole layer, and slow links between."""
    out = tmp_path / "plan.json"
    machine = ["--model", str(model), "--devices", "4", "--devices-per-host", "2", "--seq_length", "1024"]
    small = [*machine, "--memory-gb", "1.1", "--per_device_train_batch_size", "1", "--top", "20", "--json", str(out)]
    assert script.main(small) == 0
    found = json.loads(out.read_text())["local"]
    sizes = {(each["tensor_parallel_size"], each["sequence_parallel_size"]) for each in found}
    assert {(2, 1), (1, 2)} <= sizes
    assert all(min(size) == 1 for size in sizes)
    for each in found:
        ranks = each["tensor_parallel_size"] * each["sequence_parallel_size"]
        assert each["num_stages"] * each["num_replicas"] * ranks == 4
        assert each["zero"] < 3 or each["tensor_parallel_size"] == 1
        assert each["zero"] > 0 or each["tensor_parallel_size"] == 1, "in bf16 it clips by a norm that misses parts"
        assert each["head"] == "linear" or each["tensor_parallel_size"] == 1
    assert script.main([*small, "--tensor_parallel_size", "2", "--num_stages", "2"]) == 0
    said, plan = capsys.readouterr().out, json.loads(out.read_text())
    assert {each["tensor_parallel_size"] for each in plan["local"]} == {2}
    assert "chunked, 2 stages x 1 x 2 ranks a layer, ZeRO 1, linear heads" in said
    assert "--num_stages 2 --tensor_parallel_size 2 " in plan["local"][0]["flags"]
    assert plan["local"][0]["flags"].endswith("--deepspeed configs/ds/zero1.json")
    assert {each["tensor_parallel_size"] for each in plan["backpropagation"] if each["num_stages"] > 1} <= {1}


def test_a_fast_network_is_for_data_parallelism_and_a_slow_one_is_not(
    script: ModuleType, model: Path, capsys: pytest.CaptureFixture
):
    assert run(script, model, "--link-gbps", "3200") == 0
    assert "Data-parallel backpropagation would be 1." in capsys.readouterr().out
    assert run(script, model, "--link-gbps", "1") == 0
    assert "times as fast as data-parallel backpropagation." in capsys.readouterr().out


@pytest.mark.processes
def test_a_thousand_stages(script: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture):
    deep = tmp_path / "deep.json"
    deep.write_text(json.dumps({**MODEL, "num_hidden_layers": 1024}))
    assert run(script, deep, "--devices", "1024", "--num_stages", "1024") == 0
    said = capsys.readouterr().out
    assert "chunked, 1024 stages x 1, ZeRO 0, linear heads" in said
    assert "~ estimated by formula" in said


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--devices 0", "--devices 0 must be more than 0"),
        ("--link-gbps 0", "--link-gbps 0 must be more than 0"),
        ("--memory-gb -1", "--memory-gb -1 must be more than 0"),
        ("--device-tflops nan", "--device-tflops nan must be more than 0"),
        ("--link-latency-us -1", "--link-latency-us -1 must be 0 or more"),
        ("--devices-per-host 3", "--devices 8 are no multiple of --devices-per-host 3"),
        ("--num_stages 3", "--num_stages 3 does not divide the 8 devices; use one of 1, 2, 4"),
        ("--num_stages 0", "--num_stages 0 must be 1 or more"),
        ("--devices 16 --num_stages 16", "--num_stages 16 is more than the model's 8 layers; use 8 or fewer"),
        ("--seq_length 4096", "--seq_length 4096 is longer than the model's 2048 positions"),
        ("--stage_layers 4,4", "--stage_layers is set by the plan"),
        ("--freeze_stages 0", "--freeze_stages: a plan is of models that are trained whole; leave it out"),
        ("--tensor_parallel_size 3", "--tensor_parallel_size 3 does not divide the 8 devices; use one of 1, 2, 4, 8"),
        ("--sequence_parallel_size 0", "--sequence_parallel_size 0 does not divide the 8 devices; use one of 1, 2"),
        ("--tensor_parallel_size 2 --sequence_parallel_size 4", "devices divide layers or rows; leave one out"),
        (
            "--tensor_parallel_size 2 --num_stages 8",
            "--num_stages 8 does not divide the 4 groups of 2 devices",
        ),
        ("--tensor_parallel_size 2 --stage_replicas 4,2,2", "4,2,2 x 2 are 16 devices, --devices is 8"),
        (
            "--sequence_parallel_size 2 --document_mask true",
            "sequence_parallel_size=2: no rank sees where",
        ),
        (
            "--devices 16 --tensor_parallel_size 16",
            "tensor_parallel_size=16 does not divide num_attention_heads=8",
        ),
        ("--head decoder", "head=decoder needs private layers"),
        ("--per_device_train_batch_size 0", "per_device_train_batch_size=0 must be greater than 0"),
        ("--bogus 1", "unknown argument '--bogus'"),
        ("--method magic", "invalid choice: 'magic'"),
        ("--memory-gb 0.01", "Nothing fits: take more devices"),
        ("--model nowhere.json", "nowhere.json: no such file"),
        ("--json nowhere/plan.json", "--json nowhere/plan.json: there is no folder nowhere; make it"),
    ],
)
def test_bad_input_is_one_clear_line(
    script: ModuleType, model: Path, capsys: pytest.CaptureFixture, flags: str, message: str
):
    assert run(script, model, *flags.split()) == 2
    said = capsys.readouterr().err.strip()
    assert message in said
    assert said.startswith("plan.py: ")
    assert "\n" not in said
