"""Options of ZeRO that lay weights out in another order, or in more copies: checkpoints have the model all the same."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from conftest import Trainer, block_losses, weights
from engines import tiny_engine
from ranks import run_ranks

from llm_local.checkpoint.catalog import Catalog
from llm_local.checkpoint.shards import MisplacedWeights, check_masters, shards

pytestmark = pytest.mark.processes
ROBIN = {"round_robin_gradients": True}


@pytest.mark.parametrize(
    ("trainer", "ranks", "zero", "resumed_ranks", "resumed_zero"),
    [
        ("masked-lm", 2, {"stage": 1} | ROBIN, 2, {"stage": 2, "parameter_alignment": True} | ROBIN),
        ("causal-lm", 2, {"stage": 2} | ROBIN, 1, None),
        ("causal-lm", 2, {"stage": 3, "stage3_param_persistence_threshold": 0, "zero_hpz_partition_size": 2}, 2, True),
    ],
    ids=["masked-zero1-to-zero2", "zero2-to-none", "hpz"],
    indirect=["trainer"],
)
def test_a_run_goes_on_elsewhere(trainer: Trainer, ranks: int, zero: Any, resumed_ranks: int, resumed_zero: Any):
    def flags(ranks: int, zero: dict[str, Any] | None) -> dict[str, Any]:
        common = {"num_stages": 1, "layers_per_block": 2, "save_steps": 3, "eval_batches": 0, "export_dtype": "fp32"}
        path = trainer.folder / "ds.json"
        path.write_text(json.dumps({"zero_optimization": zero}))
        return {"per_device_train_batch_size": 4 // ranks, "deepspeed": path if zero else None, **common}

    straight = trainer.run("straight", ranks, max_steps=6, **flags(ranks, zero))
    catalog = Catalog(straight / "checkpoints/step-00000006")
    exported = weights(straight / "export")
    for name, tensor in exported.items():
        assert torch.equal(tensor.view(-1), catalog.tensor(name)), name
    checkpoint = straight / "checkpoints/step-00000003"
    settings = flags(resumed_ranks, zero if resumed_zero is True else resumed_zero)
    again = trainer.run("again", resumed_ranks, max_steps=6, resume_from_checkpoint=checkpoint, **settings)
    ours, theirs = (torch.tensor(block_losses(run, 1)) for run in (again, straight))
    torch.testing.assert_close(ours, theirs[3:], rtol=1e-5, atol=0.0)
    for name, tensor in weights(again / "export").items():
        torch.testing.assert_close(tensor, exported[name], rtol=0.0, atol=1e-4)


def misplaced(settings: dict[str, Any]) -> str:
    engine = tiny_engine(settings, bf16=True)
    check_masters([engine], 0)
    shard = next(each for each in shards(engine, 0) if each.name == "model.layers.0.mlp.up_proj.weight")
    assert shard.master is not None
    shard.master.values[-1] += 1
    with pytest.raises(MisplacedWeights) as error:
        check_masters([engine], 0)
    return str(error.value)


@pytest.mark.parametrize("stage", [1, 3])
def test_a_master_that_is_not_the_weight_is_named(stage: int):
    """No option of DeepSpeed is known to do that, so it is done by hand."""
    (said,) = run_ranks(misplaced, 1, {"zero_optimization": {"stage": stage}})
    assert said.startswith("the optimizer's copy of model.layers.0.mlp.up_proj.weight is not the model's weight")
