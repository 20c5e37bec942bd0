"""Image classifiers in slices: exact, and refused with a reason where they could not be."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from transformers import AutoConfig

from llm_local.checks.exit_check import difference_at
from llm_local.config import parse
from llm_local.flags import ModelArguments
from llm_local.model.anatomy import SliceError, probe
from llm_local.model.loss import head_loss
from llm_local.model.slices import check_set, new_slice, try_slices
from llm_local.partition import Span
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


@pytest.mark.parametrize("kind", CONFIGS)
def test_slices_together_are_the_classifier(kind: str):
    """Weights, logits, loss and every gradient equal the undivided model's bit for bit."""
    config = AutoConfig.for_model(kind, **CONFIGS[kind])
    anatomy = probe(config, IMAGES, try_slices)
    whole = new_slice(config, anatomy, Span(0, 6), seed=3)
    parts = [new_slice(config, anatomy, Span(a, b), seed=3, has_head=b == 6) for a, b in pairwise((0, 1, 4, 6))]
    for part in (whole, *parts):
        check_set(part)
        part.model.eval()
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(4, 3, 16, 16, generator=generator)
    labels = torch.randint(0, 10, (4, 1), generator=generator)
    hidden, logits = None, torch.empty(0)
    for part in parts:
        hidden, logits = part(hidden, **({"pixel_values": images} if part.is_first else {}))
    assert hidden is not None
    assert hidden.shape == (4, anatomy.num_tokens, 32)
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
            if wanted[key].grad is not None:
                assert parameter.grad is not None, key
                assert torch.equal(parameter.grad, wanted[key].grad), key
    assert seen == wanted.keys()
    assert difference_at(parse(["--task", TASK]), config, anatomy, 2) == "", "two layers with a head are a model"


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("resnet", r"its width changes on the way \(hidden_sizes=\[256, 512, 1024, 2048\]\), and all borders of"),
        ("convnext", r"its width changes on the way \(hidden_sizes=\[96, 192, 384, 768\]\), and all borders of"),
        ("swin", r"its hidden states change from shape"),
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
    with pytest.raises(SliceError, match=r"Input image size \(20\*20\) doesn't match model \(16\*16\)"):
        probe(config, IMAGES, row_shape=(3, 20, 20))
    assert TASKS[TASK].row_shape(config) == (3, 16, 16)
