"""How a run's model is cut into stages and blocks, and the numbers that costs.py counts its FLOPs of."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from llm_local.config import Config
from llm_local.costs import Setting, Shape, low_rank_parameters, setting_of
from llm_local.model.anatomy import Anatomy
from llm_local.model.heads.head import head_of
from llm_local.partition import Costs, Heads, Partition, cut_by_hand, make_partition
from llm_local.problems import parse_stage_layers


def plan_partition(
    config: Config, anatomy: Anatomy, costs: Costs | None = None, stage_speeds: tuple[float, ...] = ()
) -> Partition:
    """The cut that the flags ask for; costs: by default counted. stage_speeds: as Costs has them. Raises ValueError
    where it leaves a stage without a layer."""
    local = config.local
    model = (anatomy.num_layers, local.num_stages)
    blocks = (config.method.block_layers(local), config.method.window_stride(local))
    if local.stage_layers and (by_hand := parse_stage_layers(local.stage_layers)):
        return cut_by_hand(*model, by_hand, *blocks)
    heads = Heads(
        are_local=not config.has_one_head,
        layers=config.head_layers_schedule,
        share_matrix=head_of(config).shares_matrix,
        token_fraction=local.head_token_fraction,
    )
    costs = replace(costs or run_shape(config, anatomy).costs(), stage_speeds=stage_speeds)
    return make_partition(*model, costs, *blocks, heads)


def run_shape(config: Config, anatomy: Anatomy) -> Shape:
    """The head counts as much as of it is run: it may read some positions only. Of a row of fixed shape all products
    are known, those of attention, too."""
    if anatomy.row_shape:
        first, layer, head = (round(products / anatomy.num_tokens) for products in anatomy.products)
        return Shape(0, config.data.seq_length, layer, head, first)
    head = round(anatomy.head_parameters * config.task.scored_share(config.data))
    return Shape(anatomy.hidden_size, config.data.seq_length, anatomy.active_layer_parameters, head)


def run_setting(config: Config, partition: Partition, layer_matrices: Sequence[tuple[int, int]]) -> Setting:
    """layer_matrices: as an Anatomy has them."""
    local = config.local
    if not config.method.has_local_losses:
        return Setting(partition.blocks, token_fraction=0.0, adapted=local.lora_rank is not None)
    return setting_of(
        partition,
        config.head_layers_schedule,
        private_parameters=None if local.head_rank is None else low_rank_parameters(layer_matrices, local.head_rank),
        frozen_heads=head_of(config).shares_matrix,
        token_fraction=local.head_token_fraction,
        final_backprop_share=local.final_backprop_steps / config.train.max_steps,
        frozen=tuple(n for n in range(len(partition.blocks)) if partition.stage_of(n) in config.frozen_stages),
        adapted=local.lora_rank is not None,
    )
