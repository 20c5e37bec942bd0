"""A training loop as a person writes it: the whole model, transformers' own loss, torch's AdamW."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoModelForCausalLM, PretrainedConfig

from llm_local.config import Config


class PlainLoop:
    """Trains a new model of that kind on rows of random ids, which cost what others cost."""

    def __init__(self, config: Config, model: PretrainedConfig):
        train = config.train
        loader: Any = AutoModelForCausalLM
        self._model = loader.from_config(model).float().train()
        betas = (train.adam_beta1, train.adam_beta2)
        self._optimizer = torch.optim.AdamW(self._model.parameters(), train.learning_rate, betas, fused=True)
        self._shape = (train.per_device_train_batch_size, config.data.seq_length)
        self._vocab_size = model.vocab_size
        self._max_norm = train.max_grad_norm

    def step(self) -> None:
        ids = torch.randint(self._vocab_size, self._shape)
        self._model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        torch.nn.utils.clip_grad_norm_(self._model.parameters(), self._max_norm)
        self._optimizer.step()
        self._optimizer.zero_grad()
