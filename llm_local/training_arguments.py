"""transformers' TrainingArguments with the flags that these lack; and the same object for callbacks of any run."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from enum import Enum
from typing import Any, get_type_hints

import torch
from transformers import IntervalStrategy, TrainingArguments

from llm_local.config import Config, ConfigError, from_flat
from llm_local.flags import FLAGS, SECTIONS
from llm_local.trainer_flags import instead_of, is_passed_over
from llm_local.world import World

THEIRS = {field.name for field in dataclasses.fields(TrainingArguments) if field.init}


@dataclass
class _Arguments(TrainingArguments):
    """Keeps off the devices and process groups, which are the run's."""

    def __post_init__(self) -> None:
        self._world: World | None = None
        deepspeed, self.deepspeed = self.deepspeed, None  # else each from_pretrained that follows would be ZeRO's
        super().__post_init__()
        self.deepspeed = deepspeed

    @property
    def device(self) -> torch.device:
        return torch.device("cpu") if self._world is None else self._world.device

    @property
    def n_gpu(self) -> int:
        return int(self.device.type != "cpu")

    @property
    def world_size(self) -> int:
        return 1 if self._world is None else self._world.place.world_size

    @property
    def process_index(self) -> int:
        return 0 if self._world is None else self._world.place.rank

    def config(self) -> Config:
        """The run's flags. Raises ConfigError for arguments of transformers' that are not taken, with what to use."""
        default = type(self)(output_dir=self.output_dir)
        problems, values = [], {}
        for field in dataclasses.fields(self):
            name, value = field.name, getattr(self, field.name)
            if name in FLAGS:
                values[name] = _plain(name, value)
            elif name == "activation_checkpointing":  # the newer name of gradient_checkpointing, which has its value
                continue
            elif field.init and value != getattr(default, name) and not is_passed_over(name, str(value)):
                problems.append(f"{name}={value} is not taken; {instead_of(name)}")
        if problems:
            raise ConfigError(problems)
        if values["max_steps"] > 0:  # which wins
            values["num_train_epochs"] = None
        return from_flat(values)

    @classmethod
    def of(cls, config: Config, world: World) -> _Arguments:
        """What a callback sees of a run that is checked."""
        arguments = cls(output_dir=str(config.output_dir), report_to="none")
        for name, value in config.flat().items():
            if value is not None:
                setattr(arguments, name, value)
        # with a loop of one's own, evaluations come when it asks for them
        comes = {"logging": config.logging_interval, "eval": config.train.eval_batches, "save": config.save_interval}
        for name, ever in comes.items():
            strategy = getattr(config.train, f"{name}_strategy") or ("steps" if ever else "no")
            setattr(arguments, f"{name}_strategy", IntervalStrategy(strategy))
        arguments.metric_for_best_model, arguments.greater_is_better = "loss", False
        arguments.report_to, arguments._world = list(config.reporters), world
        return arguments


def _plain(name: str, value: Any) -> Any:
    """As the flag has it."""
    if isinstance(value, Enum):
        return value.value
    if name == "report_to":
        return ",".join(value) if value else "none"
    if name == "gradient_checkpointing":
        return bool(value)
    return value


def _further_fields() -> list[tuple[str, Any, Any]]:
    """The flags that TrainingArguments has not, with their defaults."""
    found = []
    for section in SECTIONS:
        hints = get_type_hints(section)
        for field in dataclasses.fields(section):
            if field.name not in THEIRS:
                known = {"help": FLAGS[field.name].help.replace("%", "%%")}
                found.append((field.name, hints[field.name], dataclasses.field(default=field.default, metadata=known)))
    return found


LocalTrainingArguments: Any = dataclasses.make_dataclass(
    "LocalTrainingArguments",
    _further_fields(),
    bases=(_Arguments,),
    namespace={
        "__doc__": """transformers' TrainingArguments, with its defaults, and all flags of pretrain.py that it lacks.

    ``config()`` is the run's configuration; what transformers' Trainer knows and a run does not is refused there.
    """,
        "__module__": __name__,
    },
)
