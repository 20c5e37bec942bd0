"""What shows in numbers alone, tried before the start on the run's own model in small.

The small model is of the same class, with the same kinds of layers and the same attention kernel, and is run as the
model will be: seconds, whatever the size of the real one.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from transformers import PretrainedConfig, PreTrainedModel

from llm_local.adapters.hf_internals import attention_kernel_of
from llm_local.checks.tiny import SIZES
from llm_local.config import Config
from llm_local.device import local_device
from llm_local.model.anatomy import Anatomy, attention_kernel, text_config
from llm_local.model.document_mask import DocumentMask
from llm_local.model.router_loss import Routers, router_loss, want_none
from llm_local.model.slices import Slice
from llm_local.model.standins import Border
from llm_local.partition import Span
from llm_local.tasks.task import Parts, Task

LARGEST_TRIED = 20_000_000  # parameters of a model that is tried as it is
POSITIONS = ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "context_length")
ON_ANY_DEVICE = (None, "sdpa", "eager")
DOCUMENTS = ((5, 9, 6), (12, 4, 4))  # tokens of each in two rows; one is longer than a small sliding window
EXACT, _ROUNDED = 1e-4, 5e-2  # of the outputs' size: differences of rounding in float32 and in bfloat16
_FIRST_WORD = 16  # below are EOS and its like


def small_model(
    config: Config, model_config: PretrainedConfig, anatomy: Anatomy, kernel: str | None = None
) -> PreTrainedModel:
    """The run's model with all its layers and small sizes, new weights, in float32 and ready to be evaluated.

    kernel: for attention, by default one that runs on any device. Raises whatever the model class makes of such sizes.
    """
    size = anatomy.num_layers * anatomy.layer_parameters + anatomy.head_parameters
    made = type(model_config).from_dict(_sized(model_config.to_dict(), shrink=size > LARGEST_TRIED))
    want_none(made)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        options: dict[str, Any] = {"trust_remote_code": config.model.trust_remote_code, "dtype": torch.float32}
        model = config.task.make(made, **options)
        if kernel:
            model.set_attn_implementation(kernel)
        with torch.no_grad():  # so that nothing is a zero or an identity
            for parameter in model.parameters():
                parameter.add_(0.05 * torch.randn_like(parameter))
    return model.eval()


def trial_rows(config: Config, model: PreTrainedModel, length: int) -> Parts:
    """Two rows for a small model: of so many tokens, or images."""
    task: Task = config.task
    if shape := task.row_shape(model.config):
        return {task.main_input: torch.randn(2, *shape, generator=torch.Generator().manual_seed(0))}
    return {task.main_input: torch.arange(8, 8 + 2 * length).reshape(2, -1)}


def _sized(values: dict[str, Any], shrink: bool) -> dict[str, Any]:
    """A config's values with positions enough for a trial and, to shrink it, sizes no larger than small ones.

    The number of layers stays: there are lists of that length.
    """
    found = {}
    for name, value in values.items():
        if isinstance(value, dict):
            inner = _sized(value, shrink)
            # factors of rotary angles are lists, as long as the old heads were wide
            has_lists = shrink and "rope_type" in inner and any(isinstance(v, list) for v in inner.values())
            found[name] = {"rope_type": "default", "rope_theta": inner.get("rope_theta", 1e4)} if has_lists else inner
        elif name in POSITIONS and type(value) is int:
            found[name] = max(value, SIZES[name])
        elif shrink and type(value) is int and "layer" not in name:
            found[name] = min(value, SIZES.get(name, value))
        else:
            found[name] = value
    heads, keys = "num_attention_heads", "num_key_value_heads"
    if heads in found and values.get(keys) == values[heads]:
        found[keys] = found[heads]
    return found


def document_problems(config: Config, model_config: PretrainedConfig, anatomy: Anatomy) -> list[str]:
    """Whether packed documents can be kept apart: each must come out as it does in a row of its own."""
    kind, kernel = model_config.model_type, attention_kernel(config.model, model_config)
    try:
        model = small_model(config, model_config, anatomy, kernel)
        difference = _between_documents(model, getattr(model, anatomy.base), kernel)
    except Exception as error:  # whatever a model class makes of masks that it does not know
        line = f"document_mask: model type {kind!r} does not take masks of documents ({named(error)})"
        return [f"{line}; leave document_mask out"]
    limit = EXACT if kernel in ON_ANY_DEVICE else _ROUNDED
    if difference <= limit:
        return []
    kernel = attention_kernel_of(model.config)
    return [
        f"document_mask: with model type {kind!r} and attn_implementation={kernel} a document is read together with "
        f"the one before it (its outputs move by {difference:.1%}); leave document_mask out, or use another model or "
        "kernel"
    ]


def named(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"


@torch.no_grad()
def _between_documents(model: PreTrainedModel, base: PreTrainedModel, kernel: str | None) -> float:
    """How far the outputs of packed documents are from those of the same ones alone, relative to their size."""
    if kernel not in ON_ANY_DEVICE:
        model.to(device=local_device(0), dtype=torch.bfloat16)  # pyright: ignore[reportCallIssue]
    mask = DocumentMask(end=2)
    generator = torch.Generator().manual_seed(0)
    highest = text_config(model.config).vocab_size
    ids = torch.randint(_FIRST_WORD, highest, (len(DOCUMENTS), sum(DOCUMENTS[0])), generator=generator)
    for row, lengths in zip(ids, DOCUMENTS, strict=True):
        for document in row.split(list(lengths)):
            document[-1] = mask.end
    ids = ids.to(base.device)
    packed = base(input_ids=ids, use_cache=False, **mask.inputs(base, ids, {}))[0].float()
    rows = []
    for row, lengths in zip(ids, DOCUMENTS, strict=True):
        outputs = [base(input_ids=document[None], use_cache=False)[0][0] for document in row.split(list(lengths))]
        rows.append(torch.cat(outputs).float())
    alone = torch.stack(rows)
    return float((packed - alone).norm() / alone.norm())


def router_problems(config: Config, model_config: PretrainedConfig, anatomy: Anatomy) -> list[str]:
    """Whether the router loss of some layers is to be had: that of all must be what the class adds to its loss."""
    given, kind = "output_router_logits=true", model_config.model_type
    try:
        model = small_model(config, model_config, anatomy, attention_kernel(config.model, model_config))
        part = Slice(model, anatomy, Span(0, anatomy.num_layers), True, Border())
        ids = torch.arange(2 * _FIRST_WORD).reshape(2, -1)
        output: Any = model(input_ids=ids, labels=ids, use_cache=False, **Routers.asked)
        plain = model(input_ids=ids, labels=ids, use_cache=False, output_router_logits=False).loss
        ours = float(router_loss(part, output.router_logits).detach())
    except Exception as error:
        return [f"{given}: model type {kind!r} has no router loss ({named(error)}); set it to false"]
    if not ours > 0 or not math.isclose(float((output.loss - plain).detach()), ours, rel_tol=1e-3, abs_tol=1e-6):
        return [f"{given}: model type {kind!r} adds no router loss to its own; set it to false"]
    return [f"{given}{problem}" for problem in config.method.router_problems(config.local)]
