"""Stages with different numbers of replicas: the same losses, however a step's micro-batches are dealt."""

from __future__ import annotations

from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Trainer, block_losses, records, weights

from llm_local.config import parse
from llm_local.place import Place
from llm_local.replicas import Dealing, parse_replicas, replica_problems, replicas_of, share

DS = Path(__file__).parent.parent / "configs" / "ds"


class TestDealing:
    @pytest.mark.parametrize(("mine", "theirs"), list(product((1, 2, 3, 4, 6), repeat=2)))
    def test_both_sides_agree_on_every_micro_batch(self, mine: int, theirs: int):
        count = 12  # of a step
        met = {}
        for replica, index in product(range(mine), range(count // mine)):
            there, as_what = Dealing(replica, mine, theirs).at(index)
            assert Dealing(there, theirs, mine).at(as_what) == (replica, index)
            assert there in Dealing(replica, mine, theirs).peers
            met.setdefault((replica, there), []).append((index, as_what))
        assert met.keys() == {(r, peer) for r in range(mine) for peer in Dealing(r, mine, theirs).peers}
        assert len({len(some) for some in met.values()}) == 1, "each link carries as many as the others"
        for some in met.values():
            assert some == sorted(some, key=lambda pair: pair[1]), "in order on both sides"

    @pytest.mark.parametrize(("mine", "theirs"), list(product((1, 2, 3, 4, 6), repeat=2)))
    def test_what_all_get_comes_from_one(self, mine: int, theirs: int):
        sources = {r: Dealing(r, mine, theirs).source for r in range(mine)}
        targets = {s: Dealing(s, theirs, mine).targets for s in range(theirs)}
        assert sources == {r: s for s, some in targets.items() for r in some}
        assert all(source in Dealing(r, mine, theirs).peers for r, source in sources.items())

    def test_four_to_two(self):
        assert [Dealing(r, 4, 2).peers for r in range(4)] == [(0,), (1,), (0,), (1,)]
        assert [Dealing(r, 4, 2).at(0) for r in range(4)] == [(0, 0), (1, 0), (0, 1), (1, 1)]


def test_ranks_count_through_the_replicas_of_each_stage():
    places = [Place(rank, (3, 1, 2)) for rank in range(6)]
    assert [(p.stage, p.replica) for p in places] == [(0, 0), (0, 1), (0, 2), (1, 0), (2, 0), (2, 1)]
    assert [p.rank_of(p.stage, p.replica) for p in places] == list(range(6))
    assert {p.world_size for p in places} == {6}
    job = Place(1, (3, 1, 2), job=2)
    assert (job.stage, job.replica, job.world_size, job.is_last_stage) == (2, 1, 2, True)


def test_a_list_of_replicas():
    assert parse_replicas("4, 2,1") == (4, 2, 1)
    assert [parse_replicas(text) for text in ("", "4,", "4,x", "-1,2", "1.5")] == [None] * 5
    assert share(2, (4, 2, 1), 2) == 8


def config_of(**flags: Any):
    given = {"config_name": "model.json", "num_stages": 3} | flags
    return parse([part for name, value in given.items() for part in (f"--{name}", str(value))])


JOB = {"stage": 1, "run_key_file": "run.key", "save_steps": 5, "send_to": "a:1", "receive_on": "b:1"}


@pytest.mark.parametrize(
    ("ranks", "flags", "problem"),
    [
        (7, {}, "7 ranks cannot be divided into num_stages=3 stages of equal size; start a multiple of 3 ranks, "
            "change num_stages, or give stage_replicas"),
        (7, {"stage_replicas": "4,x,1"}, "stage_replicas='4,x,1' is not a list such as 4,2,1"),
        (6, {"stage_replicas": "4,2"}, "stage_replicas='4,2' names 2 stages, num_stages is 3"),
        (6, {"stage_replicas": "4,0,2"}, "stage_replicas='4,0,2' leaves stage 1 without a replica"),
        (6, {"stage_replicas": "4,2,1"}, "stage_replicas='4,2,1' are 7 ranks, 6 were started"),
        (7, {"stage_replicas": "4,2,1"} | JOB, "stage_replicas='4,2,1' has 2 for stage 1, which 7 ranks were started "
            "for"),
        (7, {"stage_replicas": "3,2,2"}, "stage_replicas='3,2,2': gradient_accumulation_steps=1 on each of 3 replicas "
            "are 3 micro-batches, which the 2 of stage 1 cannot share; use a multiple of 2"),
        (7, {"stage_replicas": "3,2,2", "gradient_accumulation_steps": 2, "eval_batches": 3}, "stage_replicas='3,2,2': "
            "eval_batches=3 on each of 3 replicas are 9 micro-batches, which the 2 of stage 1 cannot share; use a "
            "multiple of 2"),
        (7, {"stage_replicas": "4,2,1", "method": "overlapping"}, "stage_replicas='4,2,1': gradients, or soft targets, "
            "come back over the boundaries of this run, which need as many replicas of each stage; use a method whose "
            "losses are local to the end"),
        (7, {"stage_replicas": "4,2,1", "trace": True}, "stage_replicas='4,2,1': trace=True compares stages step by "
            "step, of equal numbers of replicas; leave it out"),
    ],
)  # fmt: skip
def test_what_is_refused(ranks: int, flags: dict[str, Any], problem: str):
    assert replica_problems(config_of(**flags), ranks) == [problem]


@pytest.mark.parametrize("flags", [{"method": "backprop"}, {"final_backprop_steps": 2}, {"distillation_weight": 0.5}])
def test_what_needs_an_answer_of_each_packet_is_refused(flags: dict[str, Any]):
    assert "come back over the boundaries" in replica_problems(config_of(stage_replicas="2,1,1", **flags), 4)[0]


def test_what_is_right():
    for ranks, flags in (
        (7, {"stage_replicas": "4,2,1"}),
        (2, {"stage_replicas": "4,2,1"} | JOB),
        (6, {"stage_replicas": "2,2,2", "method": "overlapping"}),
        (7, {"stage_replicas": "3,2,2", "gradient_accumulation_steps": 2, "eval_batches": 0}),
    ):
        assert replica_problems(config_of(**flags), ranks) == []
    assert replicas_of(config_of(stage_replicas="4,2,1"), 7) == (4, 2, 1)
    assert replicas_of(config_of(), 6) == (2, 2, 2)


COMMON: dict[str, Any] = {"num_stages": 3, "max_steps": 4, "save_steps": 2, "lr_scheduler_type": "cosine"}
COMMON |= {"per_device_train_batch_size": 2, "eval_steps": 2, "gradient_accumulation_steps": 1, "eval_batches": 2}
COMMON |= {"head_token_fraction": 0.5, "max_grad_norm": 0.1, "deepspeed": DS / "zero2.json"}


@pytest.mark.processes
class TestLosses:
    @pytest.mark.parametrize("head", ["linear", "shared"])
    def test_are_those_of_equal_replicas(self, trainer: Trainer, head: str):
        """4 micro-batches a step: 2, 4 and 1 replicas beside one replica of each; one more packet than may wait."""
        common = COMMON | {"head": head, "head_refresh_steps": 1, "max_packets_in_flight": 1}
        equal = trainer.run("equal", 3, **common | {"gradient_accumulation_steps": 4, "eval_batches": 8})
        dealt = trainer.run("dealt", 7, **common, stage_replicas="2,4,1")
        for stage in range(3):
            ours, theirs = records(dealt, stage), records(equal, stage)
            assert [(r["tokens"], r["sent_bytes"]) for r in ours] == [(r["tokens"], r["sent_bytes"]) for r in theirs]
            for name in ("loss", "grad_norm", "lr"):
                values = [[r[name] for r in some] for some in (ours, theirs)]
                torch.testing.assert_close(*map(torch.tensor, values), rtol=1e-5, atol=0)
            losses = [[e["loss"] for e in records(run, stage, "eval")] for run in (dealt, equal)]
            torch.testing.assert_close(*map(torch.tensor, losses), rtol=1e-5, atol=0)
        one, other = weights(dealt / "export"), weights(equal / "export")
        assert all(torch.allclose(one[name], other[name], atol=1e-5) for name in other)
        assert "3 × 2,4,1" in (dealt / "export/README.md").read_text()

    def test_go_on_with_other_numbers(self, trainer: Trainer):
        common = COMMON | {"num_stages": 2, "deepspeed": DS / "zero1.json"}
        straight = trainer.run("straight", 3, **common, stage_replicas="1,2")
        checkpoint = straight / "checkpoints/step-00000002"
        again = trainer.run("again", 3, **common, stage_replicas="2,1", resume_from_checkpoint=checkpoint)
        ours, theirs = (block_losses(run, 2) for run in (again, straight))
        torch.testing.assert_close(torch.tensor(ours), torch.tensor(theirs[2:]), rtol=1e-5, atol=0)
