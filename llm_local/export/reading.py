"""An export as a command reads it: of which task it is, and what transformers makes of it on a device.

What works needs transformers alone, so that it is quick.
"""

from __future__ import annotations

import json
from argparse import ArgumentParser, Namespace
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

from llm_local.registry import TASKS
from llm_local.tasks.task import Task

DTYPES = {"auto": "auto", "fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def add_arguments(parser: ArgumentParser) -> None:
    """How every command reads an export."""
    parser.add_argument("--device", help="cpu, cuda, cuda:1, ...; default: the accelerator if there is one")
    parser.add_argument("--dtype", choices=DTYPES, default="fp32", help="auto: the export's own (fp32)")
    parser.add_argument("--trust_remote_code", action="store_true", help="run model code that the export brings along")


def loading(given: Namespace) -> dict[str, Any]:
    """What from_pretrained is told by these."""
    return {"dtype": DTYPES[given.dtype], "trust_remote_code": given.trust_remote_code}


def model_class(folder: Path) -> tuple[str, Task | None]:
    """The class that the export names, and the task that trains such models, if there is one.

    Raises ValueError naming what the folder lacks, and the export if the folder is its run.
    """
    if not (folder / "config.json").is_file():
        meant = folder / "export"
        hint = f"; did you mean {meant}?" if (meant / "config.json").is_file() else ""
        what = "has no config.json: it is no export" if folder.is_dir() else "does not exist"
        raise ValueError(f"--export {folder} {what}{hint}")
    config = json.loads((folder / "config.json").read_text())
    name, code = "".join(config.get("architectures") or []), config.get("auto_map") or {}
    found = (task for task in TASKS.values() if task.trains(name) or task.auto_class in code)
    return name, next(found, None)


def find_exit(export: Path, flag: str, name: str) -> Path:
    """The folder of an exit by its name, or of any model by its path. Raises ValueError naming the exits there are."""
    for folder in (export / "exits" / name, Path(name)):
        if (folder / "config.json").is_file():
            return folder
    exits = ", ".join(sorted(path.parent.name for path in export.glob("exits/*/config.json"))) or "none"
    raise ValueError(f"{flag} {name} is no exit of {export} (it has {exits}) and no folder of a model")


def find_device(name: str | None) -> torch.device:
    """Raises ValueError for a device that this machine does not have."""
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if name is None:
        return accelerator or torch.device("cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {name}: {str(error).splitlines()[0]}") from error
    return device


def reason(error: Exception) -> str:
    """Why transformers does not load a folder."""
    from llm_local.model.remote_code import UNTRUSTED, is_untrusted  # what works needs transformers alone

    if is_untrusted(error):
        return f"it {UNTRUSTED.removesuffix(' true')}"  # a flag without a value, here
    return str(error).strip().splitlines()[0]


def load(folder: Path, loader: Any, device: torch.device, **options: Any) -> Any:
    """The folder's model, ready to be evaluated, by the Auto class. options: of from_pretrained.

    Raises ValueError naming the folder if transformers cannot load all of it.
    """
    try:
        model, info = loader.from_pretrained(folder, output_loading_info=True, **options)
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise ValueError(f"{folder} cannot be loaded: {reason(error)}") from error
    if info["missing_keys"]:
        raise ValueError(f"{folder} lacks {min(info['missing_keys'])}: it is incomplete")
    return model.eval().to(device)


def read_tokenizer(folder: Path, trusted: bool) -> Any:
    """The tokenizer of the folder. Raises ValueError naming the folder, and the file where one is broken."""
    with suppress(Exception):  # of whatever library reads a file
        tokenizer: Any = AutoTokenizer.from_pretrained(folder, trust_remote_code=trusted)
        if tokenizer("Some text.") and not set(tokenizer.get_vocab()) <= set(tokenizer.all_special_tokens):
            return tokenizer
    from llm_local.config import ConfigError  # looks for the reason; what works needs transformers alone
    from llm_local.data import tokenizer as library

    try:
        return library.read_tokenizer(folder, str(folder), trusted)
    except ConfigError as error:
        said = "; ".join(error.problems)
        raise ValueError(said.removesuffix(" true")) from error  # a flag without a value, here
