"""A block: consecutive layers of the model with a head and a loss of their own."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import nullcontext
from typing import Any, ClassVar

import torch
from torch import nn

from llm_local.adapters.hf_internals import rows_as_they_stand
from llm_local.methods.schedule import Forward
from llm_local.model.document_mask import DocumentMask
from llm_local.model.heads.head import Head
from llm_local.model.lora import original_name
from llm_local.model.loss import head_logits, head_loss
from llm_local.model.router_loss import Routers
from llm_local.model.slices import Slice
from llm_local.model.windows import cut, cut_inputs
from llm_local.partition import Span

_PLAIN = Forward()
EXITS = "exits."  # in a checkpoint, the heads that are not the model's own


def named_once(places: Iterable[tuple[str, nn.Module]]) -> dict[str, torch.Tensor]:
    """Parameters and saved buffers of modules, each behind its prefix, as if there were no adapters beside them; what
    two places share has the first name."""
    found: dict[int, tuple[str, torch.Tensor]] = {}
    for prefix, module in places:
        for name, tensor in module.state_dict(keep_vars=True).items():
            found.setdefault(id(tensor), (f"{prefix}{original_name(name)}", tensor))
    return dict(found.values())


class Block(nn.Module):
    """A body, the block's layers of the model, and the head that turns its output into a loss.

    Body and head are slices of the model: the head's are the private layers, the norm and the output matrix.
    kind: what the head is beside that (model/heads).
    mixes: the head also reads, times a learned number that is 0 at first, what entered the block; such an exit is no
    model of the class. After the contextual supervision of local learning: earlier features go to the head alone.
    documents: how packed documents are kept apart, if they are. routed: in training the loss has the router losses of
    body and private layers, each as the model class has that of its layers; evaluation is of the language model alone.

    measured: (M,) what the task measures beside the loss, of the last forward pass that was an evaluation's.
    """

    has_head: ClassVar[bool] = True

    def __init__(
        self,
        body: Slice,
        head: Slice,
        kind: Head | None = None,
        mixes: bool = False,
        documents: DocumentMask | None = None,
        routed: bool = False,
    ):
        super().__init__()
        self.kind = kind or Head()
        self.transform = self.kind.transform(head)
        self.feature_scale = nn.Parameter(torch.zeros(1)) if mixes else None
        self.kept: torch.Tensor | None = None
        self.measured = torch.zeros(len(head.task.measures))
        self.body = body
        self.head = head
        self.body_model = body.model
        self.head_model = head.model
        self.documents = documents
        self._routers = [Routers(body), Routers(head)] if routed else []

    def features(self, input_ids: torch.Tensor | None, hidden: torch.Tensor | None, **inputs: Any) -> torch.Tensor:
        """The block's output (B, T, D) with its graph; arguments as in forward."""
        assert (hidden is None) == self.body.is_first, "only the first block starts from ids"
        entering = None if hidden is None else hidden.to(self.body.model.dtype)
        return self.body(entering, **self._inputs_of(self.body, input_ids, inputs))[0]

    def readout(
        self, features: torch.Tensor, input_ids: torch.Tensor | None, labels: torch.Tensor | None = None, **inputs: Any
    ) -> torch.Tensor:
        """The mean next-token loss of features (B, T, D), a float32 scalar."""
        return self._loss(self.normed(features, input_ids, **inputs), input_ids, labels, **inputs)

    def _loss(
        self, normed: torch.Tensor, input_ids: torch.Tensor | None, labels: torch.Tensor | None = None, **inputs: Any
    ) -> torch.Tensor:
        if self.documents is not None:
            assert input_ids is not None, "documents are of text"
            labels = self.documents.labels(input_ids, labels, inputs.get("position_ids"))
        task = self.head.task
        if task.measures and not self.training:
            self.measured = task.measure(*task.scored(normed, input_ids, labels))
        return head_loss(self.head, normed, input_ids, labels)

    def _inputs_of(self, part: Slice, input_ids: torch.Tensor | None, inputs: dict[str, Any]) -> dict[str, Any]:
        """What a slice's model is given beside hidden states."""
        if input_ids is not None:
            if self.documents is not None:
                inputs = self.documents.inputs(part.base(), input_ids, inputs)
            inputs = {"input_ids": input_ids, **inputs}
        return {**inputs, **Routers.asked} if self._routers and self.training else inputs

    def logits(self, features: torch.Tensor, input_ids: torch.Tensor | None, **inputs: Any) -> torch.Tensor:
        """The head's logits (B, T, V) of features (B, T, D)."""
        return head_logits(self.head, self.normed(features, input_ids, **inputs), input_ids)

    def normed(self, features: torch.Tensor, input_ids: torch.Tensor | None, **inputs: Any) -> torch.Tensor:
        """What the output matrix reads of features (B, T, D)."""
        _, normed = self.head(features, **self._inputs_of(self.head, input_ids, inputs))
        return normed if self.transform is None else self.transform(normed)

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        hidden: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        return_logits: bool = False,
        window: torch.Tensor | None = None,
        meaning: Forward = _PLAIN,
        **inputs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """input_ids (B, T), hidden (B, T, D) from the block before or None at the start of the model; inputs are the
        model's own attention_mask and position_ids where the data has them, or what a task has instead of ids.

        Returns the local loss (float32 scalar), or the head's logits (B, T, V) if wanted; the hidden states (B, T, D)
        for the block behind, which carry no graph; and the same with their graph, for a method that sends gradients
        back. Logits are those of a plain model, to which a row is one document. With a window (B, L) the loss is that
        of those positions; what it trains, and whether what the output matrix read is to be taken, says the meaning.
        """
        if self.documents is not None:
            assert input_ids is not None, "documents are of text"
            inside = torch.arange(input_ids.shape[1], device=input_ids.device).expand_as(input_ids)
            inputs.setdefault("position_ids", inside if return_logits else self.documents.positions(input_ids))
        features = self.features(input_ids, hidden, **inputs)
        leaving = features.detach()
        if not self.has_head:
            return features.new_zeros((), dtype=torch.float32), leaving, features
        read = leaving if meaning.detach_head else features
        if self.feature_scale is not None:
            assert hidden is not None
            # detached: overlapping blocks would send a gradient down through it
            read = read + self.feature_scale.to(read.dtype) * hidden.detach().to(read.dtype)
        if return_logits:
            return self.logits(read, input_ids, **inputs), leaving, features
        read_by_head: dict[str, Any] = {"input_ids": input_ids, "labels": labels, **inputs}
        if window is not None:
            read, read_by_head = cut(read, window), cut_inputs(self.head, window, read_by_head)
        # the positions of a window follow each other
        with nullcontext() if window is None or "position_ids" in inputs else rows_as_they_stand():
            if meaning.keeps_normed:
                self.kept = self.normed(read, input_ids, **inputs)
                loss = self._loss(self.kept, **read_by_head)
            else:
                loss = self.readout(read, **read_by_head)
        if self._routers and self.training:
            masks = [d.get("attention_mask") for d in (inputs, read_by_head)]
            of_body, of_head = (r.take_loss(mask) for r, mask in zip(self._routers, masks, strict=True))
            loss = loss + of_head + (0.0 if meaning.body_waits else of_body)
        return loss, leaving, features

    @property
    def span(self) -> Span:
        """The layers of the body."""
        return self.body.span

    @property
    def is_frozen(self) -> bool:
        """Whether nothing of the block is trained."""
        return not any(parameter.requires_grad for parameter in self.parameters())

    @property
    def _head_prefix(self) -> str:
        """What the names of the head begin with in a checkpoint: nothing, if it is the model's own."""
        return "" if self.body.is_last else f"{EXITS}{self.span.stop}."

    def saved_tensors(self) -> dict[str, torch.Tensor]:
        """Parameters and saved buffers by their names in a checkpoint."""
        own = {f"{self._head_prefix}{name}": p for name, p in self.named_parameters(recurse=False)}
        places = [("", self.body_model), (self._head_prefix, self.head_model)]
        return named_once(places) | own | named_once([(self._head_prefix, self.transform)] if self.transform else [])

    def tied_names(self) -> dict[str, str]:
        """Names of the head that stand for a parameter of the body, and that one's name: tied embeddings."""
        body = {id(tensor): name for name, tensor in self.body_model.state_dict(keep_vars=True).items()}
        head = self.head_model.state_dict(keep_vars=True).items()
        return {f"{self._head_prefix}{name}": body[id(tensor)] for name, tensor in head if id(tensor) in body}

    def folded(self) -> dict[str, torch.Tensor]:
        """What the exit's output matrix is where it is not the one that the head reads; all replicas must call."""
        return self.kind.folded(self.head, self.transform)

    def take_normed(self) -> torch.Tensor:
        """(B, T, D) what the output matrix read in the last forward pass, with its graph."""
        kept, self.kept = self.kept, None
        assert kept is not None, "the last forward pass kept nothing"
        return kept


class Trunk(Block):
    """A block without a head: the gradient of its output comes from the block behind it. Its loss is 0."""

    has_head = False

    def __init__(self, body: Slice, documents: DocumentMask | None = None):
        nn.Module.__init__(self)
        self.body = body
        self.body_model = body.model
        self.head: Any = None
        self.documents = documents
        self.measured = torch.zeros(len(body.task.measures))
        self._routers = []

    def saved_tensors(self) -> dict[str, torch.Tensor]:
        return named_once([("", self.body_model)])

    def tied_names(self) -> dict[str, str]:
        return {}

    def folded(self) -> dict[str, torch.Tensor]:
        return {}
