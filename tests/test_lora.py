"""Adapters in the layers of a pretrained model: they alone train, and an export is the merged model or an adapter."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Trainer, weights
from pretrained import pretrained
from test_resume import same_bits
from transformers import AutoModelForCausalLM

from llm_local.checkpoint.catalog import Catalog
from llm_local.checks.preflight import preflight
from llm_local.commands.export import main as export
from llm_local.config import ConfigError, from_flat, parse
from llm_local.costs import Setting, Shape, count_passes
from llm_local.export.adapter import complete_adapter, write_share
from llm_local.export.model_folder import original_names
from llm_local.export.stages import collect
from llm_local.model.anatomy import probe
from llm_local.model.lora import with_adapters
from llm_local.model.model_config import load_model_config
from llm_local.model.pretrained import tensor_files
from llm_local.model.stage import Blueprint, build_block
from llm_local.partition import Partition, Span

peft: Any = pytest.importorskip("peft")
CONFIGS = Path(__file__).parent.parent / "configs" / "ds"
IDS = torch.arange(8, 40)[None]
GPT2 = {"model_type": "gpt2", "n_embd": 32, "n_layer": 4, "n_head": 4, "n_positions": 64}


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits


def lora_flags(base: Path, **more: Any) -> dict[str, Any]:
    common = {"config_name": None, "model_name_or_path": base, "lora_rank": 4, "learning_rate": 1e-2}
    return {**common, "lora_alpha": 16, "eval_batches": 0, **more}


@pytest.mark.processes
@pytest.mark.parametrize(
    ("ranks", "zero", "model", "flags"),
    [
        (2, 0, {}, {"num_stages": 2, "lora_target_modules": "q_proj,v_proj", "head_warmup_steps": 1}),
        (4, 1, {"tie_word_embeddings": True}, {"num_stages": 2, "lora_target_modules": "all-linear", "bf16": True}),
        (2, 2, GPT2, {"layers_per_block": 2}),
        (4, 3, {}, {"num_stages": 2, "freeze_stages": "0", "lora_dropout": 0.1}),
        (1, 0, {}, {"method": "overlapping", "layers_per_block": 2, "final_backprop_steps": 1}),
        (2, 1, {"tie_word_embeddings": True}, {"num_stages": 2, "method": "backprop"}),
    ],
    ids=["two-matrices", "zero1-bf16-tied", "zero2-gpt2", "zero3-frozen", "overlapping", "backprop"],
)
def test_adapters_train_alone(
    trainer: Trainer, tmp_path: Path, ranks: int, zero: int, model: dict[str, Any], flags: dict[str, Any]
):
    """A run resumes bit for bit; merged, as an adapter and from a checkpoint it is one model."""
    base = pretrained(trainer, **model)
    common = lora_flags(base, save_steps=2, deepspeed=CONFIGS / f"zero{zero}.json", **flags)
    run = trainer.run("run", ranks, **common)
    resumed = trainer.folder / "resumed"
    shutil.copytree(run, resumed, ignore=shutil.ignore_patterns("export", "step-00000004"))
    trainer.run("resumed", ranks, **common, resume_from_checkpoint="true")
    same_bits(resumed, run)

    pretrained_model = AutoModelForCausalLM.from_pretrained(base)
    before = dict(pretrained_model.named_parameters())
    catalog = Catalog(run / "checkpoints/step-00000004")
    own = [name for name in catalog.weights if name in before]
    assert own
    dtype = torch.bfloat16 if flags.get("bf16") else torch.float32
    for name in own:
        assert torch.equal(catalog.tensor(name).to(dtype), before[name].detach().view(-1).to(dtype)), name

    merged = AutoModelForCausalLM.from_pretrained(run / "export", dtype=torch.float32)
    plain = logits(pretrained_model)
    adapted = logits(peft.PeftModel.from_pretrained(pretrained_model, run / "export/adapter"))
    size = plain.abs().max()
    assert (adapted - plain).abs().max() > 0.02 * size
    assert (adapted - logits(merged)).abs().max() < (0.02 if flags.get("bf16") else 1e-4) * size
    assert "# run, adapter" in (run / "export/adapter/README.md").read_text()
    assert "| adapters | LoRA, rank 4, alpha 16" in (run / "export/README.md").read_text()

    assert export([str(run / "checkpoints/step-00000004"), str(tmp_path / "out")]) == 0
    mine, theirs = weights(tmp_path / "out"), weights(run / "export")
    assert set(mine) == set(theirs)
    assert all(torch.equal(mine[name], theirs[name]) for name in theirs)
    names = [path.name for path in sorted((tmp_path / "out/adapter").iterdir())]
    assert names == ["README.md", "adapter_config.json", "adapter_model.safetensors"]


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"lora_rank": 0}, "lora_rank=0 must be greater than 0"),
        ({"lora_rank": None}, "lora_alpha=16 is of adapters; give lora_rank"),
        (
            {"model_name_or_path": None, "config_name": "llama.json"},
            "lora_rank=4 leaves all other weights as they are, and those of a new model are untrained; give model_name",
        ),
        (
            {"lora_target_modules": "q_proj,qkv"},
            "lora_target_modules=q_proj,qkv: qkv is no matrix of the layers of model type 'llama'; use some of "
            "down_proj, gate_proj, k_proj, o_proj, q_proj, up_proj, v_proj, or all-linear",
        ),
        ({"lora_target_modules": "lm_head"}, "lm_head is no matrix of the layers of model type 'llama'; use some of"),
        ({"lora_layers_to_transform": "2,4"}, "lora_layers_to_transform=2,4 names layer 4, the model's last is 3"),
        (
            {"tensor_parallel_size": 2},
            "tensor_parallel_size=2: the matrices of lora_rank=4 have no plan; leave it out",
        ),
        ({"lora_layers_to_transform": "a"}, "lora_layers_to_transform='a' is not a list of layers such as 2,3"),
        (
            {"lora_layers_to_transform": "0", "freeze_stages": "0"},
            "lora_rank=4: no layer is left that gets an adapter; name others",
        ),
        (
            {"lora_layers_to_transform": "2", "final_backprop_steps": 1},
            "lora_rank=4: layers 0 to 1 get no adapter, and final_backprop_steps=1 sends a gradient through them; name",
        ),
    ],
)
def test_what_cannot_be_adapted_is_refused(trainer: Trainer, tmp_path: Path, settings: dict[str, Any], said: str):
    flags = {**lora_flags(pretrained(trainer)), "num_stages": 2, **settings}
    if flags.get("config_name"):
        flags["config_name"] = trainer.config
    with pytest.raises(ConfigError) as refusal:
        preflight(parse(trainer.flags("run", **flags)), 2 * settings.get("tensor_parallel_size", 1))
    assert len(refusal.value.problems) == 1, refusal.value
    assert said in refusal.value.problems[0]


def test_a_type_of_which_peft_knows_nothing(trainer: Trainer, tmp_path: Path):
    base = pretrained(trainer, model_type="olmo", clip_qkv=None)
    with pytest.raises(ConfigError) as refusal:
        preflight(parse(trainer.flags("run", **lora_flags(base))), 1)
    (said,) = refusal.value.problems
    assert said.startswith("lora_target_modules=None: PEFT adapts no model of type 'olmo' so (")
    assert said.endswith("; use some of down_proj, gate_proj, k_proj, o_proj, q_proj, up_proj, v_proj, or all-linear")


def test_peft_is_asked_for(trainer: Trainer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    import sys

    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ConfigError, match="lora_rank=4 needs peft, which is not installed: pip install 'llm_local"):
        preflight(parse(trainer.flags("run", **lora_flags(pretrained(trainer)))), 1)


@pytest.mark.processes
def test_adapters_belong_to_their_weights(trainer: Trainer, tmp_path: Path):
    """A checkpoint without them, or with others, is another model."""
    base = pretrained(trainer)
    flags = lora_flags(base, max_steps=1, save_steps=1)
    full = trainer.run("full", 1, **{**flags, "lora_rank": None, "lora_alpha": None})
    lora = trainer.run("lora", 1, **flags)
    ends = "give the same lora_ flags and freeze_stages, or start a new run from its export (--model_name_or_path)"
    eight = "adapters of lora_rank 4, lora_alpha 16 beside 8 matrices"
    for run, more, said in (
        (full, {}, f"has no adapters, this run {eight}; {ends}"),
        (lora, {"lora_rank": 2}, f"has {eight}, this run adapters of lora_rank 2, lora_alpha 16 beside 8 matrices"),
        (lora, {"lora_rank": None, "lora_alpha": None}, f"has {eight}, this run no adapters; {ends}"),
        (lora, {"lora_layers_to_transform": "3"}, "lora_alpha 16 beside 2 matrices; "),
    ):
        checkpoint = run / "checkpoints/step-00000001"
        with pytest.raises(ConfigError) as refusal:
            preflight(parse(trainer.flags("new", **{**flags, **more}, resume_from_checkpoint=checkpoint)), 1)
        assert said in refusal.value.problems[0]


def test_gradients_are_those_of_peft(trainer: Trainer):
    """Of a whole model as one block, in its adapters and nowhere else."""
    base = pretrained(trainer)
    run = from_flat({k: v for k, v in lora_flags(str(base)).items() if k != "config_name"})
    config, partition = load_model_config(run.model), Partition((Span(0, 4),), (Span(0, 1),))
    anatomy = with_adapters(run, config, probe(config, run.model), partition)
    assert [name.rpartition(".")[2] for name in anatomy.adapted] == ["q_proj", "v_proj"] * 4
    block = build_block(Blueprint(run, config, anatomy, partition), 0)
    made = peft.LoraConfig(r=4, lora_alpha=16, target_modules=["q_proj", "v_proj"])
    theirs = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(base), made)
    ours = {f"base_model.model.{name}": p for name, p in block.body_model.named_parameters() if p.requires_grad}
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if parameter.requires_grad:
                assert ours[name].any() == ("lora_A" in name), "at first the product is zero"
                ours[name].copy_(parameter.normal_())
    loss = block(input_ids=IDS)[0]
    expected = theirs(input_ids=IDS, labels=IDS).loss
    torch.testing.assert_close(loss, expected)
    loss.backward()
    expected.backward()
    for name, parameter in theirs.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(ours.pop(name).grad, parameter.grad)
    assert not ours
    assert not any(p.requires_grad for p in block.head_model.parameters())


KINDS = {
    "gpt2": {key: value for key, value in GPT2.items() if key != "model_type"},
    "llama": {},
    "qwen3": {},
    "gemma3_text": {"head_dim": 8, "tie_word_embeddings": True},
    "mixtral": {"num_local_experts": 4},
    "phi3": {"pad_token_id": 0},
}


@pytest.mark.parametrize("kind", KINDS)
def test_blocks_of_any_type_are_peft_s_model(trainer: Trainer, tmp_path: Path, kind: str):
    """With all matrices of two blocks adapted; what is merged is what PEFT merges."""
    base = pretrained(trainer, model_type=kind, **KINDS[kind])
    run = from_flat({"model_name_or_path": str(base), "lora_rank": 4, "lora_target_modules": "all-linear"})
    config, partition = load_model_config(run.model), Partition((Span(0, 2), Span(2, 4)), (Span(0, 1), Span(1, 2)))
    anatomy = with_adapters(run, config, probe(config, run.model), partition)
    blocks = [build_block(Blueprint(run, config, anatomy, partition), index).eval() for index in (0, 1)]
    hidden, tensors = None, []
    with torch.no_grad():
        for number, block in enumerate(blocks):
            for parameter in block.body_model.parameters():
                if parameter.requires_grad:
                    parameter.normal_(std=0.1)
            hidden = block.features(IDS, hidden)
            tensors.append(collect([block.body], block.head if number else None, True, {}))
            write_share(tmp_path, number, 2, tensors[-1].adapter)
        ours = blocks[-1].logits(hidden, IDS)
    complete_adapter(tmp_path, run, str(base))
    model = AutoModelForCausalLM.from_pretrained(base)
    plain, theirs = logits(model), peft.PeftModel.from_pretrained(model, tmp_path / "adapter")
    assert (ours - plain).abs().max() > plain.abs().max() / 2
    torch.testing.assert_close(ours, logits(theirs))
    merged = original_names(model, dict(theirs.merge_and_unload().state_dict()))
    mine = tensors[0].body | tensors[1].body | tensors[1].head
    assert set(mine) >= set(tensor_files(str(base)))
    for name in set(mine) & set(merged):
        torch.testing.assert_close(mine[name], merged[name])


def test_matrices_that_stay_cost_no_gradient_of_their_own():
    """2 FLOPs a parameter: of the layers, and of the last head; the head of the first block trains."""
    shape, halves = Shape(8, 16, 1000, 500), (Span(0, 2), Span(2, 4))
    whole, adapted = (count_passes(shape, Setting(halves, adapted=given)) for given in (False, True))
    assert adapted[0].backward == pytest.approx(whole[0].backward - 2 * 2000)
    assert adapted[1].backward == pytest.approx(whole[1].backward - 2 * 2000 - 2 * 500)
    assert [each.weights for each in adapted] == pytest.approx([2 * 500, 0])
