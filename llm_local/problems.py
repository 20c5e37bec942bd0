"""What is wrong with a run's values, seen without the model, the data or the disk: pure functions."""

from __future__ import annotations

import re

from llm_local.config import Config
from llm_local.flags import FLAGS, IMAGES, TEXT
from llm_local.head_problems import head_problems
from llm_local.job_problems import job_problems
from llm_local.model.heads.head import head_of
from llm_local.model.lora import lora_problems
from llm_local.replicas import replica_problems, replicas_of


def parse_stage_layers(text: str) -> list[int] | None:
    """'4,4' → [4, 4]; None if the text is no such list."""
    parts = [part.strip() for part in text.split(",")]
    return [int(part) for part in parts] if all(part.isdecimal() for part in parts) else None


def parse_named_files(text: str) -> list[tuple[str, str]]:
    """'wiki=a.txt,code=b.txt' → the pairs; '' for a name or a file that is missing."""
    pairs = [part.partition("=") for part in text.split(",") if part.strip()]
    return [(name.strip(), file.strip()) for name, _, file in pairs]


def static_problems(config: Config, world_size: int, fp16_supported: bool, bf16_supported: bool) -> list[str]:
    """Every problem that the values show without looking at the model, the data or the disk."""
    return (
        value_problems(config)
        + _source_problems(config)
        + _of_other_rows(config)
        + _model_problems(config)
        + config.task.problems(config.model, config.data, config.local, config.train)
        + _best_problems(config)
        + _layout_problems(config, world_size)
        + _method_problems(config)
        + _freeze_problems(config)
        + lora_problems(config)
        + _replica_problems(config, world_size)
        + head_problems(config)
        + job_problems(config)
        + (_precision_problems(config, fp16_supported, bf16_supported))
    )


def value_problems(config: Config) -> list[str]:
    """What the flags' own choices and ranges refuse (flags.py)."""
    values = config.flat()
    if config.epoch_flag == "num_train_epochs":
        values["max_steps"] = None  # is not known yet
    given = [(name, values[name], flag) for name, flag in FLAGS.items() if values[name] is not None]
    problems = [
        f"{name}={value!r} is unknown; choose one of {', '.join(flag.choices)}"
        for name, value, flag in given
        if flag.choices and value not in flag.choices
    ]
    problems += [f"{n}={value} {f.range.says}" for n, value, f in given if f.range and not f.range.holds(value)]
    if values["seq_length"] == 1:
        problems.append("seq_length=1 leaves nothing to predict; use 2 or more")
    return problems


def _model_problems(config: Config) -> list[str]:
    train = config.train
    problems = []
    if config.epoch_flag == "num_train_epochs":
        problems.append(f"num_train_epochs={train.num_train_epochs} is counted by a run alone; use max_steps")
    models = [n for n in ("model_name_or_path", "config_name", "model_type") if getattr(config.model, n)]
    if len(models) > 1:
        problems.append(f"both {' and '.join(models)} are given; keep one")
    if not models:
        problems.append(
            "no model: give config_name or model_type (a new model) or model_name_or_path (a pretrained one)"
        )
    if config.model.gguf_file and not config.model.model_name_or_path:
        problems.append(f"gguf_file={config.model.gguf_file} needs model_name_or_path, the directory that it is in")
    if train.eval_on_start and not train.eval_batches:
        problems.append("eval_on_start=True with eval_batches=0 evaluates nothing; use eval_batches=1 or more")
    return problems


def _best_problems(config: Config) -> list[str]:
    train = config.train
    problems = []
    if train.greater_is_better:
        problems.append("greater_is_better=True: the lowest loss is the best; leave it out")
    if not train.load_best_model_at_end:
        return problems
    evaluation, saves = config.eval_interval if train.eval_batches else 0, config.save_interval
    if not evaluation or not saves or saves % evaluation:
        problems.append(
            "load_best_model_at_end=True needs an evaluation of each checkpoint; give save_steps, and eval_steps of "
            "which it is a multiple"
        )
    return problems


def data_flag_problems(config: Config) -> list[str]:
    """What is wrong with the flags of the data alone."""
    return value_problems(config) + _source_problems(config) + _of_other_rows(config)


def text_flag_problems(config: Config) -> list[str]:
    """The same for what reads text and trains no model."""
    if config.task.reads_images:
        return [f"task={config.task.name} reads images, and this is for text; a run reads them as they are"]
    return data_flag_problems(config)


def _of_other_rows(config: Config) -> list[str]:
    """Flags that speak of text where rows are images, or of images where they are text."""
    defaults, read = Config().flat(), IMAGES if config.task.reads_images else TEXT
    given = {name: value for name, value in config.flat().items() if value != defaults[name]}
    others = [name for name in given if FLAGS[name].of_rows not in ("", read)]
    return [
        f"{name}={given[name]} is for {FLAGS[name].of_rows}; leave it out, or choose another task" for name in others
    ]


def _source_problems(config: Config) -> list[str]:
    data = config.data
    sources = [n for n in ("dataset_name", "train_file", "train_dir", "data_mixture") if getattr(data, n)]
    problems = []
    if len(sources) > 1:
        problems.append(f"{'both ' if len(sources) == 2 else ''}{' and '.join(sources)} are given; keep one")
    if data.validation_file and not (data.train_file or data.data_mixture):
        problems.append("validation_file needs train_file")
    if data.validation_dir and (data.validation_file or not (data.train_dir or data.data_mixture)):
        problems.append("validation_dir needs train_dir, and no validation_file beside it")
    for name in ("dataset_config_name", "dataset_split", "dataset_revision"):
        if getattr(data, name) and not data.dataset_name:
            where = "; say it in the mixture file" if data.data_mixture else ""
            problems.append(f"{name}={getattr(data, name)} needs dataset_name{where}")
    if data.max_train_samples is not None and (data.streaming or data.data_mixture):
        what = "streaming" if data.streaming else "data_mixture"
        problems.append(f"max_train_samples={data.max_train_samples} does not work with {what}; use max_steps")
    pairs = parse_named_files(data.validation_files or "")
    names = [name for name, _ in pairs]
    for name, file in pairs:
        if not re.fullmatch(r"\w[\w.-]*", name) or not file:
            problems.append(f"validation_files={data.validation_files!r} is not a list such as wiki=a.jsonl,code=b.txt")
            break
    for name in sorted(set(names)):
        if names.count(name) > 1 or (name == "validation" and data.validation_file):
            problems.append(f"validation_files={data.validation_files!r} gives the name {name!r} again; choose another")
    return problems


def _layout_problems(config: Config, world_size: int) -> list[str]:
    local = config.local
    problems = replica_problems(config, world_size)
    if local.stage_layers is not None:
        layers = parse_stage_layers(local.stage_layers)
        if layers is None:
            problems.append(f"stage_layers={local.stage_layers!r} is not a list such as 4,4")
        elif len(layers) != local.num_stages:
            problems.append(
                f"stage_layers={local.stage_layers!r} names {len(layers)} stages, num_stages is {local.num_stages}"
            )
        elif 0 in layers:
            problems.append(f"stage_layers={local.stage_layers!r} leaves stage {layers.index(0)} without a layer")
    return problems


def _method_problems(config: Config) -> list[str]:
    local = config.local
    problems, steps = config.method.problems(local), local.final_backprop_steps
    warmup = local.head_warmup_steps
    if warmup > 0 and warmup + steps >= config.train.max_steps:
        after = f" after the {steps} of final_backprop_steps" if steps else ""
        problems.append(
            f"head_warmup_steps={warmup} leaves no step of max_steps={config.train.max_steps} for the layers{after}; "
            "lower it"
        )
    if config.method.is_delayed and config.train.fp16:
        problems.append(f"fp16=True does not work with method={local.method}, which scales no loss; use bf16")
    if steps > max(0, config.train.max_steps):
        problems.append(f"final_backprop_steps={steps} is more than max_steps={config.train.max_steps}; lower it")
    return problems


def _freeze_problems(config: Config) -> list[str]:
    local, text = config.local, config.local.freeze_stages
    if text is None:
        return []
    named, frozen, stages = f"freeze_stages={text!r}", config.frozen_stages, max(1, local.num_stages)
    if not all(part.strip().isdecimal() for part in text.split(",")):
        return [f"{named} is not a list of stages such as 0,1"]
    problems = []
    if frozen[-1] >= stages:
        problems.append(f"{named} names stage {frozen[-1]}, the last of num_stages={stages} is {stages - 1}")
    if frozen == tuple(range(stages)):
        problems.append(f"{named} leaves no stage to train; leave one out")
    if not config.method.has_local_losses or config.method.crosses_back(local):
        whys = ("distillation_weight", "final_backprop_steps")
        why = next(
            (f"{name}={getattr(local, name)}" for name in whys if getattr(local, name)), f"method={local.method}"
        )
        problems.append(
            f"{named} does not work with {why}: a frozen stage has no backward pass, and takes nothing from the next "
            "one; leave one of them out"
        )
    if local.replica_sync_steps:
        problems.append(
            f"{named} does not work with replica_sync_steps={local.replica_sync_steps}: a frozen stage has nothing to "
            "meet for; leave one of them out"
        )
    return problems


def _replica_problems(config: Config, world_size: int) -> list[str]:
    local, steps, defaults = config.local, config.local.replica_sync_steps, Config().local
    if not steps:
        names = ("replica_sync_fragments", "replica_sync_delay", "outer_learning_rate", "outer_momentum")
        given = [(name, value) for name in names if (value := getattr(local, name)) != getattr(defaults, name)]
        return [f"{name}={value} is of replicas that train apart; give replica_sync_steps" for name, value in given]
    named, problems = f"replica_sync_steps={steps}", []
    if config.is_pipelined:
        problems.append(
            f"{named}: DeepSpeed's pipeline (method={local.method} on several stages) joins all replicas in each step; "
            "use a method with local losses, or num_stages=1"
        )
    if max(replicas_of(config, world_size)) < 2:
        problems.append(f"{named} is for stages of two replicas or more; start more ranks, or leave it out")
    for name, most in (("replica_sync_fragments", steps), ("replica_sync_delay", steps - 1)):
        if (value := getattr(local, name)) > most:
            problems.append(f"{name}={value}: with {named} it is at most {most}; lower it, or raise the other")
        if head_of(config).shares_matrix and value != getattr(defaults, name):
            problems.append(f"{name}={value}: replicas with head={local.head} meet with all weights; leave it out")
    if head_of(config).shares_matrix and local.head_refresh_steps % steps:
        problems.append(
            f"{named} with head={local.head}: replicas have one matrix to share when they meet, and "
            f"head_refresh_steps={local.head_refresh_steps} is no multiple of it; make it one"
        )
    return problems


def _precision_problems(config: Config, fp16_supported: bool, bf16_supported: bool) -> list[str]:
    problems = []
    if config.train.bf16 and config.train.fp16:
        problems.append("both bf16 and fp16 are set; keep one")
    if config.train.fp16 and not fp16_supported:
        problems.append("fp16 is not supported on this device; use bf16, or neither for fp32")
    if config.train.bf16 and not bf16_supported:
        problems.append("bf16 is not supported on this device; use fp16, or neither for fp32")
    return problems
