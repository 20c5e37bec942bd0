"""What a head is: a file of this package each, and whatever else was registered."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import nn

from llm_local.config import Config
from llm_local.model.anatomy import Anatomy
from llm_local.model.slices import Slice
from llm_local.registry import HEADS


class Head:
    """What turns a block's output into a loss: private layers, a norm and an output matrix of its own. The model's last
    block has the model's own head, whatever the others have.

    name: what --head calls it; `register_head` gives it. takes_private_layers, needs_private_layers: what the flags may
    and must ask for. shares_matrix: it reads a copy of the last block's output matrix, which refresh.py brings, and
    does not train it. exit_problem: why an exit with it is no model of its own; '' where it is one.
    """

    name = ""
    takes_private_layers: ClassVar[bool] = True
    needs_private_layers: ClassVar[bool] = False
    shares_matrix: ClassVar[bool] = False
    exit_problem: ClassVar[str] = ""

    def problems(self, config: Config) -> list[str]:
        """What is wrong with the flags for this head, head_layers_schedule being a list of whole numbers if given."""
        local, text = config.local, config.local.head_layers_schedule
        problems = []
        if self.needs_private_layers and text is None and not local.head_layers:
            problems.append(f"head={self.name} needs private layers; set head_layers=1 or more, or use head=linear")
        elif self.needs_private_layers and text is not None and not any(config.head_layers_schedule):
            problems.append(
                f"head={self.name} needs private layers, head_layers_schedule={text!r} has none; use 1 or more, or "
                "head=linear"
            )
        if not self.takes_private_layers:
            if text is not None:
                given = f"head_layers_schedule={text!r} is given"
                problems.append(f"head={self.name} has no private layers, {given}; use head=decoder")
            elif local.head_layers > 0:
                given = f"head_layers is {local.head_layers}"
                problems.append(f"head={self.name} has no private layers, {given}; use head=decoder")
            if local.head_rank is not None and config.method.has_local_losses:
                problems.append(
                    f"head_rank={local.head_rank} is for the private layers of a head, head={self.name} has none; use "
                    "head=decoder with head_layers, or leave it out"
                )
        return problems

    def output_of(self, anatomy: Anatomy) -> int | None:
        """Layers below the head whose output matrix this one's equals when both are new; None: it is one of its own."""
        return None

    def connect(self, config: Config, head: Slice, body: Slice) -> None:
        """Finishes the output matrix of a new head; where the model ties it to the embedding, the first block's is."""
        if not (body.is_first and body.anatomy.tied):
            return
        if config.local.lora_rank is not None and not head.is_models_own:
            return  # it trains, and the embedding does not
        output, embedding = head.output_matrix, body.embedding
        # files that hold two different ones are believed before the config, as transformers does it
        if not config.model.model_name_or_path or torch.equal(output.weight, embedding.weight):
            output.weight = embedding.weight

    def transform(self, head: Slice) -> nn.Module | None:
        """What stands between the norm and the output matrix, (B, T, D) → (B, T, D); its tensors, which must be
        contiguous, are in checkpoints under their own names, and have no weight decay."""
        return None

    def folded(self, head: Slice, transform: nn.Module | None) -> dict[str, torch.Tensor]:
        """The exit's tensors that are others than the head's, as it has no transform. All replicas must call."""
        return {}


def head_of(config: Config) -> Head:
    """Of all blocks but the last; of an unknown name, which problems.py refuses, a plain one."""
    return (HEADS.get(config.local.head) if config.method.has_local_losses else None) or Head()


def register_head(name: str, head: Head) -> None:
    """Lets --head name it. Every rank must call, before its flags are checked. Raises ValueError for a name that is
    taken."""
    HEADS.add(name, head)
    head.name = name
