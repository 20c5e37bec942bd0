"""The README.md of an exported model, in the hub's model-card format: what it is and how it was trained.

Its text is a pure function of the facts of a run; `finish` and an exporter of checkpoints gather them.
"""

from __future__ import annotations

import json
import math
import textwrap
from dataclasses import dataclass
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from platform import python_version
from typing import Any

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from llm_local.config import Config
from llm_local.data.packing import PackedSource
from llm_local.data.source_problems import uses_builtin
from llm_local.ds_config import zero_stage
from llm_local.export.adapter import FOLDER as ADAPTER
from llm_local.export.model_folder import CARD, write_text
from llm_local.export.stages import exit_folder
from llm_local.files import Json
from llm_local.flags import MACHINE, START, deciding
from llm_local.partition import Partition
from llm_local.replicas import replicas_text, sequences_per_step

PACKAGES = ("llm_local", "torch", "deepspeed", "transformers", "datasets", "tokenizers")
DRAFTS = " As it has layers and vocabulary from the whole model, it also drafts for it (speculative decoding)."
HELD_OUT = "Of each stage's exit on held-out text, nats a token."
DATA = "built-in corpus: the sources of Python's own library"


@dataclass(frozen=True)
class Training:
    """A finished run, or one up to a checkpoint.

    tokens: those trained on, without padding; places: with it. losses: the validation loss of each stage's exit at the
    end, nats a token; None where nothing was evaluated. exits: stages whose exits are exported as models of their own.
    deepspeed: the JSON. measures: of each stage's exit, what the task has beside the loss. sources: what there was to
    train on, as far as it is known. skipped: steps that each stage did not train, as nothing came.
    """

    config: Config
    partition: Partition
    replicas: tuple[int, ...]
    model_type: str
    steps: int
    tokens: int
    losses: tuple[float | None, ...]
    exits: tuple[int, ...]
    deepspeed: Json
    versions: dict[str, str]
    places: int = 0
    skipped: tuple[int, ...] = ()
    sources: tuple[PackedSource, ...] = ()
    measures: tuple[tuple[float, ...], ...] = ()


@cache
def installed_versions() -> dict[str, str]:
    """Of Python and of the packages that the result depends on, as far as they are installed as packages."""
    found = {"python": python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def write_cards(training: Training, export: Path) -> None:
    """That of the whole model, and of each exit. Raises Unwritten."""
    write_text(export / CARD, model_card(training))
    for stage in training.exits:
        write_text(exit_folder(export, stage) / CARD, model_card(training, stage))
    if (export / ADAPTER).is_dir():
        write_text(export / ADAPTER / CARD, adapter_card(training))


def adapter_card(training: Training) -> str:
    """The text of README.md of an adapter of the whole model."""
    config = training.config
    base, loader = config.model.model_name_or_path, config.task.auto_class
    data = ModelCardData(
        library_name="peft",
        pipeline_tag=config.task.pipeline_tag,
        base_model=_hub_name(base),
        tags=["lora", "llm_local", training.model_type, config.local.method],
    )
    sections = [
        f"# {_name(training, None)}, adapter\n\nA LoRA adapter of all layers that were trained, for `{base}`.",
        "## Use\n\n```python\nfrom peft import PeftModel\n"
        f"from transformers import {loader}\n\n"
        f'model = PeftModel.from_pretrained({loader}.from_pretrained("{base}"), "adapter")\n```',
        f"## Training\n\n{_table(_facts(training))}",
    ]
    return str(ModelCard(f"---\n{data.to_yaml()}\n---\n\n" + "\n\n".join(sections) + "\n"))


def model_card(training: Training, stage: int | None = None) -> str:
    """The text of README.md: of the exit of a stage, or of the whole model."""
    sections = [
        f"# {_name(training, stage)}\n\n{_what_it_is(training, stage)}",
        f"## Use\n\n{_use(training, stage)}",
        f"## Training\n\n{_table(_facts(training))}",
        *([f"## Data\n\n{_sources(training)}"] if training.sources else []),
        *([f"## Validation loss\n\n{_losses(training, stage)}"] if _shown_losses(training, stage) else []),
        f"## Reproduce\n\n{_reproduce(training)}",
    ]
    return str(ModelCard(f"---\n{_metadata(training, stage).to_yaml()}\n---\n\n" + "\n\n".join(sections) + "\n"))


def _name(training: Training, stage: int | None) -> str:
    run = Path(training.config.train.output_dir).absolute().name
    return run if stage is None else f"{run}, exit of stage {stage}"


def _metadata(training: Training, stage: int | None) -> ModelCardData:
    config = training.config
    data, base = _hub_name(config.data.dataset_name), _hub_name(config.model.model_name_or_path)
    loss = training.losses[-1 if stage is None else stage]
    results = []
    if loss is not None:
        found = training.measures[-1 if stage is None else stage] if training.measures else ()
        pairs = [
            ("loss", round(loss, 6)),
            *zip(config.task.measures, (round(value, 6) for value in found), strict=False),
        ]
        pairs += [(config.task.score, round(perplexity(loss), 4))] if config.task.score else []
        results = [
            EvalResult(
                task_type=config.task.pipeline_tag,
                dataset_type=data or ("image" if config.task.reads_images else "text"),
                dataset_name=_data(config),
                dataset_config=config.data.dataset_config_name if data else None,
                dataset_split="validation",
                metric_type=metric,
                metric_value=value,
            )
            for metric, value in pairs
        ]
    known: dict[str, Any] = {
        "language": "code" if uses_builtin(config) else None,
        "base_model": base,
        "datasets": [data] if data else None,
        "model_name": _name(training, stage),
        "eval_results": results or None,
    }
    drafts = stage is not None and config.task.generates
    return ModelCardData(
        library_name="transformers",
        pipeline_tag=config.task.pipeline_tag,
        tags=["llm_local", training.model_type, config.local.method, *(["draft-model"] if drafts else [])],
        **known,
    )


def _hub_name(name: str | None) -> str | None:
    """The name if it is one of the hub's: not a folder of this machine, and not a word of the project's own."""
    if name is None or name == "builtin" or Path(name).exists():
        return None
    try:
        validate_repo_id(name)
    except HFValidationError:
        return None
    return name


def _data(config: Config) -> str:
    if uses_builtin(config):
        return DATA
    if config.data.data_mixture:
        return f"the mixture {Path(config.data.data_mixture).name}"
    part = f" ({config.data.dataset_config_name})" if config.data.dataset_config_name else ""
    return Path(config.data.train_file).name if config.data.train_file else f"{config.data.dataset_name}{part}"


def _what_it_is(training: Training, stage: int | None) -> str:
    config, partition = training.config, training.partition
    kind = f"a {config.task.title} of type `{training.model_type}`"
    if stage is not None and stage < partition.num_stages - 1:
        private = len(partition.private_layers(partition.stages[stage].stop - 1, config.head_layers_schedule))
        layers = partition.layers_of(stage).stop
        return textwrap.fill(
            f"An exit: the first {layers} of {partition.num_layers} layers of {kind}, with stage {stage}'s own head"
            f"{f' (private layers: {private})' if private else ''}. It is a smaller and faster model by itself."
            f"{DRAFTS if config.task.generates else ''}",
            120,
        )
    how = config.method.describe(len(partition.blocks))
    return textwrap.fill(f"{kind[0].upper()}{kind[1:]}, {how}.", 120)


def _use(training: Training, stage: int | None) -> str:
    exits = training.exits
    drafts = [stage] if stage is not None else [number for number in exits if number != max(exits)][:1]
    trust = ", trust_remote_code=True" if training.config.model.trust_remote_code else ""
    task = training.config.task
    lines = task.usage(trust, drafts)
    note = "\n\nGreedy text is the same with the draft as without." if drafts and task.generates else ""
    return "```python\n" + "\n".join(lines) + "\n```" + note


def _skipped(training: Training) -> list[str]:
    return [f"of which stage {stage} skipped {count:,}" for stage, count in enumerate(training.skipped) if count]


def _facts(training: Training) -> dict[str, str]:
    config = training.config
    local, train = config.local, config.train
    sequences = sequences_per_step(config, training.replicas)
    warmup = f", {config.warmup_steps} steps of warm-up" if config.warmup_steps else ""
    facts = {
        "method": local.method,
        "blocks": training.partition.describe(),
        "head": _head(config),
        "stages × replicas": f"{training.partition.num_stages} × {replicas_text(training.replicas)}",
        "data": _data(config),
        "tokens": f"{training.tokens:,}{_padding(training)}",
        "steps": ", ".join([f"{training.steps:,}", *_skipped(training)]),
        "batch": f"{sequences} sequences of {config.data.seq_length} tokens",
        "learning rate": f"{train.learning_rate:g}, {train.lr_scheduler_type}{warmup}",
        "precision": f"{config.precision}, exported as {config.export_dtype}",
        "ZeRO stage": str(zero_stage(training.deepspeed)),
        "versions": ", ".join(f"{name} {text}" for name, text in training.versions.items()),
    }
    if config.model.model_name_or_path:
        facts = {"started from": config.model.model_name_or_path, **facts}
    if local.final_backprop_steps:
        facts["method"] += f", the last {local.final_backprop_steps} steps by backpropagation through all blocks"
    if config.replica_ranks > 1:
        facts["stages × replicas"] += f", each of {config.replica_ranks} ranks"
    if local.lora_rank is not None:
        dropout = f", dropout {local.lora_dropout:g}" if local.lora_dropout else ""
        where = local.lora_target_modules or "PEFT's matrices for the type"
        where += f" of layers {local.lora_layers_to_transform}" if local.lora_layers_to_transform else ""
        facts["adapters"] = f"LoRA, rank {local.lora_rank}, alpha {local.lora_alpha}{dropout}, on {where}; merged"
    if config.frozen_stages:
        stages = ", ".join(map(str, config.frozen_stages))
        facts["not trained"] = f"stage{'s' if len(config.frozen_stages) > 1 else ''} {stages} (frozen)"
    if local.replica_sync_steps:
        momentum = f", Nesterov momentum {local.outer_momentum:g}" if local.outer_momentum else ""
        fragments = f", {local.replica_sync_fragments} fragments" if local.replica_sync_fragments > 1 else ""
        delay = f", {local.replica_sync_delay} steps on the way" if local.replica_sync_delay else ""
        facts["replicas"] = (
            f"apart for {local.replica_sync_steps} steps, then an outer step at rate {local.outer_learning_rate:g}"
            f"{momentum}{fragments}{delay}"
        )
    return facts


def _padding(training: Training) -> str:
    if training.places <= training.tokens:
        return ""
    return f", and {1 - training.tokens / training.places:.1%} of the rows' places padding"


def _sources(training: Training) -> str:
    """What packing made of each source."""
    whole = sum(source.weight for source in training.sources)
    columns = ("source", "share of the rows", "packing", "documents", "rows", "padding", "documents cut")
    lines: list[tuple[str, ...]] = []
    for source in training.sources:
        packed, share = source.packed, f"{source.weight / whole:.1%}"
        known = (training.config.data.packing, *("read as a stream", "", "", ""))
        if packed is not None:
            cut = packed.cut / max(1, packed.documents)
            known = (packed.packing, f"{packed.documents:,}", f"{packed.rows:,}", f"{packed.padding:.1%}", f"{cut:.1%}")
        lines.append((_cell(source.name), share, *known))
    about = f"What there was to train on, in rows of {training.config.data.seq_length} tokens."
    head = [about, "", f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    return "\n".join([*head, *(f"| {' | '.join(line)} |" for line in lines)])


def _head(config: Config) -> str:
    if not config.method.has_local_losses:
        return "the model's own"
    layers = ", ".join(map(str, config.head_layers_schedule))
    private = f", private layers by block: {layers}" if any(config.head_layers_schedule) else ""
    return f"{config.local.head}{private}"


def _table(facts: dict[str, str]) -> str:
    return "\n".join(["| | |", "|---|---|", *(f"| {name} | {_cell(text)} |" for name, text in facts.items())])


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def perplexity(loss: float) -> float:
    return math.exp(min(loss, 700))


def _shown_losses(training: Training, stage: int | None) -> dict[str, float]:
    """By what a reader knows them as; of the baseline only the whole model's."""
    last = len(training.losses) - 1
    wanted = range(last + 1) if training.config.method.has_local_losses else [last]
    named = {
        f"stage {k}{' (the whole model)' if k == last else ''}{' (this exit)' if k == stage else ''}": k for k in wanted
    }
    return {name: loss for name, k in named.items() if (loss := training.losses[k]) is not None}


def _losses(training: Training, stage: int | None) -> str:
    task, last = training.config.task, training.measures[-1:]
    rows = []
    for name, loss in _shown_losses(training, stage).items():
        values = [f"{loss:.4f}", *([f"{perplexity(loss):,.1f}"] if task.score else [])]
        found = training.measures[int(name.split()[1])] if training.measures else ()
        rows.append(f"| {' | '.join([name, *values, *(f'{value:.2%}' for value in found)])} |")
    held_out = "Of each stage's exit on held-out images." if task.reads_images else HELD_OUT
    measures = [name.replace("_", " ") for name in task.measures] if last else []
    columns = ["exit", "loss", *([task.score] if task.score else []), *measures]
    return "\n".join([held_out, "", f"| {' | '.join(columns)} |", "|---" * len(columns) + "|", *rows])


def _reproduce(training: Training) -> str:
    default = Config().flat()
    incidental = deciding(START, MACHINE)
    given = {n: v for n, v in training.config.flat().items() if v != default[n] and n not in incidental}
    ranks = sum(training.replicas) * training.config.replica_ranks
    text = (
        f"With `run.yaml`:\n\n```yaml\n{yaml.safe_dump(given, sort_keys=False, allow_unicode=True)}```\n\n"
        f"```sh\ndeepspeed --num_gpus {ranks} scripts/pretrain.py run.yaml\n```"
    )
    if training.deepspeed:
        name = training.config.train.deepspeed
        text += f"\n\nDeepSpeed's JSON, `{name}`:\n\n```json\n{json.dumps(training.deepspeed, indent=1)}\n```"
    return text
