"""What a run costs, from its flags, its cut and the model's anatomy: the numbers that costs.py counts FLOPs of."""

from __future__ import annotations

from collections.abc import Sequence

from llm_local.config import Config
from llm_local.costs import Setting, Shape, low_rank_parameters, setting_of
from llm_local.model.anatomy import Anatomy
from llm_local.model.heads.head import head_of
from llm_local.partition import Partition


def run_shape(config: Config, anatomy: Anatomy) -> Shape:
    """The head counts as much as of it is run: it may read some positions only."""
    head = round(anatomy.head_parameters * config.task.scored_share(config.data))
    return Shape(anatomy.hidden_size, config.data.seq_length, anatomy.active_layer_parameters, head)


def run_setting(config: Config, partition: Partition, layer_matrices: Sequence[tuple[int, int]]) -> Setting:
    """layer_matrices: as an Anatomy has them."""
    local = config.local
    if not config.method.has_local_losses:
        return Setting(partition.blocks, token_fraction=0.0)
    return setting_of(
        partition,
        config.head_layers_schedule,
        private_parameters=None if local.head_rank is None else low_rank_parameters(layer_matrices, local.head_rank),
        frozen_heads=head_of(config).shares_matrix,
        token_fraction=local.head_token_fraction,
        final_backprop_share=local.final_backprop_steps / config.train.max_steps,
    )
