"""What a task is: a file of this package each, and whatever else was registered."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from typing import TYPE_CHECKING, Any, ClassVar, TypeAlias

from llm_local.flags import DataArguments, LocalArguments, ModelArguments, TrainArguments
from llm_local.registry import TASKS

if TYPE_CHECKING:  # a command that needs only flags does not wait for torch
    import torch
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

IGNORED = -100  # the label of a position that is not scored

Parts: TypeAlias = "dict[str, torch.Tensor]"  # tensors (B, T) of a micro-batch, by the names that models give them
Ask: TypeAlias = "Callable[[Parts, Sequence[int]], Parts]"  # with a seed for each row
Wrong: TypeAlias = "dict[str, tuple[bool, str]]"  # what was given: whether it is wrong, and why


class Task(ABC):
    """What a model is trained for: what it is asked of a row, what of its answer is scored, and what it is called.

    name: what --task calls it; `register_task` gives it. title: such a model, in a text. auto_class, auto_mapping: what
    makes and loads them, and the table of its classes, in transformers. options: what each forward pass is told. score:
    what exp(loss) is. pipeline_tag: of a model card. generates: it writes text. sends_labels: they are not to be had
    from the ids. reads_images: a row is the number of an image (data/images.py), and there is no tokenizer.
    needed_token: of a tokenizer. new_tokens: special ones of a new tokenizer, as they are spelt. delimiters: what
    begins and ends a text instead, where a tokenizer lacks that.
    main_input: what a model reads, by its name there. answers_once: it predicts one thing of a row, so that a head
    gives logits (B, C) and not normed states (B, T, D). measures: what an evaluation reports beside the loss.
    answer: what transformers' pipeline calls its answer, for `llm-local predict`; '' where there is none.
    """

    name = ""
    title: ClassVar[str]
    auto_class: ClassVar[str]
    auto_mapping: ClassVar[str]
    options: ClassVar[Mapping[str, Any]] = {}
    score: ClassVar[str]
    pipeline_tag: ClassVar[str]
    generates: ClassVar[bool] = False
    sends_labels: ClassVar[bool] = False
    reads_images: ClassVar[bool] = False
    needed_token: ClassVar[str] = ""
    new_tokens: ClassVar[Mapping[str, str]] = {}
    delimiters: ClassVar[Mapping[str, str]] = {}
    main_input: ClassVar[str] = "input_ids"
    answers_once: ClassVar[bool] = False
    measures: ClassVar[tuple[str, ...]] = ()
    answer: ClassVar[str] = ""

    @abstractmethod
    def scored(
        self, states: torch.Tensor, input_ids: torch.Tensor | None, labels: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """What a head reads (B, T, D), ids and labels (B, T) → (N, D), and the targets (N,) of its predictions, of
        which those that are IGNORED count nothing. Of a task that answers once: logits (B, C), labels (B, 1) → the same
        logits, and targets (B,)."""

    @abstractmethod
    def count_scored(self, labels: torch.Tensor) -> torch.Tensor:
        """Labels (B, T) → (B,), the positions of each row that `scored` gives a target."""

    @abstractmethod
    def order_problem(self, config: PretrainedConfig, reads_ahead: bool) -> str:
        """Why a model whose positions read those behind them, or do not, cannot be trained so; '' if it can."""

    @abstractmethod
    def usage(self, trust: str, drafts: Sequence[int]) -> list[str]:
        """Lines of Python that use an export. trust: what from_pretrained is told beside the folder; drafts: stages
        whose exits may help."""

    def problems(
        self, model: ModelArguments, data: DataArguments, local: LocalArguments, train: TrainArguments
    ) -> list[str]:
        """What is wrong with the flags for this task."""
        return []

    def refusals(self, wrong: Wrong) -> list[str]:
        """Lines on what is wrong with this task."""
        return [f"{given} with task={self.name}: {why}" for given, (is_wrong, why) in wrong.items() if is_wrong]

    def asker(self, tokenizer: PreTrainedTokenizerBase, data: DataArguments) -> Ask | None:
        """Makes of the parts of rows what a model is asked, by a seed for each; None: they are as they stand."""
        return None

    def question(self, text: str, processing: Any) -> Any:
        """What a pipeline is asked of a text. processing: what the export has beside its model.

        Raises ValueError saying what it lacks.
        """
        return text

    def scored_share(self, data: DataArguments) -> float:
        """Of a text's positions, about."""
        return 1.0

    def measure(self, logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Of a task that answers once: logits (B, C), targets (B,) → (len(measures),) float32, means over the rows."""
        raise NotImplementedError(f"task {self.name!r} has no measures")

    def part_of(self, config: PretrainedConfig) -> PretrainedConfig:
        """What describes the layers, where a config has several parts."""
        return config.get_text_config(decoder=True)

    def row_shape(self, config: PretrainedConfig) -> tuple[int, ...]:
        """Of what the model reads of a row, where that is fixed; () for text."""
        return ()

    @property
    def loader(self) -> Any:
        """The Auto class."""
        return getattr(import_module("transformers"), self.auto_class)

    def make(self, config: PretrainedConfig, **options: Any) -> Any:
        """A new model; options: as the Auto class's from_config has them."""
        config = copy.deepcopy(config)
        if config.architectures is None and isinstance(self.classes.get(type(config), None), tuple):
            config.architectures = []  # the Auto class looks there which of several it is, and takes the first
        return self.loader.from_config(config, **options)

    @property
    def classes(self) -> Mapping[type[PretrainedConfig], Any]:
        """The model's class by that of its config."""
        return getattr(import_module("transformers"), self.auto_mapping)

    @property
    def class_names(self) -> Mapping[str, str | tuple[str, ...]]:
        """The names of the model's classes, by the model types that transformers has one for."""
        return getattr(import_module("transformers.models.auto.modeling_auto"), f"{self.auto_mapping}_NAMES")

    def trains(self, class_name: str) -> bool:
        """Whether transformers has such a class for the task."""
        return any(class_name in ((found,) if isinstance(found, str) else found) for found in self.class_names.values())

    def has_class(self, config: PretrainedConfig) -> bool:
        """Whether transformers, or the model's own code, has a class for such a model."""
        return type(config) in self.classes or self.auto_class in (getattr(config, "auto_map", None) or {})

    def is_of_transformers(self, config: PretrainedConfig) -> bool:
        """Whether the classes of config and model come with it, and so stay what they are."""
        found = self.classes.get(type(config), None)
        kinds = (type(config), *(found if isinstance(found, tuple) else (found,)))
        return all(kind.__module__.startswith("transformers.models.") for kind in kinds)


def causal_only(model: ModelArguments, local: LocalArguments) -> Wrong:
    """What is for models that write text."""
    return {
        f"distillation_weight={local.distillation_weight:g}": (
            local.distillation_weight > 0,
            "soft targets are of what comes next; leave it out",
        ),
        f"gguf_file={model.gguf_file}": (model.gguf_file is not None, "GGUF holds causal models; use safetensors"),
    }


def register_task(name: str, task: Task) -> None:
    """Lets --task name it. Every rank must call, before its flags are checked. Raises ValueError for a name that is
    taken."""
    TASKS.add(name, task)
    task.name = name
