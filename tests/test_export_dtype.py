"""--export_dtype: the optimizer's float32 weights of a bf16 run, bit for bit, or weights rounded on the way out."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conftest import TINY, Trainer, weights
from transformers import AutoConfig

from llm_local.checkpoint.catalog import Catalog

pytestmark = pytest.mark.processes


def masters(output: Path) -> dict[str, torch.Tensor]:
    """What the run's checkpoint of its last step has of the model, flat; heads of earlier exits left out."""
    checkpoint = max((output / "checkpoints").iterdir())
    catalog = Catalog(checkpoint)
    return {name: catalog.tensor(name) for name in catalog.weights if name.startswith(("model.", "lm_head."))}


@pytest.mark.parametrize("zero", ["zero0", "zero1", "zero3"])
def test_fp32_of_a_bf16_run_is_what_the_optimizer_updates(trainer: Trainer, zero: str):
    settings = {"bf16": True, "export_dtype": "fp32", "save_steps": 4, "deepspeed": f"configs/ds/{zero}.json"}
    output = trainer.run("run", 2, num_stages=1, **settings)
    exported, saved = weights(output / "export"), masters(output)
    assert set(exported) == set(saved)
    for name, tensor in exported.items():
        assert tensor.dtype == torch.float32
        assert torch.equal(tensor.view(-1), saved[name])
    assert any(not torch.equal(tensor, tensor.bfloat16().float()) for tensor in exported.values())
    assert AutoConfig.from_pretrained(output / "export").dtype == torch.float32


def test_the_baseline_exports_its_masters_too(trainer: Trainer):
    settings = {"bf16": True, "export_dtype": "fp32", "save_steps": 4, "deepspeed": "configs/ds/zero1.json"}
    output = trainer.run("run", 2, num_stages=2, method="backprop", **settings)
    exported, saved = weights(output / "export"), masters(output)
    assert set(exported) == set(saved)
    for name, tensor in exported.items():
        assert torch.equal(tensor.view(-1), saved[name])


def test_bf16_of_an_fp32_run_is_rounded_once(trainer: Trainer):
    """Private layers of low rank are the hard case: an exit has the rounded product, not that of rounded factors."""
    settings = {"head": "decoder", "head_layers": 1, "head_rank": 4, "save_steps": 4}
    config = trainer.model(TINY | {"tie_word_embeddings": True, "torch_dtype": "bfloat16"})
    output = trainer.run("run", 2, num_stages=2, config_name=config, export_dtype="bf16", **settings)
    catalog = Catalog(max((output / "checkpoints").iterdir()))
    assert {catalog.tensor(name).dtype for name in catalog.weights} == {torch.float32}, "whatever its config says"
    for name, tensor in weights(output / "export").items():
        assert torch.equal(tensor.view(-1), catalog.tensor(name).bfloat16())
    early = weights(output / "export/exits/stage-00")
    matrix = "model.layers.2.mlp.up_proj"
    up, down = (catalog.tensor(f"exits.2.{matrix}.{factor}.weight") for factor in ("up", "down"))
    product = (up.view(-1, 4) @ down.view(4, -1)).bfloat16()
    assert torch.equal(early[f"{matrix}.weight"], product)
    assert {tensor.dtype for tensor in early.values()} == {torch.bfloat16}


def test_auto_is_as_the_run_computes(trainer: Trainer):
    config = trainer.model(TINY | {"torch_dtype": "float16"})
    export = trainer.run("run", 1, bf16=True, config_name=config) / "export"
    assert {tensor.dtype for tensor in weights(export).values()} == {torch.bfloat16}
    assert AutoConfig.from_pretrained(export).dtype == torch.bfloat16
