"""Whether the exits of a model type are models of their own, tried before training on the run's model in small.

An exit has fewer layers than its model. A class that looks at their number, for the scale of a residual stream say,
makes another model of it; so does one whose last layer has what the others have not.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from transformers import PretrainedConfig

from llm_local.adapters.hf_internals import model_of_class, unsaved
from llm_local.checks.trial import small_model, trial_rows
from llm_local.config import Config
from llm_local.export.model_folder import describe, relative_difference
from llm_local.export.stages import exit_name, trim_config
from llm_local.model.anatomy import Anatomy
from llm_local.model.heads.head import head_of
from llm_local.model.standins import prune
from llm_local.partition import Partition, Span

TOLERANCE = 1e-4
MOST_TRIED = 8  # of the exits; each takes tenths of a second


def refused_exits(
    config: Config, model_config: PretrainedConfig, anatomy: Anatomy, partition: Partition
) -> dict[str, str]:
    """The exits that are no models of their own, by name, and why. {} where the small model cannot be made or run."""
    if config.has_one_head or config.local.head_features:
        return {}
    if reason := head_of(config).exit_problem:
        return {exit_name(stage): reason for stage in range(partition.num_stages - 1)}
    depths = exit_depths(partition, config.head_layers_schedule)
    shallower = {stage: depth for stage, depth in depths.items() if depth < partition.num_layers}
    tried = dict(list(shallower.items())[:MOST_TRIED])
    found = {}
    for stage, depth in tried.items():
        try:
            reason = difference_at(config, model_config, anatomy, depth)
        except Exception:  # of a class in sizes that it was not meant for; the export itself is checked at the end
            return {}
        if reason:
            found[exit_name(stage)] = reason
    return found


def exit_depths(partition: Partition, head_layers: tuple[int, ...]) -> dict[int, int]:
    """The layers of each stage's exit, those of its head included."""
    return {
        stage: partition.private_layers(blocks.stop - 1, head_layers).stop
        for stage, blocks in enumerate(partition.stages)
    }


@torch.no_grad()
def difference_at(config: Config, model_config: PretrainedConfig, anatomy: Anatomy, depth: int) -> str:
    """Why the first `depth` layers with a head, as a model of their own, are not what they are in the whole; '' if
    they are. Raises whatever the model class makes of the whole in small."""
    whole = small_model(config, model_config, anatomy)
    trimmed = trim_config(whole.config, depth, config.task)
    rows = trial_rows(config, whole, 8)
    prune(whole, anatomy, Span(0, depth), has_head=True)
    options = config.task.options
    wanted = whole(**rows, **options).logits
    try:
        made = _alone(type(whole), trimmed)
        kept = {k: v for k, v in whole.state_dict().items() if k not in unsaved(whole)}
        missing, unexpected = made.load_state_dict(kept, strict=False)
        missing = [name for name in missing if name not in unsaved(whole)]
        for kind, names in (("missing", missing), ("unexpected", unexpected)):
            if names:
                return f"{kind} keys {sorted(names)[:3]}"
        difference = relative_difference(made(**rows, **options).logits, wanted)
    except Exception as error:  # whatever it makes of fewer layers
        return f"does not load ({describe(error)})"
    return "" if difference <= TOLERANCE else f"its logits differ by {difference:.2g} of the largest"


def _alone(kind: Any, trimmed: PretrainedConfig) -> Any:
    """A model of the config as a reader of its JSON makes it."""
    again = type(trimmed).from_dict(copy.deepcopy(trimmed.to_dict()))
    again.tie_word_embeddings = again.get_text_config(decoder=True).tie_word_embeddings = False
    # by its class: the config of a part of a model, as Emu3 keeps it, is not one that AutoModelForCausalLM knows
    return model_of_class(kind, again, dtype=torch.float32).eval()


def exit_warnings(model_type: str, refused: dict[str, str]) -> tuple[str, ...]:
    """What a person is told at the start."""
    if not refused:
        return ()
    first, reason = next(iter(refused.items()))
    more = f" and {len(refused) - 1} more" if len(refused) > 1 else ""
    return (
        f"exits of model type {model_type!r} are no models of their own ({first}{more}: {reason}); they are left out, "
        "and the whole model is exported all the same",
    )
