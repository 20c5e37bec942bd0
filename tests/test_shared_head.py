"""The shared head: what it computes, who trains the matrix, and that a run with it is the same anywhere."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TINY, Trainer, block_losses, records, weights
from torch.nn import functional as F
from transformers import AutoConfig, AutoModelForCausalLM

from llm_local.block_engine import parameter_groups
from llm_local.checks.preflight import preflight
from llm_local.config import Config, from_flat, parse
from llm_local.model import loss as loss_module
from llm_local.model.anatomy import SliceError, probe
from llm_local.model.block import Block
from llm_local.model.heads.shared import install, installed, make_read_only, matrix_name
from llm_local.model.stage import Blueprint, build_blocks
from llm_local.partition import Costs, Heads, make_partition

CONFIGS = Path(__file__).parent.parent / "configs" / "ds"
SHARED = {"head": "shared", "head_refresh_steps": 2}
KINDS: dict[str, dict[str, Any]] = {
    "llama": {},
    "gemma2": {"head_dim": 8, "final_logit_softcapping": 5.0},
    "granite": {"logits_scaling": 4.0},
    "phi": {},
    "gpt2": {"n_positions": 64, "tie_word_embeddings": True, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
}


def built(kind: str = "llama", **flags: Any) -> list[Block]:
    """The blocks of a tiny model of four layers, one a layer."""
    settings = {"head": "shared", "layers_per_block": 1, "config_name": "unused", **flags}
    config: Config = from_flat(settings)
    model_config = AutoConfig.for_model(kind, **{k: v for k, v in TINY.items() if k != "model_type"} | KINDS[kind])
    anatomy = probe(model_config, config.model)
    layers = config.method.block_layers(config.local)
    partition = make_partition(4, 1, Costs(1.0, 1.0), layers, heads=Heads(layers=config.head_layers_schedule))
    return build_blocks(Blueprint(config, model_config, anatomy, partition), stage=0)


@pytest.fixture
def ids() -> torch.Tensor:
    return torch.randint(0, 4096, (2, 24), generator=torch.Generator().manual_seed(0))


@pytest.mark.processes
def test_the_same_blocks_train_alike_on_any_number_of_stages(trainer: Trainer):
    """Placement: when a matrix is read depends on step numbers alone, whichever way it took."""
    settings = {**SHARED, "head_layers": 1, "layers_per_block": 1, "gradient_accumulation_steps": 2}
    settings |= {"max_steps": 8, "eval_steps": 3, "max_grad_norm": 0.5}
    outputs = {n: trainer.run(f"on-{n}", n, num_stages=n, **settings) for n in (1, 2, 4)}
    for stages in (2, 4):
        assert block_losses(outputs[stages], stages) == block_losses(outputs[1], 1)
        assert block_losses(outputs[stages], stages, "eval") == block_losses(outputs[1], 1, "eval")


@pytest.mark.parametrize("kind", KINDS)
def test_loss_and_gradients_are_those_of_plain_autograd(kind: str, ids: torch.Tensor):
    """Cross-entropy of the model's own output code on temperature * norm(h), with the matrix as a constant."""
    block = built(kind)[1]
    block.train()
    hidden = torch.randn(2, 24, 32, generator=torch.Generator().manual_seed(1))
    assert block.transform is not None
    block.transform.temperature.data.fill_(1.3)
    loss, _, _ = block(ids, hidden)
    loss.backward()
    grads = {name: p.grad.clone() for name, p in block.named_parameters() if p.grad is not None}
    block.zero_grad()

    output, text = block.head.model.get_output_embeddings(), block.head.model.config.get_text_config()
    normed = block.head(block.body(hidden, input_ids=ids)[0], input_ids=ids)[1]
    logits = F.linear(normed * block.transform.temperature, installed(block.head).detach(), output.bias)
    logits = logits / (getattr(text, "logits_scaling", None) or 1.0)
    cap = getattr(text, "final_logit_softcapping", None)
    logits = logits if cap is None else cap * torch.tanh(logits / cap)
    wanted = F.cross_entropy(logits[:, :-1].reshape(-1, 4096), ids[:, 1:].reshape(-1))
    wanted.backward()
    torch.testing.assert_close(loss, wanted, rtol=1e-6, atol=0.0)
    assert {"transform.temperature"} < set(grads)
    for name, p in block.named_parameters():
        torch.testing.assert_close(grads[name], p.grad, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("kind", KINDS)
def test_all_heads_start_with_the_last_ones_matrix_which_alone_is_trained(kind: str):
    blocks = built(kind)
    *readers, last = [block.head.model.get_output_embeddings() for block in blocks]
    assert isinstance(last.weight, torch.nn.Parameter)
    assert blocks[-1].transform is None
    for block, output in zip(blocks, readers, strict=False):
        assert torch.equal(output.weight, last.weight)
        assert not output.weight.requires_grad
        assert matrix_name(block.head) == "lm_head.weight"
        assert all(p.shape != output.weight.shape or "embed" in n or "wte" in n for n, p in block.named_parameters())
    norms = [{n: p for n, p in block.head.model.named_parameters() if "lm_head" not in n} for block in blocks]
    assert all(norms), "each has a norm of its own"
    assert kind != "phi" or all(output.bias.requires_grad for output in (*readers, last))


def test_the_matrix_has_the_gradient_of_the_last_loss_alone(ids: torch.Tensor):
    blocks, hidden = built(), None
    for block in blocks:
        loss, leaving, _ = block(ids, hidden)
        loss.backward()
        last_input, hidden = hidden, leaving
    *readers, last = [block.head.model.get_output_embeddings().weight for block in blocks]
    assert all(matrix.grad is None for matrix in readers)
    together = last.grad.clone()
    blocks[-1].zero_grad()
    blocks[-1](ids, last_input)[0].backward()
    assert torch.equal(last.grad, together)


def test_a_matrix_that_is_read_costs_two_thirds():
    """Heads that cost as much as 6 layers: the last stage trains its own and has a layer less."""
    assert [len(make_partition(8, 2, Costs(1.0, 6.0)).layers_of(k)) for k in range(2)] == [4, 4]
    shared = make_partition(8, 2, Costs(1.0, 6.0), heads=Heads(share_matrix=True))
    assert [len(shared.layers_of(k)) for k in range(2)] == [5, 3], "costs 9 and 9"


def test_the_last_block_is_the_linear_heads(ids: torch.Tensor):
    shared, linear = built()[-1], built(head="linear")[-1]
    ours, theirs = dict(shared.named_parameters()), dict(linear.named_parameters())
    assert set(ours) == set(theirs)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize("chunk", [None, 16 * 4096], ids=["whole", "in chunks"])
def test_the_weight_gradient_is_not_computed(ids: torch.Tensor, chunk: int | None, monkeypatch: pytest.MonkeyPatch):
    """Nothing that the backward pass makes has the shape of the matrix."""
    if chunk is not None:
        if not hasattr(F, "linear_cross_entropy"):
            pytest.skip("before torch 2.13 it is computed")
        monkeypatch.setattr(loss_module, "_CHUNK_LOGITS", chunk)
    block = built(head_layers=0)[1]
    made: list[torch.Size] = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            if func is not torch.ops.aten.t.default:  # a view of the matrix itself
                made.extend(t.shape for t in (out if isinstance(out, (tuple, list)) else (out,)) if hasattr(t, "shape"))
            return out

    loss, _, _ = block(ids, torch.randn(2, 24, 32))
    with Watch():
        loss.backward()
    assert made
    assert torch.Size([4096, 32]) not in made


def test_the_temperature_has_no_weight_decay():
    config: Config = from_flat({"head": "shared", "weight_decay": 0.1})
    block = built()[0]
    assert block.transform is not None
    decays = {id(p): group["weight_decay"] for group in parameter_groups(config, block) for p in group["params"]}
    assert decays[id(block.transform.temperature)] == 0.0
    assert 0.1 in decays.values()
    assert len(decays) == len(list(block.parameters())), "what is read is no parameter"


def test_a_tied_model_unties_its_first_head():
    first, *_ = built("gpt2")
    assert installed(first.head) is not first.body.model.get_input_embeddings().weight
    tied = built("gpt2", head="linear")[0]
    assert tied.head.model.get_output_embeddings().weight is tied.body.model.get_input_embeddings().weight


@pytest.mark.parametrize("head", ["linear", "shared"])
def test_a_tied_models_matrices_begin_as_its_embedding(head: str):
    first, *others = built("gpt2", head=head)
    embedding = first.body.model.get_input_embeddings().weight
    for block in (first, *others):
        assert torch.equal(block.head.model.get_output_embeddings().weight, embedding)
    assert others[-1].head.model.get_output_embeddings().weight.requires_grad


def test_a_pretrained_models_matrix_is_read_by_all(tmp_path: Path):
    shape = {k: v for k, v in TINY.items() if k != "model_type"} | KINDS["gpt2"]
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("gpt2", **shape))
    model.save_pretrained(tmp_path)
    blocks = built("gpt2", model_name_or_path=str(tmp_path), config_name=None)
    assert all(torch.equal(installed(block.head), model.lm_head.weight) for block in blocks)


def test_one_block_shares_nothing():
    (block,) = built(layers_per_block=4)
    assert block.transform is None
    assert isinstance(block.head.model.get_output_embeddings().weight, torch.nn.Parameter)


def test_logits_follow_what_is_installed_and_the_temperature(ids: torch.Tensor):
    block = built()[1]
    block.eval()
    hidden = torch.randn(2, 24, 32)
    assert block.transform is not None
    with torch.no_grad():
        before = block(ids, hidden, return_logits=True)[0]
        block.transform.temperature.fill_(2.0)
        assert torch.equal(block(ids, hidden, return_logits=True)[0], 2 * before)
        install(block.head, installed(block.head) * 2)
        assert torch.equal(block(ids, hidden, return_logits=True)[0], 4 * before)


def test_a_head_with_more_than_a_norm_is_refused(monkeypatch: pytest.MonkeyPatch):
    head = built(head="linear")[1].head
    whole = type(head.model).forward

    def forward(self: Any, **inputs: Any) -> Any:
        base = getattr(self, "model")  # noqa: B009 - what a slice's echo answers
        hidden = torch.tanh(base(**inputs).last_hidden_state)
        output = whole(self, **inputs)
        output.logits = self.lm_head(hidden)
        return output

    monkeypatch.setattr(type(head.model), "forward", forward)
    with pytest.raises(SliceError, match="head=shared: the head of model type 'llama' does more than its norm"):
        make_read_only(head)


def test_the_baseline_ignores_the_head(trainer: Trainer):
    plan = preflight(parse(trainer.flags("run", num_stages=2, method="backprop", head="shared")), 2)
    assert plan.partition.num_stages == 2


@pytest.mark.processes
def test_zero_stages_agree(trainer: Trainer):
    """ZeRO 0 to 3, two stages of two replicas, fp32 and bf16; every exit has the pipeline's logits (finish.py)."""
    common = {**SHARED, "num_stages": 2, "layers_per_block": 1, "head_layers": 1, "max_steps": 6}
    for precision, tolerance in ((None, 1e-5), (True, 5e-3)):
        outputs = {
            n: trainer.run(f"zero{n}-{precision}", 4, bf16=precision, deepspeed=CONFIGS / f"zero{n}.json", **common)
            for n in range(4)
        }
        wanted = torch.tensor(block_losses(outputs[1], 2))
        for output in outputs.values():
            torch.testing.assert_close(torch.tensor(block_losses(output, 2)), wanted, rtol=tolerance, atol=0.0)
            sent = 2 * (80 + 4096 * 32 * (2 if precision else 4))
            assert [r["sent_refresh_bytes"] for r in records(output, 1)] == [0, sent, 0, sent, 0, 0]
            assert [r["sent_refresh_bytes"] for r in records(output, 0)] == [0] * 6


@pytest.mark.processes
def test_offloading_agrees(trainer: Trainer):
    common = {**SHARED, "num_stages": 1, "layers_per_block": 2, "max_steps": 6}
    outputs = [
        trainer.run(name, 2, deepspeed=CONFIGS / f"{name}.json", **common)
        for name in ("zero0", "zero2_offload", "zero3_offload")
    ]
    wanted = torch.tensor(block_losses(outputs[0], 1))
    for output in outputs[1:]:
        torch.testing.assert_close(torch.tensor(block_losses(output, 1)), wanted, rtol=1e-5, atol=0.0)


@pytest.mark.processes
def test_replicas_share_the_same_global_batch(trainer: Trainer):
    one = trainer.run("one", 2, num_stages=2, per_device_train_batch_size=8, max_steps=6, **SHARED)
    two = trainer.run("two", 4, num_stages=2, per_device_train_batch_size=4, max_steps=6, **SHARED)
    ours, theirs = torch.tensor(block_losses(two, 2)), torch.tensor(block_losses(one, 2))
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=0.0)


@pytest.mark.processes
def test_a_refresh_is_read_from_its_step_on_and_counted(trainer: Trainer):
    settings = {"num_stages": 3, "layers_per_block": 1, "max_steps": 7, "stage_layers": "1,1,2", "head": "shared"}
    never = trainer.run("never", 3, head_refresh_steps=1000, **settings)
    before, matrix = block_losses(never, 3), 80 + 4096 * 32 * 4
    assert {r["sent_refresh_bytes"] for r in records(never, 2)} == {0}
    for refresh, wanted in ((1, [matrix] * 5 + [0, 0]), (3, [0, 0, matrix, 0, 0, 0, 0])):
        again = trainer.run(f"every-{refresh}", 3, head_refresh_steps=refresh, **settings)
        after, unchanged = block_losses(again, 3), refresh + (refresh + 1) // 2
        assert after[:unchanged] == before[:unchanged]
        assert all(new != old for new, old in zip(after[unchanged][:3], before[unchanged][:3], strict=True))
        assert after[unchanged][3] == before[unchanged][3], "the last head reads what it trains"
        sent = [r["sent_refresh_bytes"] for r in records(again, 2)]
        assert sent == wanted
        assert sum(r["sent_refresh_bytes"] for r in records(again, 1)) == sum(sent)
        assert {r["sent_refresh_bytes"] for r in records(again, 0)} == {0}


@pytest.mark.processes
@pytest.mark.parametrize(
    ("ranks", "settings"),
    [
        (1, {"num_stages": 1, "layers_per_block": 1}),
        (3, {"num_stages": 3, "stage_layers": "1,1,2", "layers_per_block": 1}),
        (4, {"num_stages": 2, "deepspeed": CONFIGS / "zero3.json", "bf16": True}),
    ],
    ids=["one-process", "relayed", "zero3-bf16"],
)
def test_resume_in_the_middle_of_a_transit_equals_never_having_stopped(trainer: Trainer, ranks: int, settings: dict):
    """Taken after step 4, read from step 7 on; the checkpoints of step 4, 5 and 6 have it on its way."""
    common = {**settings, "head": "shared", "head_refresh_steps": 4, "head_layers": 1, "eval_batches": 1}
    straight = trainer.run("straight", ranks, max_steps=9, save_steps=1, **common)
    losses = block_losses(straight, settings["num_stages"])
    for step in (4, 6):
        checkpoint = straight / f"checkpoints/step-{step:08d}"
        resumed = trainer.run(f"from-{step}", ranks, max_steps=9, resume_from_checkpoint=checkpoint, **common)
        assert block_losses(resumed, settings["num_stages"]) == losses[step:]
        for folder in ("export", "export/exits/stage-00"):
            mine, theirs = weights(resumed / folder), weights(straight / folder)
            assert all(torch.equal(mine[k], theirs[k]) for k in theirs)


@pytest.mark.processes
@pytest.mark.parametrize("kind", ["gemma2", "granite", "phi", "gpt2"])
def test_exits_have_the_temperature_in_their_matrix(trainer: Trainer, kind: str):
    """finish.py compares each exit's logits with the pipeline's and refuses missing or unexpected keys."""
    path = trainer.model({**TINY, **KINDS[kind], "model_type": kind})
    settings = {**SHARED, "num_stages": 2, "max_steps": 5, "learning_rate": 0.03, "config_name": path}
    output = trainer.run("run", 2, **settings)
    early, whole = weights(output / "export/exits/stage-00"), weights(output / "export")
    ratio = early["lm_head.weight"] / whole["lm_head.weight"]
    assert float(ratio.median()) != pytest.approx(1.0, abs=1e-3), "the temperature did not move"
    _, info = AutoModelForCausalLM.from_pretrained(output / "export/exits/stage-00", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]


@pytest.mark.processes
def test_global_steps_refresh_alike(trainer: Trainer):
    settings = {**SHARED, "layers_per_block": 1, "final_backprop_steps": 4, "max_steps": 8, "head_layers": 1}
    one = trainer.run("one", 1, num_stages=1, **settings)
    two = trainer.run("two", 2, num_stages=2, **settings)
    ours, theirs = torch.tensor(block_losses(two, 2)), torch.tensor(block_losses(one, 1))
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=0.0)
