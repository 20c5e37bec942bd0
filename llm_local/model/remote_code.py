"""The code of a model: modules in its own folder, which its config's auto_map names.

transformers runs them with --trust_remote_code alone, and saves no more of them than the config's and the tokenizer's.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from transformers import PretrainedConfig
from transformers.dynamic_module_utils import get_cached_module_file, get_relative_import_files
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING
from transformers.utils import HF_MODULES_CACHE

from llm_local.config import ConfigError

OF_CODE = (ImportError, AttributeError, SyntaxError, NameError)  # what is raised where it cannot be run
UNTRUSTED = "holds code of its own; read it, and let it run with --trust_remote_code true"


def is_untrusted(error: Exception) -> bool:
    """Whether transformers would not run code that it was not told to trust."""
    return "trust_remote_code" in str(error)


def check_code(config: Any, trusted: bool, named: str) -> PretrainedConfig:
    """The config, whose auto_map names code that may be run and is all there; a class of transformers has none.

    Raises ConfigError with the repair.
    """
    if trusted:
        read_code(config, named)
    elif getattr(config, "auto_map", None):
        if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
            raise ConfigError([f"{named} {UNTRUSTED}"])
        del config.auto_map  # else the export would name files that it has not
    return config


def write_code(code: Mapping[str, str], config: PretrainedConfig, folder: Path) -> None:
    """Puts the modules into the folder, and lets the config there name them."""
    for name, text in code.items():
        (folder / name).write_text(text)
    if getattr(config, "auto_map", None):
        config.auto_map = {kind: _local(reference) for kind, reference in config.auto_map.items()}


def read_code(config: PretrainedConfig, named: str = "") -> dict[str, str]:
    """Modules, by file name, that the auto_map names, and those that they import from beside them.

    named: what a message calls the config. Raises ConfigError for one that cannot be had.
    """
    modules: dict[str, str] = {}
    for reference in _references(config):
        elsewhere, _, local = reference.rpartition("--")
        module = f"{local.partition('.')[0]}.py"
        try:
            found = Path(HF_MODULES_CACHE, get_cached_module_file(elsewhere or str(config.name_or_path), module))
            for path in (found, *map(Path, get_relative_import_files(found))):
                modules[path.name] = path.read_text()
        except (OSError, ValueError, *OF_CODE) as error:
            reason = " ".join(str(error).split())
            raise ConfigError(
                [
                    f"{named or config.name_or_path} names code in its auto_map, {reference}, that cannot be had "
                    f"({reason}); add what is missing"
                ]
            ) from error
    return modules


def _references(config: PretrainedConfig) -> Iterator[str]:
    for value in (getattr(config, "auto_map", None) or {}).values():
        yield from (name for name in (value if isinstance(value, (list, tuple)) else [value]) if name)


def _local(reference: Any) -> Any:
    """Without the repository that a class is from: 'name/repository--module.Class'."""
    if isinstance(reference, (list, tuple)):
        return [_local(each) for each in reference]
    return reference and reference.rpartition("--")[2]
