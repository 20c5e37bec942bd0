"""Image classifiers in slices: exact, and refused with a reason where they could not be."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForImageClassification, ViTConfig, ViTForImageClassification

from llm_local.checks.exit_check import difference_at
from llm_local.checks.tiny import tiny_config
from llm_local.config import parse
from llm_local.export.stages import trim_config
from llm_local.flags import ModelArguments
from llm_local.model.anatomy import SliceError, probe
from llm_local.model.levels import layers_override
from llm_local.model.loss import head_loss
from llm_local.model.slices import check_set, new_slice, try_slices
from llm_local.model.stage import Blueprint, build_block
from llm_local.partition import Partition, Span
from llm_local.registry import TASKS

TASK = "image-classification"
IMAGES = ModelArguments(task=TASK)
SIZES: dict[str, Any] = {
    **{"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 6, "num_attention_heads": 4},
    **{"image_size": 16, "patch_size": 4, "num_channels": 3, "num_labels": 10},
}
SEEING: dict[str, Any] = {name: value for name, value in SIZES.items() if name != "num_labels"}
CONFIGS: dict[str, dict[str, Any]] = {
    "vit": SIZES,
    "deit": SIZES,
    "beit": SIZES | {"drop_path_rate": 0.0, "use_relative_position_bias": True},
    "data2vec-vision": SIZES | {"drop_path_rate": 0.0, "use_relative_position_bias": True},
    "dinov2": SIZES,
    "dinov2_with_registers": SIZES,
    "vit_msn": SIZES,
    "ijepa": SIZES,
    "siglip": {"vision_config": SEEING, "num_labels": 10},
    "clip": {"vision_config": SEEING, "num_labels": 10},
    "metaclip_2": {"vision_config": SEEING, "num_labels": 10},
}
# the level of six layers is cut; numbers in other orders in memory, positions and sizes that levels hand on, pooling
LEVELS = ("swin", "hiera", "pvt", "segformer", "convnext")


def small(kind: str) -> Any:
    return AutoConfig.for_model(kind, **CONFIGS[kind]) if kind in CONFIGS else tiny_config(kind, TASK)


@pytest.mark.parametrize("kind", [*CONFIGS, *LEVELS])
def test_slices_together_are_the_classifier(kind: str):
    """Weights, logits, loss and every gradient equal the undivided model's bit for bit."""
    config = small(kind)
    anatomy = probe(config, IMAGES, try_slices)
    whole = new_slice(config, anatomy, Span(0, 6), seed=3)
    parts = [new_slice(config, anatomy, Span(a, b), seed=3, has_head=b == 6) for a, b in pairwise((0, 1, 4, 6))]
    for part in (whole, *parts):
        check_set(part)
        part.model.eval()
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(4, *anatomy.row_shape, generator=generator)
    labels = torch.randint(0, config.num_labels, (4, 1), generator=generator)
    hidden, logits = None, torch.empty(0)
    for part in parts:
        hidden, logits = part(hidden, **({"pixel_values": images} if part.is_first else {}))
    assert hidden is not None
    assert hidden.shape == (4, anatomy.num_tokens, anatomy.hidden_size)
    theirs = whole.model(pixel_values=images, labels=labels.flatten())
    assert torch.equal(logits, theirs.logits)
    loss = head_loss(parts[-1], logits, None, labels)
    assert torch.equal(loss, theirs.loss)
    loss.backward()
    theirs.loss.backward()
    wanted = dict(whole.model.named_parameters())
    seen = set()
    for part in parts:
        for key, parameter in part.model.named_parameters():
            seen.add(key)
            assert torch.equal(parameter, wanted[key]), key
            if (gradient := wanted[key].grad) is not None:
                assert parameter.grad is not None, key
                assert torch.equal(parameter.grad, gradient), key
    assert seen == wanted.keys()
    assert difference_at(parse(["--task", TASK]), config, anatomy, 2) == "", "two layers with a head are a model"


@pytest.mark.parametrize("kind", ["vit", "swin"])
def test_checkpointing_repeats_layers_and_no_border(kind: str):
    """Swin's class checkpoints levels as well."""
    config = small(kind)
    anatomy, cut = probe(config, IMAGES), Partition((Span(0, 2), Span(2, 6)), (Span(0, 1), Span(1, 2)))
    hidden = torch.randn(2, anatomy.num_tokens, anatomy.hidden_size)
    found = []
    for flag in ("false", "true"):
        run = parse(["--task", TASK, "--gradient_checkpointing", flag])
        block = build_block(Blueprint(run, config, anatomy, cut), 1).train()
        block(hidden=hidden, labels=torch.tensor([[0], [1]]))[0].backward()
        found.append({name: p.grad for name, p in block.named_parameters() if p.grad is not None})
    plain, again = found
    assert plain.keys() == again.keys()
    assert any("layers" in name for name in plain)
    assert all(torch.equal(plain[name], again[name]) for name in plain)


def test_an_exit_has_fewer_layers_of_the_level_that_is_cut():
    config = tiny_config("swin", TASK)
    assert trim_config(config, 2, TASKS[TASK]).depths == [1, 1, 2, 1]
    assert layers_override(config, 2) == "depths=[1,1,2,1]"
    assert layers_override(AutoConfig.for_model("vit", **SIZES), 2) == "num_hidden_layers=2"


def test_products_of_a_row_are_all_that_it_takes():
    """Of a ViT they are those of the formula: matrices, and two products of attention."""
    products = probe(AutoConfig.for_model("vit", **SIZES), IMAGES).products
    tokens, matrices = 17, 4 * 32 * 32 + 2 * 32 * 64
    assert products == (16 * 48 * 32, tokens * matrices + 2 * tokens * tokens * 32, 32 * 10)


class TwiceConfig(ViTConfig):
    model_type = "vit_that_sees_twice"


class Twice(ViTForImageClassification):
    """Its logits have a part of the patches themselves."""

    config_class = TwiceConfig

    def forward(self, pixel_values: Any, **options: Any) -> Any:  # pyright: ignore
        output = super().forward(pixel_values, **options)
        output.logits = output.logits + self.vit.embeddings(pixel_values).mean()
        return output


class HalvingConfig(ViTConfig):
    model_type = "vit_that_halves"


class Halving(ViTForImageClassification):
    """Its third layer drops every other position."""

    config_class = HalvingConfig

    def __init__(self, config: HalvingConfig):
        super().__init__(config)
        self.get_submodule("vit.layers.2").register_forward_hook(lambda _layer, _args, hidden: hidden[:, ::2])


class Boxed(nn.Conv2d):
    def forward(self, input: torch.Tensor) -> Any:
        return {"patches": super().forward(input)}


class BoxingConfig(ViTConfig):
    model_type = "vit_that_boxes"


class Boxing(ViTForImageClassification):
    """What it reads comes in a dictionary."""

    config_class = BoxingConfig

    def __init__(self, config: BoxingConfig):
        super().__init__(config)
        self.first = Boxed(3, 3, 1)

    def forward(self, pixel_values: Any, **options: Any) -> Any:  # pyright: ignore
        return super().forward(self.first(pixel_values)["patches"], **options)


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        (Boxing, "first returns neither tensors nor plain values, which could be made up"),
        (Twice, r"vit\.embeddings.*, which runs before its layers, is also used behind them"),
        (Halving, r"its hidden states change from shape \(3, 17, 32\) to \(3, 9, 32\), and a stage's border has one"),
    ],
)
def test_what_flows_otherwise_is_refused(kind: Any, reason: str):
    AutoModelForImageClassification.register(kind.config_class, kind, exist_ok=True)
    with pytest.raises(SliceError, match=reason):
        probe(kind.config_class(**SIZES), IMAGES)


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        (
            "resnet",
            r"\(hidden_sizes=\[256, 512, 1024, 2048\]\), and it has no list of layers of one width",
        ),
        ("cvt", "its config has no num_hidden_layers: it is no stack of like layers"),
        (
            "mobilevit",
            r"its width changes on the way \(hidden_sizes=\[144, 192, 240\]\), and it has no list of layers",
        ),
        ("textnet", "its BatchNorm has each row depend on the others of its micro-batch, and so on the layout"),
        ("mobilenet_v2", "its config has no num_hidden_layers: it is no stack of like layers"),
        (
            "gpt2",
            r"^task=image-classification: transformers has no image classifier of model type 'gpt2'; train it with",
        ),
    ],
)
def test_what_cannot_be_cut_is_refused_with_the_reason(kind: str, reason: str):
    with pytest.raises(SliceError, match=reason):
        probe(AutoConfig.for_model(kind), IMAGES)


def test_an_image_size_that_the_model_does_not_take_is_refused():
    config = AutoConfig.for_model("vit", **SIZES)
    said = r"no 'vit' model runs with images of 3 x 20 x 20, as its .* makes them; its config has 3 x 16 x 16"
    with pytest.raises(SliceError, match=said):
        probe(config, IMAGES, row_shape=(3, 20, 20))
    assert TASKS[TASK].row_shape(config) == (3, 16, 16)
