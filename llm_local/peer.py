"""Who a rank is to the others, and what is said where one is lost."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass

from llm_local.owner import machine


class LostPeer(RuntimeError):
    """A peer is gone, hangs, or never came."""


@dataclass(frozen=True)
class Peer:
    """Who a rank is, as it says itself in the store."""

    rank: int
    stage: int
    replica: int
    host: str
    pid: int
    links: str

    @staticmethod
    def me(rank: int, stage: int, replica: int, num_stages: int) -> Peer:
        links = [f"{k}→{k + 1}" for k in (stage - 1, stage) if 0 <= k < num_stages - 1]
        text = f"link {' and '.join(links)}" if links else "no link"
        return Peer(rank, stage, replica, machine(), os.getpid(), text)

    def __str__(self) -> str:
        return f"stage {self.stage}, replica {self.replica} (rank {self.rank}, pid {self.pid}, {self.links})"


def encode(peer: Peer) -> str:
    return json.dumps(asdict(peer))


def decode(text: str | bytes) -> Peer:
    return Peer(**json.loads(text))
