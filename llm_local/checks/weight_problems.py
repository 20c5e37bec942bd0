"""What is wrong with a pretrained model's files, seen by their headers: hardly a tensor is read.

transformers itself says which tensors are missing or have another shape: it loads the headers' shapes into a model
without memory, with the renaming and fusing of names that a real load has.
"""

from __future__ import annotations

from collections.abc import Collection
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from transformers import PretrainedConfig
from transformers.core_model_loading import revert_weight_conversion
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME

from llm_local.config import Config, ConfigError, some_of
from llm_local.model.gguf_cache import weights_path
from llm_local.model.model_config import adapter_problem
from llm_local.model.pretrained import COPY_AGAIN, Source, find, open_shard, sources_of, tensor_files
from llm_local.model.slices import model_without_weights

ROWS = 4096  # of a matrix that are read at a time
Shapes = dict[str, tuple[int, ...]]


def weight_problems(
    config: Config, model_config: PretrainedConfig, fresh: Collection[str] = ()
) -> tuple[list[str], tuple[str, ...]]:
    """Why the run's pretrained model cannot be loaded, and what is left out of it: problems and warnings.
    fresh: parameters that are not looked for, as Anatomy has them."""
    if config.model.model_name_or_path is None:
        return [], ()
    path = weights_path(config)
    if adapter := adapter_problem(f"model_name_or_path={path}", path):
        return [adapter], ()
    method = getattr(model_config, "quantization_config", None)
    if method is not None:
        kind = method.get("quant_method") if isinstance(method, dict) else getattr(method, "quant_method", method)
        return [f"{path} has quantised weights ({kind}), which cannot be trained; use the model they were made of"], ()
    try:
        files = tensor_files(path)
        problems, shapes = read_shapes(path, files)
    except ConfigError as error:
        return error.problems, ()
    return (problems, ()) if problems else _compare(config, path, model_config, files, shapes, fresh)


def read_shapes(path: str, files: dict[str, str]) -> tuple[list[str], Shapes]:
    """Shapes of all tensors, from the headers of the files; and the files that are missing, damaged or not the
    index's."""
    problems: list[str] = []
    shapes: Shapes = {}
    for name in sorted(set(files.values())):
        tensors = [tensor for tensor, file in files.items() if file == name]
        found = find(path, name)
        if found is None:
            problems.append(f"{_index(path)} names {name}, which is not there; {COPY_AGAIN}")
            continue
        try:
            with open_shard(Path(found)) as shard:
                there = {tensor: tuple(shard.get_slice(tensor).get_shape()) for tensor in shard.keys()}  # noqa: SIM118
        except ConfigError as error:
            problems += error.problems
            continue
        shapes |= {tensor: there[tensor] for tensor in tensors if tensor in there}
        absent = [tensor for tensor in tensors if tensor not in there]
        if absent:
            problems.append(f"{_index(path)} names {some_of(absent)} of {name}, which does not hold it; {COPY_AGAIN}")
    return problems, shapes


def _index(path: str) -> Path:
    return Path(find(path, SAFE_WEIGHTS_INDEX_NAME) or path)


def _compare(
    config: Config,
    path: str,
    model_config: PretrainedConfig,
    files: dict[str, str],
    shapes: Shapes,
    fresh: Collection[str],
) -> tuple[list[str], tuple[str, ...]]:
    """What transformers would say of the tensors when it loads them."""
    trusted = config.model.trust_remote_code
    skeleton: Any = model_without_weights(model_config, config.model.task, trust_remote_code=trusted)
    sources = sources_of(skeleton, shapes)
    tensors = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
    tensors |= {source.key: tensors[source.name] for source in sources}
    for source in sources:
        if source.parameter in fresh:
            tensors.pop(source.key, None)
    try:
        _, info = type(skeleton).from_pretrained(
            None,
            config=model_config,
            state_dict=tensors,
            dtype=torch.float32,
            attn_implementation=None,
            device_map="meta",
            ignore_mismatched_sizes=True,
            output_loading_info=True,
        )
    except RuntimeError:  # some experts of a layer are missing or of another shape
        info = _by_name(skeleton, shapes)
    wanted_by, repair = _described(config, model_config)
    missing, left = sorted({*info["missing_keys"]} - {*fresh}), sorted(info["unexpected_keys"])
    if missing:
        instead = f", and has {some_of(left)} instead" if left else ""
        return [f"{path} lacks {some_of(missing)} that {wanted_by} has{instead}; {repair}"], ()
    if info["mismatched_keys"]:
        (name, found, wanted), *more = sorted(info["mismatched_keys"], key=lambda entry: entry[0])
        file = Path(path, files[name]) if name in files else path
        others = f" (and {len(more)} more differ)" if more else ""
        return [f"{file} has {name} in shape {_shape(found)}, {wanted_by} in {_shape(wanted)}{others}; {repair}"], ()
    warnings = _untied(path, skeleton, sources, files)
    return [], warnings + ((f"{path} has more than the model, and it is left out: {some_of(left)}",) if left else ())


def _untied(path: str, skeleton: Any, sources: list[Source], files: dict[str, str]) -> tuple[str, ...]:
    """What the config ties and the files have as two that differ; of all tensors these alone are read."""
    names = {source.parameter: source.name for source in sources if source.key == source.name}
    pairs = [(names.get(one), names.get(other)) for one, other in (skeleton.all_tied_weights_keys or {}).items()]
    return tuple(
        f"{path} has {one} and {other} that differ, though its config ties them: the model is trained untied"
        for one, other in pairs
        if one and other and not _are_equal(path, files, one, other)
    )


def _are_equal(path: str, files: dict[str, str], one: str, other: str) -> bool:
    with ExitStack() as opened:
        shards = [opened.enter_context(open_shard(Path(find(path, files[name]) or ""))) for name in (one, other)]
        first, second = (shard.get_slice(name) for shard, name in zip(shards, (one, other), strict=True))
        rows = range(0, first.get_shape()[0], ROWS)
        return all(torch.equal(first[k : k + ROWS].float(), second[k : k + ROWS].float()) for k in rows)


def _by_name(skeleton: Any, shapes: Shapes) -> dict[str, Any]:
    """The same by the names that the model itself would save its tensors under."""
    wanted = {n: tuple(t.shape) for n, t in revert_weight_conversion(skeleton, skeleton.state_dict()).items()}
    return {
        "missing_keys": wanted.keys() - shapes.keys(),
        "unexpected_keys": shapes.keys() - wanted.keys(),
        "mismatched_keys": {(n, shapes[n], w) for n, w in wanted.items() if n in shapes and shapes[n] != w},
    }


def _described(config: Config, model_config: PretrainedConfig) -> tuple[str, str]:
    """Where the expected shapes come from, and how to mend it."""
    overrides = config.model.config_overrides
    if overrides:
        return f"its config with config_overrides={overrides!r}", "leave out overrides that change what is loaded"
    return f"its config (model_type {model_config.model_type!r})", "use the config that was saved with the weights"


def _shape(shape: Any) -> str:
    return "x".join(map(str, shape)) or "()"
