"""What an image shows, one class of several: ViT, DINOv2 and their like."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from llm_local.flags import DataArguments, LocalArguments, ModelArguments, TrainArguments
from llm_local.registry import HEADS
from llm_local.tasks.task import Task, Wrong, causal_only, register_task

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig

TOP = 5


class ImageClassification(Task):
    """A classifier. Rows are images (C, H, W), which stay on the first stage; their labels (B, 1) travel. A head is the
    class's own norm, pooling and classifier, run by its own forward pass."""

    title = "image classifier"
    auto_class = "AutoModelForImageClassification"
    auto_mapping = "MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING"
    score = ""
    pipeline_tag = "image-classification"
    sends_labels = True
    main_input = "pixel_values"
    reads_images = True
    answers_once = True
    measures = ("accuracy", "top_5_accuracy")
    answer = "label"

    def scored(
        self, states: torch.Tensor, input_ids: torch.Tensor | None, labels: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        assert labels is not None, "each image has a label"
        return states, labels.reshape(-1)

    def count_scored(self, labels: torch.Tensor) -> torch.Tensor:
        return labels.new_ones(len(labels))

    def measure(self, logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        found = (logits.topk(min(TOP, logits.shape[-1])).indices == targets[:, None]).float()  # (B, 5), best first
        return found.cumsum(dim=1)[:, [0, -1]].mean(dim=0)

    def part_of(self, config: PretrainedConfig) -> PretrainedConfig:
        return getattr(config, "vision_config", None) or config

    def row_shape(self, config: PretrainedConfig) -> tuple[int, ...]:
        part = self.part_of(config)
        size = getattr(part, "image_size", None) or 224
        height, width = size if isinstance(size, (list, tuple)) else (size, size)
        return (getattr(part, "num_channels", 3), height, width)

    def order_problem(self, config: PretrainedConfig, reads_ahead: bool) -> str:
        return ""

    def problems(
        self, model: ModelArguments, data: DataArguments, local: LocalArguments, train: TrainArguments
    ) -> list[str]:
        head = HEADS.get(local.head)
        wrong: Wrong = {
            f"head={local.head}": (
                head is not None and head.shares_matrix,
                "a classifier is small, and each block has its own; use head=linear or decoder",
            ),
            f"head_token_fraction={local.head_token_fraction:g}": (
                local.head_token_fraction < 1,
                "a head pools all of an image; leave it out",
            ),
            **causal_only(model, local),
        }
        return self.refusals(wrong)

    def usage(self, trust: str, drafts: Sequence[int]) -> list[str]:
        return [
            "from transformers import pipeline",
            "",
            f'classify = pipeline("image-classification", model="export"{trust})',
            'print(classify("image.png"))',
        ]


register_task("image-classification", ImageClassification())
