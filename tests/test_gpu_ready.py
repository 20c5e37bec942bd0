"""What a GPU would find, as far as a CPU can show it."""

from __future__ import annotations

import json
import os
import traceback
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import Trainer
from deepspeed.accelerator import real_accelerator
from deepspeed.runtime.fp16.fused_optimizer import FP16_Optimizer
from engines import tiny_engine
from fake_gpu import QueuedCpu, cuda, pretend
from ranks import run_ranks
from torch.utils._python_dispatch import TorchDispatchMode

from llm_local import device
from llm_local.adapters.deepspeed_internals import undo_dummy_step
from llm_local.checkpoint.loader import step_device
from llm_local.checkpoint.shards import shards
from llm_local.checks.devices import device_problems, device_warnings
from llm_local.config import from_flat
from llm_local.device import local_device, set_deepspeed_device
from llm_local.ds_config import load_json, resolve
from llm_local.ds_problems import deepspeed_problems
from llm_local.links.transports import transport
from llm_local.model.loss import chunk_rows
from llm_local.place import Place


@pytest.mark.parametrize(("fused", "wanted"), [(True, "meta"), (False, "cpu"), (None, "cpu")])
def test_a_fused_optimizer_counts_its_steps_on_the_device(fused: bool | None, wanted: str):
    holder = torch.nn.Parameter(torch.zeros(3, device="meta"))
    other = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))])
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], fused=None)
    optimizer.add_param_group({"params": [holder]})
    for group in optimizer.param_groups:
        group["fused"] = fused
    assert step_device(optimizer, holder) == torch.device(wanted)
    assert step_device(SimpleNamespace(optimizer=other), holder) == torch.device("cpu")


class OneGpu(QueuedCpu):
    def device_name(self, device_index: int | None = None) -> str:
        return "cuda"

    def device_count(self) -> int:
        return 1

    def set_device(self, device_index: int) -> None:
        assert device_index == 0, "invalid device ordinal"


def find_device(variables: dict[str, str]) -> tuple[str, dict[str, str]]:
    real_accelerator.set_accelerator(OneGpu())
    os.environ.update(variables)
    device = local_device(int(os.environ["LOCAL_RANK"]))
    set_deepspeed_device(device)
    return str(device), {name: os.environ[name] for name in ("LOCAL_RANK", *variables)}


@pytest.mark.processes
@pytest.mark.parametrize("variables", [{}, {"OMPI_COMM_WORLD_LOCAL_RANK": "1"}])
def test_deepspeed_is_told_the_device_and_not_the_rank(variables: dict[str, str]):
    """Where ranks share a GPU, or each sees its own alone, as under SLURM."""
    told = {"LOCAL_RANK": "0"} | dict.fromkeys(variables, "0")
    assert run_ranks(find_device, 2, variables) == [("cuda:0", told)] * 2


def settings_of(folder: Path, settings: dict[str, Any] | None, **flags: Any) -> Any:
    path = folder / "ds.json"
    path.write_text(json.dumps(settings))
    flags |= {"deepspeed": str(path)} if settings is not None else {}
    return from_flat({"config_name": "m.json", **flags})


@pytest.mark.parametrize("settings", [None, {}, {"zero_optimization": {}}, {"fp16": {"enabled": "auto"}}])
def test_fp16_trains_under_zero(tmp_path: Path, settings: dict[str, Any] | None):
    config = settings_of(tmp_path, settings, fp16=True)
    found = resolve(config, 1, SimpleNamespace(hidden_size=8))
    assert found["zero_optimization"]["stage"] == 1
    assert load_json(config)["zero_optimization"]["stage"] == 1, "what a checkpoint and a card say"
    assert deepspeed_problems(config, 1) == []
    assert load_json(settings_of(tmp_path, settings, bf16=True)).get("zero_optimization", {}) == {}


def test_fp16_without_zero_is_refused(tmp_path: Path):
    config = settings_of(tmp_path, {"zero_optimization": {"stage": 0}}, fp16=True)
    said = (
        f"zero_optimization.stage=0 in {tmp_path / 'ds.json'} with fp16 would train nothing, as DeepSpeed scales the "
    )
    assert deepspeed_problems(config, 1) == [said + "loss under ZeRO alone; use stage 1"]


def move_by_fp16(stage: int) -> float:
    """How far a step on a loss whose gradient is 1e-6 moves a weight, of a rate of 0.01."""
    pretend()
    engine = tiny_engine({"zero_optimization": {"stage": stage}}, fp16=True, learning_rate=1e-2)
    engine.backward(1e-6 * engine.module.head.model.get_output_embeddings().weight.float().sum())
    moved = engine.module.head.model.get_output_embeddings().weight
    before = moved.detach().float().clone()
    engine.step()
    return float((moved.detach().float() - before).abs().max())


@pytest.mark.processes
def test_a_gradient_in_fp16_moves_a_weight():
    moved = {stage: run_ranks(move_by_fp16, 1, stage)[0] for stage in (1, 2)}
    assert all(distance > 0.009 for distance in moved.values()), moved


def step_before_begin() -> tuple[int, bool]:
    """FusedAdam's wrapper takes a step on zero gradients when it is made."""
    weight = torch.nn.Parameter(torch.ones(4, dtype=torch.bfloat16))
    inner = torch.optim.AdamW([weight], lr=0.1, weight_decay=0.1)
    scale = SimpleNamespace(cur_scale=1.0, dynamic_loss_scale=False)
    wrapper = FP16_Optimizer(inner, loss_scale_config=scale, low_precision_dtype=torch.bfloat16)
    engine: Any = SimpleNamespace(optimizer=wrapper)
    undo_dummy_step(engine)
    return len(inner.state), bool((wrapper.fp32_groups_flat[0] == 1).all())


def test_a_step_that_deepspeed_takes_to_make_room_is_undone():
    assert step_before_begin() == (0, True)


@pytest.mark.parametrize("kind", ["Adam", "AdamW", "Muon"])
def test_no_optimizer_is_compiled(tmp_path: Path, kind: str):
    config = settings_of(tmp_path, {"optimizer": {"type": kind, "params": {}}})
    assert resolve(config, 1, SimpleNamespace(hidden_size=8))["optimizer"]["params"]["torch_adam"] is True


PAIR = [cuda("GPU-1"), cuda("GPU-1")]
FOUR = [cuda("GPU-1"), cuda("GPU-2"), cuda("GPU-1"), cuda("GPU-2")]
CUT = {"num_stages": 2}


@pytest.mark.parametrize(
    ("flags", "replicas", "names", "said"),
    [
        (
            {},
            (2,),
            PAIR,
            "ranks 0 and 1, replicas of a stage, share GPU-1, which NCCL cannot do; start fewer ranks, or",
        ),
        (CUT, (1, 1), PAIR, ""),
        (CUT, (2, 2), FOUR, ""),
        (CUT, (2, 2), FOUR[::2] * 2, "ranks 0 and 1, replicas of a stage, share GPU-1"),
        (CUT, (1, 3), FOUR, "ranks 1 and 3, replicas of a stage, share GPU-2"),
        ({"replica_sync_steps": 5}, (2,), PAIR, ""),
        ({**CUT, "method": "backprop"}, (1, 1), PAIR, "ranks 0 and 1, stages, share GPU-1, which NCCL cannot do; give"),
        ({**CUT, "method": "backprop"}, (1, 1), [cuda("GPU-1"), cuda("GPU-2")], ""),
    ],
)
def test_ranks_that_meet_by_nccl_have_gpus_of_their_own(flags: dict, replicas: tuple, names: list, said: str):
    problems = device_problems(from_flat({"config_name": "m.json", **flags}), Place(0, replicas), names)
    assert problems[0].startswith(said) if said else problems == []


def test_stages_that_share_a_gpu_are_told():
    assert device_warnings(Place(0, (1, 1)), [cuda("GPU-1"), cuda("GPU-2")]) == ()
    assert device_warnings(Place(0, (1, 1)), PAIR) == (
        "2 ranks share 1 GPU: good for trying out; links between them go through host memory, and stages take turns",
    )
    assert transport(*PAIR) == "gloo"


def refuse(arguments: list[str]) -> int:
    from llm_local.train import main

    pretend()
    return main(arguments)


@pytest.mark.processes
def test_a_gpu_that_replicas_share_is_refused_before_anything_is_written(
    trainer: Trainer, capfd: pytest.CaptureFixture
):
    assert run_ranks(refuse, 2, trainer.flags("out", num_stages=1)) == [2, 2]
    assert "ranks 0 and 1, replicas of a stage, share" in capfd.readouterr().err
    assert not (trainer.folder / "out").exists()


# what asks, and of which number: of tensors in host memory, or in DeepSpeed's own step
ON_THE_HOST = {"packing.py inputs_of", "feed.py _share", "feed.py _weights", "message.py to_bytes"}
OF_DOCUMENTS = {"masking_utils.py find_packed_sequence_indices"}  # where each begins, once a slice
OF_DEEPSPEED = {"stage_1_and_2.py has_overflow", "utils.py is_invalid_grad_norm"}
BF16_ZERO1 = {"bf16": True, "deepspeed": Path(__file__).parent.parent / "configs" / "ds" / "zero1.json"}


class Questions(TorchDispatchMode):
    """Which functions ask a tensor for a number, for which a host waits until a GPU has it."""

    def __init__(self) -> None:
        super().__init__()
        self.askers: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if "_local_scalar_dense" in str(func):
            stack = [frame for frame in traceback.extract_stack()[:-1] if "torch" not in Path(frame.filename).parts]
            self.askers.add(f"{Path(stack[-1].filename).name} {stack[-1].name}")
        return func(*args, **(kwargs or {}))


def ask(arguments: list[str]) -> set[str]:
    from llm_local.engine import LocalEngine
    from llm_local.train import main

    questions, train_batch = Questions(), LocalEngine.train_batch

    def watched(self: Any, step: int) -> Any:
        if step == 1:  # DeepSpeed makes its buffers
            return train_batch(self, step)
        with questions:
            return train_batch(self, step)

    LocalEngine.train_batch = watched  # type: ignore
    assert main(arguments) == 0
    return questions.askers


@pytest.mark.processes
@pytest.mark.parametrize(
    ("ranks", "flags", "others"),
    [
        (2, {"num_stages": 2, "head_token_fraction": 0.5}, set()),
        (2, {"num_stages": 2, "head": "shared", "head_refresh_steps": 2}, set()),
        (2, {"num_stages": 2, "distillation_weight": 0.5, "document_mask": True}, OF_DOCUMENTS),
        (4, {"num_stages": 2, **BF16_ZERO1}, OF_DEEPSPEED),
    ],
    ids=["windows", "shared head", "distillation, documents", "bf16 ZeRO-1"],
)
def test_a_step_asks_the_device_for_no_number(trainer: Trainer, ranks: int, flags: dict, others: set[str]):
    for askers in run_ranks(ask, ranks, trainer.flags("out", logging_steps=100, **flags)):
        assert askers - ON_THE_HOST <= others


def shards_of_eight() -> dict[int, dict[str, tuple[int, int, int]]]:
    """What this rank of eight has under each ZeRO stage: numel of a tensor, where its part begins, how many follow."""
    import torch.distributed as dist
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", rank=int(os.environ["RANK"]), world_size=8, store=FakeStore())
    found = {}
    for stage in (1, 2, 3):
        engine = tiny_engine({"zero_optimization": {"stage": stage}}, num_replicas=8, bf16=True)
        parts = (shard.master and (shard.name, shard.master) for shard in shards(engine, int(os.environ["RANK"])))
        found[stage] = {part[0]: (part[1].numel, part[1].start, len(part[1].values)) for part in parts if part}
    return found


@pytest.mark.processes
def test_eight_replicas_have_each_weight_once():
    """Of engines whose collectives do nothing, so that eight of them are made in seconds."""
    found = run_ranks(shards_of_eight, 8)
    for stage in (1, 2, 3):
        names = {name for rank in found for name in rank[stage]}
        assert len(names) > 10
        for name in names:
            parts = sorted(rank[stage][name][1:] for rank in found if name in rank[stage] and rank[stage][name][2])
            numel = next(rank[stage][name][0] for rank in found if name in rank[stage])
            ends = [start + length for start, length in parts]
            assert [start for start, _ in parts] == [0, *ends[:-1]], name
            assert ends[-1] == numel


def test_a_gpu_is_called_by_its_name_and_gets_larger_chunks_of_logits(monkeypatch: pytest.MonkeyPatch):
    gpu = SimpleNamespace(device_name=lambda: "cuda", total_memory=lambda index: (80 - 64 * index) * 2**30)
    monkeypatch.setattr(device, "_accelerator", lambda: gpu)
    monkeypatch.setattr(torch, "get_device_module", lambda name: SimpleNamespace(get_device_name=lambda: "NVIDIA H100"))
    assert device.describe_device() == "NVIDIA H100"
    device.memory_bytes.cache_clear()
    large, small, cpu = torch.device("cuda", 0), torch.device("cuda", 1), torch.device("cpu")
    assert [chunk_rows(32768, each) for each in (large, small, cpu)] == [4096, 1024, 128]
    device.memory_bytes.cache_clear()
