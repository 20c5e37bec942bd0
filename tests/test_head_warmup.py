"""Heads of early blocks that first train alone, and the logits that a pretrained model's copies start with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TINY, Trainer, block_losses, records, weights
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

from llm_local.block_engine import WAITS, make_optimizer, make_scheduler, parameter_groups, waiting_parameters
from llm_local.config import from_flat
from llm_local.ds_problems import deepspeed_problems
from llm_local.flags import ModelArguments
from llm_local.model.anatomy import probe
from llm_local.model.block import Block
from llm_local.model.head_start import SHARE, shrink_logits
from llm_local.model.slices import HeadDraw, Slice, new_slice
from llm_local.model.stage import Blueprint, build_block
from llm_local.partition import Costs, Span, make_partition
from llm_local.problems import static_problems

DS = Path(__file__).parent.parent / "configs" / "ds"
KINDS = ("llama", "gpt2", "gemma2", "opt")


def block(index: int, **flags: Any) -> Block:
    run = from_flat({"config_name": "x.json", "layers_per_block": 1, **flags})
    config = AutoConfig.for_model(**TINY)
    partition = make_partition(4, 1, Costs(1.0, 1.0), 1)
    return build_block(Blueprint(run, config, probe(config, run.model), partition), index)


class TestTheLearningRate:
    """Of head and body, step by step."""

    def rates(self, index: int, **flags: Any) -> list[list[float]]:
        config = from_flat({"config_name": "x.json", "head_warmup_steps": 2, "max_steps": 5, **flags})
        some = block(index)
        groups = parameter_groups(config, some, waiting_parameters(config, some))
        optimizer = make_optimizer(config)(groups)
        scheduler = make_scheduler(config)(optimizer)
        rates = []
        for _ in range(4):
            rates.append([group["lr"] for group in optimizer.param_groups])
            optimizer.step()
            scheduler.step()
        return rates

    def test_the_body_waits_and_then_follows_the_schedule(self):
        flags = {"lr_scheduler_type": "constant", "learning_rate": 0.5}
        head, body = [0.5, 0.5], [0.0, 0.0]
        assert self.rates(0, **flags) == [head + body, head + body, head + head, head + head]
        ramp = self.rates(0, learning_rate=1.0, warmup_steps=4, lr_scheduler_type="constant_with_warmup")
        assert [rates[-1] for rates in ramp] == [0.0, 0.0, 0.5, 0.75]
        assert [rates[0] for rates in ramp] == [0.0, 0.25, 0.5, 0.75]

    def test_the_last_block_waits_for_nothing(self):
        assert self.rates(3, lr_scheduler_type="constant", learning_rate=0.5) == [[0.5, 0.5]] * 4

    def test_every_parameter_is_in_one_group_and_the_head_alone_does_not_wait(self):
        config, some = from_flat({"config_name": "x.json", "head_warmup_steps": 2}), block(0, head="shared")
        groups = parameter_groups(config, some, waiting_parameters(config, some))
        assert sorted(id(p) for g in groups for p in g["params"]) == sorted(id(p) for p in some.parameters())
        waiting = {id(p) for g in groups if g.get(WAITS) for p in g["params"]}
        assert waiting == {id(p) for p in some.body_model.parameters()}


def body(output: Path) -> dict[str, torch.Tensor]:
    """The layers of stage 0 as they were exported."""
    return load_file(output / "export" / "model-00001-of-00003.safetensors")


@pytest.mark.processes
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"head": "shared", "head_refresh_steps": 1, "head_layers": 1},
        {"method": "greedy", "gradient_accumulation_steps": 2, "weight_decay": 0.1},
        {"method": "overlapping", "layers_per_block": 2},
        {"distillation_weight": 1},
    ],
    ids=["linear", "shared", "greedy", "overlapping", "distillation"],
)
def test_heads_train_alone_and_then_the_layers_too(trainer: Trainer, settings: dict[str, Any]):
    common = {"num_stages": 2, "lr_scheduler_type": "constant", "eval_steps": 1, "eval_on_start": True, **settings}
    trained = trainer.run("trained", 2, head_warmup_steps=2, max_steps=3, **common)
    untouched = body(trainer.run("untouched", 2, learning_rate=1e-30, max_steps=1, **common))
    early, last = ([record["loss"] for record in records(trained, stage, "eval")] for stage in (0, 1))
    assert [record["step"] for record in records(trained, 0, "eval")] == [0, 1, 2, 3]
    assert early[2] < early[0], "the head learns"
    assert last[1] < last[0], "the last block trains"
    # one update of Adam's, of the learning rate's size whatever the gradient: the steps without one do not count
    moved = max(float((tensor - untouched[name]).abs().max()) for name, tensor in body(trained).items())
    assert moved == pytest.approx(3e-3, rel=0.15), moved


@pytest.mark.processes
def test_zero_stages_agree(trainer: Trainer):
    """What has no gradient yet is nothing that any of them stumbles over, and all begin with it alike."""
    common = {"num_stages": 2, "head_warmup_steps": 2, "weight_decay": 0.1}
    plain = trainer.run("plain", 2, per_device_train_batch_size=4, **common)
    for name in ("zero1", "zero2", "zero3", "zero3_offload"):
        sharded = trainer.run(name, 4, deepspeed=DS / f"{name}.json", **common)
        ours, theirs = torch.tensor(block_losses(sharded, 2)), torch.tensor(block_losses(plain, 2))
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=0.0, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.processes
def test_the_same_blocks_warm_up_alike_on_any_number_of_stages(trainer: Trainer):
    common = {"method": "greedy", "head_warmup_steps": 2}
    outputs = {n: trainer.run(f"on-{n}", n, num_stages=n, **common) for n in (1, 2, 4)}
    for stages in (2, 4):
        ours, theirs = block_losses(outputs[stages], stages), block_losses(outputs[1], 1)
        torch.testing.assert_close(torch.tensor(ours), torch.tensor(theirs), rtol=1e-5, atol=0.0)
    assert records(outputs[4], 0)[0]["lr"] == pytest.approx(3e-3), "the record tells the head's learning rate"


@pytest.mark.processes
@pytest.mark.parametrize("settings", [{"deepspeed": DS / "zero1.json", "bf16": True}, {"deepspeed": DS / "zero3.json"}])
def test_resume_equals_never_having_stopped(trainer: Trainer, settings: dict[str, Any]):
    """In the middle of the warm-up, and at its end."""
    common = {"num_stages": 2, "head_warmup_steps": 2, "max_steps": 3, "eval_batches": 1, **settings}
    straight = trainer.run("straight", 4, save_steps=1, **common)
    for step in (1, 2):
        checkpoint = straight / "checkpoints" / f"step-{step:08d}"
        resumed = trainer.run(f"from-{step}", 4, resume_from_checkpoint=checkpoint, **common)
        mine, theirs = weights(resumed / "export"), weights(straight / "export")
        assert all(torch.equal(mine[name], theirs[name]) for name in theirs), step


def problems(**flags: Any) -> list[str]:
    return static_problems(from_flat({"config_name": "c", "seq_length": 32, **flags}), 1, True, True)


def test_nonsense_is_refused(tmp_path: Path):
    assert problems(head_warmup_steps=-1) == ["head_warmup_steps=-1 must not be negative"]
    said = "head_warmup_steps=9 leaves no step of max_steps=9 for the layers; lower it"
    assert problems(head_warmup_steps=9, max_steps=9) == [said]
    (found,) = problems(head_warmup_steps=6, max_steps=9, final_backprop_steps=3)
    assert found.startswith(
        "head_warmup_steps=6 leaves no step of max_steps=9 for the layers after the 3 of final_back"
    )
    said = "method=backprop has one head, the model's own; leave out head_warmup_steps"
    assert problems(head_warmup_steps=2, method="backprop") == [said]
    path = tmp_path / "ds.json"
    path.write_text('{"optimizer": {"type": "AdamW", "params": {"lr": "auto"}}}')
    flags = {"config_name": "c", "head_warmup_steps": 2, "deepspeed": str(path)}
    said = f"head_warmup_steps=2 sets learning rates of its own; remove optimizer from {path}"
    assert deepspeed_problems(from_flat(flags), 1) == [said]
    assert problems(eval_on_start=True, eval_batches=0) == [
        "eval_on_start=True with eval_batches=0 evaluates nothing; use eval_batches=1 or more"
    ]


def head(kind: str) -> Slice:
    config = AutoConfig.for_model(kind, **{k: v for k, v in TINY.items() if k != "model_type"})
    return new_slice(config, probe(config, ModelArguments()), Span(2, 2), seed=0, drawn=HeadDraw(2))


@pytest.mark.parametrize("kind", KINDS)
def test_a_quiet_heads_output_is_a_share_of_what_it_was(kind: str):
    part, hidden, ids = head(kind), torch.randn(1, 5, 32), torch.zeros(1, 5, dtype=torch.int64)
    part.model.eval()
    with torch.no_grad():
        for parameter in part.model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
        output: Any = part.model.get_output_embeddings()
        matrix = output.weight.clone()
        before = part(hidden, input_ids=ids)[1]
        assert shrink_logits(part)
        torch.testing.assert_close(part(hidden, input_ids=ids)[1], SHARE * before, rtol=1e-5, atol=1e-5)
    assert torch.equal(output.weight, matrix)
    assert not part.model.training


def test_a_norm_without_weights_is_left_as_it_is():
    part = head("olmo")
    assert not shrink_logits(part)


def test_early_heads_of_a_pretrained_model_are_quiet_and_the_last_one_is_its_own(tmp_path: Path):
    AutoModelForCausalLM.from_config(AutoConfig.for_model(**TINY)).save_pretrained(tmp_path)
    norms = [
        block(index, config_name=None, model_name_or_path=str(tmp_path)).head.model.model.norm.weight
        for index in (0, 3)
    ]
    assert torch.equal(norms[0], torch.full((32,), SHARE))
    assert torch.equal(norms[1], torch.ones(32))
    whole = block(0, config_name=None, model_name_or_path=str(tmp_path), head="decoder", head_layers=3)
    assert torch.equal(whole.head.model.model.norm.weight, torch.ones(32)), "its layers reach the model's end"
    assert torch.equal(block(0).head.model.model.norm.weight, torch.ones(32)), "of a new model"
