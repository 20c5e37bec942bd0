"""A checkpoint goes on at any layout: other stages, replicas, ZeRO stage, precision or blocks."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from conftest import TINY, Trainer, block_losses, records, weights
from launching import by_hand
from safetensors.torch import load_file
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader

from llm_local.checkpoint.catalog import Catalog
from llm_local.checks.preflight import preflight
from llm_local.config import ConfigError, parse

pytestmark = pytest.mark.processes
DS = Path(__file__).parent.parent / "configs" / "ds"
STEPS = 6


def goes_on(
    trainer: Trainer, written: tuple[int, dict[str, Any]], resumed: tuple[int, dict[str, Any]], **common: Any
) -> tuple[Path, Path]:
    """A run of 6 steps, and one that goes on from its step 3 at another layout."""
    common = {"save_steps": 3, "max_steps": STEPS, "lr_scheduler_type": "cosine", "warmup_steps": 2, **common}
    straight = trainer.run("straight", written[0], **common | written[1])
    checkpoint = straight / "checkpoints/step-00000003"
    again = trainer.run("resumed", resumed[0], **common | resumed[1], resume_from_checkpoint=checkpoint)
    return straight, again


def close(ours: list[list[float]], theirs: list[list[float]], rtol: float = 1e-5) -> None:
    torch.testing.assert_close(torch.tensor(ours), torch.tensor(theirs), rtol=rtol, atol=0.0)


ONE, TWO, FOUR = {"num_stages": 1}, {"num_stages": 2}, {"num_stages": 4}


def zero(name: str) -> dict[str, Any]:
    return {"deepspeed": DS / f"{name}.json"}


@pytest.mark.parametrize(
    ("written", "resumed", "common"),
    [
        ((2, TWO), (2, ONE | zero("zero1")), {"layers_per_block": 2}),
        ((2, ONE | zero("zero2")), (4, TWO | zero("zero3")), {"layers_per_block": 2}),
        ((3, ONE | zero("zero3")), (2, TWO), {"layers_per_block": 2}),
        ((2, TWO), (4, FOUR | zero("zero3_offload")), {"method": "greedy", "head": "decoder", "head_layers": 1}),
        ((2, TWO), (1, ONE), {"method": "overlapping"}),
        ((2, TWO | zero("zero1")), (1, ONE), {"method": "backprop"}),
    ],
    ids=["zero1", "zero2-to-zero3", "three-of-zero3", "four-stages-offload", "overlapping", "backprop"],
)
def test_the_same_blocks_train_on_at_another_layout(
    trainer: Trainer, written: tuple[int, dict], resumed: tuple[int, dict], common: dict
):
    """Weights, optimizer moments, schedule and data position carry over: the next losses are the old layout's."""
    first, second = (
        (ranks, settings | {"per_device_train_batch_size": 12 * settings["num_stages"] // ranks})
        for ranks, settings in (written, resumed)
    )
    straight, again = goes_on(trainer, first, second, **common)
    ours, theirs = (block_losses(f, s["num_stages"]) for f, (_, s) in ((again, resumed), (straight, written)))
    if common == {"method": "backprop"}:  # of the pipeline each stage records the last loss
        theirs = [step[-1:] for step in theirs]
    assert len(ours) == STEPS - 3
    close(ours, theirs[3:])
    assert [r["lr"] for r in records(again, 0)] == [r["lr"] for r in records(straight, 0)[3:]]


@pytest.mark.parametrize("stages", [(2, 1), (1, 4)])
def test_a_shared_head_takes_its_copies_along(trainer: Trainer, stages: tuple[int, int]):
    """The copy that is read, and one that was on its way: taken after step 2, read from step 5 on."""
    common = {"method": "greedy", "head": "shared", "head_refresh_steps": 2, "save_steps": 3}
    straight, again = goes_on(trainer, *((n, {"num_stages": n}) for n in stages), **common)
    close(block_losses(again, stages[1]), block_losses(straight, stages[0])[3:])


def test_another_interval_of_the_shared_head_is_taken_up(trainer: Trainer):
    common = {"method": "greedy", "head": "shared"}
    first, second = ((2, {"num_stages": 2, "head_refresh_steps": n}) for n in (50, 2))
    _, again = goes_on(trainer, first, second, **common)
    assert [r["step"] for r in records(again, 0)] == [4, 5, 6]


def test_precision_changes(trainer: Trainer):
    written = (2, {"num_stages": 1, "bf16": True, "deepspeed": DS / "zero1.json"})
    straight, again = goes_on(trainer, written, (1, {"num_stages": 1, "per_device_train_batch_size": 4}))
    close(block_losses(again, 1), block_losses(straight, 1)[3:], 1e-2)
    back = trainer.run(
        "back", 1, num_stages=1, bf16=True, max_steps=STEPS, per_device_train_batch_size=4,
        resume_from_checkpoint=again / "checkpoints/step-00000006",
    )  # fmt: skip
    assert all(tensor.dtype == torch.bfloat16 for tensor in weights(back / "export").values())


def says(trainer: Trainer, name: str, **settings: Any) -> str:
    """Trains in one process and returns what the screen shows."""
    with by_hand(1, trainer.flags(name, **settings), trainer.folder) as (rank,):
        assert rank.wait(120) == 0, rank.text
        return rank.text


@pytest.mark.parametrize("tied", [False, True])
def test_other_blocks_take_what_there_is_and_say_what_is_new(trainer: Trainer, tied: bool):
    """From two blocks to four: the layers are the trained ones, the heads of new boundaries start anew."""
    trainer.model(TINY | {"tie_word_embeddings": tied})
    common = {"save_steps": 3, "max_steps": STEPS}
    straight = trainer.run("straight", 2, num_stages=2, **common)
    checkpoint = straight / "checkpoints/step-00000003"
    said = says(trainer, "four", layers_per_block=1, resume_from_checkpoint=checkpoint, **common)
    heads = f"the head after 1 layers ({1 if tied else 2} tensors), the head after 3 layers (2 tensors)"
    assert f"llm_local: new, as the checkpoint has none: {heads}\n" in said
    assert f"goes on after {checkpoint}, with other settings: num_stages 2 → 1, layers_per_block None → 1, " in said
    before, after = block_losses(straight, 2)[3], block_losses(trainer.folder / "four", 1)[0]
    assert [after[1], after[3]] == pytest.approx(before, rel=1e-5)

    final = trainer.folder / "four/checkpoints/step-00000006"
    said = says(trainer, "whole", method="backprop", max_steps=8, resume_from_checkpoint=final)
    assert "in the checkpoint, and of no use here: the head after 1 layers" in said
    assert "new, as" not in said
    assert [r["step"] for r in records(trainer.folder / "whole", 0)] == [7, 8]


def test_a_linear_run_goes_on_with_a_shared_head(trainer: Trainer):
    first, second = ((2, {"num_stages": 2, "head": head}) for head in ("linear", "shared"))
    straight, again = goes_on(trainer, first, second)
    assert block_losses(again, 2)[0][1] == pytest.approx(block_losses(straight, 2)[3][1], rel=1e-5)


def test_the_files_are_those_of_torch_distributed_checkpoint(trainer: Trainer):
    """Any reader of that format can read them; names are the model's, and no code is in them."""
    run = trainer.run("run", 4, num_stages=2, save_steps=4, deepspeed=DS / "zero1.json")
    folder = run / "checkpoints/step-00000004"
    assert sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()) == [
        "manifest.json",
        "stage-00/data.json",
        *(
            f"stage-0{s}/{name}"
            for s in (0, 1)
            for name in ("replica-00.safetensors", "replica-01.safetensors", "state.json")
        ),
    ]
    exported = weights(run / "export")
    name = "model.layers.0.mlp.up_proj.weight"
    found = {name: torch.zeros(exported[name].numel())}
    dcp.load(found, storage_reader=HuggingFaceStorageReader(str(folder / "stage-00")), no_dist=True)
    assert torch.equal(found[name].view_as(exported[name]), exported[name])
    catalog = Catalog(folder)
    assert set(exported) <= set(catalog.weights)
    assert {n.partition(".")[0] for n in set(catalog.weights) - set(exported)} == {"exits"}
    assert catalog.states[name] == [f"{name}/state/exp_avg", f"{name}/state/exp_avg_sq"]
    both = [load_file(folder / f"stage-00/replica-0{r}.safetensors") for r in (0, 1)]
    assert sum(part.get(name, torch.empty(0)).numel() for part in both) == exported[name].numel(), "saved once"
    assert json.loads((folder / "manifest.json").read_text())["rows"] == 4 * 2 * 2


def test_data_go_on_where_they_were_with_another_batch(trainer: Trainer):
    """Half the replicas are half the batch: the same rows come, in twice the steps."""
    written = (2, {"num_stages": 1, "learning_rate": 1e-12})
    straight, again = goes_on(trainer, written, (1, {"num_stages": 1, "learning_rate": 1e-12, "max_steps": 9}))
    whole = [r["loss"] for r in records(straight, 0)][3:]
    halves = [r["loss"] for r in records(again, 0)]
    assert [sum(pair) / 2 for pair in zip(halves[::2], halves[1::2], strict=True)] == pytest.approx(whole, rel=1e-5)


def problems_of(trainer: Trainer, **settings: Any) -> list[str]:
    with pytest.raises(ConfigError) as refusal:
        preflight(parse(trainer.flags("other", **settings)), 1)
    return refusal.value.problems


def test_a_run_of_another_model_or_seed_is_refused(trainer: Trainer):
    output = trainer.run("run", 1, max_steps=1, save_steps=1, eval_batches=0)
    (checkpoint,) = (output / "checkpoints").iterdir()
    found = problems_of(trainer, resume_from_checkpoint=output, seed=7, config_overrides="hidden_size=64")
    text = "\n".join(found)
    assert f"{checkpoint} was written with seed=42, this run has seed=7: another seed puts the data in another" in text
    assert f"{checkpoint} holds another model (head_dim=8, hidden_size=32); this run's has head_dim=16," in text


@pytest.mark.parametrize("damage", ["gone", "cut", "state"])
def test_a_damaged_file_is_named_before_anything_starts(trainer: Trainer, damage: str):
    output = trainer.run("run", 1, max_steps=1, save_steps=1, eval_batches=0)
    folder = output / "checkpoints/step-00000001/stage-00"
    path = folder / ("state.json" if damage == "state" else "replica-00.safetensors")
    if damage == "gone":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[: 60 if damage == "state" else -100])
    (found,) = problems_of(trainer, resume_from_checkpoint=output)
    assert found.startswith(f"{path}: ")
    assert found.endswith("; resume from an earlier checkpoint")
    shutil.rmtree(folder)
