"""Bytes that DeepSpeed's engine of a block holds, as a pure function of sizes, by what its optimizers do (0.19).

The ZeRO paper (Rajbhandari et al. 2020, arXiv 1910.02054) has in mixed precision 2, 2 and 12 bytes a parameter for
weights, gradients and optimizer, the 12 being float32 weights and Adam's two moments; stages 1, 2 and 3 divide
optimizer, gradients and weights among the ranks. DeepSpeed takes more:

- ZeRO 1 and 2 copy the weights that a rank updates also where they are float32 already; ZeRO 3 does not.
- with ZeRO a buffer holds gradients until they are reduced, and is there in the whole backward pass.
- a step makes float32 gradients beside those that the backward pass has left, under ZeRO of what the rank updates.
- ZeRO 3 gathers the weights that come within max_reuse_distance again: all of a block that is no larger.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from llm_local.ds_config import BUCKET, zero_stage
from llm_local.files import Json

BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}
_MASTER, _MOMENTS = 4, 8  # bytes of a parameter: its float32 weight, and Adam's two
_LIVE = 1_000_000_000


@dataclass(frozen=True)
class Zero:
    """What DeepSpeed's JSON says of ZeRO. bucket: elements of gradients that are reduced at a time; live: of weights
    that stage 3 gathers at most. offloads, offloads_weights: to host memory."""

    stage: int
    bucket: int = BUCKET
    live: int = _LIVE
    offloads: bool = False
    offloads_weights: bool = False

    @staticmethod
    def of(settings: Json) -> Zero:
        """settings: of one engine, without "auto"."""
        zero = settings.get("zero_optimization", {})
        reused, live = (zero.get(f"stage3_max_{name}", _LIVE) for name in ("reuse_distance", "live_parameters"))
        offloads = [zero.get(f"offload_{what}", {}).get("device") == "cpu" for what in ("optimizer", "param")]
        return Zero(
            zero_stage(settings), int(zero.get("reduce_bucket_size", BUCKET)), int(min(reused, live)), *offloads
        )


@dataclass(frozen=True)
class EngineMemory:
    """Bytes of a rank.

    weights, optimizer, standing: at all times; standing are buffers of gradients. gathered: weights in passes through
    the block. gradients: from its backward passes to its step, in which `step` come beside them. buffer: of gradients
    on their way in a backward pass, and `end` beside at its end. host: in host memory, of a device that is another.
    """

    weights: float
    optimizer: float
    gradients: float = 0.0
    standing: float = 0.0
    gathered: float = 0.0
    buffer: float = 0.0
    end: float = 0.0
    step: float = 0.0
    host: float = 0.0


def engine_memory(
    trained: int, precision: str, zero: Zero, num_ranks: int, accumulates: bool = False, largest: int = 0
) -> EngineMemory:
    """Of an engine that trains so many parameters with Adam. accumulates: a step has several micro-batches; largest: of
    the numbers of elements that parameters have."""
    each, part = BYTES[precision], trained / num_ranks
    bucket, flat = each * min(zero.bucket, trained), 0 if each == 4 else each
    if zero.stage == 0:
        step = max(bucket if num_ranks > 1 else 0, 4 * trained if flat else 0)
        return EngineMemory(each * trained, (_MOMENTS + bool(flat) * _MASTER) * trained, each * trained, step=step)
    float32 = (4 + flat) * part  # gradients that the optimizer reads, and what they are made of
    if zero.stage == 3:
        optimizer, weights = (_MOMENTS + bool(flat or zero.offloads) * _MASTER) * part, each * part
        gathered = each * min(zero.live, trained)
        made = EngineMemory(weights, optimizer, 0.0, weights + bucket, gathered, end=bucket, step=float32)
    elif zero.stage == 2:
        optimizer, own = (_MASTER + _MOMENTS) * part, each * part
        made = EngineMemory(each * trained, optimizer, own, buffer=bucket, end=own * accumulates, step=float32)
    else:
        # the gradients move into the buffer, and what the rank updates by is then copied from there
        own, others = each * trained, bucket if num_ranks > 1 else 0
        step = max(bucket, others + each * part + float32 - own)
        made = EngineMemory(each * trained, (_MASTER + _MOMENTS) * part, own, buffer=bucket, step=step)
    return _offloaded(made, each, part, zero, largest) if zero.offloads else made


def _offloaded(made: EngineMemory, each: int, part: float, zero: Zero, largest: int) -> EngineMemory:
    """With the optimizer in host memory, where it also has a float32 gradient, the one that has come, and under ZeRO 1
    and 2 what it makes of it, all at all times."""
    host = made.optimizer + (4 + each) * part
    if zero.stage == 3:
        standing, weights = made.standing - each * part, 0.0 if zero.offloads_weights else made.weights
        host += made.weights - weights
        return replace(made, weights=weights, optimizer=0.0, standing=standing, step=0.0, host=host)
    # on its way there a gradient is in a buffer of its size, one on each side
    on_its_way = each * largest
    standing = made.standing + on_its_way
    return replace(made, optimizer=0.0, standing=standing, step=0.0, host=host + each * part + on_its_way)
