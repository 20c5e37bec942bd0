"""Looks inside a trained local run: what its blocks learn from their own losses, and what backpropagation would ask.

A checkpoint's blocks stand in one process, in float32, without DeepSpeed. On the same rows of validation text, each
block's local gradient, of its own loss, is compared with the true one, of the last block's loss through all blocks
above. Both are gradients of the block's body, not of its head, and go through the body's graph from its output: only
what enters there differs. A fresh linear readout of each block's output says what it holds, whatever the head.

scripts/probe.py is the command.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from llm_local.checkpoint.catalog import Catalog
from llm_local.checkpoint.line import FOLDER, committed
from llm_local.checkpoint.loader import fill_block
from llm_local.checkpoint.manifest import MANIFEST, read_manifest
from llm_local.checks.preflight import document_mask
from llm_local.config import Config
from llm_local.cut import plan_partition
from llm_local.data.sequences import Sequences
from llm_local.data.special_tokens import run_model_config
from llm_local.data.tokenizer import load_tokenizer
from llm_local.model.anatomy import probe
from llm_local.model.block import Block
from llm_local.model.lora import with_adapters
from llm_local.model.loss import IGNORED, LossLinear
from llm_local.model.slices import Seam
from llm_local.model.stage import Blueprint, build_blocks
from llm_local.partition import Partition
from llm_local.registry import METHODS

READOUT_LEARNING_RATE = 1e-2


@dataclass(frozen=True)
class TrainedRun:
    """A run as a checkpoint has it: all blocks of the model, in order, ready to be evaluated."""

    config: Config
    step: int
    partition: Partition
    blocks: list[Block]


@dataclass(frozen=True)
class Gradients:
    """Of one block: the loss of its exit in nats a token; norms of the gradients of its body, and their cosine."""

    loss: float
    cosine: float
    local_norm: float
    true_norm: float


def load_run(run: Path, checkpoint: str | None, device: torch.device) -> TrainedRun:
    """Builds the blocks, by the flags that the checkpoint was written with, and reads their weights.

    checkpoint: its name or path, by default the newest.

    Raises ValueError where there is none, or it has no blocks of that kind, and BrokenCheckpoint where a file is
    missing or damaged; the message says what to do.
    """
    if not (run / "run.yaml").is_file():
        raise ValueError(f"{run} has no run.yaml; name the --output_dir of a run")
    folder = find_committed(run, checkpoint)
    manifest = read_manifest(folder)
    config = manifest.config()
    method = manifest.layout.method
    if not METHODS[method].has_local_losses:
        raise ValueError(f"{folder} was trained with method={method}: one loss for all layers, no local gradient")
    if config.task.sends_labels:
        raise ValueError(f"{folder} was trained with task={config.task.name}; a probe reads models of causal-lm alone")
    catalog = Catalog(folder)
    tokenizer = load_tokenizer(config)
    model_config = run_model_config(config, tokenizer)
    anatomy = probe(model_config, config.model)
    partition = plan_partition(config, anatomy)
    anatomy = with_adapters(config, model_config, anatomy, partition)
    plan, blocks = Blueprint(config, model_config, anatomy, partition, document_mask(config, tokenizer)), list[Block]()
    for stage in range(partition.num_stages):
        blocks += build_blocks(plan, stage)
    for block in blocks:
        fill_block(catalog, block)
        if block.is_frozen:
            block.requires_grad_()  # what its loss asks for can be looked at all the same
    return TrainedRun(config, catalog.manifest.step, partition, [block.eval().to(device) for block in blocks])


def find_committed(run: Path, checkpoint: str | None) -> Path:
    """The newest complete checkpoint of the run, or the one named. Raises ValueError naming those there are."""
    found = committed(run)
    if checkpoint is None:
        if not found:
            raise ValueError(f"{run} has no complete checkpoint to look into; train with --save_steps")
        return found[-1]
    for folder in (run / FOLDER / checkpoint, Path(checkpoint)):
        if (folder / MANIFEST).is_file():
            return folder
    names = ", ".join(folder.name for folder in found) or "none"
    raise ValueError(f"{run} has no complete checkpoint {checkpoint} (it has {names})")


def compare_gradients(run: TrainedRun, ids: torch.Tensor) -> list[Gradients]:
    """Loss and gradients of every block on rows ids (N, T), as many at a time as in a micro-batch of the run.

    Means over the rows, of the losses as they are evaluated: without dropout, clipping, weights of losses, soft targets
    and what else a head has in training only. In overlapping blocks the local gradient has the part that comes from the
    block above, as in training.
    """
    sums = [_Sums() for _ in run.blocks]
    for rows in _micro_batches(run, ids):
        share = len(rows) / len(ids)
        entering = outputs(run.blocks, rows)
        entering = [None, *entering[:-1]]
        true: torch.Tensor | None = None
        above: torch.Tensor | None = None
        for block, hidden, total in reversed(list(zip(run.blocks, entering, sums, strict=True))):
            true, above = total.add(share, block, rows, hidden, true, above)
            above = above if run.partition.overlap else None
    return [total.result() for total in sums]


class _Sums:
    """Means over the micro-batches of one block's loss and gradients."""

    def __init__(self) -> None:
        self.loss = 0.0
        self.local: list[torch.Tensor | None] = []
        self.true: list[torch.Tensor | None] = []

    def add(
        self,
        share: float,
        block: Block,
        ids: torch.Tensor,
        hidden: torch.Tensor | None,
        true: torch.Tensor | None,
        above: torch.Tensor | None,
    ) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Adds a micro-batch's gradients of the block; hidden (B, T, D) enters it. share: of all rows.

        true: gradient (B, T, D) of the last loss by the block's output; None: this is the last block. above: that of
        the loss of the block above, where it trains layers of this one. Returns the gradients of the last and of the
        own loss by `hidden`, None at the start of the model.
        """
        leaf = None if hidden is None else hidden.detach().requires_grad_()
        features = block.features(ids, leaf)
        seam = block.body.border.take_seam()
        read = features.detach().requires_grad_()
        loss = block.readout(read, ids)
        # by the output alone: where the head is tied to the embedding, its own part of that gradient is left out
        (local,) = torch.autograd.grad(loss, read)
        true = local if true is None else true
        parameters = [p for p in block.body_model.parameters() if p.requires_grad]
        wanted = parameters if leaf is None else [*parameters, leaf]
        ours, theirs = (_pull(features, seam, wanted, gradient) for gradient in (local, true))
        self.loss += share * float(loss.detach())
        _add(self.local, ours[: len(parameters)], share)
        _add(self.true, theirs[: len(parameters)], share)
        if above is not None:
            _add(self.local, _grad(features, parameters, above), share)  # to the seam and no further
        return (None, None) if leaf is None else (theirs[-1], ours[-1])

    def result(self) -> Gradients:
        pairs = [(a, b) for a, b in zip(self.local, self.true, strict=True) if a is not None and b is not None]
        dot = sum(float((a.double() * b.double()).sum()) for a, b in pairs)
        local, true = _norm(self.local), _norm(self.true)
        return Gradients(self.loss, dot / max(local * true, 1e-300), local, true)


def _norm(gradients: Iterable[torch.Tensor | None]) -> float:
    return sum(float(g.double().square().sum()) for g in gradients if g is not None) ** 0.5


def _pull(
    features: torch.Tensor, seam: Seam | None, wanted: Sequence[torch.Tensor], gradient: torch.Tensor
) -> list[torch.Tensor | None]:
    """Gradients by `wanted`, from that by the features; through both pieces of a graph that has a seam."""
    if seam is None:
        return _grad(features, wanted, gradient)
    *upper, between = _grad(features, [*wanted, seam.above], gradient)
    assert between is not None
    lower = _grad(seam.below, wanted, between)
    return [a if b is None else b for a, b in zip(upper, lower, strict=True)]


def _grad(output: torch.Tensor, wanted: Sequence[torch.Tensor], gradient: torch.Tensor) -> list[torch.Tensor | None]:
    return list(torch.autograd.grad(output, wanted, gradient, retain_graph=True, allow_unused=True))


def _add(sums: list[torch.Tensor | None], gradients: Sequence[torch.Tensor | None], share: float) -> None:
    sums += [None] * (len(gradients) - len(sums))
    for index, gradient in enumerate(gradients):
        if gradient is not None:
            before = sums[index]
            sums[index] = share * gradient if before is None else before + share * gradient


@torch.no_grad()
def outputs(blocks: Iterable[Block], ids: torch.Tensor) -> list[torch.Tensor]:
    """What each block gives to the next, (B, T, D)."""
    hidden: torch.Tensor | None = None
    found = []
    for block in blocks:
        hidden = block.features(ids, hidden)
        found.append(hidden)
    return found


class Readout(nn.Module):
    """A norm and an output matrix. Starts at zero, so that nothing about it is random."""

    def __init__(self, hidden_size: int, vocab_size: int):
        super().__init__()
        self.norm = nn.RMSNorm(hidden_size)
        self.output = LossLinear.of(nn.Linear(hidden_size, vocab_size, bias=False))
        nn.init.zeros_(self.output.weight)

    def forward(self, features: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """(B, T, D), (B, T) → the mean next-token loss, of the same positions as an exit's."""
        states, targets = self.norm(features[:, :-1].float()).flatten(0, 1), labels[:, 1:].flatten()
        return self.output(states, targets) / (targets != IGNORED).sum().clamp(min=1)


def linear_losses(run: TrainedRun, train: Sequences, ids: torch.Tensor, steps: int) -> list[float]:
    """Losses on rows ids (N, T) of a new linear readout of each block's output, trained while the blocks stay.

    All take `steps` steps of Adam, with a rate that falls to 0, on the first micro-batches of the training rows.
    """
    text: Any = run.blocks[0].body_model.config.get_text_config(decoder=True)
    width = run.blocks[0].body.anatomy.hidden_size
    readouts = nn.ModuleList([Readout(width, text.vocab_size) for _ in run.blocks]).to(ids.device)
    optimizer = torch.optim.Adam(readouts.parameters(), lr=READOUT_LEARNING_RATE)
    falling = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=steps)
    for step in range(steps):
        rows = train.batch(step, run.config.train.per_device_train_batch_size).to(ids.device)
        for readout, features in zip(readouts, outputs(run.blocks, rows), strict=True):
            readout(features, _labels(run, rows)).backward()
        optimizer.step()
        falling.step()
        optimizer.zero_grad()
    losses = torch.zeros(len(run.blocks), dtype=torch.float64)
    with torch.no_grad():
        for rows in _micro_batches(run, ids):
            pairs = zip(readouts, outputs(run.blocks, rows), strict=True)
            found = [float(readout(features, _labels(run, rows))) for readout, features in pairs]
            losses += torch.tensor(found, dtype=torch.float64) * len(rows) / len(ids)
    return losses.tolist()


def _labels(run: TrainedRun, ids: torch.Tensor) -> torch.Tensor:
    documents = run.blocks[0].documents
    return ids if documents is None else documents.labels(ids)


def _micro_batches(run: TrainedRun, ids: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return ids.split(run.config.train.per_device_train_batch_size)
