"""The blocks of a stage, put together from a configuration."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from transformers import PretrainedConfig
from transformers.modeling_layers import GradientCheckpointingLayer

from llm_local.config import Config
from llm_local.model.anatomy import Anatomy, attention_kernel
from llm_local.model.block import Block, Trunk
from llm_local.model.document_mask import DocumentMask
from llm_local.model.gguf_cache import weights_path
from llm_local.model.head_start import begin_as_embedding, shrink_logits
from llm_local.model.heads.head import Head, head_of
from llm_local.model.lora import add_adapters
from llm_local.model.loss import fit_head
from llm_local.model.lowrank import make_low_rank
from llm_local.model.pretrained import load_slice
from llm_local.model.router_loss import want_none, wants_router_loss
from llm_local.model.sequence_parallel import exchange_heads
from llm_local.model.slices import HeadDraw, Slice, check_set, new_slice
from llm_local.model.tensor_parallel import divide
from llm_local.partition import Partition, Span
from llm_local.world import ReplicaRanks, TensorRanks


@dataclass(frozen=True)
class Blueprint:
    """What the blocks of a run are built by. documents: how packed documents are kept apart, if they are."""

    config: Config
    model_config: PretrainedConfig
    anatomy: Anatomy
    partition: Partition
    documents: DocumentMask | None = None


def build_slice(
    config: Config,
    model_config: PretrainedConfig,
    anatomy: Anatomy,
    span: Span,
    has_head: bool,
    drawn: HeadDraw | None = None,
) -> Slice:
    """New or pretrained weights for some layers, and of no others; drawn: as in new_slice.

    Raises ConfigError or SliceError where the weights cannot be had or the head cannot be run by itself.
    """
    model_args: dict[str, Any] = {"trust_remote_code": config.model.trust_remote_code}
    if config.model.model_name_or_path:
        part = load_slice(weights_path(config), model_config, anatomy, span, has_head, **model_args)
        if anatomy.fresh and has_head:
            seed, end = config.train.seed, Span(span.stop, span.stop)
            new = new_slice(model_config, anatomy, end, seed, drawn=drawn, **model_args).model
            for name in anatomy.fresh:
                part.model.get_parameter(name).data = new.get_parameter(name).data
    else:
        seed = config.train.seed
        part = new_slice(model_config, anatomy, span, seed, has_head, drawn, **model_args)
    want_none(part.model.config)  # a Block asks for router logits, and only in training
    if has_head:
        fit_head(part)
        if config.model.model_name_or_path and span.stop < anatomy.num_layers and not anatomy.fresh:
            shrink_logits(part)
    if kernel := attention_kernel(config.model, model_config):
        # only now: the head is looked at on the CPU, where not every kernel runs
        part.model.set_attn_implementation(kernel)
    if config.train.gradient_checkpointing:
        # reentrant checkpointing would drop the gradients of a stage whose input needs none
        part.model.gradient_checkpointing_enable({"use_reentrant": False})
        for name, module in part.model.named_modules():
            if isinstance(module, GradientCheckpointingLayer) and anatomy.layers.startswith(f"{name}."):
                module.gradient_checkpointing = False  # a level of the model, whose borders run once
    if config.train.torch_compile:
        for layer in anatomy.layers_in(part.model)[span.start : span.stop]:
            layer.compile()  # one by one, they are compiled once for all
    return part


def build_block(plan: Blueprint, index: int) -> Block:
    """Block `index` of the model."""
    config, anatomy, partition = plan.config, plan.anatomy, plan.partition
    model = (config, plan.model_config, anatomy)
    span = partition.blocks[index]
    private = partition.private_layers(index, config.head_layers_schedule)
    body = build_slice(*model, span, has_head=False)
    if not config.method.has_local_losses and index + 1 < len(partition.blocks):
        add_adapters(config, body)
        return Trunk(body, plan.documents)
    kind = head_of(config) if index + 1 < len(partition.blocks) else Head()
    head = build_slice(*model, private, has_head=True, drawn=HeadDraw(span.stop, kind.output_of(anatomy)))
    if partition.overlap and index + 1 < len(partition.blocks) and partition.overlap < len(span):
        body.add_seam(span.stop - partition.overlap)
    if config.local.head_rank is not None:
        make_low_rank(head, config.local.head_rank, config.train.seed, is_new=not config.model.model_name_or_path)
    if anatomy.tied and not config.model.model_name_or_path:
        begin_as_embedding(head, body, plan.model_config, config.train.seed, config.model.trust_remote_code)
    kind.connect(config, head, body)
    add_adapters(config, body)
    if config.local.lora_rank is not None and head.is_models_own:
        head.model.requires_grad_(False)
    mixes = config.local.head_features and 0 < index < len(partition.blocks) - 1
    block = Block(body, head, kind, mixes, plan.documents, wants_router_loss(plan.model_config))
    if partition.stage_of(index) in config.frozen_stages:
        block.requires_grad_(False)
    return block


def build_blocks(
    plan: Blueprint, stage: int, ranks: TensorRanks | None = None, sequence: ReplicaRanks | None = None
) -> list[Block]:
    """The blocks of one stage, in order. ranks, sequence: between which each block, or each row, is divided, if it is.
    Raises SliceError where the class leaves weights of a new model unset."""
    numbers, blocks = plan.partition.stages[stage], []
    for index in range(numbers.start, numbers.stop):  # one whole block at a time, where ranks divide them
        block = build_block(plan, index)
        parts = [block.body, block.head] if block.has_head else [block.body]
        if not plan.config.model.model_name_or_path:
            for part in parts:
                check_set(part)
        if ranks is not None:
            divide([part.model for part in parts], ranks)
        if sequence is not None:
            for part in parts:
                exchange_heads(part.model, sequence)
        blocks.append(block)
    return blocks
