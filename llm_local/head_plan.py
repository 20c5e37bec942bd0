"""What a block's loss weighs, and which positions its head sees in training: pure functions of the flags.

A window is drawn for each row of each step from a hash of where the row is, and not from a generator with a state:
so it is the same after a resume, on any number of stages, and however replicas and micro-batches share the rows.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass

from llm_local.config import Config
from llm_local.partition import Partition, held
from llm_local.replicas import ALONE, Dealing


def seed_of(text: str) -> int:
    """A seed for a generator that depends on the text alone."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:7], "big")


def parse_weights(text: str) -> tuple[float, ...] | None:
    """'0.5,1' → (0.5, 1.0); None if the text is no list of finite numbers."""
    try:
        weights = tuple(float(part) for part in text.split(","))
    except ValueError:
        return None
    return weights if all(map(math.isfinite, weights)) else None


def loss_weights(config: Config, num_blocks: int) -> tuple[float, ...]:
    """The weight of each block's loss."""
    text = config.local.block_loss_weights
    given = (1.0,) if text is None else parse_weights(text)
    assert given, "checked in head_problems.py"
    return tuple(held(given, block) for block in range(num_blocks))


def window_length(fraction: float, num_positions: int) -> int:
    """Positions of a window: the share of the row rounded up, and at least two, as one alone has nothing to predict."""
    return min(num_positions, max(2, math.ceil(fraction * num_positions - 1e-9)))


@dataclass(frozen=True)
class HeadPlan:
    """The heads of one rank's blocks in training, by their number in the stage.

    weights: of the blocks' losses. first_block: number of the stage's first block in the model, which has num_blocks.
    fraction: share of the positions that all heads but the model's last see. dealing: between this rank and stage 0.
    """

    weights: tuple[float, ...]
    first_block: int
    num_blocks: int
    fraction: float = 1.0
    seed: int = 0
    dealing: Dealing = ALONE

    @staticmethod
    def of(config: Config, partition: Partition, stage: int, dealing: Dealing) -> HeadPlan:
        blocks, count = partition.stages[stage], len(partition.blocks)
        weights = loss_weights(config, count)[blocks.start : blocks.stop]
        fraction = config.local.head_token_fraction
        return HeadPlan(weights, blocks.start, count, fraction, config.train.seed, dealing)

    def dropout_seed(self, step: int, index: int, block: int) -> int:
        """Of the stage's block in micro-batch `index`: the same wherever the block runs, and after a resume."""
        number = self.first_block + block
        replica, first_index = self.dealing.at(index)
        return seed_of(f"dropout:{self.seed}:{step}:{first_index}:{number}:{replica}")

    def window(self, step: int, index: int, block: int, num_rows: int, num_positions: int) -> list[range] | None:
        """Positions that the head of the stage's block sees of each row of micro-batch `index`; None: of all, all."""
        number = self.first_block + block
        if self.fraction >= 1 or number == self.num_blocks - 1:
            return None
        length = window_length(self.fraction, num_positions)
        windows = []
        replica, first_index = self.dealing.at(index)
        for row in range(first_index * num_rows, (first_index + 1) * num_rows):
            place = replica + row * self.dealing.theirs  # in the step's global batch, see feed.py
            digest = hashlib.sha256(f"window:{self.seed}:{step}:{number}:{place}".encode()).digest()
            start = int.from_bytes(digest[:8], "big") % (num_positions - length + 1)
            windows.append(range(start, start + length))
        return windows
