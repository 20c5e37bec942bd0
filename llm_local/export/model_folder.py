"""The folder of one model: shards of its tensors, and beside them what transformers needs to load it.

A folder appears whole or not at all. It is written under another name beside its own and then renamed, so a full disk
or a kill leaves what was there before.
"""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import GenerationConfig, PretrainedConfig, PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion
from transformers.utils import GENERATION_CONFIG_NAME

from llm_local import files
from llm_local.checkpoint.catalog import save_tensors
from llm_local.files import link_or_copy
from llm_local.model.anatomy import text_config
from llm_local.model.remote_code import write_code
from llm_local.model.slices import model_without_weights
from llm_local.registry import TASKS
from llm_local.tasks.task import Task

INDEX, CARD = "model.safetensors.index.json", "README.md"


class WrongExport(RuntimeError):
    """An export is not the model that it should be."""

    def __init__(self, folder: Path, reason: str):
        super().__init__(f"export {folder}: {reason}")
        self.reason = reason


def draft_of(folder: Path) -> Path:
    """Where a folder is written before it has its name."""
    return folder.with_name(f"{folder.name}.unfinished")


def predecessor_of(folder: Path) -> Path:
    """Where the folder that is replaced lies for a moment."""
    return folder.with_name(f"{folder.name}.before")


def put_in_place(folder: Path) -> None:
    """Gives the draft of the folder its name; what had that name before goes. Raises Unwritten."""
    before = predecessor_of(folder)
    shutil.rmtree(before, ignore_errors=True)
    with writing(folder):
        if folder.exists():
            folder.rename(before)
        try:
            draft_of(folder).rename(folder)
        except OSError:
            if before.exists():
                before.rename(folder)
            raise
    shutil.rmtree(before, ignore_errors=True)


def writing(path: Path) -> AbstractContextManager[None]:
    """Raises Unwritten naming the file where the disk takes no more of it."""
    return files.writing(path, repair="what was exported before is as it was; make room and export again")


def shard_name(index: int, count: int) -> str:
    return f"model-{index + 1:05d}-of-{count:05d}.safetensors"


def write_shard(path: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """A file of tensors under original names. Raises Unwritten."""
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        save_tensors(dict(tensors), path, metadata={"format": "pt"})


def original_names(model: PreTrainedModel, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Tensors under the names that a checkpoint of the model has: transformers fuses experts and renames when it loads.

    model: of the class, or some layers of it; its own tensors are not looked at and may be on the meta device.
    """
    given = dict(tensors)
    return {k: v.contiguous() for k, v in revert_weight_conversion(model, given).items()} if given else {}


def model_without_memory(config: PretrainedConfig, task: str) -> PreTrainedModel:
    """The model of a task that the config describes, on the meta device."""
    trusted = bool(getattr(config, "auto_map", None))  # load_model_config leaves it to code that may run
    return model_without_weights(config, task, trust_remote_code=trusted)


def tied_names(config: PretrainedConfig, task: str) -> dict[str, str]:
    """Original names of tensors that the config ties, with those that they are tied to: the output matrix's."""
    if not any(getattr(part, "tie_word_embeddings", False) for part in (config, text_config(config))):
        return {}
    model = model_without_memory(config, task)
    tied = model.all_tied_weights_keys or {}
    named = dict(model.named_parameters(remove_duplicate=False))
    # one at a time: two names of one tensor
    originals = {n: next(iter(original_names(model, {n: named[n]}))) for n in {*tied, *tied.values()}}
    return {originals[copied]: originals[source] for copied, source in tied.items()}


@contextmanager
def replaced(folder: Path) -> Iterator[Path]:
    """Its draft, to be filled; it takes the folder's place as a whole, and goes where it cannot be filled."""
    draft = draft_of(folder)
    shutil.rmtree(draft, ignore_errors=True)
    try:
        yield draft
        put_in_place(folder)
    except BaseException:
        shutil.rmtree(draft, ignore_errors=True)
        raise


@dataclass(frozen=True)
class Description:
    """What transformers needs to load a model, beside its weights.

    class_name: of the model. generation: what generation_config.json holds; default: as the config has it; of a task
    that writes no text there is none. code: modules of the model's own, by file name. task: its name.
    """

    config: PretrainedConfig
    class_name: str
    tokenizer: Any
    generation: Mapping[str, Any] | None = None
    code: Mapping[str, str] = field(default_factory=dict)
    task: str = "causal-lm"


def complete(folder: Path, shards: Sequence[Path], model: Description, tied: Mapping[str, str]) -> None:
    """Makes a model of shards that lie in the folder. tied: see tied_names; where the two are not equal bit for bit the
    model is untied. Raises Unwritten naming a file."""
    is_tied = drop_copies(shards, tied)
    places = _places(shards)
    index = {
        "metadata": {"total_size": sum(shard.stat().st_size for shard in shards)},
        "weight_map": {name: path.name for name, path in sorted(places.items())},
    }
    write_text(folder / INDEX, json.dumps(index, indent=1) + "\n")
    write_description(folder, model, is_tied)


def write_description(folder: Path, model: Description, is_tied: bool = True) -> None:
    """All of a model's folder but its weights. is_tied: whether they are as the config has them. Raises Unwritten."""
    config = copy.deepcopy(model.config)
    config.architectures = [model.class_name]
    for name in config.sub_configs:  # one dtype for all, as they were trained
        if (part := getattr(config, name, None)) is not None:
            part.dtype = config.dtype
    if not is_tied and hasattr(config, "tie_word_embeddings"):
        config.tie_word_embeddings = text_config(config).tie_word_embeddings = False
    with writing(folder / "config.json"):
        write_code(model.code, config, folder)
        config.save_pretrained(folder)
    if TASKS[model.task].generates:
        generation = model.generation
        if generation is None:
            generation = GenerationConfig.from_model_config(config).to_diff_dict()
        write_text(folder / GENERATION_CONFIG_NAME, json.dumps(generation, indent=2) + "\n")
    with writing(folder / "tokenizer.json"):
        model.tokenizer.save_pretrained(folder)


def write_text(path: Path, text: str) -> None:
    """Raises Unwritten naming the file."""
    with writing(path):
        path.write_text(text)


def _places(shards: Sequence[Path]) -> dict[str, Path]:
    """The shard of every tensor."""
    places: dict[str, Path] = {}
    for shard in shards:
        with safe_open(shard, "pt") as file:
            for name in file.keys():  # noqa: SIM118 - not a mapping
                assert name not in places, f"{name} is in {places[name].name} and in {shard.name}"
                places[name] = shard
    return places


def drop_copies(shards: Sequence[Path], tied: Mapping[str, str]) -> bool:
    """Takes tied tensors out of the shards where every one equals what it is tied to; returns whether that is so."""
    places = _places(shards)
    copies = [name for name in tied if name in places]
    if not tied or not all(_are_equal(places, name, tied[name]) for name in copies):
        return False
    for shard in {places[name] for name in copies}:
        kept = {name: tensor for name, tensor in load_file(shard).items() if name not in copies}
        smaller = shard.with_name(f"{shard.name}.smaller")  # a new file: the old one may have other names, too
        write_shard(smaller, kept)
        smaller.replace(shard)
    return True


def _are_equal(places: Mapping[str, Path], one: str, other: str) -> bool:
    if other not in places:
        return False
    tensors = []
    for name in (one, other):
        with safe_open(places[name], "pt") as file:
            tensors.append(file.get_tensor(name))
    return tensors[0].dtype == tensors[1].dtype and torch.equal(*tensors)


def link(source: Path, target: Path) -> None:
    """Lets a shard lie in two folders. Raises Unwritten."""
    with writing(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        target.unlink(missing_ok=True)
        link_or_copy(source, target)


def check_export(
    folder: Path, row: torch.Tensor, logits: torch.Tensor, tolerance: float, task: Task, **model_args: Any
) -> str:
    """Loads an export and compares its logits with the pipeline's (1, T', V), which may be those of the first positions
    alone; returns how that went.

    Raises WrongExport naming the folder if it does not load, tensors are missing or left over, or the logits differ by
    more than tolerance, relative to the largest, and by more than what the model's own dtype rounds away: of a deep one
    in bf16 two kernels may differ by a fifth.
    """
    size = sum(shard.stat().st_size for shard in folder.glob("model-*.safetensors"))
    free = psutil.virtual_memory().available
    if free < 1.5 * size:
        return f"not checked, {size >> 20} MiB of weights and {free >> 20} MiB of free memory"
    try:
        model, info = task.loader.from_pretrained(folder, output_loading_info=True, dtype="auto", **model_args)
    except (OSError, MemoryError):  # the machine's doing
        raise
    except Exception as error:  # whatever the model class makes of the config
        raise WrongExport(folder, f"does not load ({describe(error)})") from error
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if info[kind]:
            raise WrongExport(folder, f"{kind.replace('_', ' ')} {sorted(info[kind])[:3]}")
    with torch.no_grad():
        again = model.eval()(**{task.main_input: row}, **task.options).logits[:, : logits.shape[1]].float()
    logits = logits.cpu().float()
    difference = relative_difference(again, logits)
    if not difference <= tolerance and not _is_rounding(model, task, row, again, logits):
        raise WrongExport(folder, f"its logits differ from the pipeline's by {difference:.2g} of the largest")
    same = (
        "equal the pipeline's" if difference == 0 else f"differ from the pipeline's by {difference:.1g} of the largest"
    )
    return f"loads with no missing or unexpected key, logits {same}"


def _is_rounding(model: Any, task: Task, row: torch.Tensor, again: torch.Tensor, logits: torch.Tensor) -> bool:
    """Whether the pipeline's logits are about as far from the model's in float32 as the model's own are."""
    if model.dtype == torch.float32:
        return False
    with torch.no_grad():
        exact = model.float()(**{task.main_input: row}, **task.options).logits[:, : logits.shape[1]]
    return relative_difference(logits, exact) <= 2 * relative_difference(again, exact)


def relative_difference(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """The largest difference, relative to the largest number of theirs."""
    return float((ours - theirs).abs().max() / theirs.abs().max().clamp(min=1e-12))


def describe(error: Exception) -> str:
    """In one line what a library said."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]
