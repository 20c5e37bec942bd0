"""The flags of transformers' Trainer and of run_clm.py, and what becomes of each here.

The parser takes from here what it says of a flag that is not taken, --help its last group, and scripts/flags.py the
page docs/flags.md. The names stand here and are not read from whatever transformers is installed.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from llm_local.flags import FLAGS

TRAINING_ARGUMENTS = "TrainingArguments of transformers 5.24.0"
EARLIER = "TrainingArguments of earlier versions"
RUN_CLM = "run_clm.py: its model and its data"
TRL = "ModelConfig of TRL: adapters"


def _names(text: str) -> list[str]:
    return text.split()


THEIRS = {
    TRAINING_ARGUMENTS: _names("""
        output_dir per_device_train_batch_size num_train_epochs max_steps learning_rate lr_scheduler_type
        lr_scheduler_kwargs warmup_steps optim optim_args weight_decay adam_beta1 adam_beta2 adam_epsilon
        optim_target_modules gradient_accumulation_steps average_tokens_across_devices max_grad_norm
        label_smoothing_factor bf16 fp16 bf16_full_eval fp16_full_eval tf32 activation_checkpointing
        activation_checkpointing_kwargs gradient_checkpointing gradient_checkpointing_kwargs torch_compile
        torch_compile_backend torch_compile_mode use_liger_kernel liger_kernel_config use_cache neftune_noise_alpha
        torch_empty_cache_steps auto_find_batch_size logging_strategy logging_steps logging_first_step
        log_on_each_node logging_nan_inf_filter include_num_input_tokens_seen log_level log_level_replica
        disable_tqdm report_to run_name project trackio_space_id trackio_bucket_id trackio_static_space_id
        eval_strategy eval_steps eval_delay per_device_eval_batch_size prediction_loss_only eval_on_start
        eval_do_concat_batches eval_use_gather_object eval_accumulation_steps include_for_metrics batch_eval_metrics
        save_only_model save_strategy save_steps save_on_each_node save_total_limit enable_jit_checkpoint push_to_hub
        hub_token hub_private_repo hub_model_id hub_strategy hub_always_push hub_revision load_best_model_at_end
        metric_for_best_model greater_is_better ignore_data_skip restore_callback_states_from_checkpoint
        full_determinism seed data_seed use_cpu accelerator_config parallelism_config dataloader_drop_last
        dataloader_num_workers dataloader_pin_memory dataloader_persistent_workers dataloader_prefetch_factor
        dataloader_multiprocessing_context dataloader_in_order remove_unused_columns label_names
        train_sampling_strategy length_column_name ddp_find_unused_parameters ddp_bucket_cap_mb
        ddp_broadcast_buffers ddp_static_graph ddp_backend ddp_timeout fsdp fsdp_config deepspeed debug
        skip_memory_metrics do_train do_eval do_predict resume_from_checkpoint local_rank
    """),
    EARLIER: _names("""
        overwrite_output_dir warmup_ratio logging_dir per_gpu_train_batch_size per_gpu_eval_batch_size
        save_safetensors no_cuda use_mps_device jit_mode_eval fp16_opt_level half_precision_backend fp16_backend
        tpu_num_cores tpu_metrics_debug past_index fsdp_min_num_params fsdp_transformer_layer_cls_to_wrap adafactor
        group_by_length use_legacy_prediction_loop include_inputs_for_metrics push_to_hub_model_id
        push_to_hub_organization push_to_hub_token mp_parameters torchdynamo ray_scope include_tokens_per_second
        evaluation_strategy
    """),
    RUN_CLM: _names("""
        model_name_or_path model_type config_overrides config_name tokenizer_name cache_dir use_fast_tokenizer
        model_revision token trust_remote_code dtype torch_dtype low_cpu_mem_usage dataset_name dataset_config_name
        train_file validation_file max_train_samples max_eval_samples streaming block_size overwrite_cache
        validation_split_percentage preprocessing_num_workers keep_linebreaks
    """),
    TRL: _names("""
        use_peft lora_r lora_alpha lora_dropout lora_target_modules lora_target_parameters lora_modules_to_save
        lora_task_type use_rslora use_dora load_in_8bit load_in_4bit
    """),
}

# of flags that are taken: how they are not what they are there
DIFFERS = {
    "per_device_train_batch_size": "on each replica; there are ranks / --num_stages of them",
    "num_train_epochs": "of data on disk from one source; the next pass goes on in the middle of a batch",
    "max_steps": "1000 unless it, or --num_train_epochs, is said",
    "learning_rate": "5e-4 unless it is said",
    "lr_scheduler_type": f"one of {', '.join(FLAGS['lr_scheduler_type'].choices)}",
    "max_grad_norm": "of each block by itself",
    "fp16": "on GPUs that DeepSpeed trains in fp16",
    "gradient_checkpointing": "the non-reentrant kind",
    "torch_compile": "each layer by itself",
    "logging_steps": "10 unless it is said",
    "report_to": "csv, too; names with commas between; metrics are written in any case",
    "logging_strategy": "the last step is recorded in any case",
    "logging_first_step": "true unless it is said",
    "eval_strategy": "as --eval_steps says unless it is said; at the end a run evaluates, too",
    "eval_steps": "0 unless it is said: at the end alone",
    "save_strategy": "as --save_steps says unless it is said",
    "save_steps": "0 unless it is said: no checkpoints; else one after the last step, too",
    "max_train_samples": "rows of --seq_length tokens, the first ones of the data",
    "load_best_model_at_end": "the export is made of that checkpoint; OUTPUT/metrics goes on to the end",
    "metric_for_best_model": "the last stage's loss on the first validation set alone: loss, eval_loss",
    "greater_is_better": "false alone",
    "ddp_timeout": "of the start; --link_timeout_seconds is for the time after it",
    "deepspeed": "a file; ZeRO shards among the replicas of a stage",
    "resume_from_checkpoint": "true and auto, too; at any layout",
    "overwrite_output_dir": "replaces the run in the folder, and leaves other files",
    "local_rank": "set by a launcher, and not used",
    "config_overrides": "with --config_name, too; lists and dictionaries as JSON",
    "tokenizer_name": "a sentencepiece .model, too",
    "cache_dir": "for text and tokens; models of the hub are where HF_HOME says",
    "train_file": "a directory or a glob, too; .parquet and .arrow, too",
    "validation_file": "as --train_file",
    "validation_split_percentage": "drawn from all documents; of a stream the first ones",
    "preprocessing_num_workers": "1 unless it is said",
    "lora_alpha": "8 unless it is said",
    "lora_dropout": "0 unless it is said",
    "lora_target_modules": "of the layers; names with commas between, or all-linear",
}


@dataclass(frozen=True)
class Refusal:
    """A flag that is not taken. instead: what to use, or why there is nothing to say. agrees: values with which it asks
    for what is done anyway; with these it is passed over."""

    instead: str
    agrees: tuple[str, ...] = ()


def _no(instead: str, *agrees: str) -> Refusal:
    return Refusal(instead, agrees)


_OFF = ("false", "none", "")
_HUB = _no("the export is a folder for from_pretrained: upload it with `hf upload NAME OUTPUT/export`", *_OFF)
_REDUCES = _no("DeepSpeed reduces gradients, as the JSON of --deepspeed says", *_OFF)
_LOADER = _no("rows are read from tokens on disk, by no other process; leave it out", "false", "0", *_OFF)
_SCREEN = _no("a run's own lines are all that it prints; leave it out", "passive", "warning", *_OFF)
_FSDP = _no("use --deepspeed configs/ds/zero3.json: ZeRO-3 shards weights as FSDP does", *_OFF)
_COMPILE = _no("use --torch_compile", *_OFF)
_CHECKPOINTING = _no("it is always the non-reentrant kind; use --gradient_checkpointing", *_OFF)
_BATCH = _no("use --per_device_train_batch_size: evaluation takes the same")
_MIXED = _no("use --bf16 or --fp16")
_WHOLE = _no("an evaluation computes losses alone, in the precision of the training; leave it out", *_OFF)
_OPTIMIZER = _no("name an optimizer and its settings in the JSON of --deepspeed", *_OFF)
_TRACKIO = _no("use --trackio_space_id", *_OFF)
_CPU = _no("hide the GPUs: CUDA_VISIBLE_DEVICES=", *_OFF)
_LABELS = _no("the data is text, or tokens of prepare_data.py; leave it out", *_OFF)
_TPU = _no("there is no support for TPUs; leave it out", *_OFF)

NOT_TAKEN: dict[str, Refusal] = {
    "lr_scheduler_kwargs": _no("name a scheduler and its settings in the JSON of --deepspeed", *_OFF),
    "optim": _no("name another than AdamW in the JSON of --deepspeed", "adamw_torch", "adamw_torch_fused"),
    "optim_args": _OPTIMIZER,
    "optim_target_modules": _OPTIMIZER,
    "average_tokens_across_devices": _no("a step's loss is the mean over the tokens of all replicas", "true"),
    "label_smoothing_factor": _no("there is --distillation_weight for soft targets", "0", "0.0"),
    "bf16_full_eval": _WHOLE,
    "fp16_full_eval": _WHOLE,
    "tf32": _no("set torch's own variable: TORCH_ALLOW_TF32_CUBLAS_OVERRIDE=1", "none"),
    "activation_checkpointing": _no("use --gradient_checkpointing", *_OFF),
    "activation_checkpointing_kwargs": _CHECKPOINTING,
    "gradient_checkpointing_kwargs": _CHECKPOINTING,
    "torch_compile_backend": _COMPILE,
    "torch_compile_mode": _COMPILE,
    "use_liger_kernel": _no("losses are computed some positions at a time by themselves; leave it out", *_OFF),
    "liger_kernel_config": _no("there is no Liger kernel here; leave it out", *_OFF),
    "use_cache": _no("no cache is kept in training; leave it out", *_OFF),
    "neftune_noise_alpha": _no("it is for fine-tuning on instructions; leave it out", *_OFF),
    "torch_empty_cache_steps": _no("set PYTORCH_ALLOC_CONF=expandable_segments:True against fragments", *_OFF),
    "auto_find_batch_size": _no("use --per_device_train_batch_size; scripts/plan.py says what fits", *_OFF),
    "log_on_each_node": _no("rank 0 alone prints; leave it out", "true"),
    "logging_nan_inf_filter": _no("a loss that is not finite ends the run; leave it out"),
    "include_num_input_tokens_seen": _no("metrics have the tokens of each step; leave it out", "no", *_OFF),
    "log_level": _SCREEN,
    "log_level_replica": _SCREEN,
    "disable_tqdm": _no("there is a bar on a terminal alone; leave it out", *_OFF),
    "trackio_bucket_id": _TRACKIO,
    "trackio_static_space_id": _TRACKIO,
    "eval_delay": _no("evaluation begins after --eval_steps; leave it out", "0", "0.0"),
    "per_device_eval_batch_size": _BATCH,
    "prediction_loss_only": _no("an evaluation computes losses alone; leave it out", "true"),
    "eval_do_concat_batches": _no("an evaluation computes losses alone; leave it out", "true"),
    "eval_use_gather_object": _WHOLE,
    "eval_accumulation_steps": _WHOLE,
    "include_for_metrics": _WHOLE,
    "batch_eval_metrics": _WHOLE,
    "save_only_model": _no("a checkpoint has the optimizer's state; scripts/export.py makes a model of it", *_OFF),
    "save_on_each_node": _no("--output_dir lies where all hosts see it; leave it out", *_OFF),
    "enable_jit_checkpoint": _no("a run with --save_steps saves on SIGTERM: --signal_save_seconds", *_OFF),
    "push_to_hub": _HUB,
    "hub_token": _HUB,
    "hub_private_repo": _HUB,
    "hub_model_id": _HUB,
    "hub_strategy": _no(_HUB.instead, "every_save"),
    "hub_always_push": _HUB,
    "hub_revision": _HUB,
    "ignore_data_skip": _no("a resumed run goes on in its data by itself; leave it out", "false"),
    "restore_callback_states_from_checkpoint": _no("a resumed run restores them by itself; leave it out", *_OFF),
    "full_determinism": _no("on a CPU runs are the same anyway; on a GPU use torch's own switches", *_OFF),
    "data_seed": _no("use --seed: it draws the order of the data, too", *_OFF),
    "use_cpu": _CPU,
    "accelerator_config": _no("use --deepspeed, and the data flags", *_OFF),
    "parallelism_config": _no(
        "use --num_stages, --tensor_parallel_size, --sequence_parallel_size, and --deepspeed for ZeRO", *_OFF
    ),
    "dataloader_drop_last": _no("rows go on over the end of the data, so that no batch is incomplete", *_OFF),
    "dataloader_num_workers": _LOADER,
    "dataloader_pin_memory": _no(_LOADER.instead, "true"),
    "dataloader_persistent_workers": _LOADER,
    "dataloader_prefetch_factor": _LOADER,
    "dataloader_multiprocessing_context": _LOADER,
    "dataloader_in_order": _no(_LOADER.instead, "true"),
    "remove_unused_columns": _no("--text_column_name is the only column that is read; leave it out", "true"),
    "label_names": _LABELS,
    "train_sampling_strategy": _no("rows are shuffled by --seed; --packing says what they hold", "random"),
    "length_column_name": _no("--packing says what rows hold; leave it out", "length"),
    "ddp_find_unused_parameters": _REDUCES,
    "ddp_bucket_cap_mb": _REDUCES,
    "ddp_broadcast_buffers": _REDUCES,
    "ddp_static_graph": _REDUCES,
    "ddp_backend": _no("it is NCCL between GPUs and gloo between CPUs; leave it out", *_OFF),
    "fsdp": _FSDP,
    "fsdp_config": _FSDP,
    "debug": _no("a loss that is not finite is named with its block, and --trace shows what ran when", *_OFF),
    "skip_memory_metrics": _no("metrics have peak_memory_bytes in any case; leave it out", "true"),
    "do_train": _no("leave it out: a run trains", "true"),
    "do_eval": _no("leave it out: a run evaluates, unless --eval_batches is 0", "true"),
    "do_predict": _no("use scripts/generate.py or predict.py on the export", "false"),
    "logging_dir": _no("TensorBoard's files are in OUTPUT/tensorboard: use --output_dir", *_OFF),
    "per_gpu_train_batch_size": _no("use --per_device_train_batch_size", "none"),
    "per_gpu_eval_batch_size": _BATCH,
    "save_safetensors": _no("files are safetensors in any case; leave it out", "true"),
    "no_cuda": _CPU,
    "use_mps_device": _no("torch finds the device; leave it out", *_OFF),
    "jit_mode_eval": _COMPILE,
    "fp16_opt_level": _MIXED,
    "half_precision_backend": _MIXED,
    "fp16_backend": _MIXED,
    "tpu_num_cores": _TPU,
    "tpu_metrics_debug": _TPU,
    "past_index": _WHOLE,
    "fsdp_min_num_params": _FSDP,
    "fsdp_transformer_layer_cls_to_wrap": _FSDP,
    "adafactor": _OPTIMIZER,
    "group_by_length": _no("--packing says what rows hold; leave it out", *_OFF),
    "use_legacy_prediction_loop": _WHOLE,
    "include_inputs_for_metrics": _WHOLE,
    "push_to_hub_model_id": _HUB,
    "push_to_hub_organization": _HUB,
    "push_to_hub_token": _HUB,
    "mp_parameters": _no("use --num_stages", *_OFF),
    "torchdynamo": _COMPILE,
    "ray_scope": _no("scripts/study.py compares settings; leave it out", "last"),
    "include_tokens_per_second": _no("a run shows tokens a second in any case; leave it out", *_OFF),
    "evaluation_strategy": _no("use --eval_strategy, its newer name"),
    "use_fast_tokenizer": _no("the tokenizer is as its own files say; leave it out", "true"),
    "model_revision": _no("download that revision, and give its folder as --model_name_or_path", "main"),
    "token": _no("log in by `hf auth login`, or set HF_TOKEN", *_OFF),
    "dtype": _MIXED,
    "torch_dtype": _MIXED,
    "low_cpu_mem_usage": _no("each rank reads the tensors of its own layers alone; leave it out", "true", "false"),
    "max_eval_samples": _no("use --eval_batches"),
    "block_size": _no("use --seq_length"),
    "overwrite_cache": _no("data that has changed is tokenised anew by itself; else remove --cache_dir", "false"),
    "keep_linebreaks": _no("line breaks are kept; leave it out", "true"),
    "use_peft": _no("use --lora_rank", *_OFF),
    "lora_r": _no("use --lora_rank"),
    "lora_target_parameters": _no("adapters are of matrices alone: --lora_target_modules", *_OFF),
    "lora_modules_to_save": _no("the heads of earlier stages train in any case, and nothing else; leave it out", *_OFF),
    "lora_task_type": _no("--task says it; leave it out", "causal_lm"),
    "use_rslora": _no("use --lora_alpha: it counts by the rank", *_OFF),
    "use_dora": _no("adapters are plain LoRA; leave it out", *_OFF),
    "load_in_8bit": _no("weights are those of --bf16, --fp16 or float32; leave it out", *_OFF),
    "load_in_4bit": _no("weights are those of --bf16, --fp16 or float32; leave it out", *_OFF),
}


def instead_of(name: str) -> str:
    """What to do without a flag that is not taken."""
    return NOT_TAKEN[name].instead if name in NOT_TAKEN else "leave it out"


def is_passed_over(name: str, value: str) -> bool:
    """Whether a flag that is not taken asks for what is done anyway."""
    return name in NOT_TAKEN and value.lower() in NOT_TAKEN[name].agrees


def page() -> str:
    """The text of docs/flags.md."""
    lines = [
        "# Flags of Trainer, run_clm.py and TRL",
        "",
        "What becomes here of each flag that a person may bring along; made by `python scripts/flags.py`. A flag that",
        "is not taken ends the start with this line, unless its value asks for what is done anyway.",
    ]
    for source, names in THEIRS.items():
        lines += ["", f"## {source}", "", "| flag | here |", "|---|---|"]
        lines += [f"| `{name}` | {_here(name)} |" for name in names]
    return "\n".join(lines) + "\n"


def _here(name: str) -> str:
    if name not in NOT_TAKEN:
        return f"works, but: {DIFFERS[name]}" if name in DIFFERS else "works as there"
    refusal = NOT_TAKEN[name]
    agrees = [f"`{value}`" for value in refusal.agrees if value]
    return f"not taken: {refusal.instead}" + (f" ({', '.join(agrees)}: passed over)" if agrees else "")


def new_flags(arguments: Any) -> list[str]:
    """Flags of another version's TrainingArguments of which nothing is said here."""
    known = {name for names in THEIRS.values() for name in names}
    return [each.name for each in dataclasses.fields(arguments) if each.name not in known]
