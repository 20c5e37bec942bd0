"""Gradients of the weights of one step before: as one process without stages has them, wherever the blocks run."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from conftest import Trainer, block_losses, records, weights
from deepspeed.runtime.pipe.schedule import LoadMicroBatch, PipeInstruction, RecvActivation

from llm_local.checks.preflight import preflight
from llm_local.config import ConfigError, parse
from llm_local.data.sets import prepare
from llm_local.data.tokenizer import load_tokenizer
from llm_local.methods import delayed
from llm_local.methods.delayed import DelayedSchedule
from llm_local.model.anatomy import probe
from llm_local.model.model_config import load_model_config
from llm_local.model.slices import new_slice
from llm_local.partition import Span
from llm_local.simulator.simulate import picture, simulate

CONFIGS = Path(__file__).parent.parent / "configs" / "ds"
STEPS, RATE = 6, 1e-2
PLAIN = {"method": "delayed", "max_grad_norm": 0, "lr_scheduler_type": "constant", "learning_rate": RATE}
PLAIN |= {"max_steps": STEPS, "gradient_accumulation_steps": 3, "eval_steps": 3}


def reference(trainer: Trainer, corrects: bool) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Losses and weights of plain torch: AdamW's update by the gradient at the weights of one step before."""
    config = parse(trainer.flags("reference", **PLAIN))
    model_config = load_model_config(config.model)
    anatomy = probe(model_config, config.model)
    model = new_slice(model_config, anatomy, Span(0, anatomy.num_layers), config.train.seed).model
    train, _ = prepare(config, load_tokenizer(config))
    rows = train.batch(0, 3 * 2 * STEPS).view(STEPS, 3, 2, -1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0)
    now = [p.detach().clone() for p in model.parameters()]
    computed_with = [now, now]  # of this step and the next
    losses = []
    for step in range(STEPS):
        for p, values in zip(model.parameters(), computed_with.pop(0), strict=True):
            p.data, p.grad = values.clone(), None
        found = [model(input_ids=ids, labels=ids, use_cache=False).loss for ids in rows[step]]
        loss = torch.stack(found).mean()
        loss.backward()
        losses.append(loss.item())
        for p, values in zip(model.parameters(), now, strict=True):
            p.data = values.clone()
        optimizer.step()
        before, now = now, [p.detach().clone() for p in model.parameters()]
        computed_with.append([2 * n - b for n, b in zip(now, before, strict=True)] if corrects else now)
    return losses, {name: p.detach() for name, p in model.named_parameters()}


@pytest.mark.processes
@pytest.mark.parametrize("corrects", [False, True], ids=["plain", "corrected"])
def test_three_stages_and_one_train_as_one_process_without_stages(trainer: Trainer, corrects: bool):
    losses, model = reference(trainer, corrects)
    settings = PLAIN | {"delay_correction": corrects}
    for name, stages in (("three", 3), ("one", 1)):
        output = trainer.run(name, stages, num_stages=stages, stage_layers="1,1,2" if stages == 3 else None, **settings)
        for stage in range(stages):
            assert [r["loss"] for r in records(output, stage)] == pytest.approx(losses, rel=1e-5)
        exported = weights(output / "export")
        assert set(exported) == set(model)
        for key, tensor in model.items():
            torch.testing.assert_close(exported[key], tensor, rtol=1e-3, atol=1e-4)


@pytest.mark.processes
def test_blocks_train_alike_wherever_they_run(trainer: Trainer):
    """Cut by hand, so that each clips its own gradient: on 1, 2 and 4 stages, 2 replicas, under ZeRO 1 and 2."""
    common = PLAIN | {"layers_per_block": 1, "max_grad_norm": 0.1, "weight_decay": 0.1, "eval_steps": 2}
    one = trainer.run("one", 1, **common)
    layouts = {
        "two": (2, {"num_stages": 2, "gradient_checkpointing": True}),
        "four": (4, {"num_stages": 4, "deepspeed": CONFIGS / "zero2.json"}),
        "replicas": (4, {"num_stages": 2, "per_device_train_batch_size": 1, "deepspeed": CONFIGS / "zero1.json"}),
        "many-micro-batches": (
            2,
            {"num_stages": 2, "per_device_train_batch_size": 1, "gradient_accumulation_steps": 6, "eval_batches": 4},
        ),
        "one-micro-batch": (3, {"num_stages": 3, "per_device_train_batch_size": 6, "gradient_accumulation_steps": 1}),
    }
    for name, (ranks, settings) in layouts.items():
        output = trainer.run(name, ranks, **common | settings)
        last = settings["num_stages"] - 1
        for split in ("train",) if name == "one-micro-batch" else ("train", "eval"):
            losses = [loss for [loss] in block_losses(one, 1, split)]
            assert [r["loss"] for r in records(output, last, split)] == pytest.approx(losses, rel=1e-5), name


@pytest.mark.processes
def test_hidden_states_go_forward_and_one_gradient_comes_back(trainer: Trainer):
    output = trainer.run("way", 2, num_stages=2, method="delayed", gradient_accumulation_steps=2)
    hidden = 2 * 32 * 32 * 4
    first, *_, last = records(output, 0)
    assert first["sent_bytes"] == 4 * (10 * 8 + 2 * 32 * 4 + hidden), "two micro-batches of the next step go ahead"
    assert last["sent_bytes"] == 0, "there is no next step"
    assert {r["sent_gradient_bytes"] for r in records(output, 1)} == {2 * (10 * 8 + hidden)}


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"fp16": True}, "fp16=True does not work with method=delayed, which scales no loss; use bf16"),
        ({"lora_rank": 2}, "lora_rank=2 has not been tried with method=delayed; leave it out"),
        ({"replica_sync_steps": 2}, "replica_sync_steps=2 has not been tried with method=delayed; leave it out"),
        ({"tensor_parallel_size": 2}, "tensor_parallel_size=2 has not been tried with method=delayed; leave it out"),
        ({"head_warmup_steps": 2}, "method=delayed has one head, the model's own; leave out head_warmup_steps"),
        ({"final_backprop_steps": 2}, "final_backprop_steps=2: every step of method=delayed is one; leave it out"),
        ({"freeze_stages": "0"}, "freeze_stages='0' does not work with method=delayed"),
        ({"method": "backprop", "delay_correction": True}, "delay_correction=True is for method=delayed, not backprop"),
        ({"deepspeed": CONFIGS / "zero3.json"}, "ZeRO stage 3 does not work with method=delayed"),
        ({"stage": 0}, "method=delayed"),
    ],
)
def test_what_does_not_go_with_it_is_refused(trainer: Trainer, settings: dict, said: str):
    config = parse(trainer.flags("refused", **{"method": "delayed", "num_stages": 2, **settings}))
    with pytest.raises(ConfigError, match=re.escape(said)):
        preflight(config, 2)


def steps(
    micro_batches: int, num_stages: int, stage: int, num_blocks: int, count: int
) -> Iterator[list[PipeInstruction]]:
    """Of a run of so many steps."""
    entered = 0
    for step in range(count):
        made = DelayedSchedule(micro_batches, num_stages, stage, num_blocks, entered=entered, is_end=step == count - 1)
        commands = [command for some in made.steps() for command in some]
        entered += sum(isinstance(c, RecvActivation | LoadMicroBatch) for c in commands) - micro_batches
        yield commands
    assert not entered


def test_the_picture_is_what_the_simulation_draws():
    drawn = picture(simulate(lambda stage: steps(4, 2, stage, 1, count=2), num_stages=2))
    assert delayed.__doc__
    lines = [line.strip() for line in delayed.__doc__.splitlines() if line.lstrip().startswith("stage ")]
    assert "\n".join(lines) == drawn


@pytest.mark.parametrize(("micro_batches", "stages"), [(1, 1), (1, 3), (2, 2), (2, 4), (3, 5), (4, 3), (8, 4)])
@pytest.mark.parametrize("num_blocks", [1, 3])
def test_no_stage_waits_for_ever_and_a_full_step_has_no_bubble(micro_batches: int, stages: int, num_blocks: int):
    drawn = simulate(
        lambda stage: steps(micro_batches, stages, stage, num_blocks, count=40), stages, max_packets_in_flight=1
    )
    alive = [DelayedSchedule.alive_passes(stages - stage - 1, micro_batches, num_blocks) for stage in range(stages)]
    assert all(here <= most for here, most in zip(drawn.peak_alive, alive, strict=True))
    if micro_batches >= 2 * (stages - 1):
        assert max(drawn.bubble) < 0.02 * stages, "but for filling and draining the pipe"


@pytest.mark.processes
def test_a_stream_goes_on_where_the_step_ended_though_the_next_has_begun(trainer: Trainer):
    common = {"num_stages": 2, "streaming": True, "save_steps": 2, "eval_batches": 0, **PLAIN, "eval_steps": None}
    straight = trainer.run("straight", 2, **common)
    resumed = trainer.run("resumed", 2, **common, resume_from_checkpoint=straight / "checkpoints/step-00000002")
    for stage in (0, 1):
        facts = [[(r["loss"], r["tokens"]) for r in records(output, stage)] for output in (straight, resumed)]
        assert facts[0][2:] == facts[1]
