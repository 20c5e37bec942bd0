"""What is wrong with the flags of the heads: by themselves, and once it is known how the model is cut."""

from __future__ import annotations

from llm_local.config import Config
from llm_local.head_plan import parse_weights
from llm_local.model.heads.head import Head
from llm_local.partition import Partition
from llm_local.registry import HEADS


def head_problems(config: Config) -> list[str]:
    """What the flags of the heads show without the model."""
    local = config.local
    text = local.head_layers_schedule
    if text is not None and not is_schedule(text):
        problems = [f"head_layers_schedule={text!r} is not a list of whole numbers such as 2,1,1"]
    else:
        problems = (HEADS.get(local.head) or Head()).problems(config)
        if text is not None and local.head_layers > 0:
            given = f"head_layers={local.head_layers} and head_layers_schedule={text!r}"
            problems.append(f"both {given} are given; keep one")
    return problems + (_weight_problems(config) if config.method.has_local_losses else [])


def is_schedule(text: str) -> bool:
    """Whether the text is a list of whole numbers such as 2,1,1."""
    return all(part.strip().isdecimal() for part in text.split(","))


def _weight_problems(config: Config) -> list[str]:
    text = config.local.block_loss_weights
    if text is None:
        return []
    weights = parse_weights(text)
    if weights is None:
        return [f"block_loss_weights={text!r} is not a list of numbers such as 0.5,1"]
    if min(weights) < 0:
        return [f"block_loss_weights={text!r} has the negative weight {min(weights):g}; use 0 or more"]
    if not any(weights):
        return [f"block_loss_weights={text!r} trains nothing; give at least one weight above 0"]
    return []


def head_warnings(config: Config) -> tuple[str, ...]:
    """What a person may not expect of the heads' flags."""
    if not config.local.head_features:
        return ()
    return ("head_features: heads read more than the layers below, so that no exit is exported but the whole model",)


def cut_problems(config: Config, partition: Partition) -> list[str]:
    """Where lists by block do not fit the blocks, or a head would have more private layers than the model has left."""
    if not config.method.has_local_losses:
        return []
    local, blocks = config.local, partition.blocks
    problems = []
    for name in ("head_layers_schedule", "block_loss_weights"):
        text = getattr(local, name)
        count = 0 if text is None else len(text.split(","))
        if count > len(blocks):
            named = f"{len(blocks)} block" + ("s" if len(blocks) > 1 else "")
            problems.append(f"{name}={text!r} has {count} numbers, the model has {named}; leave out the last ones")
    room = [partition.num_layers - block.stop for block in blocks]
    text = local.head_layers_schedule
    if text is None and local.head_layers > room[0]:
        problems.append(
            f"head_layers={local.head_layers} is more than the {room[0]} layers above the first block; "
            + (f"use at most {room[0]}" if room[0] else "use head=linear, or cut the model into more blocks")
        )
    if text is None or not is_schedule(text):
        return problems
    for index, (wanted, left) in enumerate(zip(config.head_layers_schedule, room, strict=False)):
        if wanted > left:
            problems.append(
                f"head_layers_schedule={text!r} gives block {index} {wanted} private layers, the model has {left} "
                f"above it; use at most {left} there"
            )
    return problems
