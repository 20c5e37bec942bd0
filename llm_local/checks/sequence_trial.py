"""A small model whose rows threads divide, which shows before the start whether its type can be trained so; and all
that is wrong with a model whose layers or rows are to be divided."""

from __future__ import annotations

import copy
from math import gcd
from typing import Any

import torch
from transformers import PretrainedConfig, PreTrainedModel

from llm_local.checks.tensor_trial import ThreadRanks, division_problems, in_threads, relative
from llm_local.checks.trial import EXACT, named, small_model, trial_rows
from llm_local.config import Config
from llm_local.model.anatomy import Anatomy, attention_kernel, text_config
from llm_local.model.sequence_parallel import exchange_heads, position_problems
from llm_local.model.tensor_parallel import plan_problems

_POSITIONS = 6  # of a rank


def undividable(config: Config, model_config: PretrainedConfig, anatomy: Anatomy, is_tried: bool = True) -> list[str]:
    """Why the model's layers, or its rows, cannot be divided as the flags say. is_tried: in small, too, which shows
    alike for all numbers of ranks."""
    problems, local = [], config.local
    if local.tensor_parallel_size > 1:
        trusted = config.model.trust_remote_code
        unfit = plan_problems(model_config, anatomy, local.tensor_parallel_size, trust_remote_code=trusted)
        problems += unfit or (division_problems(config, model_config, anatomy) if is_tried else [])
    if local.sequence_parallel_size > 1:
        kernel = attention_kernel(config.model, model_config)
        unfit = [*position_problems(model_config, kernel, local.sequence_parallel_size)]
        problems += unfit or (dealing_problems(config, model_config, anatomy) if is_tried else [])
    return problems


def dealing_problems(config: Config, model_config: PretrainedConfig, anatomy: Anatomy) -> list[str]:
    """Whether the model's type has the logits and gradients of whole rows where each rank has a part of them."""
    kind, given = model_config.model_type, f"sequence_parallel_size={config.local.sequence_parallel_size}"
    try:
        whole = small_model(config, model_config, anatomy)
        size = _ranks_for(whole)
        wanted = _train(config, whole, size * _POSITIONS)
        difference = in_threads(lambda ranks: _differs(config, whole, wanted, ranks), size)
    except Exception as error:  # whatever a model class makes of parts of rows
        return [f"{given}: model type {kind!r} does not run on parts of rows ({named(error)}); use 1"]
    if difference <= EXACT:
        return []
    return [
        f"{given}: model type {kind!r} is another model on parts of rows (logits or gradients differ by "
        f"{difference:.1%}): it reads other positions elsewhere than in transformers' attention functions; use 1, with "
        "more stages or replicas"
    ]


def _ranks_for(model: PreTrainedModel) -> int:
    """That can divide its heads. Raises ValueError where two cannot."""
    text = text_config(model.config)
    numbers = [getattr(text, name, None) for name in ("num_attention_heads", "num_key_value_heads")]
    size = gcd(*(number for number in numbers if isinstance(number, int)))
    if size < 2:
        raise ValueError(f"a small one has no heads to divide: {numbers}")
    return size


def _train(config: Config, model: PreTrainedModel, length: int, ranks: ThreadRanks | None = None) -> torch.Tensor:
    """Logits of rows of so many tokens, or of a rank's part of them, with what a backward pass leaves in the model."""
    rows: dict[str, Any] = trial_rows(config, model, length)
    if ranks is not None:  # the class numbers whole rows itself
        rows["position_ids"] = torch.arange(length).expand(2, -1)
        rows = {name: values.chunk(ranks.size, 1)[ranks.rank] for name, values in rows.items()}
    logits = model(**rows, **config.task.options).logits.float()
    weights = torch.randn(2, length, logits.shape[-1], generator=torch.Generator().manual_seed(0))
    (logits * (weights if ranks is None else weights.chunk(ranks.size, 1)[ranks.rank])).sum().backward()
    return logits.detach()


def _differs(config: Config, whole: PreTrainedModel, wanted: torch.Tensor, ranks: ThreadRanks) -> float:
    model = copy.deepcopy(whole)
    model.zero_grad()
    exchange_heads(model, ranks)
    found = [relative(_train(config, model, wanted.shape[1], ranks), wanted.chunk(ranks.size, 1)[ranks.rank])]
    gradients = dict(whole.named_parameters())
    least = 1e-3 * max(float(p.grad.norm()) for p in gradients.values() if p.grad is not None)
    for name, parameter in model.named_parameters():
        theirs, ours = gradients[name].grad, parameter.grad
        if theirs is not None:
            ours = torch.zeros_like(theirs) if ours is None else ours
            found.append(relative(ranks.sum(ours), theirs, least))
    return max(found)
