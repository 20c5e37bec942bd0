"""Training FLOPs of a setting for one token, as pure functions of the model's numbers.

    shape = Shape(hidden_size=768, seq_length=1024, layer_parameters=7_087_872, head_parameters=38_597_376)
    four = Setting(blocks=(Span(0, 3), Span(3, 6), Span(6, 9), Span(9, 12)))
    count_flops(shape, four).overhead    # 1.81: what three more heads cost

A matrix takes 2 FLOPs a parameter and token forward and twice that backward, half of it for the gradient of its
weights; attention takes 12·T·H a layer, both ways, as `partition.estimate_costs` has it. Left out, as they are small:
norms, softmax, rotary angles, adapters, the optimizer, and the one position of a sequence that has nothing to predict.
Attention is counted over whole rows of T positions, though a causal kernel may skip half of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from llm_local.partition import Costs, Partition, Span, estimate_costs

BACKWARD = 2 / 3  # of the FLOPs of a trained part
WEIGHT_GRADIENT = 1 / 3  # of the FLOPs of a trained matrix


@dataclass(frozen=True)
class Shape:
    """The numbers of a model. Parameters are those that take part in a product with each token; first_parameters: of
    what runs before the layers, if that is no table. hidden_size: 0 where attention is counted among them."""

    hidden_size: int
    seq_length: int
    layer_parameters: int
    head_parameters: int
    first_parameters: int = 0

    def costs(self) -> Costs:
        """Of each part, for one token."""
        parameters = (self.layer_parameters, self.head_parameters)
        return estimate_costs(*parameters, self.hidden_size, self.seq_length, self.first_parameters)


@dataclass(frozen=True)
class Setting:
    """How a model is trained.

    blocks: layers of each block; one block is backpropagation. overlap: layers of the block below that a block's loss
    trains as well. private_layers: of each block's head; () means none. private_parameters: of one of them, if it is
    not like the model's layers (low rank). frozen_heads: all heads but the last read a matrix that they do not train.
    token_fraction: share of the positions that all heads but the last see, private layers included.
    final_backprop_share: share of the tokens, from 0 to 1, on which the whole model learns from the last loss alone.
    frozen: numbers of the blocks that have forward passes alone. adapted: the matrices of layers, and of
    the model's own head, are not trained themselves, but adapters beside them.
    """

    blocks: tuple[Span, ...]
    overlap: int = 0
    private_layers: tuple[int, ...] = ()
    private_parameters: int | None = None
    frozen_heads: bool = False
    token_fraction: float = 1.0
    final_backprop_share: float = 0.0
    frozen: tuple[int, ...] = ()
    adapted: bool = False


@dataclass(frozen=True)
class Flops:
    """Training FLOPs for one token.

    total: of all blocks. blocks: of each block in a local step. sequential: of what an ideal parallel machine, with a
    group of ranks for every block, has to do one after the other: the costliest block in a local step, and the whole
    model under backpropagation. backprop: of the undivided model.
    """

    total: float
    blocks: tuple[float, ...]
    sequential: float
    backprop: float

    @property
    def overhead(self) -> float:
        """Total FLOPs relative to backpropagation through the undivided model; 1.0 is the same."""
        return self.total / self.backprop

    @property
    def sequential_share(self) -> float:
        """Sequential FLOPs relative to backpropagation through the undivided model."""
        return self.sequential / self.backprop


@dataclass(frozen=True)
class Passes:
    """FLOPs of a block's passes for one token.

    weights: the part of `backward` that computes gradients of matrices; the rest is the input's. from_above: of the
    pass through the top layers that the next block's loss sends back. layers: the part of `forward` that the block's
    layers take, private ones included, which gradient checkpointing computes twice.
    """

    forward: float
    backward: float
    weights: float
    from_above: float
    layers: float


def count_passes(shape: Shape, setting: Setting) -> tuple[Passes, ...]:
    """The FLOPs of each block in a local step, pass by pass; those of a block add up to its part of `count_flops`."""
    costs = shape.costs()
    found = []
    for index, span in enumerate(setting.blocks):
        is_last = index == len(setting.blocks) - 1
        fraction = 1.0 if is_last else setting.token_fraction
        private, matrix = _head_parts(shape, setting, index, fraction)
        number = setting.private_layers[index] if setting.private_layers else 0
        each = shape.layer_parameters if setting.private_parameters is None else setting.private_parameters
        # a matrix takes 2 FLOPs a parameter for the gradient of its weights; attention has no weights of its own
        first, of_a_layer = 0.0 if index else costs.first, 2.0 * shape.layer_parameters
        trains_matrix = not setting.adapted if is_last else not setting.frozen_heads
        of_body = len(span) * of_a_layer + WEIGHT_GRADIENT * first
        stays = of_body if setting.adapted else 0.0
        weights = 2.0 * fraction * number * each + WEIGHT_GRADIENT * matrix * trains_matrix + of_body - stays
        layers = costs.layer * len(span) + private + first
        again = 0 if is_last else min(setting.overlap, len(span))
        above = again * (BACKWARD * costs.layer - of_a_layer * setting.adapted)
        backward = BACKWARD * (layers + matrix) - stays - (0 if trains_matrix else WEIGHT_GRADIENT * matrix)
        if index in setting.frozen:
            backward = weights = 0.0
        found.append(Passes((1 - BACKWARD) * (layers + matrix), backward, weights, above, (1 - BACKWARD) * layers))
    return tuple(found)


def count_flops(shape: Shape, setting: Setting) -> Flops:
    """FLOPs of one token, means over the run where its last steps train globally."""
    costs = shape.costs()
    # the loss above sends a second gradient through the upper layers of a block
    blocks = [each.forward + each.backward + each.from_above for each in count_passes(shape, setting)]
    backprop = costs.first + costs.layer * setting.blocks[-1].stop + costs.head
    share = setting.final_backprop_share
    return Flops(
        total=(1 - share) * sum(blocks) + share * backprop,
        blocks=tuple(blocks),
        sequential=(1 - share) * max(blocks) + share * backprop,
        backprop=backprop,
    )


def _head_parts(shape: Shape, setting: Setting, index: int, fraction: float) -> tuple[float, float]:
    """Private layers, and the output matrix as if it were trained, of a head that sees this share of all tokens."""
    parameters = shape.layer_parameters if setting.private_parameters is None else setting.private_parameters
    # positions that are left attend to each other only, so attention falls with the square of their share
    seen = estimate_costs(parameters, shape.head_parameters, shape.hidden_size, round(fraction * shape.seq_length))
    private = seen.layer * (setting.private_layers[index] if setting.private_layers else 0)
    return fraction * private, fraction * seen.head


def flops_so_far(shape: Shape, setting: Setting, tokens: int, global_tokens: int) -> Flops:
    """FLOPs of the first `tokens` tokens of a run, the last global_tokens of which trained globally."""
    share = global_tokens / tokens if tokens else 0.0
    one = count_flops(shape, replace(setting, final_backprop_share=share))
    return Flops(
        total=one.total * tokens,
        blocks=tuple(block * tokens for block in one.blocks),
        sequential=one.sequential * tokens,
        backprop=one.backprop * tokens,
    )


def setting_of(partition: Partition, schedule: Sequence[int], **options: Any) -> Setting:
    """The setting of a cut whose heads have as many private layers as `schedule` says, fewer where the model ends."""
    private = tuple(len(partition.private_layers(index, schedule)) for index in range(len(partition.blocks)))
    return Setting(partition.blocks, partition.overlap, private, **options)


def low_rank_parameters(matrices: Sequence[tuple[int, int]], rank: int) -> int:
    """Parameters of matrices of so many rows and columns, each made of two of the given rank."""
    return sum(rank * (rows + columns) for rows, columns in matrices)


def head_in_layers(vocab_size: int, hidden_size: int) -> float:
    """FLOPs of an output matrix in those of a layer of 12·H² parameters, without attention: V / (12·H)."""
    return vocab_size / (12 * hidden_size)
