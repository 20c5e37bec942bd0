"""The links of a rank, made boundary by boundary."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from llm_local.links.dealt import SenderToAll, receiver_of, sender_of
from llm_local.links.ends import Receiver, Sender
from llm_local.links.link import ReceivingEnd, SendingEnd, StepReceivingEnd
from llm_local.links.together import SharedReceiver
from llm_local.place import Place
from llm_local.trace import Tracer
from llm_local.world import TensorRanks, World

REFRESH_IN_FLIGHT = 2


@dataclass(frozen=True)
class Links:
    """The links of one rank, as far as it has them: activations come in and go out, gradients come back and go back.

    The refresh links, whose way is that of gradients, are refresh.py's to use, wait for and close.
    """

    receiver: StepReceivingEnd | None = None
    sender: SendingEnd | None = None
    gradient_receiver: StepReceivingEnd | None = None
    gradient_sender: SendingEnd | None = None
    refresh_receiver: ReceivingEnd | None = None
    refresh_sender: SendingEnd | None = None

    @staticmethod
    def join(
        world: World, wire_dtype: str, max_in_flight: int, back_dtype: str | None, refresh_dtype: str | None
    ) -> Links:
        """Makes them, boundary by boundary. Every rank must call. back_dtype: that of gradients or soft targets, and
        refresh_dtype: that of a shared head's matrix, where the run has such."""
        if world.tensor is None:
            return Links._own(world, wire_dtype, max_in_flight, back_dtype, refresh_dtype)
        assert refresh_dtype is None, "tensor_problems.py refuses a shared head"
        links, place = Links(), world.place
        if place.tensor_rank == 0:
            links = Links._own(world, wire_dtype, max_in_flight, back_dtype, None)
        return links._shared(world.tensor, world.device, place, back_dtype is not None)

    def _shared(self, ranks: TensorRanks, device: torch.device, place: Place, comes_back: bool) -> Links:
        """What the ranks of a replica have of the first one's."""

        def received(end: StepReceivingEnd | None, is_any: bool) -> StepReceivingEnd | None:
            return SharedReceiver(end, ranks, device) if is_any else None

        def sent(end: SendingEnd | None, is_any: bool) -> SendingEnd | None:
            return (end or SenderToAll([])) if is_any else None

        has_before, has_behind = not place.is_first_stage, not place.is_last_stage
        return Links(
            received(self.receiver, has_before),
            sent(self.sender, has_behind),
            received(self.gradient_receiver, has_behind and comes_back),
            sent(self.gradient_sender, has_before and comes_back),
        )

    @staticmethod
    def _own(
        world: World, wire_dtype: str, max_in_flight: int, back_dtype: str | None, refresh_dtype: str | None
    ) -> Links:
        """Of a rank that shares none."""
        place = world.place
        before, behind = place.stage - 1, place.stage + 1
        receiver = sender = refresh_sender = refresh_receiver = None
        if not place.is_first_stage:
            dealing = place.dealing(before)
            ends = {peer: Receiver(world, before, max_in_flight, replica=peer) for peer in dealing.peers}
            receiver = receiver_of(ends, dealing)
        gradient_sender = None
        if back_dtype is not None and not place.is_first_stage:
            gradient_sender = Sender(world, before, back_dtype, max_in_flight)
        if refresh_dtype is not None and not place.is_first_stage:
            refresh_sender = SenderToAll(
                [
                    Sender(world, before, refresh_dtype, REFRESH_IN_FLIGHT, background=True, replica=peer)
                    for peer in place.dealing(before).targets
                ]
            )
        if not place.is_last_stage:
            dealing = place.dealing(behind)
            ends = {peer: Sender(world, behind, wire_dtype, max_in_flight, replica=peer) for peer in dealing.peers}
            sender = sender_of(ends, dealing)
        gradient_receiver = None
        if back_dtype is not None and not place.is_last_stage:
            gradient_receiver = Receiver(world, behind, max_in_flight)
        if refresh_dtype is not None and not place.is_last_stage:
            source = place.dealing(behind).source
            refresh_receiver = Receiver(world, behind, REFRESH_IN_FLIGHT, background=True, replica=source)
        return Links(receiver, sender, gradient_receiver, gradient_sender, refresh_receiver, refresh_sender)

    def all(self) -> list[SendingEnd | StepReceivingEnd]:
        found = (self.receiver, self.sender, self.gradient_receiver, self.gradient_sender)
        return [link for link in found if link is not None]

    def trace(self, tracer: Tracer) -> None:
        for link in (*self.all(), self.refresh_receiver):
            if isinstance(link, Receiver):
                link.tracer = tracer

    def close(self, step: int) -> None:
        """Goodbyes over each link, forward first."""
        for link in (self.receiver, self.sender, self.gradient_sender, self.gradient_receiver):
            if link is not None:
                link.close(step)
