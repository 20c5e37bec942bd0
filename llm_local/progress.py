"""What a person sees while a run trains: step, tokens a second, and the loss of every stage."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from tqdm import tqdm

from llm_local.files import writing
from llm_local.world import World

BAR = "{n_fmt}/{total_fmt} steps |{bar:20}| {elapsed}<{remaining}{postfix}"


class Progress:
    """Drawn by rank 0. The other stages' losses come through the store, and nobody waits for them: a line about a
    step appears once the last stage is through with it."""

    def __init__(self, world: World, max_steps: int, first_step: int):
        self._world = world
        self._max_steps = max_steps
        self._waiting: list[tuple[str, int]] = []
        self._steps: list[tuple[int, float]] = []  # tokens and seconds
        self._shown = world.place.rank == 0
        self._bar = None
        self.listener: Callable[[str, int, list[float]], None] | None = None  # to split, step, losses by stage
        if self._shown and sys.stderr.isatty():
            self._bar = tqdm(total=max_steps, initial=first_step, dynamic_ncols=True, bar_format=BAR)

    def say(self, text: str) -> None:
        """A line above the bar, from rank 0 only."""
        if self._shown:
            with writing(Path("<stderr>")):
                tqdm.write(text, file=sys.stderr)

    def publish(self, split: str, step: int, losses: Sequence[float]) -> None:
        """Tells rank 0 the losses of this stage's blocks at a step."""
        self._world.publish(f"{split}/{step}/{self._world.place.stage}", " ".join(map(str, losses)))
        if self._shown:
            self._waiting.append((split, step))

    def step(self, seconds: float, tokens: int) -> None:
        """One more step is done, of so many tokens without padding, in so many seconds."""
        if not self._shown:
            return
        self._steps = [*self._steps[-19:], (tokens, seconds)]
        if self._bar is not None:
            self._bar.update(1)
        self.show()

    def show_all(self, seconds: float) -> None:
        """Shows what is left when every stage has told of it, each within so many seconds. Raises LostPeer."""
        for split, step in self._waiting:
            for stage in self._world.place.stages:
                self._world.fetch(f"{split}/{step}/{stage}", seconds, f"stage {stage} to be through with step {step}")
        self.show()

    def show(self) -> None:
        """Shows the steps that every stage has told of by now."""
        while self._waiting:
            split, step = self._waiting[0]
            found = self._losses(split, step)
            if found is None:
                return
            self._waiting.pop(0)
            losses = " ".join(f"{loss:.3f}" for loss in found)  # '3.120 3.050'
            if self.listener is not None:
                self.listener(split, step, found)
            tokens, seconds = (sum(column) for column in zip(*self._steps, strict=True)) if self._steps else (0, 1.0)
            rate = tokens / seconds
            if split.startswith("eval"):
                on = split.replace("eval_", " on ", 1) if split != "eval" else ""
                self.say(f"step {step}  validation loss{on} by stage: {losses}")
            elif self._bar is not None:
                self._bar.set_postfix_str(f"{rate:,.0f} tokens/s, step {step} loss by stage {losses}")
            else:
                self.say(f"step {step}/{self._max_steps}  {rate:,.0f} tokens/s, loss by stage: {losses}")

    def _losses(self, split: str, step: int) -> list[float] | None:
        """Of every stage's last block; None as long as one is missing."""
        found = [self._world.peek(f"{split}/{step}/{stage}") for stage in self._world.place.stages]
        return None if None in found else [float(text.split()[-1]) for text in found if text is not None]

    def close(self) -> None:
        """Takes the bar away and shows what is left to show, as far as it is known."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None  # what a later stage tells from now on gets a line of its own
        self.show()
