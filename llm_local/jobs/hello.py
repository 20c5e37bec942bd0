"""What the two ends of a link tell each other when they meet, and whether they belong together: pure functions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from pydantic import TypeAdapter, ValidationError

from llm_local.files import Json
from llm_local.jobs.frames import HELLO, REFUSAL, Frame, Garbled, with_text

NEW, SAVED, TRAINING = range(3)


@dataclass(frozen=True)
class Hello:
    """One end. run: the run's identity, once it is known. place: where it runs, for a person. life: how many times it
    was started. standing: NEW, SAVED (it has a checkpoint), or TRAINING (or linked with the other one) in this life.

    fingerprint: what both must have alike, by name. facts: what stage 0 alone has read and all must know.
    wants: the number of the first packet that this end has not; None: it only asks. taken, durable: as in frames.py.
    window: packets that may be on their way, or wait here to be used. finished, farewell: as in frames.py.
    """

    stage: int
    replica: int
    place: str
    life: int
    fingerprint: Json
    run: str | None = None
    facts: Json | None = None
    standing: int = NEW
    wants: int | None = None
    taken: int = 0
    durable: int = 0
    window: int = 0
    finished: bool = False
    farewell: bool = False

    def to_bytes(self) -> bytes:
        return with_text(HELLO, asdict(self))

    @staticmethod
    def of(frame: Frame) -> Hello:
        """Raises Garbled."""
        if frame.kind != HELLO:
            raise Garbled("a frame where a hello was due")
        try:
            found = TypeAdapter(Hello).validate_python(frame.content)
        except ValidationError as error:
            raise Garbled("a hello of another version") from error
        if min(found.taken, found.durable) < 0 or max(found.taken, found.durable) > (found.wants or 0):
            raise Garbled("a hello that has more packets than it has got")
        return found

    def __str__(self) -> str:
        return f"stage {self.stage}, replica {self.replica} ({self.place})"


@dataclass(frozen=True)
class Refusal:
    """Why an end has nothing to do with the other one. standing: as in Hello."""

    reason: str
    standing: int

    def to_bytes(self) -> bytes:
        return with_text(REFUSAL, asdict(self))

    @staticmethod
    def of(frame: Frame) -> Refusal:
        """Raises Garbled."""
        content = frame.content
        standing = content.get("standing")
        return Refusal(str(content.get("reason", "")), standing if isinstance(standing, int) else NEW)


@dataclass
class Terms:
    """What this end knows of the other one before it comes: its stage, and which of its replicas it can be."""

    mine: Hello
    stage: int
    replicas: tuple[int, ...]
    log_begins: int = 0

    @property
    def link(self) -> str:
        """Which one they end, in messages."""
        stages, ends = sorted((self.stage, self.mine.stage)), [self.mine.replica, *self.replicas]
        ends = ends if self.stage == stages[1] else ends[::-1]
        return f"link {stages[0]}→{stages[1]}, replica {'→'.join(str(end) for end in dict.fromkeys(ends))}"

    def is_too_early(self, other: Hello) -> bool:
        """Whether the other end belongs here, and wants what the log has no more."""
        has_all = replace(self, log_begins=0)
        return other.wants is not None and other.wants < self.log_begins and not has_all.objection(other)

    def objection(self, other: Hello) -> str:
        """Why the other end is not the one that belongs here, in a line; '' if it is."""
        mine = self.mine
        if other.stage != self.stage or other.replica not in self.replicas:
            return f"stage {mine.stage}, replica {mine.replica} waits for stage {self.stage} here, not for {other}"
        if found := difference(other.fingerprint, mine.fingerprint):
            name, theirs, ours = found
            return f"{name} differs: {theirs} in stage {other.stage}, {ours} in stage {mine.stage}; start both alike"
        if mine.run and other.run and mine.run != other.run:
            return (
                f"stage {other.stage} is of another run ({other.run[:8]}, stage {mine.stage} of {mine.run[:8]}); name "
                "the output_dir of this one, or begin anew with --overwrite_output_dir"
            )
        if other.wants is not None and other.wants < self.log_begins:
            return (
                f"stage {other.stage} goes on from packet {other.wants}, and stage {mine.stage} has none before "
                f"{self.log_begins}, which a checkpoint of stage {other.stage} held; go on from its newest one, or "
                "start all stages from one step (--resume_from_checkpoint)"
            )
        return ""


def difference(theirs: Mapping[str, Any], ours: Mapping[str, Any], name: str = "") -> tuple[str, Any, Any] | None:
    """Name and both values of the first field that is not alike."""
    for key in [*ours, *(key for key in theirs if key not in ours)]:
        one, other = theirs.get(key), ours.get(key)
        full = f"{name}.{key}" if name else key
        if isinstance(one, dict) and isinstance(other, dict):
            if found := difference(one, other, full):
                return found
        elif one != other:
            return full, one, other
    return None
