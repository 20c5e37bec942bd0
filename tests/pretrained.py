"""Tiny pretrained models in folders."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from conftest import TINY, Trainer
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from llm_local.data.tokenizer import builtin_tokenizer_dir


def pretrained(trainer: Trainer, **changes: Any) -> Path:
    """A TINY one, with changes to its config, weights that no initialisation gives, and the built-in tokenizer."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**TINY | changes))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    folder = trainer.folder / "model"
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(builtin_tokenizer_dir(trainer.cache)).save_pretrained(folder)
    return folder
