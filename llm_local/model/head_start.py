"""What heads begin with that are not drawn by themselves.

In a new model whose output matrix is its embedding, that of each block equals it at first, though it is trained apart:
otherwise the last stage of a small ModernBERT is behind the first (docs/LOG.md).

A pretrained model has a norm and an output matrix for its last block only. Copies of these in an early block read
hidden states that they were not made for: they are sure of the wrong tokens, and their loss is far above that of a
guess, 20 nats where a uniform guess has 10.8. With logits a quarter as large it is 8 at every depth.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from transformers import PretrainedConfig

from llm_local.model.slices import Slice, new_slice
from llm_local.partition import Span
from llm_local.tasks.task import Parts

SHARE = 0.25  # measured on SmolLM2-135M, docs/LOG.md; a power of two, so that nothing is rounded

# what makes a norm's output smaller: its weights times the share, or those of a class that adds 1 to them (Gemma)
CHANGES: tuple[Callable[[torch.Tensor], torch.Tensor], ...] = (lambda p: SHARE * p, lambda p: SHARE * (1 + p) - 1)


@torch.no_grad()
def begin_as_embedding(head: Slice, body: Slice, config: PretrainedConfig, seed: int, trusted: bool) -> None:
    """Copies the new embedding, drawn again where the body has none, into the head's output matrix."""
    if not body.is_first:
        body = new_slice(config, body.anatomy, Span(0, 0), seed, has_head=False, trust_remote_code=trusted)
    head.output_matrix.weight.copy_(body.embedding.weight)


@torch.no_grad()
def shrink_logits(head: Slice) -> bool:
    """Makes the logits of a copied head smaller, in its norm and in place; False if no change of weights does so."""
    generator = torch.Generator().manual_seed(0)
    tokens = head.anatomy.num_tokens or 8
    hidden = torch.randn(1, tokens, head.anatomy.hidden_size, generator=generator)
    inputs = {head.task.main_input: torch.zeros(1, tokens, dtype=torch.int64)}
    was_training = head.model.training
    head.model.eval()
    wanted = SHARE * head(hidden, **inputs)[1]
    found = any(_try(head, name, change, hidden, inputs, wanted) for name in head.anatomy.after for change in CHANGES)
    head.model.train(was_training)
    return found


def _try(
    head: Slice,
    name: str,
    change: Callable[[torch.Tensor], torch.Tensor],
    hidden: torch.Tensor,
    inputs: Parts,
    wanted: torch.Tensor,
) -> bool:
    """Changes one module's parameters if the head's output is then what is wanted."""
    parameters = list(head.model.get_submodule(name).parameters(recurse=False))
    if head.model.get_submodule(name) is head.output_matrix or not parameters:
        return False
    originals = [parameter.clone() for parameter in parameters]
    for parameter in parameters:
        parameter.copy_(change(parameter))
    if torch.allclose(head(hidden, **inputs)[1], wanted, rtol=1e-4, atol=1e-5):
        return True
    for parameter, original in zip(parameters, originals, strict=True):
        parameter.copy_(original)
    return False
