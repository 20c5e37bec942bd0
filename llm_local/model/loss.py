"""From a block's normed output to its loss, with the model class's own output code and without whole logits.

Logits of a vocabulary are the largest tensor of a training step, so they exist for a chunk of positions at a time.
Where the head is a plain matrix product, `linear_cross_entropy`, which torch has from 2.13 on, computes loss and
gradient chunk by chunk; a head that does more (soft-capping, scaling) runs as its authors wrote it on one chunk at a
time and is recomputed in the backward pass. Which of the two is right is not guessed from the model's name but measured
on a few tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from llm_local.adapters.torch_internals import modules_of, twin_of
from llm_local.device import memory_bytes
from llm_local.model.anatomy import SliceError
from llm_local.model.observation import name_of
from llm_local.model.slices import Slice
from llm_local.model.tensor_parallel import OutputMatrix, gathered, part_of, shared, summed
from llm_local.tasks.task import IGNORED

_CHUNK_LOGITS = 1 << 22
_GPU_CHUNK_LOGITS = 1 << 27


def chunk_rows(vocab_size: int, device: torch.device) -> int:
    """Positions whose logits exist at a time."""
    return rows_at_a_time(vocab_size, 0 if device.type == "cpu" else memory_bytes(device))


def rows_at_a_time(vocab_size: int, gpu_bytes: float) -> int:
    """At least 16: about 4M logits, on a GPU, which small products do not fill, up to 128M in a 64th of its memory.
    gpu_bytes: that it has; 0 on a CPU."""
    logits = min(_GPU_CHUNK_LOGITS, int(gpu_bytes) // 64 // 8) if gpu_bytes else _CHUNK_LOGITS
    return max(16, logits // vocab_size)


class _Echo:
    """Takes the base model's place and returns hidden states, and router logits, that are there already."""

    def __init__(self, normed: torch.Tensor, base: nn.Module, router_logits: tuple[torch.Tensor, ...] | None):
        self.last_hidden_state = normed
        self.router_logits = router_logits
        self._base = base

    def __call__(self, *_args: Any, **_kwargs: Any) -> _Echo:
        return self

    def __getitem__(self, index: Any) -> Any:
        return (self.last_hidden_state,)[index]

    def __getattr__(self, name: str) -> Any:
        # a part of the base model (OPT's head calls model.decoder) echoes too, a number is itself (Falcon-H1 scales its
        # logits by one); caches, attentions and the like are none
        value = getattr(self._base, name, None)
        return self if isinstance(value, nn.Module) else value if isinstance(value, (int, float)) else None


def without_layers(
    part: Slice, normed: torch.Tensor, router_logits: tuple[torch.Tensor, ...] | None = None
) -> PreTrainedModel:
    """The slice's model with its layers run already: for a call of the class's forward, not of the model, as hooks of
    an engine around the model belong to the real one."""
    model, name = part.model, part.anatomy.base
    twin = twin_of(model)
    base = modules_of(twin).pop(name)
    assert base is not None
    twin.__dict__[name] = _Echo(normed, base, router_logits)
    return twin


def head_logits(part: Slice, normed: torch.Tensor, input_ids: torch.Tensor | None) -> torch.Tensor:
    """(B, T, D) normed hidden states → (B, T, V) logits, by the model class's own forward; (B, C) are these already."""
    if part.task.answers_once:
        return normed
    return type(part.model).forward(without_layers(part, normed), input_ids=input_ids, **part.task.options).logits


class LossLinear(OutputMatrix):
    """An output matrix that turns hidden states and targets into summed cross-entropy.

    The loss is computed inside the module's forward, so that ZeRO-3 gathers the matrix as for any other module. Where
    the matrix is cut, each rank has the logits of its part of the vocabulary, and no rank those of another.
    """

    @staticmethod
    def of(linear: nn.Linear) -> LossLinear:
        """The same parameters under the same names."""
        made = object.__new__(LossLinear)
        made.__dict__ = linear.__dict__
        return made

    def forward(self, input: torch.Tensor, targets: torch.Tensor | None = None) -> torch.Tensor:
        """(N, D), (N,) → the sum of the positions' losses, float32; without targets (N, D) → (N, V) logits."""
        if targets is None:
            return super().forward(input) if self.ranks is None else gathered(self._own_logits(input), self.ranks)
        input = input.to(self.weight.dtype)  # some models keep the residual stream in float32
        rows = chunk_rows(self.out_features, input.device)
        if self.ranks is not None:
            return _by_chunks(self._loss_of_parts, input, targets, rows)
        if not hasattr(F, "linear_cross_entropy"):  # torch before 2.13
            return _by_chunks(self._loss_of, input, targets, rows)
        # A chunked bf16 sum is wrong by percents (8.8 for 10.4); single losses are right and are summed in float32.
        # "auto" would add the chunks' gradients of the matrix up in bf16 on a GPU.
        policy = "auto" if input.device.type == "cpu" else "balanced"
        options = nn.LinearCrossEntropyOptions(batch_chunk_size=rows, chunking_method=None, acc_policy=policy)
        losses = F.linear_cross_entropy(
            input, self.weight, targets, linear_bias=self.bias, reduction="none", ignore_index=IGNORED, options=options
        )
        return losses.float().sum()

    def _loss_of(self, states: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return _summed(super().forward(states), targets)

    def _own_logits(self, states: torch.Tensor) -> torch.Tensor:
        assert self.ranks is not None
        return F.linear(shared(states, self.ranks), self.weight, self.bias)

    def _loss_of_parts(self, states: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """The same on all ranks: they tell each other a position's largest logit, its sum of exponentials, and the
        target's logit."""
        part, count = part_of(self.weight), self.out_features
        assert self.ranks is not None
        assert part is not None
        logits = self._own_logits(states).float()
        logits = logits - self.ranks.largest(logits.amax(-1)).unsqueeze(-1)
        own = targets - part.cut.start
        at = logits.gather(-1, own.clamp(0, count - 1).unsqueeze(-1)).squeeze(-1)
        at = at.masked_fill((own < 0) | (own >= count), 0.0)
        total, target = summed(torch.stack([logits.exp().sum(-1), at]), self.ranks)
        return (total.log() - target).masked_fill(targets == IGNORED, 0.0).sum()


def head_loss(
    part: Slice, normed: torch.Tensor, input_ids: torch.Tensor | None, labels: torch.Tensor | None
) -> torch.Tensor:
    """Mean cross-entropy of what the task scores of (B, T, D) hidden states, by ids and labels."""
    states, targets = part.task.scored(normed, input_ids, labels)
    count = (targets != IGNORED).sum().clamp(min=1)
    if part.task.answers_once:
        return _summed(states, targets) / count
    output = part.model.get_output_embeddings()
    if isinstance(output, LossLinear):
        return output(states, targets) / count
    rows = chunk_rows(text_vocab_size(part.model), states.device)
    return _by_chunks(partial(_loss_of_head, part), states, targets, rows) / count


def _loss_of_head(part: Slice, states: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return _summed(head_logits(part, states[None], targets[None].clamp(min=0))[0], targets)


def _summed(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(logits.float(), targets, ignore_index=IGNORED, reduction="sum")


def _by_chunks(
    loss_of: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    states: torch.Tensor,
    targets: torch.Tensor,
    rows: int,
) -> torch.Tensor:
    """The sum of the losses of so many rows at a time, whose logits are computed again in the backward pass."""
    total = torch.zeros((), dtype=torch.float32, device=states.device)
    for some, wanted in zip(states.split(rows), targets.split(rows), strict=True):
        total = total + checkpoint(loss_of, some, wanted, use_reentrant=False, preserve_rng_state=False)
    return total


def text_vocab_size(model: PreTrainedModel) -> int:
    return model.config.get_text_config(decoder=True).vocab_size


@torch.no_grad()
def fit_head(part: Slice) -> None:
    """Chooses how the slice's loss is computed, by comparing logits on a few tokens.

    Raises SliceError if the model's head cannot be run apart from its layers.
    """
    if part.task.answers_once:  # few logits, by the class's own forward pass
        return
    model = part.model
    was_training = model.training
    model.eval()
    ids = torch.arange(8).reshape(1, 8) % text_vocab_size(model)
    generator = torch.Generator().manual_seed(0)
    hidden = None if part.is_first else torch.randn(1, 8, part.anatomy.hidden_size, generator=generator)
    part.border.entering = hidden
    logits = model(input_ids=ids, **part.task.options).logits
    _, normed = part(hidden, input_ids=ids)
    if not torch.equal(head_logits(part, normed, ids), logits):
        kind = model.config.model_type
        raise SliceError(f"the head of model type {kind!r} reads more than the last hidden states")
    output: Any = model.get_output_embeddings()
    # of another width, more of the head runs before it
    chunked = type(output) is nn.Linear and output.in_features == normed.shape[-1]
    if chunked and torch.equal(F.linear(normed, output.weight, output.bias), logits):
        # by name: the class's own setter may tie more than the matrix
        model.set_submodule(name_of(model, output), LossLinear.of(output))
    model.train(was_training)
