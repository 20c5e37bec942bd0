"""Activations of one block are alive at a time, however many blocks a stage has."""

from __future__ import annotations

import weakref
from typing import Any

import pytest
import torch
from conftest import Trainer
from ranks import run_ranks
from torch._subclasses.fake_tensor import FakeTensor


def peak_of_saved_bytes(arguments: list[str]) -> int:
    """Trains, and returns the most bytes that graphs held for their backward passes at a time."""
    from llm_local.train import main

    live = peak = 0

    class Held:
        def __init__(self, tensor: torch.Tensor):
            nonlocal live, peak
            self.tensor = tensor
            # the model is first watched without weights, and without memory
            size = 0 if isinstance(tensor, FakeTensor) else tensor.numel() * tensor.element_size()
            live += size
            peak = max(peak, live)
            weakref.finalize(self, release, size)

    def release(size: int) -> None:
        nonlocal live
        live -= size

    with torch.autograd.graph.saved_tensors_hooks(Held, lambda held: held.tensor):
        assert main(arguments) == 0
    return peak


def measure(trainer: Trainer, name: str, layers: int, **settings: Any) -> int:
    flags = trainer.flags(name, num_stages=1, config_overrides=f"num_hidden_layers={layers}", **settings)
    return run_ranks(peak_of_saved_bytes, 1, flags)[0]


@pytest.mark.processes
def test_greedy_holds_one_layer_and_backpropagation_all(trainer: Trainer):
    greedy = {layers: measure(trainer, f"greedy-{layers}", layers, method="greedy") for layers in (2, 8)}
    whole = {layers: measure(trainer, f"whole-{layers}", layers, method="backprop") for layers in (2, 8)}
    assert greedy[8] == greedy[2]
    assert whole[8] > 2 * whole[2]
    assert greedy[8] < whole[8] / 3


@pytest.mark.processes
def test_overlapping_blocks_hold_two(trainer: Trainer):
    settings = {"method": "overlapping", "layers_per_block": 2, "block_stride": 1}
    held = {layers: measure(trainer, f"windows-{layers}", layers, **settings) for layers in (4, 8)}
    assert held[8] < 1.25 * held[4], "a norm's input a block stays until the micro-batch is through"
