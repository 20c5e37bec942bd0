"""What an exported model writes, for people to see how far it is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from llm_local.data.encoding import prompt_ids

SAMPLE_TOKENS = 80


def sample(export: Path, prompt: str, seed: int, trust_remote_code: bool = False) -> str:
    """The prompt and what the model goes on with, by seeded sampling."""
    loader: Any = AutoModelForCausalLM
    model = loader.from_pretrained(export, trust_remote_code=trust_remote_code).float()
    tokenizer: Any = AutoTokenizer.from_pretrained(export, trust_remote_code=trust_remote_code)
    ids = torch.tensor([prompt_ids(prompt, tokenizer)])
    torch.manual_seed(seed)
    output = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=SAMPLE_TOKENS,
        do_sample=True,
        temperature=0.7,
        top_k=50,
        pad_token_id=tokenizer.eos_token_id,
    )
    return str(tokenizer.decode(output[0], skip_special_tokens=True))
