"""The fault campaign: three stages as jobs of their own, faults at random moments, and the losses of a run without any.

python -m tests.campaign --kills 200 [--seed 1] [--replicas 1,2,1] [--output DIR] [--longest 30] [flags]

It trains a tiny model once in one launch. Then each stage is a job under torchrun, its links go through relays, and
faults.py hurts them, start-up, saving and the end included. At the end every loss of every stage, and the assembled
model, must be those of the first run, bit for bit; within 1e-5 from where a stage has gone on with another ZeRO stage.
No rank of a stage that was not hit may have ended. Exit status 1 if anything differs. OUTPUT/campaign.json
has each fault and the figures.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from random import Random
from typing import Any

from llm_local.jobs.key import make_key
from tests.faults import KINDS, Blow, Scene, deal
from tests.jobs import Relay, Stage, end_with_parent, environment, launcher
from tests.paced import PACE
from tests.ranks import free_ports
from tests.verdict import compare, compare_models, spread

NUM_STAGES = 3
LOOK_SECONDS = 0.1
HANG_SECONDS = 150.0
STEPS_A_FAULT = 60
SECONDS_A_FAULT = 9.0  # at first: then what faults have taken so far
ZERO = 1
MODEL = {"model_type": "llama", "vocab_size": 4096, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3}
MODEL |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}
MODEL |= {"bos_token_id": 1, "eos_token_id": 2}


@dataclass
class Report:
    """A fault. at: seconds after the start; recovery: from its end (the kill, or when a link or a process goes on) to
    the next trained step, beyond_loading without the import and the checkpoint; stalls: the longest time without a step
    of each other stage meanwhile."""

    number: int
    kind: str
    stage: int
    step: int
    at: float
    detail: str = ""
    recovery_seconds: float | None = None
    beyond_loading_seconds: float | None = None
    stalls: dict[int, float] = field(default_factory=dict)


@dataclass
class Active:
    """A fault whose stage does not train again yet. since: when it was over."""

    report: Report
    blow: Blow
    since: float
    is_undone: bool = False


class Campaign:
    num_paced = 1  # the first stage: the others follow as they can

    def __init__(self, given: argparse.Namespace, flags: Sequence[str]):
        self.folder: Path = given.output
        self.kills, self.replicas = given.kills, tuple(map(int, given.replicas.split(",")))
        self.random = Random(given.seed)
        self.max_steps = given.steps or STEPS_A_FAULT * given.kills + 60
        self.flags = [*self._flags(), *flags]
        self.limit_seconds = 60 * given.minutes
        self.longest_seconds, self.share_soon = given.longest, given.soon
        self.reports: list[Report] = []
        self.wrong: list[str] = []
        self.hangs = 0
        self.begun = self._first_at = 0.0
        self._active: list[Active] = []
        self._loosened: dict[int, int] = {}  # the step after which a stage's losses are those of another ZeRO stage

    def _flags(self) -> list[str]:
        """Of all launches; the text is that of a module of Python's own."""
        self.folder.mkdir(parents=True)
        (self.folder / "model.json").write_text(json.dumps(MODEL))
        shutil.copy(argparse.__file__, self.folder / "text.txt")
        settings = {
            "config_name": self.folder / "model.json",
            "train_file": self.folder / "text.txt",
            "cache_dir": self.folder / "cache",
            "num_stages": NUM_STAGES,
            "stage_replicas": ",".join(map(str, self.replicas)),
            "seq_length": 32,
            "per_device_train_batch_size": 2,
            "max_steps": self.max_steps,
            "learning_rate": 1e-3,
            "logging_steps": 1,
            "eval_steps": 25,
            "eval_batches": 1,
            "link_timeout_seconds": 120,
        }
        return [part for name, value in settings.items() for part in (f"--{name}", str(value))]

    def reference(self) -> None:
        """The run that nothing happens to, in one launch."""
        zero = ["--deepspeed", f"configs/ds/zero{ZERO}.json"]
        command = [*launcher(sum(self.replicas), restarts=0), *self.flags, *zero]
        with (self.folder / "reference.log").open("w") as log:
            output = ["--output_dir", str(self.folder / "reference")]
            subprocess.run(
                [*command, *output],
                env=environment(),
                stdout=log,
                stderr=log,
                check=True,
                preexec_fn=end_with_parent,
            )

    def begin(self) -> None:
        key, pace = self.folder / "run.key", self.folder / "pace"
        make_key(key)
        ports = free_ports(sum(self.replicas))
        links, stages = [], []
        for stage in range(NUM_STAGES):
            own = ["--stage", str(stage), "--run_key_file", str(key), "--save_steps", "10", "--save_total_limit", "3"]
            own += ["--resume_from_checkpoint", "auto", "--output_dir", str(self.folder / "jobs")]
            if stage > 0:
                own += ["--receive_on", f"127.0.0.1:{ports[sum(self.replicas[:stage])]}"]
            if stage < NUM_STAGES - 1:
                own += ["--send_to", f"127.0.0.1:{self._relays(links, ports[sum(self.replicas[: stage + 1]) :])}"]
            output = self.folder / f"jobs/stage-{stage:02d}"
            output.mkdir(parents=True)
            variables = {PACE: str(pace)} if stage < self.num_paced else {}
            stages.append(
                Stage(stage, output, [*self.flags, *own], self.replicas[stage], self.max_steps, variables, ZERO)
            )
        self.scene = Scene(stages, links, self.random, self.longest_seconds)
        self.begun = time.time()
        for each in stages:
            each.start()

    def _relays(self, links: list[list[Relay]], targets: Sequence[int]) -> int:
        """Adds a link's, one for each replica that receives, on ports in a row; returns the first."""
        count = self.replicas[len(links) + 1]
        first = free_ports(count)[0]
        links.append([Relay(targets[n], first + n) for n in range(count)])
        return first

    def run(self) -> None:
        """Until all stages have finished, or nothing moves any more."""
        kinds = deal(self.kills, self.random)
        due = None  # when the next fault comes; None: when all train again
        num_at_end = max(1, self.kills // 20)
        while not all(stage.is_done for stage in self.scene.stages):
            time.sleep(LOOK_SECONDS)
            self._look()
            if self._hangs():
                return
            now = time.time()
            if now - self.begun > self.limit_seconds:
                self.kills = len(self.reports)
            left = self.kills - len(self.reports)
            self._pace(left - num_at_end)
            if due is None and self._all_train() and not self._active:
                due = now + self.random.uniform(0, 3)
            if left and due is not None and now >= due and (left > num_at_end or self._is_at_end()):
                self._strike(kinds[len(self.reports)])
                is_soon = self.random.random() < self.share_soon or left <= num_at_end
                due = time.time() + self.random.uniform(0, 8) if is_soon else None

    def _all_train(self) -> bool:
        return all(stage.is_back(0) for stage in self.scene.stages)

    def _is_at_end(self) -> bool:
        return self.scene.stages[0].step >= self.max_steps - 5

    def _pace(self, left: int) -> None:
        """So many faults must come before the first stage is at the end; then it hurries."""
        path = self.folder / "pace"
        if left <= 0:
            path.unlink(missing_ok=True)
            return
        num_done, stage = len(self.reports), self.scene.stages[0]
        each = (time.time() - self._first_at) / num_done if num_done else SECONDS_A_FAULT
        steps = max(1, self.max_steps - 20 - stage.step)
        text = f"{each * left / steps:.3f}"
        if not path.exists() or path.read_text() != text:
            path.with_suffix(".new").write_text(text)
            path.with_suffix(".new").replace(path)

    def _strike(self, kind: str) -> None:
        living = [stage for stage in self.scene.stages if not stage.is_done]
        stage = self.random.choice(living)
        now = time.time()
        self._first_at = self._first_at or now
        blow = KINDS[kind](self.scene, stage)
        for active in self._active:  # what the new fault delays is not the old one's
            if active.blow.stage is blow.stage and active.is_undone:
                active.report.detail += f"; overtaken by fault {len(self.reports) + 1}"
        self._active = [a for a in self._active if a.blow.stage is not blow.stage or not a.is_undone]
        at = round(now - self.begun, 1)
        report = Report(len(self.reports) + 1, kind, blow.stage.number, blow.stage.step, at, blow.detail)
        self.reports.append(report)
        self._active.append(Active(report, blow, now + blow.seconds))
        print(f"{report.at:7.1f} s  fault {report.number}: {kind}, stage {report.stage} at step {report.step}, "
              f"{report.detail}", flush=True)  # fmt: skip

    def _look(self) -> None:
        now = time.time()
        for stage in self.scene.stages:
            self.wrong += stage.look()
            if stage.lives and stage.life.ready and stage.life.zero != ZERO:
                self._loosened[stage.number] = min(stage.life.resumed, self._loosened.get(stage.number, self.max_steps))
        for active in list(self._active):
            report, stage = active.report, active.blow.stage
            for other in self.scene.stages:
                if other is not stage and not other.is_done and 0 < other.step < self.max_steps:
                    stalled = round(now - max(other.moved, self.begun + report.at), 1)
                    report.stalls[other.number] = max(stalled, report.stalls.get(other.number, 0.0))
            if not active.is_undone and now >= active.since:
                active.blow.undo()
                active.is_undone, active.since = True, time.time()
            elif active.is_undone and self._trains_again(active):
                self._active.remove(active)
        for stage in self.scene.stages:
            may_end = any(stage is active.blow.stage or stage in active.blow.involved for active in self._active)
            if not may_end and stage.is_back(0):
                stage.hit_at = None

    def _trains_again(self, active: Active) -> bool:
        report, stage = active.report, active.blow.stage
        hit_at = self.begun + report.at
        is_new = stage.life.created > hit_at - 0.2
        if not stage.is_back(active.since):
            return False
        report.recovery_seconds = round(max(stage.moved - active.since, 0.0), 2)
        if is_new and stage.life.ready is not None:
            loading = stage.life.ready - stage.life.created
            report.beyond_loading_seconds = round(max(report.recovery_seconds - loading, 0.0), 2)
        return True

    def _hangs(self) -> bool:
        """Whether nothing at all has moved for long."""
        moved = max(max(stage.moved, *(life.created for life in stage.lives), self.begun)
                    if stage.lives else self.begun for stage in self.scene.stages)  # fmt: skip
        slow = [a.report.number for a in self._active if time.time() - a.since > HANG_SECONDS]
        if time.time() - moved < HANG_SECONDS and not slow:
            return False
        self.hangs += 1
        self.wrong.append(f"hangs, fault {slow or len(self.reports)}")
        self.wrong += [f"stage {stage.number} at step {stage.step}: {stage.last_news()}" for stage in self.scene.stages]
        return True

    def end(self) -> None:
        for stage in self.scene.stages:
            if stage.process is not None and stage.process.poll() is None:
                stage.kill()

    def verdict(self) -> dict[str, Any]:
        """All figures."""
        stages = self.scene.stages
        # a stage trains on what those before it send, and with a shared head on the matrix of the last one
        behind = NUM_STAGES if "shared" in self.flags else 1
        stages_of = [range(min(stage + behind, NUM_STAGES)) for stage in range(NUM_STAGES)]
        bounds = [min(self._loosened.get(k, self.max_steps) for k in of) for of in stages_of]
        losses = compare(stages, self.folder / "reference", bounds)
        complaint = compare_models(stages, self.folder / "reference", self.folder / "model", bool(self._loosened))
        self.wrong += [complaint] if complaint else []
        stalls = [max(report.stalls.values(), default=0.0) for report in self.reports]
        figures = {
            "faults": len(self.reports),
            "kinds": {kind: sum(report.kind == kind for report in self.reports) for kind in KINDS},
            "lives": [len(stage.lives) for stage in stages],
            "steps": self.max_steps,
            **asdict(losses),
            "same_model": not complaint,
            "hangs": self.hangs,
            "recovery_seconds": spread([report.recovery_seconds for report in self.reports]),
            "beyond_loading_seconds": spread([report.beyond_loading_seconds for report in self.reports]),
            "stall_seconds": spread(stalls),
            "seconds": round(time.time() - self.begun, 1),
            "wrong": self.wrong,
        }
        text = json.dumps({**figures, "each": [asdict(report) for report in self.reports]}, indent=1)
        (self.folder / "campaign.json").write_text(text + "\n")
        return figures


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.campaign", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=10, help="faults (10)")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--replicas", default="1,2,1", help="ranks of each stage (1,2,1)")
    parser.add_argument("--longest", type=float, default=30.0, help="seconds for which a link is away at most (30)")
    parser.add_argument(
        "--soon", type=float, default=0.33, help="share of faults that come while another one is felt (0.33)"
    )
    parser.add_argument("--minutes", type=float, default=float("inf"), help="after which no further fault comes")
    parser.add_argument("--steps", type=int, help=f"of the run ({STEPS_A_FAULT} a fault, and some)")
    parser.add_argument("--output", type=Path, default=Path("runs/campaign"), help="a new folder (runs/campaign)")
    given, flags = parser.parse_known_args(arguments)
    given.output = given.output.absolute()
    campaign = Campaign(given, flags)
    start = time.time()
    campaign.reference()
    print(f"the run without faults took {time.time() - start:.0f} s for {campaign.max_steps} steps", flush=True)
    campaign.begin()
    try:
        campaign.run()
    finally:
        campaign.end()
    figures = campaign.verdict()
    print(json.dumps(figures, indent=1))
    is_good = not (campaign.wrong or figures["lost_steps"] or figures["steps_twice"] or figures["differing_losses"])
    return 0 if is_good and figures["same_model"] and figures["faults"] == campaign.kills else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
