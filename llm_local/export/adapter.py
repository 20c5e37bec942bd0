"""The adapter of a whole model as PEFT reads it, in OUTPUT/export/adapter: what all stages have of it in one file."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers.utils.peft_utils import ADAPTER_SAFE_WEIGHTS_NAME

from llm_local.config import Config
from llm_local.export.model_folder import shard_name, write_shard, writing
from llm_local.model.lora import adapted_by, lora_config

FOLDER = "adapter"


def write_share(export: Path, stage: int, num_stages: int, tensors: Mapping[str, torch.Tensor]) -> None:
    """What one stage has, if it has any. Raises Unwritten."""
    if tensors:
        write_shard(export / FOLDER / shard_name(stage, num_stages), tensors)


def complete_adapter(export: Path, config: Config, base: str | None) -> None:
    """Joins what the stages have written, if they have. base: the pretrained model. Raises Unwritten."""
    folder = export / FOLDER
    if not folder.is_dir():
        return
    shares = sorted(folder.glob("model-*.safetensors"))
    tensors = {name: tensor for share in shares for name, tensor in load_file(share).items()}
    write_shard(folder / ADAPTER_SAFE_WEIGHTS_NAME, tensors)
    for share in shares:
        share.unlink()
    made = lora_config(config, adapted_by(tensors))
    made.inference_mode, made.base_model_name_or_path = True, base
    with writing(folder / "adapter_config.json"):
        made.save_pretrained(folder)
