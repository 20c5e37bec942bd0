"""The flags: names, types and defaults, and what is known of each where it is defined; pure data.

Names are those of transformers' TrainingArguments and of run_clm.py where these have such a flag. What checks, --help
and others need to know of a flag stands here, and nowhere else is a list of names.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import Any

from llm_local.registry import HEADS, METHODS, TASKS

PARTITIONS = ("flops", "profile")
PACKINGS = ("concat", "best_fit", "none")
EXPORT_DTYPES = ("auto", "fp32", "bf16", "fp16")
WIRE_DTYPES = (*EXPORT_DTYPES, "int8", "int4")
SCHEDULERS = ("linear", "cosine", "constant", "constant_with_warmup", "polynomial", "inverse_sqrt")
SAVE_STEPS = 500  # of TrainingArguments
STRATEGIES = ("no", "steps", "epoch")

# what a flag decides: what is trained; on how much; where the layers run; where this start reads and writes; what is of
# a machine; what is measured, saved and waited for
TRAINING, AMOUNT, LAYOUT, START, MACHINE, WATCH = "training", "amount", "layout", "start", "machine", "watch"
TEXT, IMAGES = "text", "images"  # what a row is


@dataclass(frozen=True)
class Range:
    """The numbers that a flag takes. says: what a message has behind 'name=value' for any other."""

    says: str
    holds: Callable[[float], bool]


POSITIVE = Range("must be greater than 0", lambda value: value > 0)
NOT_NEGATIVE = Range("must not be negative", lambda value: value >= 0)
RATE = Range("must lie in [0, 1)", lambda value: 0 <= value < 1)
SHARE = Range("must lie in (0, 1]", lambda value: 0 < value <= 1)
STEPS = Range("must be a whole number of steps, or a share of them below 1", lambda v: v >= 0 and (v < 1 or v % 1 == 0))
SOME_STEPS = Range(f"{STEPS.says}, and more than 0", lambda value: value > 0 and STEPS.holds(value))
PERCENTAGE = Range("must lie between 1 and 99", lambda value: 0 < value < 100)


@dataclass(frozen=True)
class Flag:
    """What is known of a flag besides its type and default.

    choices: all that a text may be; none: any. is_read: it names a file, folder or data set that the run reads.
    of_local_heads: it says nothing of a model with one head. of_rows: it says something of rows of TEXT, or of IMAGES,
    alone.
    """

    help: str
    range: Range | None = None
    choices: Collection[str] = ()
    decides: str = TRAINING
    is_read: bool = False
    of_local_heads: bool = False
    of_rows: str = ""


def _option(default: Any, text: str, range: Range | None = None, **known: Any) -> Any:
    return field(default=default, metadata={"flag": Flag(text, range, **known)})


@dataclass(frozen=True)
class ModelArguments:
    """The model."""

    task: str = _option("causal-lm", "What the model is trained for: causal-lm or masked-lm.", choices=TASKS)
    model_name_or_path: str | None = _option(
        None, "Pretrained model to go on from: directory or hub name.", is_read=True
    )
    gguf_file: str | None = _option(None, "GGUF file in that directory; its weights are dequantised to train them.")
    config_name: str | None = _option(None, "JSON file (or directory) with the config of a new model.", is_read=True)
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
        is_read=True,
        of_rows=TEXT,
    )
    image_processor_name: str | None = _option(
        None,
        "Image processor: directory or hub name; default: the model's; of a new one by its image size and channels.",
        is_read=True,
        of_rows=IMAGES,
    )
    attn_implementation: str | None = _option(None, "Attention: sdpa, eager or flash_attention_2; else the config's.")
    trust_remote_code: bool = _option(False, "Run model or data code that a checkpoint brings along.")


@dataclass(frozen=True)
class DataArguments:
    """The data."""

    dataset_name: str | None = _option(
        None,
        "Hub name, a clone of what is there, a folder from save_to_disk or prepare_data.py, or 'builtin' (the running "
        "Python's library); of images also 'digits' (scikit-learn's).",
        is_read=True,
    )
    dataset_config_name: str | None = _option(None, "Configuration of the hub dataset.")
    dataset_split: str | None = _option(None, "Split of the dataset to train on; default: train.")
    dataset_revision: str | None = _option(None, "Branch, tag or commit of the hub dataset.")
    data_mixture: str | None = _option(
        None, "YAML file with several weighted sources, or one as in configs/data.", is_read=True
    )
    train_file: str | None = _option(
        None,
        "Training text: .txt, .jsonl or .csv (also .gz, .zst), .parquet or .arrow; a file, a directory or a glob. "
        "One .txt is one running text; of several, each is a document.",
        is_read=True,
    )
    validation_file: str | None = _option(None, "Validation text, as train_file.", is_read=True)
    validation_files: str | None = _option(
        None, "Validation texts by name, as 'wiki=a.jsonl,code=b.txt'; each is evaluated and reported by itself."
    )
    validation_split_percentage: int = _option(
        5, "Percent of the training documents held out for validation.", PERCENTAGE
    )
    text_column_name: str = _option("text", "Column that holds the text.", of_rows=TEXT)
    train_dir: str | None = _option(
        None,
        "Training images: a directory for each class, or one with a metadata file, as imagefolder of datasets has it.",
        is_read=True,
        of_rows=IMAGES,
    )
    validation_dir: str | None = _option(None, "Validation images, as train_dir.", is_read=True, of_rows=IMAGES)
    image_column_name: str = _option("image", "Column that holds the images.", of_rows=IMAGES)
    label_column_name: str = _option("label", "Column with the class of each image, by name or number.", of_rows=IMAGES)
    random_crop_scale: float | None = _option(
        None,
        "Least share of an image's area that training sees of it, cut out anew each time; 1: whole images; default: "
        "0.08, of digits 1.",
        SHARE,
        of_rows=IMAGES,
    )
    horizontal_flip: bool | None = _option(
        None, "Mirror every other image in training; default: unless they are digits.", of_rows=IMAGES
    )
    streaming: bool = _option(False, "Read the dataset as a stream.", of_rows=TEXT)
    max_train_samples: int | None = _option(None, "Train on so many sequences, the first of the data.", POSITIVE)
    seq_length: int = _option(512, "Tokens of a training sequence.", POSITIVE)
    packing: str = _option(
        "concat",
        "How documents fill sequences: concat (end to end), best_fit (few are cut, little padding), or none (each in "
        "sequences of its own, padded). Losses are means over the tokens of a step that are no padding.",
        choices=PACKINGS,
        of_rows=TEXT,
    )
    add_bos: bool | None = _option(
        None,
        "Begin each document with BOS; default: if the tokenizer itself begins a text so. The export's does the same.",
        of_rows=TEXT,
    )
    document_mask: bool = _option(
        False,
        "Keep the documents of a row apart: positions restart and attention ends at EOS. The first token of a document "
        "is then read and not predicted; losses are means over the other tokens of a step.",
        of_rows=TEXT,
    )
    mlm_probability: float = _option(
        0.15, "Share of the tokens that are masked, and predicted (task masked-lm).", SHARE, of_rows=TEXT
    )
    preprocessing_num_workers: int = _option(
        1, "Processes that read text files and tokenise, or threads that read images.", POSITIVE, decides=WATCH
    )
    cache_dir: str | None = _option(
        None, "Tokenised data and the built-in tokenizer; default ~/.cache/llm_local.", decides=MACHINE
    )


@dataclass(frozen=True)
class LocalArguments:
    """Stages, blocks, heads and links."""

    num_stages: int = _option(
        1, "Pipeline stages; ranks / num_stages is the data-parallel degree.", POSITIVE, decides=LAYOUT
    )
    method: str = _option(
        "chunked", "backprop, greedy (each layer a block), chunked, overlapping or delayed.", choices=METHODS
    )
    layers_per_block: int | None = _option(
        None, "Layers of a block (chunked; default: one block a stage), or of a window (overlapping).", POSITIVE
    )
    block_stride: int | None = _option(
        None, "Layers from the start of a window to that of the next (overlapping).", POSITIVE
    )
    final_backprop_steps: int = _option(
        0, "Last steps of the run that train by backpropagation through all stages.", NOT_NEGATIVE
    )
    delay_correction: bool = _option(
        False, "Step ahead by what the weights have moved in the last step, against the delay (delayed)."
    )
    freeze_stages: str | None = _option(
        None, "Stages that are not trained, as '0,1': their weights stay, and they have forward passes alone."
    )
    lora_rank: int | None = _option(
        None,
        "Rank of adapters (LoRA) in the layers of a pretrained model, whose own weights then stay; default: none.",
        POSITIVE,
    )
    lora_alpha: int = _option(8, "Adapters count lora_alpha / lora_rank times.", POSITIVE)
    lora_dropout: float = _option(0.0, "Dropout of what adapters read.", RATE)
    lora_target_modules: str | None = _option(
        None,
        "Matrices of a layer that get adapters, as 'q_proj,v_proj', or all-linear; default: as PEFT has it for the "
        "model's type.",
    )
    lora_layers_to_transform: str | None = _option(
        None, "Layers that get adapters, as '2,3'; default: all but those of frozen stages."
    )
    partition: str = _option(
        "flops",
        "How stages are balanced: by counted flops, or by profile, for which layers and head are timed first.",
        choices=PARTITIONS,
        decides=LAYOUT,
    )
    stage_layers: str | None = _option(
        None, "Layers of each stage, as '4,4'; default: as partition finds.", decides=LAYOUT
    )
    head: str = _option("linear", "What turns a block's output into a loss: linear, decoder or shared.", choices=HEADS)
    head_layers: int = _option(0, "Private layers of a head (decoder, shared).", NOT_NEGATIVE)
    head_layers_schedule: str | None = _option(
        None, "Private layers of each block's head, as '2,1,1'; the last number holds for the blocks behind."
    )
    head_rank: int | None = _option(
        None, "Rank of the private layers' matrices; default: full.", POSITIVE, of_local_heads=True
    )
    head_token_fraction: float = _option(
        1.0, "Share of the positions that heads but the last one's see in training.", SHARE, of_local_heads=True
    )
    head_refresh_steps: int = _option(20, "Steps between refreshes of the shared head's matrix.", POSITIVE)
    head_warmup_steps: int = _option(
        0,
        "First steps in which all heads but the last block's train alone, and the layers below them do not.",
        NOT_NEGATIVE,
        of_local_heads=True,
    )
    head_features: bool = _option(False, "Heads in training also see what entered their block.", of_local_heads=True)
    block_loss_weights: str | None = _option(
        None,
        "Weight of each block's loss, as '0.5,1'; the last number holds for the blocks behind.",
        of_local_heads=True,
    )
    distillation_weight: float = _option(
        0.0, "Weight of the next exit's predictions as soft targets; 0: none.", NOT_NEGATIVE, of_local_heads=True
    )
    distillation_top_k: int = _option(16, "Tokens that a soft target has, the likeliest ones.", POSITIVE)
    distillation_sampling: bool = _option(
        False, "They are drawn from the predictions instead, which is right on average.", of_local_heads=True
    )
    wire_dtype: str = _option(
        "auto",
        "Hidden states on a link: fp32, bf16, fp16, int8 with a scale a token, int4 with one for 64 numbers; auto: "
        "that of the model.",
        choices=WIRE_DTYPES,
    )
    max_packets_in_flight: int = _option(
        4, "Micro-batches a stage may be ahead of the next one; raise it for a link of long latency.", POSITIVE
    )
    link_timeout_seconds: float = _option(600.0, "Longest wait for a living peer, in seconds.", POSITIVE, decides=WATCH)
    replica_sync_steps: int = _option(
        0,
        "Steps that the replicas of a stage train apart, each by itself, before they meet in an outer step; 0: "
        "DeepSpeed reduces gradients in each step.",
        NOT_NEGATIVE,
    )
    replica_sync_fragments: int = _option(
        1, "Parts of the weights that meet at steps of their own, so that less is sent at a time.", POSITIVE
    )
    replica_sync_delay: int = _option(
        0, "Steps that the replicas train on while a part is on its way; 0: they wait for it.", NOT_NEGATIVE
    )
    outer_learning_rate: float = _option(
        0.7, "Rate of the outer step, SGD on what the replicas have moved on average since they met.", POSITIVE
    )
    outer_momentum: float = _option(0.9, "Nesterov momentum of the outer step; 0: none.", RATE)
    stage_replicas: str | None = _option(
        None,
        "Replicas of each stage, as '4,2,1', where they differ; --gradient_accumulation_steps and --eval_batches are "
        "those of a replica of the stage with the most, others have more.",
        decides=LAYOUT,
    )
    tensor_parallel_size: int = _option(
        1,
        "Ranks of a replica, between which each layer and the output matrix are divided; ranks / num_stages / "
        "tensor_parallel_size is the data-parallel degree.",
        POSITIVE,
        decides=LAYOUT,
    )
    sequence_parallel_size: int = _option(
        1,
        "Ranks of a replica, each with as many positions of every row; attention alone has whole rows, of some heads.",
        POSITIVE,
        decides=LAYOUT,
    )
    stage: int | None = _option(
        None, "The stage that this launch trains, as a job of its own; default: all.", NOT_NEGATIVE, decides=START
    )
    send_to: str | None = _option(
        None,
        "HOST:PORT at which the next stage's job receives; replica r is at the port + r. Several hosts, with commas, "
        "share its replicas.",
        decides=START,
    )
    receive_on: str | None = _option(
        None, "HOST:PORT on which this job receives, as '0.0.0.0:7001'; local rank r on the port + r.", decides=START
    )
    run_key_file: str | None = _option(
        None, "The run's key, of llm-local key, which all of its jobs have.", decides=START, is_read=True
    )
    absent_peer_timeout: float | None = _option(
        None,
        "Longest wait of a job for a neighbour that is away, in seconds; default: for ever.",
        POSITIVE,
        decides=START,
    )
    log_memory_gb: float = _option(
        1.0, "GB of packets that a job keeps in memory for the next stage; more go to disk.", POSITIVE, decides=START
    )
    log_disk_gb: float = _option(50.0, "GB of packets that it keeps on disk beside those.", NOT_NEGATIVE, decides=START)
    on_full_log: str = _option(
        "wait",
        "What a job does whose log for the next stage is full: wait until that one has saved, or go on and let it "
        "skip steps.",
        choices=("wait", "skip"),
        decides=START,
    )


@dataclass(frozen=True)
class TrainArguments:
    """Training, and what is written."""

    output_dir: str = _option("runs/pretrain", "Folder of the run.", decides=START)
    overwrite_output_dir: bool = _option(False, "Replace the run that output_dir holds.", decides=START)
    max_steps: int = _option(1000, "Optimizer steps.", POSITIVE, decides=AMOUNT)
    num_train_epochs: float | None = _option(
        None, "Passes over the training data, in place of max_steps, which wins.", POSITIVE, decides=AMOUNT
    )
    per_device_train_batch_size: int = _option(
        8, "Sequences of a micro-batch on each replica.", POSITIVE, decides=AMOUNT
    )
    gradient_accumulation_steps: int = _option(1, "Micro-batches of a step.", POSITIVE, decides=AMOUNT)
    learning_rate: float = _option(5e-4, "Peak learning rate.", POSITIVE)
    weight_decay: float = _option(0.0, "AdamW weight decay; biases and norms are spared.", NOT_NEGATIVE)
    adam_beta1: float = _option(0.9, "AdamW beta1.", RATE)
    adam_beta2: float = _option(0.999, "AdamW beta2.", RATE)
    adam_epsilon: float = _option(1e-8, "AdamW epsilon.", POSITIVE)
    max_grad_norm: float = _option(1.0, "Clip the gradient norm of each block; 0 turns it off.", NOT_NEGATIVE)
    warmup_steps: int | float = _option(0, "Steps of linear warm-up; below 1 their share of all steps.", STEPS)
    warmup_ratio: float = _option(0.0, "Share of all steps that warm up; warmup_steps wins.", RATE)
    lr_scheduler_type: str = _option("linear", "Schedule of the learning rate.", choices=SCHEDULERS)
    seed: int = _option(42, "Seed of weights, data order and dropout.", NOT_NEGATIVE)
    bf16: bool = _option(False, "Train in bfloat16.")
    fp16: bool = _option(False, "Train in float16, where the accelerator can.")
    gradient_checkpointing: bool = _option(False, "Recompute activations in the backward pass (non-reentrant).")
    torch_compile: bool = _option(False, "Compile the layers with torch.compile, each by itself.")
    ignore_memory_check: bool = _option(
        False, "Start also where the run is expected to need more memory than there is.", decides=START
    )
    deepspeed: str | None = _option(None, "DeepSpeed JSON; 'auto' values are filled from the flags.", is_read=True)
    logging_strategy: str | None = _option(
        None, "When metrics are recorded; default: every logging_steps.", choices=STRATEGIES, decides=WATCH
    )
    logging_steps: int | float = _option(
        10, "Steps between metric records; below 1 their share of all steps.", SOME_STEPS, decides=WATCH
    )
    logging_first_step: bool = _option(True, "Record the first step, too.", decides=WATCH)
    eval_strategy: str | None = _option(
        None,
        "When the exits are evaluated before the end; default: every eval_steps; steps: with eval_steps=0 every "
        "logging_steps.",
        choices=STRATEGIES,
        decides=WATCH,
    )
    eval_steps: int | float = _option(
        0, "Steps between evaluations; below 1 their share of all steps; 0: only at the end.", STEPS, decides=WATCH
    )
    eval_on_start: bool = _option(False, "Evaluate before the first step, too.", decides=WATCH)
    eval_batches: int = _option(
        8, "Micro-batches of one evaluation on each replica; 0: never evaluate.", NOT_NEGATIVE, decides=WATCH
    )
    save_strategy: str | None = _option(
        None,
        f"When checkpoints are written; default: every save_steps; steps: with save_steps=0 every {SAVE_STEPS}.",
        choices=STRATEGIES,
        decides=WATCH,
    )
    save_steps: int | float = _option(
        0,
        "Steps between checkpoints, and one after the last step; below 1 their share of all steps; 0: none.",
        STEPS,
        decides=WATCH,
    )
    save_total_limit: int | None = _option(None, "Checkpoints kept; older ones are removed.", POSITIVE, decides=WATCH)
    load_best_model_at_end: bool = _option(
        False, "Export the checkpoint with the last stage's lowest validation loss, and keep it.", decides=WATCH
    )
    metric_for_best_model: str | None = _option(
        None, "What is lowest; there is the loss alone.", choices=("loss", "eval_loss"), decides=WATCH
    )
    greater_is_better: bool | None = _option(None, "Of a loss it is not.", decides=WATCH)
    resume_from_checkpoint: str | None = _option(
        None,
        "Checkpoint or run folder; 'true': newest in output_dir; 'auto': that, or a new run if there is none.",
        decides=START,
    )
    signal_save_seconds: float = _option(
        25.0,
        "On SIGTERM or SIGUSR1 a run with save_steps saves and leaves within so many seconds (launchers kill 30 s "
        "after SIGTERM); 0: leaves at once.",
        NOT_NEGATIVE,
        decides=WATCH,
    )
    report_to: str = _option(
        "none",
        "Extra copies of the metrics, as 'wandb,csv': tensorboard and csv by DeepSpeed's monitor, or a tracker that "
        "transformers knows (wandb, mlflow, trackio, comet_ml, ...); all; none.",
        decides=MACHINE,
    )
    run_name: str | None = _option(None, "What trackers call the run; default: as output_dir.", decides=MACHINE)
    project: str | None = _option(None, "Project of the run at trackio.", decides=MACHINE)
    trackio_space_id: str | None = _option(None, "Space of the hub that trackio reports to.", decides=MACHINE)
    ddp_timeout: int = _option(
        1800, "Longest wait for start-up, in seconds; rank 0 may prepare data for longer.", POSITIVE, decides=MACHINE
    )
    export_dtype: str = _option(
        "auto",
        "Weights of exported models: fp32 (the optimizer's own), bf16, fp16; auto: as the run computes.",
        choices=EXPORT_DTYPES,
        decides=WATCH,
    )
    trace: bool = _option(
        False,
        "Record each instruction of each stage in OUTPUT/trace. On a GPU every instruction then waits for the device, "
        "which costs speed.",
        decides=WATCH,
    )
    sample_prompt: str | None = _option(
        None, "Print what the exported model writes after this text.", decides=WATCH, of_rows=TEXT
    )


SECTIONS: tuple[Any, ...] = (ModelArguments, DataArguments, LocalArguments, TrainArguments)
FLAGS: dict[str, Flag] = {f.name: f.metadata["flag"] for section in SECTIONS for f in dataclasses.fields(section)}


def deciding(*what: str) -> tuple[str, ...]:
    """Names of the flags that decide one of these."""
    return tuple(name for name, flag in FLAGS.items() if flag.decides in what)
