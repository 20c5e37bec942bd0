"""What a person sees while a run trains: step, tokens a second, and the loss of every stage."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from llm_local.config import Config
from llm_local.files import writing
from llm_local.world import World

if TYPE_CHECKING:  # most ranks draw none
    from llm_local.bars import Bars


def known_losses(config: Config, world: World, split: str, step: int, losses: Sequence[float]) -> Sequence[float]:
    """A stage's losses at a step; the last one's where that alone has a head. Raises LostPeer."""
    last = world.place.num_stages - 1
    if not config.has_one_head or world.place.is_last_stage:
        return losses
    seconds = config.local.link_timeout_seconds
    text = world.fetch(f"{split}/{step}/{last}", seconds, f"stage {last} to be through with step {step}")
    return [float(text.split()[-1])]


class Progress:
    """Drawn by rank 0. The other stages' losses come through the store, and nobody waits for them: a line about a
    step appears once the last stage is through with it."""

    def __init__(self, world: World, max_steps: int, first_step: int):
        self._world = world
        self._max_steps = max_steps
        self._waiting: list[tuple[str, int]] = []
        self._steps: list[tuple[int, float]] = []  # tokens and seconds
        self._shown = world.place.rank == 0
        self._step = first_step
        self._bars: Bars | None = None
        self._untold: dict[int, list[int]] = {stage: [] for stage in world.place.stages}  # steps, for its bar
        self.listener: Callable[[str, int, list[float]], None] | None = None  # to split, step, losses by stage
        if self._shown and sys.stderr.isatty() and os.environ.get("TERM") != "dumb":
            from llm_local.bars import Bars

            self._bars = Bars(world.place.stages, max_steps, first_step)

    def say(self, text: str) -> None:
        """A line above the bars, from rank 0 only."""
        if not self._shown:
            return
        with writing(Path("<stderr>")):
            if self._bars is not None:
                self._bars.say(text)
            else:
                print(text, file=sys.stderr, flush=True)

    def publish(self, split: str, step: int, losses: Sequence[float]) -> None:
        """Tells rank 0 the losses of this stage's blocks at a step."""
        self._world.publish(f"{split}/{step}/{self._world.place.stage}", " ".join(map(str, losses)))
        if self._shown:
            self._waiting.append((split, step))
        if self._bars is not None and split == "train":
            for steps in self._untold.values():
                steps.append(step)

    def step(self, seconds: float, tokens: int) -> None:
        """One more step is done, of so many tokens without padding, in so many seconds."""
        if not self._shown:
            return
        self._steps = [*self._steps[-19:], (tokens, seconds)]
        self._step += 1
        self.show()

    def show_all(self, seconds: float) -> None:
        """Shows what is left when every stage has told of it, each within so many seconds. Raises LostPeer."""
        for split, step in self._waiting:
            for stage in self._world.place.stages:
                self._world.fetch(f"{split}/{step}/{stage}", seconds, f"stage {stage} to be through with step {step}")
        self.show()

    def show(self) -> None:
        """Shows the steps that every stage has told of by now."""
        if self._bars is not None:
            self._move(self._bars)
        while self._waiting:
            split, step = self._waiting[0]
            found = self._losses(split, step)
            if found is None:
                return
            self._waiting.pop(0)
            losses = " ".join(f"{loss:.3f}" for loss in found)  # '3.120 3.050'
            if self.listener is not None:
                self.listener(split, step, found)
            if split.startswith("eval"):
                on = split.replace("eval_", " on ", 1) if split != "eval" else ""
                self.say(f"step {step}  validation loss{on} by stage: {losses}")
            elif self._bars is None:
                self.say(f"step {step}/{self._max_steps}  {self._rate:,.0f} tokens/s, loss by stage: {losses}")

    @property
    def _rate(self) -> float:
        """Tokens a second of the last steps."""
        tokens, seconds = (sum(column) for column in zip(*self._steps, strict=True)) if self._steps else (0, 1.0)
        return tokens / seconds

    def _move(self, bars: Bars) -> None:
        """This rank's own bar to its step, each other one to the last step that its stage has told of."""
        own = self._world.place.stage
        for stage, steps in self._untold.items():
            while steps and (told := self._world.peek(f"train/{steps[0]}/{stage}")) is not None:
                rate = f", {self._rate:,.0f} tokens/s" if stage == own else ""
                bars.move(stage, steps.pop(0), f"loss {float(told.split()[-1]):.3f}{rate}")
        bars.move(own, self._step)
        bars.refresh()

    def _losses(self, split: str, step: int) -> list[float] | None:
        """Of every stage's last block; None as long as one is missing."""
        found = [self._world.peek(f"{split}/{step}/{stage}") for stage in self._world.place.stages]
        return None if None in found else [float(text.split()[-1]) for text in found if text is not None]

    def close(self) -> None:
        """Leaves the bars as they are, and shows what is left to show, as far as it is known."""
        if self._bars is not None:
            self._move(self._bars)
            self._bars.close()
            self._bars = None  # what a later stage tells from now on gets a line of its own
        self.show()
