"""What a stage holds, part by part, as pure functions of sizes.

- activations: a layer's as they are counted (activations.py), else by Korthikanti et al. 2022 (arXiv 2205.05198).
- logits: of the positions whose loss is computed at a time, and what the loss makes of the output matrix's gradient.
- packets: hidden states that have been sent and not received, or received ahead of their use.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

from llm_local.config import Config
from llm_local.in_flight import packets_asked_for, packets_pending
from llm_local.links.wire import expected
from llm_local.memory.activations import Activations
from llm_local.memory.engine import BYTES
from llm_local.memory.sizes import NORM, ModelSizes
from llm_local.methods.method import local_schedules
from llm_local.model.heads.head import head_of
from llm_local.model.loss import rows_at_a_time
from llm_local.partition import Partition

TOKEN_IDS = 4  # int32, beside each position's hidden states


@dataclass(frozen=True)
class Parameters:
    """Of one stage: those that each of its engines trains, and those that it only reads (the shared head's matrix)."""

    engines: tuple[int, ...]
    read: int = 0

    @property
    def trained(self) -> int:
        return sum(self.engines)


def layer_activations(sizes: ModelSizes, seq_length: int, precision: str, keeps_scores: bool = False) -> float:
    """Bytes of one layer for one token, if nothing is recomputed.

    Korthikanti et al.: 34·h for a feed-forward width of 4·h, 16·h of it between the two matrices, where a gated layer
    keeps four tensors of its width. Of the other 18·h masks of dropout are 2·h, and the norms of transformers' classes,
    in float32, keep 8·h more: 24·h is what a Llama keeps. Activation functions written out in Python (GPT-2's), and
    norms of queries and keys, keep more. keeps_scores: 5·a·T more, where attention is not a fused kernel. Ranks that
    divide a layer each have its inputs and norms whole, 16·h.
    """
    between = (8 if sizes.is_gated else 4) * sizes.feed_forward_width
    scores = 5 * sizes.num_attention_heads * seq_length if keeps_scores else 0
    around = (16 + 8 / sizes.division.layers) * sizes.hidden_size
    return (around + between + scores) * BYTES[precision] / 2


def block_activations(sizes: ModelSizes, num_layers: float, config: Config) -> tuple[float, float, float]:
    """Bytes that a micro-batch keeps of so many layers, with checkpointing of their inputs alone; those of the head's
    norm and of what stands before the layers, which go first; and those that one layer's backward pass takes beside
    what is kept, with checkpointing all that the layer makes again."""
    rows, length = config.train.per_device_train_batch_size, config.data.seq_length
    counted = sizes.activations
    if counted is None:
        kept = length * layer_activations(sizes, length, config.precision, sizes.keeps_scores)
        counted = Activations(kept, kept / 2, 0.0)
    # embeddings, angles and masks are made for the body and again for its head, whose norm keeps its input and output
    around = 2 * counted.around + NORM * sizes.hidden_size * length
    kept, working = counted.kept * num_layers, counted.working * min(1, num_layers)
    if config.train.gradient_checkpointing:
        one = BYTES[config.precision] * sizes.hidden_size * length
        kept, working = one * num_layers, (counted.kept - one + counted.working) * min(1, num_layers)
    return rows * kept, rows * around, rows * working


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


def loss_memory(sizes: ModelSizes, config: Config, is_trained: bool, gpu_bytes: float) -> tuple[float, float]:
    """Bytes of the loss of an output matrix, as torch's linear_cross_entropy takes them in its backward pass, and of
    the matrix's gradient, which stays behind. gpu_bytes: of the device; 0 on a CPU.

    Logits are float32. A scratch holds the gradient of the rows at hand, in float32, but for float32 on a CPU. There
    bf16's matrix is copied to float32 as well, and adding the scratch to the gradient takes two copies more.
    """
    each, local = BYTES[config.precision], config.local
    scored = config.train.per_device_train_batch_size * config.data.seq_length * config.task.scored_share(config.data)
    seen = scored * local.head_token_fraction
    rows = min(rows_at_a_time(sizes.vocab_size, gpu_bytes), seen)
    logits, matrix = 4.0 * rows * sizes.vocab_size, each * sizes.head_parameters
    if sizes.division.layers > 1:
        return _loss_of_parts(logits, each * seen * sizes.hidden_size, matrix, seen > rows), float(matrix)
    copied = 0 if gpu_bytes or each == 4 else 4
    scratch = copied + is_trained * (4 if gpu_bytes else 3 * copied)
    logits += (each + copied) * scored * sizes.hidden_size
    return logits + scratch * sizes.head_parameters, float(matrix * is_trained)


def _loss_of_parts(logits: float, states: float, matrix: float, goes_on: bool) -> float:
    """The same of a rank's part of the vocabulary, beside the matrix's gradient, as model/loss.py has it: four times
    the logits while the softmax goes back, or twice, when the gradients of matrix and states are made; beside that of
    the matrix by the rows before, if it goes on, and what the ranks have summed of the states'."""
    return max(4 * logits, 2 * logits + matrix + states) + matrix * goes_on + states - matrix


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
    shares, last = head_of(config).shares_matrix, len(partition.blocks) - 1
    engines, copies = [], 0
    for block in range(blocks.start, blocks.stop):
        layers, number = len(partition.blocks[block]), len(partition.private_layers(block, schedule))
        trained = layers * sizes.layer_parameters + number * private
        if shares and block != last:
            copies = sizes.head_parameters
        else:
            trained += sizes.head_parameters
        if block == 0 and not (sizes.is_tied and (last == 0 or not shares)):
            trained += sizes.embedding_parameters
        engines.append(trained)
    return Parameters(tuple(engines), copies)


def pipeline_parameters(sizes: ModelSizes, num_layers: int, is_first: bool, is_last: bool) -> Parameters:
    """What a stage of backpropagation holds; the last one has the model's head, and of a tied one a second copy."""
    trained = num_layers * sizes.layer_parameters + sizes.head_parameters * is_last
    trained += sizes.embedding_parameters * (is_first and not (is_last and sizes.is_tied))
    return Parameters((trained,))
