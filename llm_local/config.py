"""What a run is: frozen dataclasses filled from a YAML file and flags, with transformers' and run_clm's names.

    python scripts/pretrain.py configs/quickstart.yaml --max_steps 20 --num_stages 2

A flag wins over the file, the file over the default. What is wrong with the values is said in problems.py; what
needs the model or the data is checked in preflight.py.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args, get_type_hints

import yaml
from transformers import HfArgumentParser

METHODS = ("backprop", "greedy", "chunked", "overlapping")
HEADS = ("linear", "decoder", "shared")
PARTITIONS = ("flops", "profile")
PACKINGS = ("concat", "best_fit", "none")
EXPORT_DTYPES = ("auto", "fp32", "bf16", "fp16")
WIRE_DTYPES = (*EXPORT_DTYPES, "int8")
SCHEDULERS = ("linear", "cosine", "constant", "constant_with_warmup", "polynomial", "inverse_sqrt")
REPORTERS = ("none", "tensorboard", "csv")


class ConfigError(ValueError):
    """Everything that is wrong with a run's configuration, one line a problem."""

    def __init__(self, problems: Sequence[str]):
        self.problems = list(problems)
        count = f"{len(self.problems)} problems" if len(self.problems) > 1 else "1 problem"
        super().__init__(f"the configuration has {count}:\n" + "\n".join(f"  - {line}" for line in self.problems))


def some_of(names: Iterable[str]) -> str:
    """The first of the names, and how many more there are."""
    first, *more = sorted(names)
    return f"{first} and {len(more)} more" if more else first


def from_here(path: Path | str) -> str:
    """What a message about a path that does not exist adds to it: where a relative one was looked for."""
    return "" if Path(path).is_absolute() else f" (relative to {Path.cwd()})"


# Flags of run_clm and TrainingArguments that a person may bring along, and what says the same here
INSTEAD = {
    "block_size": "use --seq_length",
    "num_train_epochs": "use --max_steps",
    "warmup_ratio": "use --warmup_steps",
    "max_eval_samples": "use --eval_batches",
    "eval_strategy": "use --eval_steps",
    "save_strategy": "use --save_steps",
    "torch_dtype": "use --bf16 or --fp16",
    "do_train": "leave it out: a run trains",
    "do_eval": "leave it out: a run evaluates, unless --eval_batches is 0",
}


def _unknown(kind: str, name: Any) -> str:
    plain = str(name).lstrip("-").partition("=")[0]
    return f"unknown {kind} {name!r}; {INSTEAD.get(plain, 'see pretrain.py --help')}"


def _option(default: Any, text: str) -> Any:
    return field(default=default, metadata={"help": text})


@dataclass(frozen=True)
class ModelArguments:
    model_name_or_path: str | None = _option(None, "Pretrained model to go on from: directory or hub name.")
    gguf_file: str | None = _option(None, "GGUF file in that directory; its weights are dequantised to train them.")
    config_name: str | None = _option(None, "JSON file (or directory) with the config of a new model.")
    model_type: str | None = _option(None, "Type of a new model with the type's default config, as 'llama'.")
    config_overrides: str | None = _option(
        None,
        "Changes to that config, as 'num_hidden_layers=8,hidden_size=256'; lists and dictionaries as JSON, as "
        "'layer_types=[\"full_attention\"]'.",
    )
    tokenizer_name: str | None = _option(
        None,
        "Tokenizer: directory, hub name or sentencepiece .model; default: the model's, else one trained on the "
        "built-in corpus.",
    )
    attn_implementation: str | None = _option(None, "Attention: sdpa, eager or flash_attention_2; else the config's.")
    trust_remote_code: bool = _option(False, "Run model or data code that a checkpoint brings along.")


@dataclass(frozen=True)
class DataArguments:
    dataset_name: str | None = _option(
        None, "Hub name, a folder from save_to_disk or prepare_data.py, or 'builtin' (the running Python's library)."
    )
    dataset_config_name: str | None = _option(None, "Configuration of the hub dataset.")
    dataset_split: str | None = _option(None, "Split of the dataset to train on; default: train.")
    dataset_revision: str | None = _option(None, "Branch, tag or commit of the hub dataset.")
    data_mixture: str | None = _option(None, "YAML file with several weighted sources, or one as in configs/data.")
    train_file: str | None = _option(
        None,
        "Training text: .txt, .jsonl or .csv (also .gz, .zst), .parquet or .arrow; a file, a directory or a glob. "
        "One .txt is one running text; of several, each is a document.",
    )
    validation_file: str | None = _option(None, "Validation text, as train_file.")
    validation_files: str | None = _option(
        None, "Validation texts by name, as 'wiki=a.jsonl,code=b.txt'; each is evaluated and reported by itself."
    )
    validation_split_percentage: int = _option(5, "Percent of the training documents held out for validation.")
    text_column_name: str = _option("text", "Column that holds the text.")
    streaming: bool = _option(False, "Read the dataset as a stream.")
    seq_length: int = _option(512, "Tokens of a training sequence.")
    packing: str = _option(
        "concat",
        "How documents fill sequences: concat (end to end), best_fit (few are cut, little padding), or none (each in "
        "sequences of its own, padded). Losses are means over the tokens of a step that are no padding.",
    )
    add_bos: bool | None = _option(
        None,
        "Begin each document with BOS; default: if the tokenizer itself begins a text so. The export's does the same.",
    )
    document_mask: bool = _option(
        False,
        "Keep the documents of a row apart: positions restart and attention ends at EOS. The first token of a document "
        "is then read and not predicted; losses are means over the other tokens of a step.",
    )
    preprocessing_num_workers: int = _option(1, "Processes that read text files and tokenise.")
    cache_dir: str | None = _option(None, "Tokenised data and the built-in tokenizer; default ~/.cache/llm_local.")


@dataclass(frozen=True)
class LocalArguments:
    num_stages: int = _option(1, "Pipeline stages; ranks / num_stages is the data-parallel degree.")
    method: str = _option("chunked", "backprop, greedy (each layer a block), chunked or overlapping.")
    layers_per_block: int | None = _option(
        None, "Layers of a block (chunked; default: one block a stage), or of a window (overlapping)."
    )
    block_stride: int | None = _option(None, "Layers from the start of a window to that of the next (overlapping).")
    final_backprop_steps: int = _option(0, "Last steps of the run that train by backpropagation through all stages.")
    partition: str = _option(
        "flops",
        "How stages are balanced: by counted flops, or by profile, for which layers and head are timed first.",
    )
    stage_layers: str | None = _option(None, "Layers of each stage, as '4,4'; default: as partition finds.")
    head: str = _option("linear", "What turns a block's output into a loss: linear, decoder or shared.")
    head_layers: int = _option(0, "Private layers of a head (decoder, shared).")
    head_layers_schedule: str | None = _option(
        None, "Private layers of each block's head, as '2,1,1'; the last number holds for the blocks behind."
    )
    head_rank: int | None = _option(None, "Rank of the private layers' matrices; default: full.")
    head_token_fraction: float = _option(1.0, "Share of the positions that heads but the last one's see in training.")
    head_refresh_steps: int = _option(20, "Steps between refreshes of the shared head's matrix.")
    head_warmup_steps: int = _option(
        0, "First steps in which all heads but the last block's train alone, and the layers below them do not."
    )
    head_features: bool = _option(False, "Heads in training also see what entered their block.")
    block_loss_weights: str | None = _option(
        None, "Weight of each block's loss, as '0.5,1'; the last number holds for the blocks behind."
    )
    distillation_weight: float = _option(0.0, "Weight of the next exit's predictions as soft targets; 0: none.")
    distillation_top_k: int = _option(16, "Most likely tokens that a soft target has.")
    wire_dtype: str = _option(
        "auto", "Hidden states on a link: fp32, bf16, fp16, int8 with a scale a token; auto: that of the model."
    )
    max_packets_in_flight: int = _option(
        4, "Micro-batches a stage may be ahead of the next one; raise it for a link of long latency."
    )
    link_timeout_seconds: float = _option(600.0, "Longest wait for a living peer, in seconds.")


@dataclass(frozen=True)
class TrainArguments:
    output_dir: str = _option("runs/pretrain", "Folder of the run.")
    overwrite_output_dir: bool = _option(False, "Replace the run that output_dir holds.")
    max_steps: int = _option(1000, "Optimizer steps.")
    per_device_train_batch_size: int = _option(8, "Sequences of a micro-batch on each replica.")
    gradient_accumulation_steps: int = _option(1, "Micro-batches of a step.")
    learning_rate: float = _option(5e-4, "Peak learning rate.")
    weight_decay: float = _option(0.0, "AdamW weight decay; biases and norms are spared.")
    adam_beta1: float = _option(0.9, "AdamW beta1.")
    adam_beta2: float = _option(0.999, "AdamW beta2.")
    adam_epsilon: float = _option(1e-8, "AdamW epsilon.")
    max_grad_norm: float = _option(1.0, "Clip the gradient norm of each block; 0 turns it off.")
    warmup_steps: int = _option(0, "Steps of linear warm-up.")
    lr_scheduler_type: str = _option("linear", f"One of {', '.join(SCHEDULERS)}.")
    seed: int = _option(42, "Seed of weights, data order and dropout.")
    bf16: bool = _option(False, "Train in bfloat16.")
    fp16: bool = _option(False, "Train in float16, where the accelerator can.")
    gradient_checkpointing: bool = _option(False, "Recompute activations in the backward pass (non-reentrant).")
    torch_compile: bool = _option(False, "Compile the layers with torch.compile, each by itself.")
    deepspeed: str | None = _option(None, "DeepSpeed JSON; 'auto' values are filled from the flags.")
    logging_steps: int = _option(10, "Steps between metric records.")
    eval_steps: int = _option(0, "Steps between evaluations; 0: only at the end.")
    eval_on_start: bool = _option(False, "Evaluate before the first step, too.")
    eval_batches: int = _option(8, "Micro-batches of one evaluation on each replica; 0: never evaluate.")
    save_steps: int = _option(0, "Steps between checkpoints, and one after the last step; 0: none.")
    save_total_limit: int | None = _option(None, "Checkpoints kept; older ones are removed.")
    resume_from_checkpoint: str | None = _option(
        None, "Checkpoint or run folder; 'true': newest in output_dir; 'auto': that, or a new run if there is none."
    )
    signal_save_seconds: float = _option(
        25.0,
        "On SIGTERM or SIGUSR1 a run with save_steps saves and leaves within so many seconds (launchers kill 30 s "
        "after SIGTERM); 0: leaves at once.",
    )
    report_to: str = _option("none", "Extra copies of the metrics by DeepSpeed's monitor: none, tensorboard, csv.")
    ddp_timeout: int = _option(1800, "Longest wait for start-up, in seconds; rank 0 may prepare data for longer.")
    export_dtype: str = _option(
        "auto", "Weights of exported models: fp32 (the optimizer's own), bf16, fp16; auto: as the run computes."
    )
    trace: bool = _option(
        False,
        "Record each instruction of each stage in OUTPUT/trace. On a GPU every instruction then waits for the device, "
        "which costs speed.",
    )
    sample_prompt: str | None = _option(None, "Print what the exported model writes after this text.")


@dataclass(frozen=True)
class RunConfig:
    """The whole configuration; sections keep the flag names, which are unique across them."""

    model: ModelArguments = field(default_factory=ModelArguments)
    data: DataArguments = field(default_factory=DataArguments)
    local: LocalArguments = field(default_factory=LocalArguments)
    train: TrainArguments = field(default_factory=TrainArguments)

    def flat(self) -> dict[str, Any]:
        """All flags by name, in order: what run.yaml holds and what a YAML file may set."""
        return {name: value for section in dataclasses.asdict(self).values() for name, value in section.items()}

    @property
    def output_dir(self) -> Path:
        return Path(self.train.output_dir)

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
    def is_pipelined(self) -> bool:
        """Whether DeepSpeed's own pipeline trains: backpropagation over several stages. On one the model is a block."""
        return self.local.method == "backprop" and self.local.num_stages > 1

    @property
    def head_layers_schedule(self) -> tuple[int, ...]:
        """Private layers of each block's head, as far as given; the baseline has one head, the model's own."""
        if self.local.method == "backprop":
            return (0,)
        text = self.local.head_layers_schedule
        if text is None:
            return (self.local.head_layers,)
        return tuple(int(part) for part in text.split(",") if part.strip().isdecimal()) or (0,)  # see problems.py

    @property
    def shares_head(self) -> bool:
        """Whether the heads read the last one's output matrix; the baseline has one head, and all of it is trained."""
        return self.local.head == "shared" and self.local.method != "backprop"

    @property
    def block_layers(self) -> int | None:
        """Layers of a block, or of a window; None: each stage, or with backprop the whole model, is one block."""
        named = {"greedy": 1, "backprop": None, "overlapping": self.local.layers_per_block or 2}
        return named.get(self.local.method, self.local.layers_per_block)

    @property
    def window_stride(self) -> int | None:
        """Layers from window to window; by default half a window, rounded up: the paper's case of 2 and 1 layers."""
        if self.local.method != "overlapping":
            return None
        return self.local.block_stride or ((self.block_layers or 2) + 1) // 2

    def is_global(self, step: int) -> bool:
        """Whether the step trains by backpropagation through all blocks."""
        return step > self.train.max_steps - self.local.final_backprop_steps

    @property
    def cache_dir(self) -> Path:
        home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        return Path(self.data.cache_dir) if self.data.cache_dir else Path(home) / "llm_local"


SECTIONS: tuple[Any, ...] = (ModelArguments, DataArguments, LocalArguments, TrainArguments)


class _Parser(HfArgumentParser):
    def error(self, message: str):  # argparse would print usage for ninety flags and exit from every rank
        raise ConfigError([f"{message}; see pretrain.py --help"])


def parse(arguments: Sequence[str]) -> RunConfig:
    """Reads `[CONFIG.yaml] [--name value ...]`. Raises ConfigError naming the unknown key, value or file."""
    parser = _Parser(
        SECTIONS, allow_abbrev=False, prog="pretrain.py", usage="%(prog)s [CONFIG.yaml] [--name value ...]"
    )
    # The deepspeed launcher puts --local_rank=N before everything else; the environment says the same.
    parser.add_argument("--local_rank", type=int, help="Set by the deepspeed launcher; not used.")
    flags = [a for a in arguments if not a.startswith("--local_rank=")]
    if flags and not flags[0].startswith("-"):
        parser.set_defaults(**_read_yaml(Path(flags.pop(0))))
    sections: Any = parser.parse_args_into_dataclasses(flags, look_for_args_file=False, return_remaining_strings=True)
    if sections[-1]:
        raise ConfigError([_unknown("argument", text) for text in _without_values(sections[-1])])
    return RunConfig(*sections[: len(SECTIONS)])


def _without_values(unknown: Sequence[str]) -> list[str]:
    """The unknown arguments less the values that follow unknown flags: a flag and its value are one problem."""
    flags = [text.startswith("--") for text in unknown]
    before = [False, *(flag and "=" not in text for flag, text in zip(flags, unknown, strict=True))]
    return [text for text, flag, after in zip(unknown, flags, before, strict=False) if flag or not after]


def from_flat(values: dict[str, Any]) -> RunConfig:
    """The inverse of RunConfig.flat. Raises ConfigError for unknown names."""
    names = [{f.name for f in dataclasses.fields(section)} for section in SECTIONS]
    unknown = sorted(set(values).difference(*names))
    if unknown:
        raise ConfigError([_unknown("setting", name) for name in unknown])
    return RunConfig(*(s(**{k: v for k, v in values.items() if k in n}) for s, n in zip(SECTIONS, names, strict=True)))


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        values = yaml.safe_load(path.read_text()) or {}
    except OSError as error:
        raise ConfigError([f"cannot read the configuration file {path}{from_here(path)}: {error.strerror}"]) from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError([f"{path} is not YAML: {' '.join(str(error).split())}"]) from error
    if not isinstance(values, dict):
        raise ConfigError([f"{path} holds {type(values).__name__}, not 'name: value' lines"])
    types = {name: hint for section in SECTIONS for name, hint in get_type_hints(section).items()}
    problems, typed = [], {}
    for name, value in values.items():
        if name not in types:
            problems.append(f"{path}: {_unknown('setting', name)}")
            continue
        typed[name], problem = _typed(value, types[name])
        if problem:
            problems.append(f"{path}: {name}: {value!r} is not {problem}")
    if problems:
        raise ConfigError(problems)
    return typed


def _typed(value: Any, hint: Any) -> tuple[Any, str]:
    """A YAML value as the field's type, and what it should have been if it is not ('' when it is)."""
    kinds = get_args(hint) or (hint,)
    if value is None:
        return None, "" if type(None) in kinds else "a value"
    if str in kinds:
        return _text(value)
    if bool in kinds:
        return value, "" if isinstance(value, bool) else "true or false"
    wanted, name = (int, "a whole number") if int in kinds else (float, "a number")
    try:  # YAML reads 5e-4 as text
        number = None if isinstance(value, bool) else wanted(value)
    except (TypeError, ValueError, OverflowError):  # int(inf) overflows
        number = None
    return number, "" if number is not None and float(number) == float(value) else name


def _text(value: Any) -> tuple[Any, str]:
    """YAML's natural forms of a text flag: stage_layers: 4 or [4, 4], resume_from_checkpoint: true."""
    if isinstance(value, dict):
        return None, "a single value"
    if isinstance(value, bool):
        return str(value).lower(), ""
    return ",".join(map(str, value)) if isinstance(value, list) else str(value), ""
