"""Takes a run up from a checkpoint of any layout: other stages, replicas, blocks, ZeRO stage or precision."""

from __future__ import annotations

import json
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from deepspeed.runtime.engine import DeepSpeedEngine
from torch.optim.lr_scheduler import LambdaLR

from llm_local.adapters.deepspeed_internals import base_optimizer, forget_second_copies
from llm_local.checkpoint.catalog import Catalog
from llm_local.checkpoint.manifest import BrokenCheckpoint, Layout, layout_changes
from llm_local.checkpoint.saver import SHARED, loss_scales
from llm_local.checkpoint.shards import SCALAR, STATE, Shard, Stretch, saved_module, shards, states_of, whole
from llm_local.config import Config, some_of
from llm_local.model.block import EXITS, Block
from llm_local.model.heads.shared import install, installed, matrix_name
from llm_local.model.refresh import INSTALLED
from llm_local.model.slices import Slice
from llm_local.replicas import replicas_text
from llm_local.world import World


def restore(
    catalog: Catalog, config: Config, layout: Layout, world: World, engines: Sequence[DeepSpeedEngine]
) -> tuple[str, ...]:
    """Fills the engines, and tells rank 0 what heads of the checkpoint this run has not, or the other way round.

    Every rank must call. Raises BrokenCheckpoint where the model itself is not whole.
    """
    read, missing = load_engines(catalog, engines, world.shard)
    gone = [name for name in missing if not name.startswith(EXITS)]
    if gone:
        raise BrokenCheckpoint(catalog.path, f"it lacks {some_of(gone)}, of the model's own tensors")
    if world.place.is_recorder:
        world.publish(f"restored/{world.place.stage}", json.dumps([sorted(read), sorted(missing)]))
    if world.place.rank > 0:
        return ()
    seconds = float(config.train.ddp_timeout)
    for stage in world.place.stages[1:]:
        parts = json.loads(world.fetch(f"restored/{stage}", seconds, f"stage {stage} to read the checkpoint"))
        read, missing = read | set(parts[0]), missing | set(parts[1])
    left = [name for name in catalog.weights if name.startswith(EXITS) and name not in read]
    changes = ", ".join(layout_changes(catalog.manifest, layout, config.flat()))
    lines = [f"goes on after {catalog.path}" + (f", with other settings: {changes}" if changes else "")]
    saved = catalog.manifest
    if saved.apart and not (catalog.replica and saved.layout.has_as_many(world.place.replicas)):
        lines += [f"its {replicas_text(saved.layout.stage_replicas)} replicas were apart: all go on from their mean"]
    lines += [f"new, as the checkpoint has none: {_heads(missing)}"] if missing else []
    lines += [f"in the checkpoint, and of no use here: {_heads(left)}"] if left else []
    return tuple(lines)


def _heads(names: Iterable[str]) -> str:
    counts = Counter(int(name.split(".")[1]) for name in names)
    return ", ".join(f"the head after {layers} layers ({count} tensors)" for layers, count in sorted(counts.items()))


def load_engines(catalog: Catalog, engines: Sequence[DeepSpeedEngine], replica: int) -> tuple[set[str], set[str]]:
    """Fills the engines' weights and optimizer state, at whatever layout they have, and sets their schedules.

    Returns the names in the checkpoint that were read, and those of tensors that it does not have: they stay new.
    """
    read: set[str] = set()
    missing: set[str] = set()
    passes: list[dict[str, Stretch]] = []  # in each a tensor is read once; most have a master and weights
    for engine in engines:
        for shard in shards(engine, replica):
            stretches = [*([shard.master] if shard.master else []), *shard.weights]
            source = catalog.source(shard.name, stretches[0].whole_numel) if stretches else None
            if source is None:
                missing |= {shard.name} if stretches else set()
                continue
            read.add(source)
            for stretch in stretches:
                _plan(passes, source, stretch)
            if shard.holder is not None and shard.master is not None:
                state, device = states_of(engine)[shard.holder], step_device(engine.optimizer, shard.holder)
                for name, stretch in _states(catalog, source, shard, state, device):
                    _plan(passes, name, stretch)
        _load_position(catalog, engine)
    for some in passes:
        catalog.read(some)
    for engine in engines:
        forget_second_copies(engine)  # of old weights; the next forward pass makes them anew
    return read, missing


def _plan(passes: list[dict[str, Stretch]], name: str, stretch: Stretch) -> None:
    for some in passes:
        if name not in some:
            some[name] = stretch
            return
    passes.append({name: stretch})


def _states(
    catalog: Catalog, source: str, shard: Shard, state: dict[str, Any], device: torch.device
) -> Iterator[tuple[str, Stretch]]:
    """Sets what the optimizer keeps for the parameter as a whole, numbers of it on the device; yields what is to be
    read for its weights."""
    assert shard.master is not None
    assert shard.holder is not None
    for name in catalog.scalars.get(source, ()):
        key, value = name.partition(SCALAR)[2], catalog.tensor(name)[0]
        # one number for all that lies in a holder: new parameters take that of the old ones
        now = torch.maximum(value, torch.as_tensor(state.get(key, value), dtype=value.dtype, device="cpu"))
        state[key] = now.to(device) if value.dtype == torch.float32 else now.item()
    for name in catalog.states.get(source, ()):
        key = name.partition(STATE)[2]
        if key not in state:
            state[key] = shard.new_state()
        yield name, shard.kept(state[key])


def step_device(optimizer: Any, holder: torch.Tensor) -> torch.device:
    """Where torch's optimizers want the count of a tensor's steps: beside it if they are fused or capturable, and else
    in host memory. torch/optim/optimizer.py, Optimizer._process_value_according_to_param_policy"""
    groups = base_optimizer(optimizer).param_groups
    group = next((each for each in groups if any(one is holder for one in each["params"])), groups[0])
    return holder.device if group.get("fused") or group.get("capturable") else torch.device("cpu")


def fill(catalog: Catalog, tensors: Mapping[str, torch.Tensor]) -> None:
    """Fills tensors that no engine trains. Raises BrokenCheckpoint where one is not there in that size."""
    sources = {name: catalog.source(name, tensor.numel()) for name, tensor in tensors.items()}
    lacking = [name for name, source in sources.items() if source is None]
    if lacking:
        raise BrokenCheckpoint(catalog.path, f"it has no {lacking[0]} of that size: it is of other blocks or heads")
    passes: list[dict[str, Stretch]] = []
    for name, source in sources.items():
        assert source is not None
        _plan(passes, source, whole(tensors[name]))
    for some in passes:
        catalog.read(some)


def fill_block(catalog: Catalog, block: Block) -> None:
    """As fill, for all that a block has; its head is untied where the checkpoint has an output matrix for it."""
    if set(block.tied_names()) & set(catalog.weights):
        output = block.head.output_matrix
        output.weight = torch.nn.Parameter(output.weight.detach().clone())
    fill(catalog, block.saved_tensors())
    install_saved(catalog, block)


def install_saved(catalog: Catalog, block: Block) -> None:
    """Puts the matrix that a shared head reads, which is no parameter, into the block's; nothing into another head."""
    if block.kind.shares_matrix:
        now = installed(block.head)
        install(block.head, load_shared_head(catalog, block.head)[INSTALLED].to(now.device, now.dtype))


def load_shared_head(catalog: Catalog, head: Slice) -> dict[str, torch.Tensor]:
    """For Refresher.start: the copy that heads read, and those on their way. Of a run that shared none, the output
    matrix is the copy. head: that of any block."""
    matrix, names = installed(head), [name for name in catalog.weights if name.startswith(SHARED)]
    shape = getattr(matrix, "ds_shape", matrix.shape)  # the last block's is a parameter, sharded under ZeRO-3
    found = {name.removeprefix(SHARED): catalog.tensor(name).view(shape) for name in names}
    if INSTALLED not in found:
        source = catalog.source(matrix_name(head), shape.numel())
        assert source is not None, "a model has an output matrix"
        found[INSTALLED] = catalog.tensor(source).view(shape)
    return found


def _load_position(catalog: Catalog, engine: DeepSpeedEngine) -> None:
    """Schedule, counters and loss scale: those of the same block, or where there is none of the first one."""
    span = saved_module(engine).span
    span = None if span is None else [span.start, span.stop]
    saved = next((block for block in catalog.blocks if block["span"] == span), catalog.blocks[0])
    position = saved["scheduler"]
    stand_at(engine.lr_scheduler, position.get("last_epoch", position.get("last_batch_iteration", -1) + 1))
    step = catalog.manifest.step
    engine.global_steps = step
    engine.global_samples = step * engine.train_batch_size()
    engine.micro_steps = step * engine.gradient_accumulation_steps()
    for number, name, owner, _ in loss_scales(engine):
        if f"{number}.{name}" in saved["loss_scale"]:
            setattr(owner, name, saved["loss_scale"][f"{number}.{name}"])


def stand_at(scheduler: Any, steps: int) -> None:
    """Puts a new scheduler, of any kind, where one stands that has taken so many steps; so are its groups' rates."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Detected call of `lr_scheduler.step\\(\\)`")
        if isinstance(scheduler, LambdaLR):
            scheduler.last_epoch = steps - 1
            scheduler.step()
        elif hasattr(scheduler, "last_batch_iteration"):
            if steps:
                scheduler.step(steps - 1)
        else:  # torch's make a rate from the one before
            for _ in range(steps):
                scheduler.step()
