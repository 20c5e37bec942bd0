"""Replicas that meet rarely: each trains by itself, and an outer step makes one model of them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TINY, Trainer, block_losses, records, weights
from test_resume import same_bits

from llm_local.checkpoint.catalog import Catalog
from llm_local.checks.preflight import preflight
from llm_local.config import ConfigError, from_flat, parse
from llm_local.offline_export import export_checkpoint
from llm_local.problems import static_problems

CONFIGS = Path(__file__).parent.parent / "configs" / "ds"
ANCHOR, MOMENTUM = "/outer/anchor", "/outer/momentum_buffer"


@pytest.fixture
def descent(tmp_path: Path) -> dict[str, Any]:
    """Settings of plain gradient descent without clipping."""
    path = tmp_path / "sgd.json"
    path.write_text(json.dumps({"optimizer": {"type": "SGD", "params": {"lr": 0.5}}}))
    return {"deepspeed": path, "learning_rate": 0.5, "lr_scheduler_type": "constant", "max_grad_norm": 0}


def checkpoint(output: Path, step: int) -> Path:
    return output / f"checkpoints/step-{step:08d}"


def flat(path: Path, replica: int | None = None) -> torch.Tensor:
    """All weights of a checkpoint, those of a replica or the mean."""
    catalog = Catalog(path, None if replica is None else (replica, 2))
    return torch.cat([catalog.tensor(name) for name in sorted(catalog.weights)])


def outer(path: Path, kind: str) -> torch.Tensor:
    """What the outer optimizer has in a checkpoint, in the same order."""
    catalog = Catalog(path)
    return torch.cat([catalog.tensor(f"{name}{kind}") for name in sorted(catalog.weights)])


@pytest.mark.processes
class TestSteps:
    @pytest.mark.parametrize("packing", ["concat", "none"])
    def test_meeting_in_each_step_is_data_parallelism(self, trainer: Trainer, descent: dict, packing: str):
        """Also where replicas have different numbers of tokens: each one's gradient counts by its share."""
        common = {"num_stages": 2, "gradient_accumulation_steps": 2, "packing": packing, **descent}
        if packing == "none":
            texts = [{"text": "def f(x):\n    return x\n" * n} for n in (1, 9, 2, 7, 1, 5) * 9]
            path = trainer.folder / "texts.jsonl"
            path.write_text("".join(json.dumps(text) + "\n" for text in texts))
            common |= {"train_file": path}
        plain = trainer.run("plain", 4, **common)
        each = {"replica_sync_steps": 1, "outer_learning_rate": 1.0, "outer_momentum": 0.0}
        met = trainer.run("met", 4, **common, **each)
        for split in ("train", "eval"):
            ours, theirs = (torch.tensor(block_losses(run, 2, split)) for run in (met, plain))
            torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=0.0)
        mine, others = weights(met / "export"), weights(plain / "export")
        for name, tensor in others.items():
            torch.testing.assert_close(mine[name], tensor, rtol=0.0, atol=1e-6)

    def test_the_outer_step_is_nesterovs(self, trainer: Trainer):
        """From where two replicas are after two steps, in a run in which they do not meet by then."""
        common = {"num_stages": 1, "max_steps": 4, "save_steps": 2, "eval_batches": 0, "seed": 1}
        outer_step = {"outer_learning_rate": 0.5, "outer_momentum": 0.8}
        apart = checkpoint(trainer.run("apart", 2, replica_sync_steps=5, **common), 2)
        met = trainer.run("met", 2, replica_sync_steps=2, **common, **outer_step)
        began = outer(apart, ANCHOR)
        assert not torch.equal(flat(apart, 0), flat(apart, 1))
        gradient = began - (flat(apart, 0) + flat(apart, 1)) / 2
        torch.testing.assert_close(outer(checkpoint(met, 2), MOMENTUM), gradient, rtol=0.0, atol=1e-6)
        anchor = began - 0.5 * (gradient + 0.8 * gradient)
        for replica in (0, 1, None):
            assert torch.equal(flat(checkpoint(met, 2), replica), outer(checkpoint(met, 2), ANCHOR))
        torch.testing.assert_close(outer(checkpoint(met, 2), ANCHOR), anchor, rtol=0.0, atol=1e-6)

    @pytest.mark.parametrize("delay", [0, 1])
    def test_a_fragment_meets_by_itself_while_the_replicas_train_on(self, trainer: Trainer, delay: int):
        """Of two, the second one is sent halfway between two meetings of the first. What replicas would have without it
        is in a run in which they do not meet by then."""
        common = {"num_stages": 1, "max_steps": 4, "save_steps": 1, "eval_batches": 0, "logging_steps": 1, "seed": 1}
        apart = trainer.run("apart", 2, replica_sync_steps=9, **common)
        streaming = {"replica_sync_steps": 4, "replica_sync_fragments": 2, "replica_sync_delay": delay}
        met = trainer.run("met", 2, **common, **streaming, outer_learning_rate=0.5, outer_momentum=0.8)
        step, began = 2 + delay, Catalog(checkpoint(apart, 2))
        paths = (checkpoint(apart, 2), checkpoint(met, step), checkpoint(apart, step))
        sent, now, alone = ([Catalog(path, (replica, 2)) for replica in (0, 1)] for path in paths)
        num_met = 0
        for name in now[0].weights:
            own = [catalog.tensor(name) for catalog in alone]
            if torch.equal(now[0].tensor(name), own[0]):
                assert torch.equal(now[1].tensor(name), own[1]), name
                continue
            num_met += own[0].numel()
            anchor = began.tensor(f"{name}{ANCHOR}")
            gradient = anchor - (sent[0].tensor(name) + sent[1].tensor(name)) / 2
            anchor = anchor - 0.5 * (gradient + 0.8 * gradient)
            for mine, others in zip(now, own, strict=True):
                expected = (anchor + others) / 2 if delay else anchor
                torch.testing.assert_close(mine.tensor(name), expected, rtol=0.0, atol=1e-6)
        held = sum(now[0].tensor(name).numel() for name in now[0].weights)
        assert 0 < num_met < held
        of_step = {record["step"]: record["sent_replica_bytes"] for record in records(met, 0)}
        assert of_step == {1: 0, 2: 2 * 4 * num_met, 3: 0, 4: 2 * 4 * (held - num_met)}

    def test_between_meetings_the_model_is_the_mean(self, trainer: Trainer):
        """It is evaluated and exported so, which changes nothing in the training."""
        common = {"num_stages": 2, "replica_sync_steps": 3, "bf16": True, "export_dtype": "fp32", "save_steps": 5}
        output = trainer.run("run", 4, max_steps=5, eval_steps=1, **common)
        alone = trainer.run("alone", 4, max_steps=5, eval_batches=0, **common)
        assert block_losses(output, 2) == block_losses(alone, 2)
        export_checkpoint(checkpoint(output, 5), trainer.folder / "later", None, "fp32")
        later = weights(trainer.folder / "later")
        for name, tensor in weights(output / "export").items():
            torch.testing.assert_close(tensor, later[name], rtol=0.0, atol=1e-7)
        again = {**common, "replica_sync_steps": 0, "resume_from_checkpoint": checkpoint(output, 5)}
        met = trainer.run("as one", 4, max_steps=5, **again)
        assert block_losses(met, 2, "eval")[-1] == pytest.approx(block_losses(output, 2, "eval")[-1], rel=1e-3)

    def test_what_they_exchange_is_counted(self, trainer: Trainer):
        settings = {"num_stages": 2, "replica_sync_steps": 2, "max_steps": 5, "logging_steps": 3, "eval_batches": 0}
        output = trainer.run("run", 4, save_steps=5, **settings)
        held = len(outer(checkpoint(output, 5), ANCHOR))
        for stage in (0, 1):
            assert [r["step"] for r in records(output, stage)] == [1, 3, 5]
        sent = [
            sum(r["sent_replica_bytes"] for r in records(output, k) if r["step"] == n)
            for n in (1, 3, 5)
            for k in (0, 1)
        ]
        assert sent[:2] == [0, 0]
        assert sum(sent[2:4]) == sum(sent[4:]) == 2 * 4 * held, "a ring of two sends all that it has, each of them"


APART = {"num_stages": 1, "layers_per_block": 2, "replica_sync_steps": 4, "save_steps": 3, "eval_batches": 0}


@pytest.fixture(scope="module")
def two_apart(tmp_path_factory: pytest.TempPathFactory, cache: Path) -> Path:
    """A run of two replicas, six steps."""
    return Trainer(tmp_path_factory.mktemp("apart"), cache).run("run", 2, max_steps=6, **APART)


@pytest.mark.processes
class TestCheckpoints:
    @pytest.mark.parametrize(
        ("ranks", "settings"),
        [
            (4, {"num_stages": 2, "deepspeed": CONFIGS / "zero1.json", "bf16": True}),
            (2, {"num_stages": 1, "deepspeed": CONFIGS / "zero3.json", "layers_per_block": 1}),
            (2, {"num_stages": 1, "deepspeed": CONFIGS / "zero2_offload.json"}),
            (4, {"num_stages": 2, "method": "overlapping", "layers_per_block": 2, "block_stride": 1}),
            (4, {"num_stages": 2, "head": "shared", "head_refresh_steps": 4, "final_backprop_steps": 2}),
            (2, {"num_stages": 1, "method": "backprop", "outer_momentum": 0.0}),
            (3, {"num_stages": 2, "stage_replicas": "2,1", "gradient_accumulation_steps": 1}),
            (2, {"num_stages": 1, "replica_sync_steps": 3, "replica_sync_fragments": 3, "replica_sync_delay": 2}),
        ],
        ids=["zero1-bf16", "zero3-blocks", "offload", "overlapping", "shared", "backprop", "two and one", "streaming"],
    )
    def test_resume_equals_never_having_stopped(self, trainer: Trainer, ranks: int, settings: dict):
        """From between two meetings; in one case from one, too."""
        trainer.model(TINY | {"attention_dropout": 0.1})
        common = {"save_steps": 3, "eval_batches": 1, "replica_sync_steps": 2, "max_steps": 9, **settings}
        straight = trainer.run("straight", ranks, **common)
        for step in (3, 6) if "stage_replicas" in settings else (3,):
            resumed = trainer.folder / f"resumed {step}"
            later = [checkpoint(straight, other).name for other in (6, 9) if other > step]
            shutil.copytree(straight, resumed, ignore=shutil.ignore_patterns("export", *later))
            trainer.run(resumed.name, ranks, resume_from_checkpoint="true", **common)
            same_bits(resumed, straight)
            names = ("step", "loss", "lr", "grad_norm")
            for stage in range(settings["num_stages"]):
                ours, theirs = ([[r[n] for n in names] for r in records(run, stage)] for run in (resumed, straight))
                assert ours == theirs

    @pytest.mark.parametrize(
        ("ranks", "changes"),
        [
            (2, {"replica_sync_steps": 0}),
            (1, {"replica_sync_steps": 0}),
            (2, {"replica_sync_steps": 2}),
            (3, {}),
            (4, {"num_stages": 2, "stage_layers": "2,2"}),
        ],
        ids=["plain", "one", "other steps", "three", "two stages"],
    )
    def test_elsewhere_a_run_goes_on_from_their_mean(
        self, trainer: Trainer, two_apart: Path, capfd: pytest.CaptureFixture[str], ranks: int, changes: dict
    ):
        first = checkpoint(two_apart, 3)
        again = {**APART, **changes, "resume_from_checkpoint": first, "save_steps": 1}
        capfd.readouterr()
        trainer.run("again", ranks, max_steps=4, **again)
        said = "its 2 replicas were apart: all go on from their mean"
        assert (said in capfd.readouterr().err) == (ranks != 4), "two stages have the same replicas"
        if changes.get("replica_sync_steps") == 2:
            assert outer(checkpoint(trainer.folder / "again", 4), MOMENTUM).any()
        if ranks == 3:
            assert not torch.equal(outer(first, ANCHOR), outer(checkpoint(trainer.folder / "again", 4), ANCHOR))
        if ranks == 4:
            assert block_losses(trainer.folder / "again", 2)[-1] == block_losses(two_apart, 1)[3]

    def test_a_replica_that_is_missing_is_named(self, trainer: Trainer):
        output = trainer.run("run", 2, num_stages=1, replica_sync_steps=3, max_steps=2, save_steps=2, eval_batches=0)
        missing = checkpoint(output, 2) / "stage-00/replica-01/replica-01.safetensors"
        missing.unlink()
        flags = {"resume_from_checkpoint": "true", "replica_sync_steps": 3, "max_steps": 4}
        with pytest.raises(ConfigError, match=f"{missing}: .*; resume from an earlier checkpoint"):
            preflight(parse(trainer.flags("run", **flags)), 2)

    def test_the_best_is_the_mean_that_was_measured(self, trainer: Trainer):
        common = {"num_stages": 1, "replica_sync_steps": 10, "save_steps": 1, "eval_steps": 1, "max_steps": 4}
        output = trainer.run("run", 2, learning_rate=0.3, load_best_model_at_end=True, **common)
        losses = [r["loss"] for r in records(output, 0, "eval")]
        best = losses.index(min(losses)) + 1
        assert best < 4, "the rate is so high that it gets worse"
        catalog = Catalog(checkpoint(output, best))
        for name, tensor in weights(output / "export").items():
            assert torch.equal(tensor.view(-1), catalog.tensor(name)), name


class TestProblems:
    @pytest.mark.parametrize(
        ("flags", "ranks", "said"),
        [
            (
                {"replica_sync_steps": 8},
                1,
                "replica_sync_steps=8 is for stages of two replicas or more; start more ranks, or leave it out",
            ),
            (
                {"replica_sync_steps": 8, "num_stages": 2},
                2,
                "replica_sync_steps=8 is for stages of two replicas or more; start more ranks, or leave it out",
            ),
            (
                {"replica_sync_steps": 8, "replica_sync_fragments": 9},
                2,
                "replica_sync_fragments=9: with replica_sync_steps=8 it is at most 8; lower it, or raise the other",
            ),
            (
                {"replica_sync_steps": 8, "replica_sync_delay": 8},
                2,
                "replica_sync_delay=8: with replica_sync_steps=8 it is at most 7; lower it, or raise the other",
            ),
            (
                {"replica_sync_steps": 10, "head": "shared", "replica_sync_fragments": 2},
                2,
                "replica_sync_fragments=2: replicas with head=shared meet with all weights; leave it out",
            ),
            (
                {"replica_sync_delay": 2},
                2,
                "replica_sync_delay=2 is of replicas that train apart; give replica_sync_steps",
            ),
            ({"replica_sync_steps": -1}, 2, "replica_sync_steps=-1 must not be negative"),
            (
                {"outer_learning_rate": 0.5},
                2,
                "outer_learning_rate=0.5 is of replicas that train apart; give replica_sync_steps",
            ),
            ({"outer_momentum": 0.0}, 2, "outer_momentum=0.0 is of replicas that train apart; give replica_sync_steps"),
            (
                {"replica_sync_steps": 8, "num_stages": 2, "method": "backprop"},
                4,
                "replica_sync_steps=8: DeepSpeed's pipeline (method=backprop on several stages) joins all replicas in "
                "each step; use a method with local losses, or num_stages=1",
            ),
            (
                {"replica_sync_steps": 8, "head": "shared"},
                2,
                "replica_sync_steps=8 with head=shared: replicas have one matrix to share when they meet, and "
                "head_refresh_steps=20 is no multiple of it; make it one",
            ),
        ],
    )
    def test_are_said_in_a_line(self, flags: dict[str, Any], ranks: int, said: str):
        config = from_flat({"config_name": "c", "seq_length": 32, **flags})
        assert said in static_problems(config, ranks, True, True)
