"""What a model class does that shows in numbers alone, tried before the start on the run's model in small."""

from __future__ import annotations

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from llm_local.checks.trial import small_model
from llm_local.config import Config
from llm_local.model.anatomy import Anatomy, SliceError
from llm_local.model.slices import check_set, model_without_weights, new_slice
from llm_local.partition import Span

TOLERANCE = 1e-4  # of the logits' size: what rounding alone may do
_IDS = torch.arange(8, 32).reshape(2, -1)


def class_problems(config: Config, model_config: PretrainedConfig, anatomy: Anatomy) -> list[str]:
    """Whether the class sets all of a new model's weights, and reads of a row what the task needs.

    [] where the small model cannot be made or run.
    """
    problems = []
    try:
        model = small_model(config, model_config, anatomy)
        if not config.model.model_name_or_path:
            problems += _unset(config, model, anatomy)
        if config.task.answers_once:
            return problems
        moved = _moved_by_later_tokens(model, config)
    except Exception:  # of a class in sizes that it was not meant for
        return problems
    problem = config.task.order_problem(model_config, moved > TOLERANCE)
    return [*problems, problem] if problem else problems


def skipped_positions(config: Config, model_config: PretrainedConfig, positions: int) -> int:
    """How many of its positions a class leaves to padding, as RoBERTa does, where the run's rows then have too few."""
    pad = getattr(model_config, "pad_token_id", None)
    if not isinstance(pad, int) or config.data.seq_length + pad + 1 <= positions:
        return 0
    model = model_without_weights(model_config, config.model.task, trust_remote_code=config.model.trust_remote_code)
    tables = [each for each in model.modules() if isinstance(each, nn.Embedding) and each.num_embeddings == positions]
    words = model.get_input_embeddings()
    return pad + 1 if any(table.padding_idx == pad for table in tables if table is not words) else 0


def _unset(config: Config, model: PreTrainedModel, anatomy: Anatomy) -> list[str]:
    trusted, whole = config.model.trust_remote_code, Span(0, anatomy.num_layers)
    try:
        check_set(new_slice(model.config, anatomy, whole, seed=0, trust_remote_code=trusted))
    except SliceError as error:
        return [str(error)]
    return []


@torch.no_grad()
def _moved_by_later_tokens(model: PreTrainedModel, config: Config) -> float:
    """How far another last token moves the logits before it, relative to the largest."""
    changed = _IDS.clone()
    changed[:, -1] += 40
    before, after = (model(input_ids=ids, **config.task.options).logits[:, :-1] for ids in (_IDS, changed))
    return float((after - before).abs().max() / before.abs().max())
