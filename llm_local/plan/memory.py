"""Bytes that a device of each stage needs, part by part, as pure functions of sizes.

- weights, gradients, optimizer: the ZeRO paper (Rajbhandari et al. 2020, arXiv 1910.02054): in mixed precision 2, 2 and
  12 bytes a parameter, the 12 being float32 weights and Adam's two moments; stages 1, 2 and 3 divide optimizer,
  gradients and weights among the replicas. ZeRO-3 gathers the weights of two layers at a time, or the output matrix.
- activations: a layer's by Korthikanti et al. 2022 (arXiv 2205.05198), as many micro-batches as the schedule keeps.
- logits: of the positions whose loss is computed at a time, and the output matrix's gradient, which comes with it.
- packets: hidden states that have been sent and not received, or received ahead of their use.

What a CUDA context, buckets and fragmentation take is not in it: some GB that a device should have beside. A GPU
computes more logits at a time, in a 64th of its memory at most.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from math import prod

import torch

from llm_local.config import Config
from llm_local.in_flight import packets_asked_for, packets_pending
from llm_local.links.wire import expected
from llm_local.methods.method import local_schedules
from llm_local.model.heads.head import head_of
from llm_local.model.loss import chunk_rows
from llm_local.partition import Partition

BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}
TOKEN_IDS = 4  # int32, beside each position's hidden states


@dataclass(frozen=True)
class ModelSizes:
    """The numbers of a model. Parameters are all that there are; active ones take part in a product with each token.

    feed_forward_width: hidden units that a token passes, of all its experts; is_gated: with a second matrix beside.
    layer_matrices: rows and columns of the matrices of a layer. keeps_scores: attention is not a fused kernel.
    """

    num_layers: int
    hidden_size: int
    vocab_size: int
    layer_parameters: int
    active_layer_parameters: int
    head_parameters: int
    embedding_parameters: int
    is_tied: bool
    feed_forward_width: int
    is_gated: bool
    num_attention_heads: int
    max_positions: int | None = None
    layer_matrices: tuple[tuple[int, int], ...] = ()
    model_type: str = ""
    keeps_scores: bool = False

    @property
    def num_parameters(self) -> int:
        once = self.embedding_parameters + (0 if self.is_tied else self.head_parameters)
        return self.num_layers * self.layer_parameters + once


@dataclass(frozen=True)
class Memory:
    """Bytes on one device."""

    weights: float
    gradients: float
    optimizer: float
    activations: float
    logits: float
    packets: float

    @property
    def total(self) -> float:
        states = self.weights + self.gradients + self.optimizer
        return states + self.activations + self.logits + self.packets

    def __str__(self) -> str:
        """'40.1 GB: weights 2.0, gradients 2.0, ...', greatest first; parts below 0.05 GB are left out."""
        parts = {field.name: getattr(self, field.name) / 1e9 for field in fields(self)}
        shown = [f"{name} {size:.1f}" for name, size in sorted(parts.items(), key=lambda p: -p[1]) if size >= 0.05]
        return f"{self.total / 1e9:.1f} GB" + (f" ({', '.join(shown)})" if shown else "")


@dataclass(frozen=True)
class Parameters:
    """Of one stage: those that it trains, those that it only reads (the shared head's matrix), and the most that one
    block's passes gather at a time under ZeRO-3."""

    trained: int
    read: int
    gathered: int


def state_memory(parameters: Parameters, precision: str, zero: int, num_replicas: int) -> tuple[float, float, float]:
    """Bytes of weights, gradients and optimizer states."""
    each, master = BYTES[precision], 0 if precision == "fp32" else 4
    trained, shard = parameters.trained, parameters.trained / num_replicas
    weights = each * (shard + parameters.gathered if zero == 3 else trained) + each * parameters.read
    gradients = each * (shard if zero >= 2 else trained)
    return weights, gradients, (8 + master) * (shard if zero >= 1 else trained)


def layer_activations(sizes: ModelSizes, seq_length: int, precision: str, keeps_scores: bool = False) -> float:
    """Bytes of one layer for one token, if nothing is recomputed.

    Korthikanti et al.: 34·h for a feed-forward width of 4·h, 16·h of it between the two matrices, where a gated layer
    keeps four tensors of its width. Of the other 18·h masks of dropout are 2·h, and the norms of transformers' classes,
    in float32, keep 8·h more: 24·h is what a Llama keeps. Activation functions written out in Python (GPT-2's), and
    norms of queries and keys, keep more. keeps_scores: 5·a·T more, where attention is not a fused kernel.
    """
    between = (8 if sizes.is_gated else 4) * sizes.feed_forward_width
    scores = 5 * sizes.num_attention_heads * seq_length if keeps_scores else 0
    return (24 * sizes.hidden_size + between + scores) * BYTES[precision] / 2


def block_activations(sizes: ModelSizes, num_layers: float, config: Config) -> float:
    """Bytes that a micro-batch keeps of so many layers; with checkpointing their inputs, and all of one layer."""
    tokens = config.train.per_device_train_batch_size * config.data.seq_length
    whole = layer_activations(sizes, config.data.seq_length, config.precision, sizes.keeps_scores)
    if config.train.gradient_checkpointing:
        return tokens * (num_layers * sizes.hidden_size * BYTES[config.precision] + min(1, num_layers) * whole)
    return tokens * num_layers * whole


def alive_passes(schedule: str, num_stages: int, stage: int, micro_batches: int, num_blocks: int = 1) -> int:
    """Most passes of a micro-batch through a block (interleaved: a chunk) that a stage has the activations of."""
    behind = num_stages - stage - 1
    if schedule == "gpipe":
        return micro_batches
    if schedule == "1f1b" or (schedule == "interleaved" and num_blocks == 1):
        return min(behind + 1, micro_batches)
    if schedule == "zero_bubble":
        return min(num_stages, micro_batches)
    if schedule == "interleaved":
        return min(2 * behind + (num_blocks - 1) * num_stages + 1, micro_batches * num_blocks)
    return local_schedules()[schedule].alive_passes(behind, micro_batches, num_blocks)


def head_memory(sizes: ModelSizes, precision: str, is_trained: bool) -> float:
    """Bytes of the loss of an output matrix: logits and their gradient in float32, and the matrix's own."""
    logits = 2 * 4 * chunk_rows(sizes.vocab_size, torch.device("cpu")) * sizes.vocab_size
    return logits + BYTES[precision] * sizes.head_parameters * is_trained


def wire_bytes(sizes: ModelSizes, wire_dtype: str) -> int:
    """Of one position's hidden states on a link."""
    parts = expected(wire_dtype, (1, 1, sizes.hidden_size))
    return sum(prod(shape) * dtype.itemsize for shape, dtype in parts)


def packet_memory(sizes: ModelSizes, config: Config, has_before: int, has_behind: int) -> float:
    """Bytes of the packets in flight of a local stage: sent ones, and those that are received ahead of their use;
    has_before, has_behind: of how many links, none or one where neighbours have as many replicas."""
    tokens = config.train.per_device_train_batch_size * config.data.seq_length
    each = tokens * (wire_bytes(sizes, config.wire_dtype) + TOKEN_IDS)
    bound = config.local.max_packets_in_flight
    return each * (has_behind * packets_pending(bound) + has_before * packets_asked_for(bound))


def stage_parameters(sizes: ModelSizes, partition: Partition, stage: int, config: Config, private: int) -> Parameters:
    """What a stage of local training holds; private: the parameters of one private layer of a head.

    Where embeddings are tied the first block's head reads the embedding itself, unless it reads the shared copy.
    """
    schedule, blocks = config.head_layers_schedule, partition.stages[stage]
    layers = len(partition.layers_of(stage))
    number = sum(len(partition.private_layers(block, schedule)) for block in range(blocks.start, blocks.stop))
    trained = layers * sizes.layer_parameters + number * private
    last = len(partition.blocks) - 1
    copies = 0
    for block in range(blocks.start, blocks.stop):
        if head_of(config).shares_matrix and block != last:
            copies = sizes.head_parameters
        else:
            trained += sizes.head_parameters
    if stage == 0:
        first_reads_it = sizes.is_tied and (last == 0 or not head_of(config).shares_matrix)
        trained += 0 if first_reads_it else sizes.embedding_parameters
    return Parameters(trained, copies, max(2 * sizes.layer_parameters, sizes.head_parameters))


def pipeline_parameters(sizes: ModelSizes, num_layers: int, is_first: bool, is_last: bool) -> Parameters:
    """What a stage of backpropagation holds; the last one has the model's head, and of a tied one a second copy."""
    trained = num_layers * sizes.layer_parameters + sizes.head_parameters * is_last
    trained += sizes.embedding_parameters * (is_first and not (is_last and sizes.is_tied))
    return Parameters(trained, 0, max(2 * sizes.layer_parameters, sizes.head_parameters))
