"""Schedules of backpropagation that a local pipe is compared with, as instruction lists for simulate.py.

Nothing here runs on an engine; 1F1B, which does, is DeepSpeed's TrainSchedule. Three stages, four micro-batches (W is
the part of a backward pass that computes gradients of weights, where the schedule does it by itself). GPipe (Huang et
al. 2019, arXiv 1811.06965):

    stage 0 | FFFF    BBBBO
    stage 1 |  FFFF  BBBBO
    stage 2 |   FFFFBBBBO

Zero bubble, ZB-H1 (Qi et al. 2023, arXiv 2401.10241):

    stage 0 | FFF  BWFBWBWBWO
    stage 1 |  FF BFBWFBWBWWO
    stage 2 |   FBFBFBWFBWWWO

Interleaved 1F1B (Narayanan et al. 2021, arXiv 2104.04473), two stages with two chunks of layers each:

    stage 0 | FFFFFBFBFBFB B BBBO
    stage 1 |  FFFBFBFBFBFBFBBBO
"""

from __future__ import annotations

from typing import Any

from deepspeed.runtime.pipe.schedule import (
    BackwardPass,
    BufferOpInstruction,
    ForwardPass,
    LoadMicroBatch,
    OptimizerStep,
    PipeInstruction,
    PipeSchedule,
    RecvActivation,
    RecvGrad,
    ReduceGrads,
    SendActivation,
    SendGrad,
)


class WeightPass(BufferOpInstruction):
    """The gradients of the weights, where the BackwardPass before it had `input_only`."""


class _PeerSchedule(PipeSchedule):
    """What the schedules share: a pass with the messages around it. Each message names its micro-batch and chunk."""

    num_chunks = 1

    def _forward(self, micro_batch: int, chunk: int = 0) -> list[PipeInstruction]:
        part, last = self._part(chunk)
        enter = RecvActivation(micro_batch, source=self._before, micro_batch=micro_batch, chunk=chunk)
        after = (part + 1) // self.stages  # another chunk where the last stage sends to the first
        leave = SendActivation(micro_batch, target=self._behind, micro_batch=micro_batch, chunk=after)
        return [
            LoadMicroBatch(micro_batch) if part == 0 else enter,
            ForwardPass(micro_batch, block=chunk, micro_batch=micro_batch),
            *([] if part == last else [leave]),
        ]

    def _backward(self, micro_batch: int, chunk: int = 0, input_only: bool = False) -> list[PipeInstruction]:
        part, last = self._part(chunk)
        enter = RecvGrad(micro_batch, source=self._behind, micro_batch=micro_batch, chunk=chunk)
        after = (part - 1) // self.stages
        leave = SendGrad(micro_batch, target=self._before, micro_batch=micro_batch, chunk=after)
        return [
            *([] if part == last else [enter]),
            BackwardPass(micro_batch, block=chunk, micro_batch=micro_batch, input_only=input_only),
            *([] if part == 0 else [leave]),
        ]

    @property
    def _before(self) -> int:
        return (self.stage_id - 1) % self.stages

    @property
    def _behind(self) -> int:
        return (self.stage_id + 1) % self.stages

    def _part(self, chunk: int) -> tuple[int, int]:
        """Which part of the model the chunk is, and which is the last one."""
        return chunk * self.stages + self.stage_id, self.num_chunks * self.stages - 1


class GPipeSchedule(_PeerSchedule):
    """One step: every forward pass, then every backward pass; all micro-batches are alive in between."""

    def steps(self) -> Any:
        for micro_batch in range(self.micro_batches):
            yield self._forward(micro_batch)
        for micro_batch in range(self.micro_batches):
            yield self._backward(micro_batch)
        yield [ReduceGrads(), OptimizerStep()]


class ZeroBubbleSchedule(_PeerSchedule):
    """One step of ZB-H1: 1F1B whose backward passes hand their input's gradient on before they compute the weights'.

    Stage k puts the latter off by k micro-batches, so that it fills the time in which 1F1B drains; every stage has
    as many micro-batches alive as the first one of 1F1B.
    """

    def steps(self) -> Any:
        ahead = min(self.stages - self.stage_id - 1, self.micro_batches)
        for micro_batch in range(ahead):
            yield self._forward(micro_batch)
        for micro_batch in range(self.micro_batches):
            commands = []
            if micro_batch + ahead < self.micro_batches:
                commands = self._forward(micro_batch + ahead)
            commands += self._backward(micro_batch, input_only=True)
            if micro_batch >= self.stage_id:
                commands += self._weights(micro_batch - self.stage_id)
            yield commands
        for micro_batch in range(max(0, self.micro_batches - self.stage_id), self.micro_batches):
            yield self._weights(micro_batch)
        yield [ReduceGrads(), OptimizerStep()]

    def _weights(self, micro_batch: int) -> list[PipeInstruction]:
        return [WeightPass(micro_batch, block=0, micro_batch=micro_batch)]

    def num_pipe_buffers(self) -> int:
        return min(self.stages, self.micro_batches)


class InterleavedSchedule(_PeerSchedule):
    """One step of 1F1B in which a stage has several chunks of layers: chunk c of stage k is part c·stages + k of the
    model. Messages of the last stage to the first wrap around.

    Raises ValueError where the stages do not divide the micro-batches, which the order of chunks needs.
    """

    def __init__(self, micro_batches: int, stages: int, stage_id: int, num_chunks: int = 2):
        super().__init__(micro_batches, stages, stage_id)
        self.num_chunks = num_chunks
        if num_chunks > 1 and micro_batches % stages:
            raise ValueError(
                f"the interleaved schedule cannot divide {micro_batches} micro-batches by {stages} stages; "
                f"use a multiple of {stages}"
            )

    def steps(self) -> Any:
        total = self.micro_batches * self.num_chunks
        ahead = min(total, self.num_ahead)
        for number in range(ahead):
            yield self._forward(*self._at(number))
        for number in range(total):
            commands = []
            if number + ahead < total:
                commands = self._forward(*self._at(number + ahead))
            micro_batch, chunk = self._at(number)
            yield commands + self._backward(micro_batch, self.num_chunks - 1 - chunk)
        yield [ReduceGrads(), OptimizerStep()]

    @property
    def num_ahead(self) -> int:
        """Forward passes before the first pair of a forward and a backward pass."""
        behind = self.stages - self.stage_id - 1
        return behind if self.num_chunks == 1 else 2 * behind + (self.num_chunks - 1) * self.stages

    def _at(self, number: int) -> tuple[int, int]:
        """Micro-batch and chunk of the stage's n-th forward pass: as many micro-batches as stages through each chunk
        in turn."""
        group, rest = divmod(number, self.stages * self.num_chunks)
        chunk, micro_batch = divmod(rest, self.stages)
        return group * self.stages + micro_batch, chunk

    def num_pipe_buffers(self) -> int:
        return min(self.micro_batches * self.num_chunks, self.num_ahead + 1)
