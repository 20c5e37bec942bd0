"""A method and a head of one's own, in one file: registered, then named like those of the library.

    torchrun --nproc_per_node 2 docs/examples/adding_a_method.py

A method says how a step goes, instruction by instruction, and a head what turns a block's output into a loss. Flags,
checks, planner and study take both from the registry; every rank registers them before it prepares the run.
"""

import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

import llm_local as ll

FOLDER = sys.argv[1] if len(sys.argv) > 1 else "runs/own-method"


class AlternatingSchedule(ll.Schedule):
    """One step in which every second micro-batch trains the heads alone, but the last block's, which is the model's."""

    name = "alternating"

    def steps(self) -> Iterator[list[Any]]:
        for micro_batch in range(self.micro_batches):
            commands = [self.enter(0)]
            for block in range(self.num_blocks):
                alone = micro_batch % 2 == 0 and not self.is_last(block)
                commands += [*self.forward(0, block, detach_head=alone), self.backward(0, block)]
            yield commands + self.end(micro_batch)


class Alternating(ll.Method):
    own_schedule = AlternatingSchedule


class Squashed(ll.Head):
    """A linear head of squashed states. An exit with it is no model that transformers has, and this says why."""

    exit_problem = "its head squashes what the output matrix reads"

    def transform(self, head: Any) -> nn.Module:
        return nn.Tanh()


ll.register_method("alternating", Alternating())
ll.register_head("squashed", Squashed())

config = ll.Config.load(
    model_type="llama",
    config_overrides="num_hidden_layers=4,hidden_size=64,intermediate_size=128,num_attention_heads=4,"
    "num_key_value_heads=4,vocab_size=4096,max_position_embeddings=128",
    method="alternating",
    head="squashed",
    num_stages=2,
    seq_length=64,
    per_device_train_batch_size=4,
    gradient_accumulation_steps=2,
    max_steps=20,
    learning_rate=5e-3,
    eval_batches=2,
    output_dir=FOLDER,
    overwrite_output_dir=True,
)
with ll.prepare(config) as run:
    losses = torch.stack([run.train_step().losses[-1] for _ in run.steps()])
    run.export()
    print(f"stage {run.place.stage}: loss {losses[0]:.3f}, then {losses[-1]:.3f}")
assert losses[-1] < losses[0]
