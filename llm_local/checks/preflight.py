"""Everything that can be wrong with a run, found by rank 0 before the ranks meet and before a file is written."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from functools import partial
from typing import Any

from transformers import BaseImageProcessor, PretrainedConfig, PreTrainedTokenizerBase

from llm_local.checkpoint.catalog import Catalog
from llm_local.checkpoint.line import documents_begin, find_checkpoint
from llm_local.checkpoint.manifest import BrokenCheckpoint, layout_of, layout_problems
from llm_local.checks.class_problems import class_problems, skipped_positions
from llm_local.checks.engine_trial import engine_problems
from llm_local.checks.exit_check import exit_warnings, refused_exits
from llm_local.checks.memory_check import MemoryCheck, room_of
from llm_local.checks.output_folder import output_problems, unwritable
from llm_local.checks.profile import measure_costs
from llm_local.checks.sequence_trial import undividable
from llm_local.checks.tokenizer_check import tokenizer_warnings
from llm_local.checks.trial import document_problems, router_problems
from llm_local.checks.weight_problems import weight_problems
from llm_local.config import Config, ConfigError
from llm_local.cut import plan_partition
from llm_local.data.image_processor import pixel_shape
from llm_local.data.sets import ProcessingClass, class_names, data_problems, key_of, load_processing_class
from llm_local.data.special_tokens import generation_values, pretrained_generation, special_tokens, token_warnings
from llm_local.data.tokenizer import highest_id
from llm_local.device import missing_for_compile, supports
from llm_local.ds_config import load_json
from llm_local.ds_problems import deepspeed_problems
from llm_local.head_problems import cut_problems, head_warnings
from llm_local.job_problems import surroundings_problems
from llm_local.memory.division import Division
from llm_local.memory.sizes import Measuring, ModelSizes
from llm_local.model.anatomy import Anatomy, SliceError, Trial, attention_kernel, probe_and, text_config
from llm_local.model.classes import new_parameters, set_classes
from llm_local.model.document_mask import DocumentMask
from llm_local.model.gguf_cache import convert
from llm_local.model.lora import lora_problems, resume_problems, with_adapters
from llm_local.model.lowrank import rank_problems
from llm_local.model.model_config import load_model_config
from llm_local.model.remote_code import read_code
from llm_local.model.router_loss import wants_router_loss
from llm_local.model.slices import try_slices
from llm_local.model.token_ids import set_token_ids
from llm_local.partition import Partition
from llm_local.problems import static_problems
from llm_local.replicas import of_stage, replicas_of
from llm_local.reporting import report_problems
from llm_local.sequence_problems import sequence_problems
from llm_local.setup import Setup, model_values
from llm_local.tensor_problems import tensor_problems


def preflight(given: Config, world_size: int, local_world_size: int = 0) -> Setup:
    """As set_up, without what reads the data."""
    return set_up(given, world_size, local_world_size)[0]


def set_up(given: Config, world_size: int, local_world_size: int = 0) -> tuple[Setup, ProcessingClass]:
    """Checks the whole run; what all ranks will use, and the tokenizer or image processor, which is read once here.

    local_world_size: ranks of this host, by default all. Raises ConfigError with every problem that was found.
    """
    config = replace(given, data=replace(given.data, add_bos=documents_begin(given)))
    with suppress(ConfigError):  # which deepspeed_problems has
        config = replace(config, deepspeed_json=load_json(config))
    problems = _flag_problems(config, world_size) + report_problems(config)
    problems = problems or _of_engines(engine_problems, config, world_size) + surroundings_problems(config)
    problems += (data_problems(config) if config.reads_data else []) + output_problems(config)
    cache_problems = unwritable("cache_dir", config.cache_dir)
    problems += cache_problems
    found = _Model()
    if (config.model.config_name or config.model.model_name_or_path or config.model.model_type) and not cache_problems:
        problems += found.look(config, world_size)
    if problems:
        raise ConfigError(problems)
    config = found.sized(config)
    checkpoint, problems = _resume(config, found, world_size)
    if problems:
        raise ConfigError(problems)
    setup = _in_memory(_setup_of(given, config, checkpoint, found), found, world_size, local_world_size or world_size)
    return setup, found.processing_class(config)


def _in_memory(setup: Setup, found: _Model, world_size: int, local_world_size: int) -> Setup:
    """With the bytes that the run needs. Raises ConfigError where they are not there."""
    model_config, anatomy, _ = found.whole()

    def other_problems(config: Config) -> list[str]:
        return _flag_problems(config, world_size) + _support_problems(config, model_config)

    def of_division(config: Config) -> list[str]:
        return undividable(config, model_config, anatomy)

    room, sizes_of = room_of(local_world_size), partial(found.sizes_of, setup.config)
    check = MemoryCheck(model_config, anatomy, sizes_of, world_size, room, other_problems, of_division)
    memory = check.of(setup.config, setup.partition)
    problems, warnings = check.problems(setup.config, memory)
    if problems and not setup.config.train.ignore_memory_check:
        raise ConfigError(problems)
    return replace(setup, memory=memory, warnings=(*setup.warnings, *problems, *warnings))


def _flag_problems(config: Config, world_size: int) -> list[str]:
    """What the flags and DeepSpeed's JSON show, without model and data."""
    problems = static_problems(config, world_size, supports("fp16"), supports("bf16"))
    problems += _of_engines(deepspeed_problems, config, world_size)
    return problems + tensor_problems(config) + sequence_problems(config)


def _of_engines(look: Callable[[Config, int], list[str]], config: Config, world_size: int) -> list[str]:
    """What is found for the engines of the stages, by their flags and number of replicas."""
    replicas = replicas_of(config, world_size)
    different = {number: of_stage(config, replicas, stage) for stage, number in enumerate(replicas)}
    return next(filter(None, (look(each, config.engine_ranks(number)) for number, each in different.items())), [])


def _setup_of(given: Config, config: Config, checkpoint: str | None, found: _Model) -> Setup:
    """What all ranks will use, of a run that is right."""
    model_config, anatomy, partition = found.whole()
    if config.local.partition == "profile":
        if config.local.stage_layers is None:
            costs = measure_costs(config, model_config, anatomy)
            partition = plan_partition(config, anatomy, costs)
            anatomy = with_adapters(config, model_config, anatomy, partition)
        layers = [len(partition.layers_of(stage)) for stage in range(partition.num_stages)]
        config = replace(config, local=replace(config.local, stage_layers=",".join(map(str, layers))))
    warnings, generation = found.warnings + head_warnings(config) + _frozen_as_new(config, checkpoint), {}
    refused = refused_exits(config, model_config, anatomy, partition)
    processing = found.processing_class(config)
    if isinstance(processing, PreTrainedTokenizerBase):
        warnings += tokenizer_warnings(config, model_config, processing)
        warnings += token_warnings(config, model_config, processing)
        generation = generation_values(config, model_config, processing)
    return Setup(
        config=config,
        given=given.flat(),
        model=model_values(config, model_config),
        generation=generation,
        anatomy=anatomy,
        partition=partition,
        checkpoint=checkpoint,
        warnings=warnings + exit_warnings(model_config.model_type, refused),
        documents=document_mask(config, processing),
        refused_exits=refused,
        code=read_code(model_config),
        tokenizer=key_of(processing) if getattr(processing, "is_fast", True) else "",
    )


def _frozen_as_new(config: Config, checkpoint: str | None) -> tuple[str, ...]:
    if not config.frozen_stages or checkpoint or config.model.model_name_or_path:
        return ()
    return (f"freeze_stages={config.local.freeze_stages}: what is frozen has new weights, which nothing has trained",)


class _Model:
    """What is learned of the model while looking for problems."""

    def __init__(self) -> None:
        self.config: PretrainedConfig | None = None
        self.anatomy: Anatomy | None = None
        self.partition: Partition | None = None
        self.warnings: tuple[str, ...] = ()
        self.sizes: dict[Division, ModelSizes] = {}
        self.row_shape: tuple[int, ...] | None = None
        self._processing: ProcessingClass | None = None

    def processing_class(self, config: Config) -> ProcessingClass:
        """The run's, read when it is first asked for. Raises ConfigError."""
        if self._processing is None:
            assert self.config is not None
            self._processing = load_processing_class(config, self.config)
        return self._processing

    def tokenizer(self, config: Config) -> PreTrainedTokenizerBase:
        """That of a run that reads text. Raises ConfigError."""
        tokenizer = self.processing_class(config)
        assert isinstance(tokenizer, PreTrainedTokenizerBase)
        return tokenizer

    def sized(self, config: Config) -> Config:
        """With as many tokens a row as the model makes of one, where that is fixed."""
        tokens = self.anatomy.num_tokens if self.anatomy is not None else 0
        return replace(config, data=replace(config.data, seq_length=tokens)) if tokens else config

    def whole(self) -> tuple[PretrainedConfig, Anatomy, Partition]:
        """Of a model without problems."""
        assert self.config is not None
        assert self.anatomy is not None
        assert self.partition is not None
        return self.config, self.anatomy, self.partition

    def look(self, config: Config, world_size: int) -> list[str]:
        try:
            model_config, anatomy = self._watch(config)
        except ConfigError as error:
            return error.problems
        except SliceError as error:
            assert self.config is not None
            return [_attention_problem(attention_kernel(config.model, self.config), error.__cause__) or str(error)]
        fresh, said = new_parameters(config, model_config)
        self.anatomy = anatomy = replace(anatomy, fresh=fresh)
        problems, self.warnings = weight_problems(config, model_config, fresh)
        self.warnings += (said,) if said else ()
        problems += self._length_problems(config, anatomy) + _support_problems(config, model_config)
        config = self.sized(config)
        problems += class_problems(config, model_config, anatomy)
        problems += undividable(config, model_config, anatomy)
        if config.data.document_mask:
            problems += document_problems(config, model_config, anatomy)
        if wants_router_loss(model_config):
            problems += router_problems(config, model_config, anatomy)
        if config.local.num_stages > 0:
            try:
                self.partition = plan_partition(config, anatomy)
                problems += cut_problems(config, self.partition)
                problems += rank_problems(config, model_config, anatomy, self.partition)
                if not lora_problems(config):
                    self.anatomy = with_adapters(config, model_config, anatomy, self.partition)
            except ConfigError as error:
                problems += error.problems
            except ValueError as error:
                problems.append(str(error))
        return problems

    def _watch(self, config: Config) -> tuple[PretrainedConfig, Anatomy]:
        """Raises ConfigError and SliceError."""
        self.config, shape = load_model_config(config.model), None
        if config.task.reads_images:
            set_classes(self.config, class_names(config))
            processor = self.processing_class(config)
            assert isinstance(processor, BaseImageProcessor)
            shape = pixel_shape(processor)
        elif config.model.model_name_or_path is None:
            with suppress(ConfigError):  # of the tokenizer, which _length_problems has
                set_token_ids(self.config, special_tokens(config, self.tokenizer(config)))
        self.row_shape, own = shape, Division.of(config)
        self.anatomy, self.sizes[own] = self._measure(config, own, then=try_slices)
        convert(config)
        pretrained_generation(config)
        return self.config, self.anatomy

    def _length_problems(self, config: Config, anatomy: Anatomy) -> list[str]:
        """What is wrong with the length of rows, and with the tokenizer."""
        assert self.config is not None
        length, default = config.data.seq_length, Config().data.seq_length
        if not anatomy.num_tokens:
            problems = _size_problems(config, self.config)
            try:
                return problems + _vocabulary_problems(config, self.config, highest_id(self.tokenizer(config)))
            except ConfigError as error:
                return problems + error.problems
        if length in (default, anatomy.num_tokens):
            return []
        return [f"seq_length={length}: the model makes {anatomy.num_tokens} tokens of an image; leave it out"]

    def sizes_of(self, config: Config, division: Division) -> ModelSizes:
        """Of a rank's share of the model."""
        if division not in self.sizes:
            self.sizes[division] = self._measure(config, division)[1]
        return self.sizes[division]

    def _measure(self, config: Config, division: Division, then: Trial | None = None) -> tuple[Anatomy, ModelSizes]:
        assert self.config is not None
        kernel = attention_kernel(config.model, self.config)
        measuring = Measuring(config.data.seq_length, config.precision, kernel, (division,), then)
        anatomy, (sizes,) = probe_and(measuring, self.config, config.model, self.row_shape)
        return anatomy, sizes


def _attention_problem(wanted: str | None, cause: BaseException | None) -> str:
    """What is wrong with the kernel that was asked for, '' if it is not that what kept the model from being watched."""
    reason = str(cause).partition("\n")[0]
    if not wanted or not (isinstance(cause, ImportError) or "attn_implementation" in reason):
        return ""
    return f"attn_implementation={wanted} cannot be used ({reason}); install what it needs, or use sdpa or eager"


def document_mask(config: Config, processing_class: ProcessingClass) -> DocumentMask | None:
    """How the run keeps packed documents apart, if it does."""
    end: Any = getattr(processing_class, "eos_token_id", None) if config.data.document_mask else None
    return None if end is None else DocumentMask(end)  # data/sets.py refuses a tokenizer without


def _size_problems(config: Config, model_config: PretrainedConfig) -> list[str]:
    text = text_config(model_config)
    problems = []
    positions = getattr(text, "max_position_embeddings", None)
    if positions is not None and config.data.seq_length > positions:
        problems.append(
            f"seq_length={config.data.seq_length} is longer than the model's {positions} positions; shorten it, or set "
            f"max_position_embeddings={config.data.seq_length} in config_overrides"
        )
    elif positions is not None and (skipped := skipped_positions(config, model_config, positions)):
        problems.append(
            f"seq_length={config.data.seq_length} is longer than the model's {positions - skipped} positions, which "
            f"begin behind pad_token_id={skipped - 1}; shorten it, or set "
            f"max_position_embeddings={config.data.seq_length + skipped} in config_overrides"
        )
    return problems


def _vocabulary_problems(config: Config, model_config: PretrainedConfig, highest: int) -> list[str]:
    """highest: the tokenizer's last id."""
    text, problems = text_config(model_config), []
    if config.local.distillation_weight > 0 and config.local.distillation_top_k > text.vocab_size:
        problems.append(
            f"distillation_top_k={config.local.distillation_top_k} is more than the model's vocabulary of "
            f"{text.vocab_size}; lower it"
        )
    if text.vocab_size <= highest:
        problems.append(
            f"the model's vocabulary of {text.vocab_size} has no row for the tokenizer's highest id {highest}; "
            + (
                "choose another tokenizer (--tokenizer_name): a pretrained model has weights for no more tokens"
                if config.model.model_name_or_path
                else f"set vocab_size={highest + 1} in config_overrides or choose another tokenizer"
            )
        )
    return problems


def _support_problems(config: Config, model_config: PretrainedConfig) -> list[str]:
    text = text_config(model_config)
    problems = []
    if getattr(text, "layerdrop", 0) or getattr(text, "decoder_layerdrop", 0):
        problems.append("the model's config has layerdrop, which would skip a stage's border; set layerdrop=0.0")
    model_class = config.task.classes.get(type(model_config), None)
    if config.train.gradient_checkpointing and not getattr(model_class, "supports_gradient_checkpointing", True):
        problems.append(f"model type {model_config.model_type!r} does not support gradient_checkpointing; leave it off")
    if config.train.torch_compile and (missing := missing_for_compile()):
        problems.append(f"torch_compile=True needs {missing}, which is not there; install it, or leave it off")
    return problems


def _resume(config: Config, found: _Model, world_size: int) -> tuple[str | None, list[str]]:
    model_config, anatomy, partition = found.whole()
    layout = layout_of(config, partition, replicas_of(config, world_size), model_config)
    checkpoint = find_checkpoint(config)
    if checkpoint is None:
        return None, []
    try:
        problems = layout_problems(checkpoint, layout)
        catalog = Catalog(checkpoint)
        step, flags = catalog.manifest.step, catalog.manifest.flags
        problems += resume_problems(str(checkpoint), {*catalog.weights}, flags, config, anatomy)
    except ConfigError as error:
        return None, error.problems
    except BrokenCheckpoint as error:
        return None, [str(error)]
    if step > config.train.max_steps:
        problems.append(f"{checkpoint} is beyond max_steps={config.train.max_steps}; raise max_steps")
    if config.train.trace and step == config.train.max_steps:
        problems.append(
            f"trace=True finds no step to record: {checkpoint} is at max_steps; raise it, or leave trace off"
        )
    return str(checkpoint), problems
