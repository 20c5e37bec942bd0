"""Whether a model type can be trained in stages and exported, tried on a tiny model of it in this process.

    examine("mixtral", "causal-lm")    # Finding(model_type='mixtral', status='exact', ties=('untied', 'tied'), ...)

Three stages of two layers, with weights under which no norm or bias is an identity, against the undivided model of
plain transformers, bit for bit on the CPU and for tied and untied embeddings: new weights; logits, loss and all
gradients of the chained stages; the logits of the exported whole, and of the exit of each stage.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import nn
from torch.nn import functional as F
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerFast

from llm_local.checks.class_problems import class_problems
from llm_local.checks.exit_check import refused_exits
from llm_local.checks.tiny import tiny_config
from llm_local.config import Config
from llm_local.export.model_folder import Description, model_without_memory
from llm_local.export.stages import collect, compose, exit_folder, exit_name, write_stage
from llm_local.flags import ModelArguments
from llm_local.model.anatomy import SliceError, probe, text_config
from llm_local.model.block import Block
from llm_local.model.observation import name_of
from llm_local.model.slices import new_slice, try_slices
from llm_local.model.stage import Blueprint, build_block
from llm_local.partition import Partition, Span
from llm_local.registry import TASKS
from llm_local.tasks.task import IGNORED, Task

EXACT, REFUSED, WRONG, UNTRIED = "exact", "refused", "wrong", "not tried"
NUM_STAGES = 3
MOST_PARAMETERS = 10_000_000
LOSS_TOLERANCE = 1e-5  # the local loss is summed position by position
_SEED = 7


@dataclass(frozen=True)
class Finding:
    """What came out for a model type.

    status: exact; refused, before a run would start; wrong, which should not be; not tried. reason: why, in a line.
    ties: the variants that were compared. exits: how the models of the earlier stages do. note: what else there is.
    """

    model_type: str
    status: str
    reason: str = ""
    ties: tuple[str, ...] = ()
    exits: str = ""
    note: str = ""


class Different(Exception):
    """The stages and the undivided model do not agree; the message says in what."""


class Refused(Exception):
    """A run of the type would not start; the message is the line that it ends with."""


def one_line(error: BaseException) -> str:
    """The message, with the kind of error where it is none of ours."""
    text = " ".join(str(error).split())
    return text if isinstance(error, (SliceError, Refused, Different)) else f"{type(error).__name__}: {text}"[:200]


def examine(model_type: str, task: str = "causal-lm") -> Finding:
    """Tries the type, untied and tied where it can be both."""
    try:
        config = tiny_config(model_type, task)
        size = sum(parameter.numel() for parameter in model_without_memory(config, task).parameters())
    except Exception as error:  # whatever a class makes of sizes that it was not meant for
        return Finding(model_type, UNTRIED, f"no tiny model: {one_line(error)}")
    if size > MOST_PARAMETERS:
        try:
            probe(config, ModelArguments(task=task), try_slices)  # of any size
        except SliceError as error:
            return Finding(model_type, REFUSED, one_line(error))
        return Finding(model_type, UNTRIED, f"the tiny model still has {size:,} parameters")
    return replace(compare(config, task), model_type=model_type)  # gpt-sw3's config says gpt2


def compare(config: PretrainedConfig, task: str = "causal-lm") -> Finding:
    """Tries the model of a config, untied and tied where it can be both."""
    kind = config.model_type
    ties: list[str] = []
    refused: dict[str, str] = {}
    exits = note = ""
    for wanted in (False,) if TASKS[task].answers_once else (False, True):
        variant = copy.deepcopy(config)
        variant.tie_word_embeddings = text_config(variant).tie_word_embeddings = wanted
        try:
            trial = _Trial(variant, task)
            if not ties:  # they are the same for both
                refused = trial.look_ahead()
            trial.check_new_weights()
            trial.copy_weights()
            trial.check_chain()
            note = trial.check_losses()
            exits = trial.check_exports(refused)
        except (SliceError, Refused) as error:
            return Finding(kind, REFUSED, one_line(error))
        except Exception as error:
            return Finding(kind, WRONG, one_line(error), tuple(ties))
        ties.append("tied" if trial.anatomy.tied else "untied")
    return Finding(kind, EXACT, "", () if TASKS[task].answers_once else tuple(dict.fromkeys(ties)), exits, note)


class _Trial:
    """One tiny model, undivided and in stages. Each check raises Different where they do not agree."""

    def __init__(self, config: PretrainedConfig, task: str):
        self.config = config
        self.config.dtype = torch.float32
        self.anatomy = probe(config, ModelArguments(task=task), try_slices)
        layers = self.anatomy.num_layers
        cuts = [layers * k // NUM_STAGES for k in range(NUM_STAGES + 1)]
        spans = tuple(Span(a, b) for a, b in pairwise(cuts))
        self.partition = Partition(spans, tuple(Span(k, k + 1) for k in range(NUM_STAGES)))
        run = Config()
        self.run = replace(run, model=ModelArguments(task=task), train=replace(run.train, seed=_SEED))
        self.task: Task = self.run.task
        plan = Blueprint(self.run, config, self.anatomy, self.partition)
        self.blocks = [build_block(plan, k) for k in range(NUM_STAGES)]
        self.whole: PreTrainedModel = self.task.make(config)
        generator = torch.Generator().manual_seed(1)
        if self.anatomy.row_shape:
            rows = torch.randn(2, *self.anatomy.row_shape, generator=generator)
            self.labels = torch.tensor([[0], [1]])
        else:
            rows = torch.randint(3, text_config(config).vocab_size, (2, 12), generator=generator)
            self.labels = torch.where(torch.arange(12) % 3 > 0, rows, IGNORED)
        self.rows = {self.task.main_input: rows}
        self.asked = {"input_ids": None, **self.rows}

    def look_ahead(self) -> dict[str, str]:
        """What else a run finds out before it starts: raises Refused, or returns why exits are no models."""
        problems = class_problems(self.run, self.config, self.anatomy)
        if problems:
            raise Refused(problems[0])
        return refused_exits(self.run, self.config, self.anatomy, self.partition)

    def check_new_weights(self) -> None:
        """One slice of all layers and the stages' slices have the same new weights and buffers."""
        whole = new_slice(self.config, self.anatomy, Span(0, self.anatomy.num_layers), _SEED)
        wanted = _tensors(whole.model)
        if self.anatomy.tied:  # a slice is not; what a tied matrix is at first is its embedding
            wanted[f"{name_of(whole.model, whole.output_matrix)}.weight"] = whole.embedding.weight
        found: dict[str, torch.Tensor] = dict(_parts(self.blocks))
        for name in sorted(wanted.keys() | found.keys()):
            _same(f"new weights {name}", found.get(name), wanted.get(name))

    def copy_weights(self) -> None:
        """Noisy weights of the undivided model for the stages; the heads of earlier stages get noise of their own."""
        perturb(self.whole, 0)
        source = self.whole.state_dict()
        for index, block in enumerate(self.blocks):
            is_last = index == NUM_STAGES - 1
            with torch.no_grad():
                for part in (block.body.model, block.head.model) if is_last else (block.body.model,):
                    for name, tensor in part.state_dict().items():
                        tensor.copy_(source[name])
            if not is_last:
                perturb(block.head.model, 100 + index, leave=tuple(block.body.model.parameters()))

    def check_chain(self) -> None:
        """Logits, loss and gradients in training, with gradients through all stages."""
        for model in (self.whole, *self.blocks):
            model.train()
        inputs = {**self.rows, **self.task.options, **self._labels()}
        theirs = self.whole(**inputs)
        head = self.blocks[-1].head
        head.border.entering = self._features()[-1]
        ours = head.model(**inputs)
        head.border.entering = None
        _same("logits", ours.logits, theirs.logits)
        losses = [self._loss(a.logits) if a.loss is None else a.loss for a in (ours, theirs)]
        _same("loss", *losses)
        for loss in losses:
            loss.backward()
        gradients: dict[str, torch.Tensor | None] = {}
        seen: set[int] = set()
        for name, tensor in _parts(self.blocks):
            if id(tensor) not in seen:
                seen.add(id(tensor))
                gradients[name] = tensor.grad
        for names, parameter in _named_once(self.whole):
            # what the model ties is apart in the stages, which have the summands of its gradient
            summands = [g for name in names if (g := gradients.get(name)) is not None]
            _same(f"gradient of {names[0]}", torch.stack(summands).sum(0) if summands else None, parameter.grad)
        self.whole.zero_grad()
        for block in self.blocks:
            block.zero_grad()

    @torch.no_grad()
    def check_losses(self) -> str:
        """Logits of the last stage's head in evaluation; returns what there is to say of the class's own loss."""
        for model in (self.whole, *self.blocks):
            model.eval()
        labels = self._labels()
        theirs = self.whole(**self.rows, **self.task.options, **labels)
        features, block = self._features()[-1], self.blocks[-1]
        _same("logits of the head", block.logits(features, **self.asked), theirs.logits)
        ours = float(block.readout(features, labels=self.labels, **self.asked))
        wanted = float(self._loss(theirs.logits))
        if not abs(ours - wanted) <= LOSS_TOLERANCE * wanted:
            raise Different(f"local loss: {ours:.6f}, not {wanted:.6f}")
        if not labels:
            return "the class has no loss of text alone"
        if abs(float(theirs.loss) - wanted) > LOSS_TOLERANCE * wanted:
            return "the class's own loss is not the task's, which is what stages are trained with"
        return ""

    @torch.no_grad()
    def check_exports(self, refused: dict[str, str]) -> str:
        """The whole model as its Auto class loads it; returns how the exits do."""
        last = NUM_STAGES - 1
        with tempfile.TemporaryDirectory() as folder:
            export = Path(folder)
            for stage, block in enumerate(self.blocks):
                tensors = collect([block.body], block.head, True, {})
                write_stage(export, stage, NUM_STAGES, tensors, has_head=stage == last or not refused)
            tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel({"a": 0}, unk_token="a")))
            name = type(self.blocks[0].body.model).__name__
            description = Description(self.config, name, tokenizer, task=self.task.name)
            compose(export, self.partition, (0,), description, not refused)
            answers = [b.logits(f, **self.asked) for b, f in zip(self.blocks, self._features(), strict=True)]
            self._check_loads(export, answers[last])
            if refused:
                return f"refused: {next(iter(refused.values()))}"
            for stage in range(last):
                try:
                    self._check_loads(exit_folder(export, stage), answers[stage])
                except Different as error:
                    return f"{exit_name(stage)}: {error}"
        return EXACT

    def _features(self) -> list[torch.Tensor]:
        """What leaves each stage, with its graph."""
        hidden, found = None, []
        for block in self.blocks:
            hidden = block.features(hidden=hidden, **self.asked)
            found.append(hidden)
        return found

    def _labels(self) -> dict[str, torch.Tensor]:
        """Labels, if the class computes a loss of text alone."""
        try:
            with torch.no_grad():
                output = self.whole(labels=self.labels, **self.rows, **self.task.options)
        except (ValueError, RuntimeError, TypeError):
            return {}
        return {} if output.loss is None else {"labels": self.labels}

    def _loss(self, logits: torch.Tensor) -> torch.Tensor:
        scored, targets = self.task.scored(logits, self.asked["input_ids"], self.labels)
        return F.cross_entropy(scored.float(), targets)

    def _check_loads(self, folder: Path, logits: torch.Tensor) -> None:
        """Raises Different unless transformers loads the folder and gets the same logits, bit for bit."""
        try:
            model, info = self.task.loader.from_pretrained(folder, output_loading_info=True)
        except Exception as error:
            raise Different(f"export does not load ({one_line(error)})") from error
        for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
            if info[kind]:
                raise Different(f"export: {kind.replace('_', ' ')} {sorted(info[kind])[:3]}")
        placed = copy.deepcopy(model.eval())  # loaded weights lie as in the file, by which kernels of experts round
        _same("logits of the export", placed(**self.rows, **self.task.options).logits, logits)


def perturb(module: nn.Module, seed: int, leave: Sequence[torch.Tensor] = ()) -> None:
    """Adds noise to all numbers that are saved, so that no norm is all ones and no bias is zero."""
    generator = torch.Generator().manual_seed(seed)
    done = {id(tensor) for tensor in leave}
    with torch.no_grad():
        for tensor in module.state_dict(keep_vars=True).values():
            if tensor.is_floating_point() and id(tensor) not in done:
                done.add(id(tensor))
                tensor.add_(0.05 * torch.randn(tensor.shape, generator=generator))


def _parts(blocks: Sequence[Block]) -> Iterator[tuple[str, torch.Tensor]]:
    """Tensors of the layers of all stages and of the last head."""
    for block in blocks:
        yield from _tensors(block.body.model).items()
    yield from _tensors(blocks[-1].head.model).items()


def _tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    return dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers())


def _named_once(model: nn.Module) -> list[tuple[list[str], nn.Parameter]]:
    """Each parameter with all of its names."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return [(names[id(parameter)], parameter) for parameter in model.parameters()]


def _same(what: str, ours: torch.Tensor | None, theirs: torch.Tensor | None) -> None:
    """Raises Different unless both are equal bit for bit, or both are not there."""
    if ours is None or theirs is None:
        if ours is not theirs:
            raise Different(f"{what}: only {'the stages have' if theirs is None else 'the model has'} it")
    elif ours.shape != theirs.shape:
        raise Different(f"{what}: shape {tuple(ours.shape)}, not {tuple(theirs.shape)}")
    elif not torch.equal(ours, theirs):
        raise Different(f"{what}: differs by {float((ours.float() - theirs.float()).abs().max()):.2g}")
