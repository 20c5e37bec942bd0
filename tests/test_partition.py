"""Layers, blocks and stages: every cut covers the model in order, and none is cheaper than the one chosen."""

from dataclasses import replace
from itertools import combinations, pairwise

import pytest
from transformers import AutoConfig

from llm_local.config import from_flat
from llm_local.cut import plan_partition
from llm_local.model.anatomy import probe
from llm_local.partition import Costs, Heads, Partition, Span, cut_by_hand, estimate_costs, held, make_partition

LAYER_ONLY = Costs(layer=1.0, head=0.0)


def sizes(partition: Partition) -> list[int]:
    return [len(partition.layers_of(stage)) for stage in range(partition.num_stages)]


def stage_costs(partition: Partition, costs: Costs, local_heads: bool) -> list[float]:
    """What each stage computes, by the definition: its layers, and a head a block or one at the model's end."""
    layers = [size * costs.layer for size in sizes(partition)]
    if local_heads:
        return [cost + costs.head * len(partition.blocks_of(k)) for k, cost in enumerate(layers)]
    return [*layers[:-1], layers[-1] + costs.head]


def every_cut(num_blocks: int, num_stages: int):
    for cuts in combinations(range(1, num_blocks), num_stages - 1):
        yield tuple(Span(a, b) for a, b in pairwise([0, *cuts, num_blocks]))


def every_partition(num_layers: int, num_stages: int, layers_per_block: int | None):
    unit = layers_per_block or 1
    blocks = tuple(Span(a, min(a + unit, num_layers)) for a in range(0, num_layers, unit))
    for stages in every_cut(len(blocks), num_stages):
        if layers_per_block is None:  # a stage is one block
            yield Partition(stages, tuple(Span(k, k + 1) for k in range(num_stages)))
        else:
            yield Partition(blocks, stages)


@pytest.mark.parametrize("local_heads", [True, False])
@pytest.mark.parametrize("layers_per_block", [None, 1, 2, 3, 20])
@pytest.mark.parametrize("num_layers", [1, 2, 3, 5, 8, 13])
def test_blocks_and_stages_cover_the_model_in_order(num_layers, layers_per_block, local_heads):
    num_blocks = -(-num_layers // (layers_per_block or 1))
    for num_stages in range(1, num_blocks + 1):
        partition = make_partition(num_layers, num_stages, Costs(1, 2.5), layers_per_block, heads=Heads(local_heads))
        assert partition.num_layers == num_layers
        assert partition.num_stages == num_stages
        assert [i for block in partition.blocks for i in range(block.start, block.stop)] == list(range(num_layers))
        blocks = [block for stage in range(num_stages) for block in partition.blocks_of(stage)]
        assert blocks == list(partition.blocks)
        assert min(sizes(partition)) > 0
        for stage in range(num_stages):
            layers, first, last = partition.layers_of(stage), blocks[0], partition.blocks_of(stage)[-1]
            assert (layers.start, layers.stop) == (first.start, last.stop)
            blocks = blocks[len(partition.blocks_of(stage)) :]


@pytest.mark.parametrize("local_heads", [True, False])
@pytest.mark.parametrize("layers_per_block", [None, 1, 2, 3])
@pytest.mark.parametrize("head", [0, 1, 4, 9])
def test_no_cut_has_a_cheaper_costliest_stage(head, layers_per_block, local_heads):
    costs = Costs(layer=2, head=head)
    for num_layers in range(1, 9):
        for num_stages in range(1, -(-num_layers // (layers_per_block or 1)) + 1):
            chosen = make_partition(num_layers, num_stages, costs, layers_per_block, heads=Heads(local_heads))
            best = min(
                max(stage_costs(partition, costs, local_heads))
                for partition in every_partition(num_layers, num_stages, layers_per_block)
            )
            assert max(stage_costs(chosen, costs, local_heads)) == best


@pytest.mark.parametrize(("num_layers", "num_stages"), [(8, 1), (8, 2), (8, 4), (8, 8), (12, 3)])
def test_equal_stages_where_the_layers_divide(num_layers, num_stages):
    for head in (0, 3):
        partition = make_partition(num_layers, num_stages, Costs(1, head))
        assert sizes(partition) == [num_layers // num_stages] * num_stages


def test_of_equal_cuts_the_one_with_the_smaller_last_stage():
    assert sizes(make_partition(5, 2, LAYER_ONLY)) == [3, 2]
    assert sizes(make_partition(5, 4, LAYER_ONLY)) == [2, 1, 1, 1]


def test_without_layers_per_block_a_stage_is_one_block():
    partition = make_partition(6, 3, LAYER_ONLY)
    assert partition.blocks == (Span(0, 2), Span(2, 4), Span(4, 6))
    assert partition.stages == (Span(0, 1), Span(1, 2), Span(2, 3))


def test_the_blocks_do_not_depend_on_the_stages():
    layouts = [make_partition(7, num_stages, Costs(1, 5), layers_per_block=2) for num_stages in (1, 2, 4)]
    assert {layout.blocks for layout in layouts} == {(Span(0, 2), Span(2, 4), Span(4, 6), Span(6, 7))}


@pytest.mark.parametrize("layers_per_block", [None, 1, 2, 3, 4])
def test_local_heads_move_no_cut(layers_per_block):
    # All blocks are alike but for a shorter last one, so a head for each of them makes no other cut better.
    for num_layers in range(1, 14):
        for num_stages in range(1, -(-num_layers // (layers_per_block or 1)) + 1):
            free = make_partition(num_layers, num_stages, Costs(1, 0), layers_per_block)
            assert make_partition(num_layers, num_stages, Costs(1, 1000), layers_per_block) == free


def test_one_head_at_the_end_is_paid_by_the_last_stage_alone():
    costs = Costs(layer=1, head=2)
    assert sizes(make_partition(6, 2, costs, heads=Heads(False))) == [4, 2]
    assert sizes(make_partition(6, 2, costs, heads=Heads(True))) == [3, 3]
    assert sizes(make_partition(6, 2, costs, layers_per_block=1, heads=Heads(False))) == [4, 2]


def test_what_runs_before_the_layers_is_paid_by_the_first_stage():
    for layers_per_block in (None, 1):
        assert sizes(make_partition(6, 2, Costs(1, 0, first=2), layers_per_block)) == [2, 4]


def test_stages_by_hand():
    assert sizes(cut_by_hand(6, 2, [1, 5])) == [1, 5]
    partition = cut_by_hand(7, 2, [4, 3], layers_per_block=2)
    assert partition.stages == (Span(0, 2), Span(2, 4))
    assert sizes(partition) == [4, 3]


def test_describe_shows_a_range_for_each_block():
    assert make_partition(8, 2, LAYER_ONLY).describe() == "stage 0: layers 0-3 | stage 1: layers 4-7"
    by_two = cut_by_hand(5, 2, [2, 3], layers_per_block=2)
    assert by_two.describe() == "stage 0: layers 0-1 | stage 1: layers 2-3, 4"


def test_costs_follow_the_formula():
    costs = estimate_costs(layer_parameters=1000, head_parameters=50, hidden_size=8, seq_length=32)
    assert costs == Costs(layer=6 * 1000 + 12 * 32 * 8, head=300)


@pytest.mark.parametrize(
    ("num_layers", "window", "stride", "ends"),
    [(4, 2, 1, [2, 3, 4]), (8, 3, 2, [3, 5, 7, 8]), (8, 4, 2, [4, 6, 8]), (6, 5, 3, [5, 6])],
)
def test_windows_leave_a_block_what_no_earlier_one_has(num_layers, window, stride, ends):
    """Block b ends where window b ends, and the overlap is what the window has of the block below."""
    partition = make_partition(num_layers, 1, LAYER_ONLY, window, stride)
    assert [block.stop for block in partition.blocks] == ends
    assert [block.start for block in partition.blocks] == [0, *ends[:-1]]
    assert partition.overlap == window - stride
    whole = partition.blocks[1:] if ends[-1] - ends[-2] == stride else partition.blocks[1:-1]
    for block in whole:
        assert len(block) + partition.overlap == window


def test_blocks_side_by_side_do_not_overlap():
    assert make_partition(8, 2, LAYER_ONLY).overlap == make_partition(8, 2, LAYER_ONLY, 2).overlap == 0


def test_stages_of_overlapping_blocks():
    costs = Costs(1.0, 1.0)
    partition = make_partition(8, 2, costs, 3, 2)
    assert partition.stages == (Span(0, 2), Span(2, 4)), "layers 0-2, 3-4 and 5-6, 7"
    assert partition.describe() == "stage 0: layers 0-2, 3-4 | stage 1: layers 5-6, 7"
    assert make_partition(4, 3, costs, 2, 1).describe() == "stage 0: layers 0-1 | stage 1: layers 2 | stage 2: layers 3"
    by_hand = cut_by_hand(8, 2, [3, 5], 3, 2)
    assert by_hand.stages == (Span(0, 1), Span(1, 4))
    deep = make_partition(8, 2, costs, 3, 2, heads=Heads(layers=(0, 0, 2)))
    assert sizes(deep) == [5, 3], "costs 5 and 4: above layer 6 there is room for one private layer"


def test_one_window_has_nothing_to_overlap_with():
    for num_layers in (2, 3):
        with pytest.raises(ValueError, match=f"makes one window of the model's {num_layers} layers, nothing overlaps"):
            make_partition(num_layers, 1, LAYER_ONLY, 3, 2)


@pytest.mark.parametrize(
    ("schedule", "wanted"),
    [((2,), [2, 2, 2, 0]), ((3,), [3, 3, 2, 0]), ((0, 3, 1), [0, 3, 1, 0]), ((1, 0), [1, 0, 0, 0])],
)
def test_the_last_number_of_a_schedule_holds_for_the_rest(schedule, wanted):
    partition = make_partition(8, 1, LAYER_ONLY, 2)
    spans = [partition.private_layers(block, schedule) for block in range(4)]
    assert [span.start for span in spans] == [2, 4, 6, 8], "a head's layers are named as those behind the block"
    assert [len(span) for span in spans] == wanted, "and end where the model ends"
    assert [held((2, 0, 1), block) for block in range(5)] == [2, 0, 1, 1, 1]


def test_a_stage_pays_for_the_heads_of_all_its_blocks():
    """The first head's private layers weigh as much as all layers, the output matrices more."""
    by_block = [sizes(make_partition(6, 2, Costs(1, h), 1, heads=Heads(layers=(4, 0)))) for h in (0, 5)]
    assert by_block == [[1, 5], [3, 3]], "costs 5 and 5, then 7 + 15 and 3 + 15"
    one_a_stage = make_partition(6, 2, Costs(1, 5), heads=Heads(layers=(2, 0)))
    assert sizes(one_a_stage) == [2, 4], "one block, one matrix a stage"


def test_heads_that_see_few_tokens_leave_room_for_layers():
    """A quarter of the positions: the last stage has the only whole head."""
    costs = Costs(1, 4)
    assert sizes(make_partition(7, 2, costs, heads=Heads(token_fraction=0.25))) == [5, 2], "costs 6 and 6"
    assert sizes(make_partition(7, 2, costs, 1, heads=Heads(token_fraction=0.25))) == [4, 3], "costs 8 and 9"


def test_more_stages_than_layers():
    with pytest.raises(ValueError, match=r"num_stages=5 is more than the model's 4 layers.*use at most 4 stages"):
        make_partition(4, 5, LAYER_ONLY)


def test_more_stages_than_blocks():
    with pytest.raises(ValueError, match=r"num_stages=3 is more than the model's 2 blocks of 2 layers.*at most 2"):
        make_partition(4, 3, LAYER_ONLY, layers_per_block=2)


def test_stage_layers_that_are_not_the_model():
    with pytest.raises(ValueError, match="stage_layers=4,3 adds up to 7 layers, the model has 8"):
        cut_by_hand(8, 2, [4, 3])


def test_stage_layers_that_cut_a_block():
    with pytest.raises(ValueError, match="stage_layers=3,5 cuts before layer 3, inside a block; cut where"):
        cut_by_hand(8, 2, [3, 5], layers_per_block=2)


def test_of_a_mixture_of_experts_the_parameters_count_that_a_token_passes():
    """By hand: attention, a router, 8 experts of three matrices, of which 1 is used, and two norms a layer."""
    width, inner, vocabulary = 32, 256, 1024
    config = AutoConfig.for_model(
        "mixtral",
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=inner,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=8,
        num_experts_per_tok=1,
    )
    attention, router, expert, norms = 3 * width * width, 8 * width, 3 * width * inner, 2 * width
    run = from_flat({"config_name": "x", "num_stages": 2, "seq_length": 8})
    anatomy = probe(config, run.model)
    assert anatomy.layer_parameters == attention + router + 8 * expert + norms
    assert anatomy.active_layer_parameters == attention + router + expert + norms
    # the last head is as dear as a layer is: with all experts counted the cut would be 2, 2 in backprop, too
    one_head = replace(run, local=replace(run.local, method="backprop"))
    assert [len(plan_partition(one_head, anatomy).layers_of(stage)) for stage in (0, 1)] == [3, 1]
    dense = replace(anatomy, active_layer_parameters=anatomy.layer_parameters)
    assert [len(plan_partition(one_head, dense).layers_of(stage)) for stage in (0, 1)] == [2, 2]
