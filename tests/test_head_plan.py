"""What a head sees and weighs in training, and lists by block that do not fit the blocks."""

from __future__ import annotations

import pytest

from llm_local.config import from_flat
from llm_local.head_plan import HeadPlan, loss_weights, parse_weights, window_length
from llm_local.head_problems import cut_problems
from llm_local.partition import Costs, make_partition
from llm_local.replicas import Dealing


def plan(**changes: int | float) -> HeadPlan:
    return HeadPlan(**({"weights": (1.0, 1.0), "first_block": 0, "num_blocks": 4, "fraction": 0.25} | changes))  # pyright: ignore[reportArgumentType]


def cut(num_layers: int, layers_per_block: int | None, num_stages: int = 1, **changes: object) -> list[str]:
    partition = make_partition(num_layers, num_stages, Costs(1.0, 1.0), layers_per_block)
    return cut_problems(from_flat({"head": "decoder", **changes}), partition)


class TestListsByBlock:
    @pytest.mark.parametrize(
        "changes",
        [
            {"head_layers": 6},
            {"head_layers_schedule": "6,4,2,0"},
            {"head_layers_schedule": "6"},
            {"head_layers_schedule": "1,4"},
            {"head": "linear", "block_loss_weights": "1,2,3,4"},
            {"head_layers": 9, "method": "backprop", "block_loss_weights": "1,2,3,4,5"},
        ],
    )
    def test_that_fit(self, changes):
        assert cut(8, 2, **changes) == []

    def test_longer_than_the_blocks(self):
        assert cut(4, 2, head_layers_schedule="2,0,1") == [
            "head_layers_schedule='2,0,1' has 3 numbers, the model has 2 blocks; leave out the last ones"
        ]
        assert cut(4, None, head="linear", block_loss_weights="2,1") == [
            "block_loss_weights='2,1' has 2 numbers, the model has 1 block; leave out the last ones"
        ]

    def test_more_private_layers_than_the_model_has_left(self):
        assert cut(8, 2, head_layers=7) == [
            "head_layers=7 is more than the 6 layers above the first block; use at most 6"
        ]
        assert cut(8, None, head_layers=1) == [
            "head_layers=1 is more than the 0 layers above the first block; use head=linear, or cut the model into "
            "more blocks"
        ]
        assert cut(8, 2, head_layers_schedule="7,1,3,0") == [
            "head_layers_schedule='7,1,3,0' gives block 0 7 private layers, the model has 6 above it; use at most 6 "
            "there",
            "head_layers_schedule='7,1,3,0' gives block 2 3 private layers, the model has 2 above it; use at most 2 "
            "there",
        ]

    def test_what_is_no_list_has_been_said_before(self):
        assert cut(8, 2, head_layers_schedule="9,x") == []


class TestWeights:
    @pytest.mark.parametrize(
        ("text", "weights"), [("1", (1.0,)), ("0.5, 1e-1", (0.5, 0.1)), ("", None), ("1,", None), ("inf", None)]
    )
    def test_are_read(self, text, weights):
        assert parse_weights(text) == weights

    def test_the_last_holds_for_the_rest(self):
        assert loss_weights(from_flat({}), 3) == (1.0, 1.0, 1.0)
        assert loss_weights(from_flat({"block_loss_weights": "2,0.5"}), 3) == (2.0, 0.5, 0.5)

    def test_of_a_stages_own_blocks(self):
        partition = make_partition(6, 3, Costs(1.0, 1.0), 1)
        config = from_flat({"block_loss_weights": "1,2,3,4", "head_token_fraction": 0.5, "seed": 7})
        plans = [HeadPlan.of(config, partition, stage, Dealing(1, 2, 2)) for stage in range(3)]
        assert [p.weights for p in plans] == [(1.0, 2.0), (3.0, 4.0), (4.0, 4.0)]
        assert [p.first_block for p in plans] == [0, 2, 4]
        assert {(p.num_blocks, p.fraction, p.seed, p.dealing) for p in plans} == {(6, 0.5, 7, Dealing(1, 2, 2))}


class TestWindows:
    @pytest.mark.parametrize(
        ("fraction", "positions", "length"),
        [(0.25, 32, 8), (0.3, 10, 3), (0.31, 10, 4), (0.01, 32, 2), (0.999, 32, 32), (0.5, 2, 2), (0.1, 70, 7)],
    )
    def test_have_the_share_rounded_up_and_two_at_least(self, fraction, positions, length):
        assert window_length(fraction, positions) == length

    def test_lie_in_the_row_anywhere(self):
        found = [plan().window(step, 0, 0, 4, 32) for step in range(200)]
        starts = [w.start for windows in found for w in windows or []]
        assert {len(w) for windows in found for w in windows or []} == {8}
        assert set(starts) == set(range(25)), "all 800 starts, from the row's first to its last eight positions"
        assert max(starts.count(start) for start in set(starts)) < 60

    def test_depend_on_seed_step_block_and_row_alone(self):
        given = plan().window(3, 1, 1, 4, 32)
        assert plan(weights=(), first_block=1).window(3, 1, 0, 4, 32) == given, "the same block on another stage"
        for other in (
            plan(seed=1).window(3, 1, 1, 4, 32),
            plan().window(4, 1, 1, 4, 32),
            plan().window(3, 0, 1, 4, 32),
            plan().window(3, 1, 0, 4, 32),
        ):
            assert other != given

    def test_are_those_of_the_global_batchs_rows(self):
        """Eight rows of a step on one replica, on two, and in two micro-batches on two: row r has the same window."""
        one = plan().window(1, 0, 0, 8, 32)
        two = [plan(dealing=Dealing(r, 2, 2)).window(1, 0, 0, 4, 32) or [] for r in range(2)]
        more = [[plan(dealing=Dealing(r, 2, 2)).window(1, i, 0, 2, 32) or [] for i in range(2)] for r in range(2)]
        assert [two[row % 2][row // 2] for row in range(8)] == one
        assert [[*a, *b] for a, b in more] == two

    def test_none_for_the_models_last_head_or_all_positions(self):
        assert plan(first_block=2).window(1, 0, 1, 4, 32) is None
        assert plan(fraction=1.0).window(1, 0, 0, 4, 32) is None
