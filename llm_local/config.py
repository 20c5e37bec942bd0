"""What a run is: the flags' sections (flags.py), filled from a YAML file and the command line.

    python scripts/pretrain.py configs/quickstart.yaml --max_steps 20 --num_stages 2

A flag wins over the file, the file over the default. What is wrong with the values is said in problems.py; what
needs the model or the data is checked in preflight.py.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import os
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any, get_args, get_type_hints

import yaml

from llm_local.flag_values import number, options, truth, typed_value, unknown_name, without_values
from llm_local.flags import FLAGS, SAVE_STEPS, SECTIONS, DataArguments, LocalArguments, ModelArguments, TrainArguments
from llm_local.methods.method import Method
from llm_local.program import program
from llm_local.registry import METHODS, TASKS
from llm_local.tasks.task import Task
from llm_local.trainer_flags import NOT_TAKEN, is_passed_over


class ConfigError(ValueError):
    """Everything that is wrong with a run's configuration, one line a problem, each once."""

    def __init__(self, problems: Sequence[str]):
        self.problems = list(dict.fromkeys(problems))
        count = f"{len(self.problems)} problems" if len(self.problems) > 1 else "1 problem"
        super().__init__(f"the configuration has {count}:\n" + "\n".join(f"  - {line}" for line in self.problems))


def refused(name: str, error: Exception) -> int:
    """Says in a line why the program of that name begins nothing; returns its exit status."""
    said = f"{error.filename}: {error.strerror}" if isinstance(error, OSError) else str(error)
    print(f"{name}: {'; '.join(error.problems) if isinstance(error, ConfigError) else said}", file=sys.stderr)
    return 2


def some_of(names: Iterable[str]) -> str:
    """The first of the names, and how many more there are."""
    first, *more = sorted(names)
    return f"{first} and {len(more)} more" if more else first


def from_here(path: Path | str) -> str:
    """What a message about a path that does not exist adds to it: where a relative one was looked for."""
    return "" if Path(path).is_absolute() else f" (relative to {Path.cwd()})"


@dataclass(frozen=True)
class Config:
    """The whole configuration; sections keep the flag names, which are unique across them.

    epoch: rows of the training data, and of a step, once they are known (checks/epochs.py).
    deepspeed_json: what the file of --deepspeed holds, once it is read (ds_config.load_json).
    rows: data sets that were given as objects, by name, each with its column that is read (data/objects.py).
    """

    model: ModelArguments = field(default_factory=ModelArguments)
    data: DataArguments = field(default_factory=DataArguments)
    local: LocalArguments = field(default_factory=LocalArguments)
    train: TrainArguments = field(default_factory=TrainArguments)
    epoch: tuple[int, int] | None = None
    deepspeed_json: dict[str, Any] | None = None
    rows: dict[str, tuple[str, Any]] = field(default_factory=dict, repr=False, compare=False)

    @staticmethod
    def load(path: Path | str | None = None, **flags: Any) -> Config:
        """The flags of a YAML file, and those given here, which win; named as on the command line.

        Raises ConfigError naming each that is unknown or of another type.
        """
        values = {} if path is None else _read_yaml(Path(path))
        return from_flat(_merged(values, _typed_flags(flags, "")))

    def flat(self) -> dict[str, Any]:
        """All flags by name, in order: what run.yaml holds and what a YAML file may set."""
        sections = (self.model, self.data, self.local, self.train)
        return {name: value for section in sections for name, value in dataclasses.asdict(section).items()}

    @property
    def output_dir(self) -> Path:
        """The folder of the run; of a job's, that of its stage."""
        whole = Path(self.train.output_dir)
        return whole if self.local.stage is None else whole / f"stage-{self.local.stage:02d}"

    @property
    def is_job(self) -> bool:
        """Whether the launch trains one stage alone."""
        return self.local.stage is not None

    @property
    def reads_data(self) -> bool:
        """Whether the launch has the first stage."""
        return self.local.stage in (None, 0)

    @property
    def launched_stages(self) -> int:
        """How many stages share the ranks of the launch."""
        return 1 if self.is_job else max(1, self.local.num_stages)

    @property
    def replica_ranks(self) -> int:
        """Of each replica."""
        return max(1, self.local.tensor_parallel_size) * max(1, self.local.sequence_parallel_size)

    @property
    def rank_positions(self) -> int:
        """Of a row, that each rank has."""
        return self.data.seq_length // max(1, self.local.sequence_parallel_size)

    def engine_ranks(self, num_replicas: int) -> int:
        """How many of a stage's replicas an engine of DeepSpeed spans: all, or each has its own."""
        return 1 if self.local.replica_sync_steps else num_replicas

    @property
    def precision(self) -> str:
        return "bf16" if self.train.bf16 else "fp16" if self.train.fp16 else "fp32"

    @property
    def wire_dtype(self) -> str:
        return self.precision if self.local.wire_dtype == "auto" else self.local.wire_dtype

    @property
    def export_dtype(self) -> str:
        return self.precision if self.train.export_dtype == "auto" else self.train.export_dtype

    @property
    def reporters(self) -> tuple[str, ...]:
        """Names of report_to."""
        return tuple(name.strip() for name in self.train.report_to.split(",") if name.strip() not in ("", "none"))

    @property
    def method(self) -> Method:
        """What trains; of an unknown name, which problems.py refuses, a plain one."""
        return METHODS.get(self.local.method) or Method()

    @property
    def task(self) -> Task:
        """What the model is trained for; of an unknown name, which problems.py refuses, the default's."""
        return TASKS.get(self.model.task, TASKS["causal-lm"])

    @property
    def is_pipelined(self) -> bool:
        """Whether DeepSpeed's own pipeline trains: backpropagation over several stages. On one the model is a block."""
        return self.method.is_pipelined(self.local)

    @property
    def has_one_head(self) -> bool:
        """Whether the last of several stages alone has a head, and a loss."""
        return not self.method.has_local_losses and self.local.num_stages > 1

    @property
    def head_layers_schedule(self) -> tuple[int, ...]:
        """Private layers of each block's head, as far as given; the baseline has one head, the model's own."""
        if not self.method.has_local_losses:
            return (0,)
        text = self.local.head_layers_schedule
        if text is None:
            return (self.local.head_layers,)
        return tuple(int(part) for part in text.split(",") if part.strip().isdecimal()) or (0,)  # see problems.py

    @property
    def frozen_stages(self) -> tuple[int, ...]:
        """Numbers of the stages that are not trained, in order; what is no number is not there (problems.py)."""
        parts = (part.strip() for part in (self.local.freeze_stages or "").split(","))
        return tuple(sorted({int(part) for part in parts if part.isdecimal()}))

    @property
    def warmup_steps(self) -> int:
        """Steps of linear warm-up."""
        return self._steps(self.train.warmup_steps or self.train.warmup_ratio)

    @property
    def logging_interval(self) -> Fraction:
        """Steps between two records of the metrics; 0: the last step alone is recorded."""
        return self._interval(self.train.logging_strategy, self.train.logging_steps, 0)

    @property
    def eval_interval(self) -> Fraction:
        """Steps between two evaluations before the one at the end; 0: there are none."""
        return self._interval(self.train.eval_strategy, self.train.eval_steps, self.train.logging_steps)

    @property
    def save_interval(self) -> Fraction:
        """Steps between two checkpoints; 0: none are written."""
        return self._interval(self.train.save_strategy, self.train.save_steps, SAVE_STEPS)

    def _interval(self, strategy: str | None, steps: float, otherwise: float) -> Fraction:
        if strategy == "no":
            return Fraction(0)
        if strategy == "epoch":
            rows, of_step = self.epoch or (1, 1)
            return Fraction(rows, of_step)
        return Fraction(self._steps(steps or (otherwise if strategy == "steps" else 0)))

    @property
    def epoch_flag(self) -> str | None:
        """A flag that needs the length of an epoch, if there is one."""
        train = self.train
        if train.num_train_epochs is not None and train.max_steps < 0:
            return "num_train_epochs"
        strategies = ("logging_strategy", "eval_strategy", "save_strategy")
        return next((name for name in strategies if getattr(train, name) == "epoch"), None)

    def _steps(self, steps: float) -> int:
        """A number of steps, which below 1 is a share of all, rounded up as transformers' Trainer does it."""
        return math.ceil(self.train.max_steps * steps) if 0 < steps < 1 else int(steps)

    @property
    def cache_dir(self) -> Path:
        home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        return Path(self.data.cache_dir) if self.data.cache_dir else Path(home) / "llm_local"


def is_due(step: int, interval: Fraction) -> bool:
    """Whether an interval ends in this step."""
    return interval > 0 and step // interval > (step - 1) // interval


class Parser(argparse.ArgumentParser):
    """One whose errors are ConfigErrors."""

    def error(self, message: str):  # argparse would print usage for ninety flags and exit from every rank
        raise ConfigError([f"{message}; see {self.prog} --help"])


def _parser() -> Parser:
    """Takes every flag, with hyphens as well; of those that are not given the namespace has nothing."""
    usage = "%(prog)s [CONFIG.yaml] [--name value ...]"
    parser = Parser(allow_abbrev=False, prog=program("pretrain.py"), usage=usage, argument_default=argparse.SUPPRESS)
    for section in SECTIONS:
        group, hints = parser.add_argument_group(section.__doc__.rstrip(".")), get_type_hints(section)
        for each in dataclasses.fields(section):
            flag, kinds = FLAGS[each.name], get_args(hints[each.name]) or (hints[each.name],)
            known: dict[str, Any] = {
                "help": flag.help + ("" if each.default is None else f" (default: {each.default})")
            }
            if bool in kinds:
                known |= {"type": truth, "nargs": "?", "const": True, "metavar": "{true,false}"}
            else:
                known |= {
                    "type": number if {int, float} <= {*kinds} else kinds[0],
                    "metavar": f"{{{','.join(flag.choices)}}}" if flag.choices else None,
                }
            group.add_argument(*options(each.name), **known)
    group = parser.add_argument_group("Of transformers' Trainer and run_clm.py, and not taken (docs/flags.md)")
    for name, refusal in NOT_TAKEN.items():
        group.add_argument(*options(name), nargs="*", metavar="", help=refusal.instead.replace("%", "%%"))
    # The deepspeed launcher puts --local_rank=N before everything else; the environment says the same.
    parser.add_argument("--local_rank", type=int, help="Set by the deepspeed launcher; not used.")
    return parser


def parse(arguments: Sequence[str]) -> Config:
    """Reads `[CONFIG.yaml] [--name value ...]`. Raises ConfigError naming the unknown key, value or file."""
    flags = [a for a in arguments if not a.startswith("--local_rank=")]
    values = _read_yaml(Path(flags.pop(0))) if flags and not flags[0].startswith("-") else {}
    found, unknown = _parser().parse_known_args(flags)
    given = {name: value for name, value in vars(found).items() if name != "local_rank"}
    others = {name: " ".join(given.pop(name)) or "true" for name in list(given) if name in NOT_TAKEN}
    refused = [f"--{name}" for name, value in others.items() if not is_passed_over(name, value)]
    if refused or unknown:
        raise ConfigError([unknown_name("argument", text) for text in (*refused, *without_values(unknown))])
    return from_flat(_merged(values, given))


def _merged(values: dict[str, Any], given: dict[str, Any]) -> dict[str, Any]:
    """A file's settings with those that win over them."""
    if "num_train_epochs" in given:  # and not the file's
        values = {name: value for name, value in values.items() if name != "max_steps"}
    return values | given


def from_flat(values: dict[str, Any]) -> Config:
    """The inverse of Config.flat. Raises ConfigError for unknown names."""
    if values.get("num_train_epochs") is not None:
        values = {"max_steps": -1} | values  # until the data is counted
    names = [{f.name for f in dataclasses.fields(section)} for section in SECTIONS]
    unknown = sorted(set(values).difference(*names))
    if unknown:
        raise ConfigError([unknown_name("setting", name) for name in unknown])
    return Config(*(s(**{k: v for k, v in values.items() if k in n}) for s, n in zip(SECTIONS, names, strict=True)))


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        values = yaml.safe_load(path.read_text()) or {}
    except OSError as error:
        raise ConfigError([f"cannot read the configuration file {path}{from_here(path)}: {error.strerror}"]) from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError([f"{path} is not YAML: {' '.join(str(error).split())}"]) from error
    if not isinstance(values, dict):
        raise ConfigError([f"{path} holds {type(values).__name__}, not 'name: value' lines"])
    return _typed_flags(values, f"{path}: ")


def _typed_flags(values: dict[str, Any], place: str) -> dict[str, Any]:
    """Settings as the flags' types. Raises ConfigError with the place of each that is none."""
    types = {name: hint for section in SECTIONS for name, hint in get_type_hints(section).items()}
    problems, typed = [], {}
    for name, value in values.items():
        if name not in types and is_passed_over(name, str(value)):
            continue
        if name not in types:
            problems.append(f"{place}{unknown_name('setting', name)}")
            continue
        typed[name], problem = typed_value(value, types[name])
        if problem:
            problems.append(f"{place}{name}: {value!r} is not {problem}")
    if problems:
        raise ConfigError(problems)
    return typed
