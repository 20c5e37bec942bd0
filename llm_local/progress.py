"""What a person sees while a run trains: step, tokens a second, and the loss of every stage."""

from __future__ import annotations

import sys
import time

from tqdm import tqdm

from llm_local.world import World


class Progress:
    """Drawn by rank 0; the other stages' losses come through the store, without waiting for them."""

    def __init__(self, world: World, max_steps: int, first_step: int, tokens_per_step: int):
        self._world = world
        self._tokens_per_step = tokens_per_step
        self._start = time.monotonic()
        self._first = first_step
        self._pending: list[int] = []
        self._shown = world.place.rank == 0
        self._bar = None
        self._max_steps = max_steps
        if self._shown and sys.stderr.isatty():
            self._bar = tqdm(total=max_steps, initial=first_step, unit="step", dynamic_ncols=True)

    def say(self, text: str) -> None:
        """A line above the bar, from rank 0 only."""
        if self._shown:
            tqdm.write(text, file=sys.stderr)

    def train_loss(self, value: float) -> None:
        """Publishes this stage's loss for everybody's picture."""
        self._world.publish(f"train/{self._world.place.stage}", f"{value}")

    def eval_loss(self, step: int, value: float) -> None:
        """Publishes a validation loss; rank 0 shows an evaluation once the last stage is through with it."""
        self._world.publish(f"eval/{step}/{self._world.place.stage}", f"{value}")
        self._pending.append(step)

    def step(self, step: int, logged: bool) -> None:
        if self._bar is not None:
            self._bar.update(1)
        if not self._shown:
            return
        while self._pending and "-" not in self.losses(f"eval/{self._pending[0]}"):
            done = self._pending.pop(0)
            self.say(f"step {done}  validation loss by stage: {self.losses(f'eval/{done}')}")
        if not logged:
            return
        rate = (step - self._first) * self._tokens_per_step / (time.monotonic() - self._start)
        text = f"{rate:,.0f} tokens/s, loss by stage: {self.losses('train')}"
        if self._bar is not None:
            self._bar.set_postfix_str(text)
        else:
            self.say(f"step {step}/{self._max_steps}  {text}")

    def losses(self, key: str) -> str:
        """'3.120 3.050', one number a stage as last published; '-' where there is none yet."""
        found = [self._world.peek(f"{key}/{k}") for k in range(self._world.place.num_stages)]
        return " ".join("-" if text is None else f"{float(text):.3f}" for text in found)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
