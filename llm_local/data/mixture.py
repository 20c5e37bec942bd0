"""Where a run's documents come from, as its flags or a mixture file say it.

    - source: HuggingFaceFW/fineweb-edu    # hub name, 'builtin', folder of save_to_disk or prepare_data, file, glob
      config: sample-10BT
      streaming: true
      weight: 3
    - source: code/*.jsonl.gz
      text_column: content

A weight is a share of the rows; the defaults of the other keys are the flags of the same meaning. configs/data has
files of one source, to be used as they are or copied from.
"""

from __future__ import annotations

import dataclasses
import glob
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml
from datasets import IterableDataset

from llm_local.config import Config, ConfigError, from_here
from llm_local.data.text_files import format_of
from llm_local.data.token_folder import is_token_folder
from llm_local.flags import DataArguments
from llm_local.problems import parse_named_files

SAVED = ("state.json", "dataset_dict.json")  # what save_to_disk leaves in a folder
CLONED = (".gitattributes", "README.md")  # what a clone of a data set of the hub has, one at least
BUILTIN = "builtin"
DIGITS = "digits"  # scikit-learn's (data/digits.py)
TOKENS = "tokens"
OBJECT = "<train_dataset>"  # what run.yaml names of a data set that was an object
TRAIN, VALIDATION = "train", "validation"  # of config.rows; any other name is that of a set to validate on


@dataclass(frozen=True)
class Source:
    """One source of documents. field: how a message names the place that asks for it.

    split, validation_split: of a data set; None: 'train', and 'validation' if there is one. running_text: the rows of
    the data set are lines of one text, and not documents. rows: a data set that was given as an object.
    """

    field: str
    source: str
    text_column: str
    config: str | None = None
    revision: str | None = None
    split: str | None = None
    validation_split: str | None = None
    streaming: bool = False
    running_text: bool = False
    weight: float = 1.0
    image_column: str = "image"
    label_column: str = "label"
    rows: Any = None

    @property
    def named(self) -> str:
        return self.field if self.rows is not None else f"{self.field}={self.source}"

    @property
    def kind(self) -> str:
        """'builtin', 'digits', 'files', 'tokens' (by prepare_data.py), 'saved' (by save_to_disk), 'hub' (or a clone of
        what is there) or 'object' (rows)."""
        if self.source == OBJECT:
            return "object"
        if self.field in ("train_file", "validation_file", "validation_files", "train_dir", "validation_dir"):
            return "files"
        if self.source in (BUILTIN, DIGITS):
            return self.source
        path = local_path(self.source)
        if path is not None and is_token_folder(path):
            return TOKENS
        if path is not None and _has_any(path, SAVED):
            return "saved"
        if self.field == "dataset_name":
            return "hub" if path is None or _has_any(path, CLONED) else "saved"
        return "files" if path is not None or glob.has_magic(self.source) or format_of(self.source) else "hub"


def local_path(name: str) -> Path | None:
    """The path that a name means, None if it is a name on the hub ("name" or "owner/name")."""
    path = Path(name)
    looks_local = path.is_absolute() or name.startswith((".", "~")) or len(path.parts) > 2
    return path if looks_local or path.exists() else None


def _has_any(folder: Path, names: tuple[str, ...]) -> bool:
    return any((folder / name).exists() for name in names)


def training_sources(config: Config) -> list[Source]:
    """The sources of the training documents. Raises ConfigError for all that is wrong with a mixture file."""
    data = config.data
    if TRAIN in config.rows:
        return [_of_object(data, "train_dataset", *config.rows[TRAIN])]
    if data.data_mixture:
        return _read_mixture(config, Path(data.data_mixture))
    field, source = "dataset_name", data.dataset_name or BUILTIN
    for name in ("train_file", "train_dir"):
        if given := getattr(data, name):
            field, source = name, given
    return [
        Source(
            field=field,
            source=source,
            **columns_of(data),
            config=data.dataset_config_name,
            revision=data.dataset_revision,
            split=data.dataset_split,
            streaming=data.streaming,
        )
    ]


def validation_sources(config: Config) -> dict[str, Source]:
    """The files that are given to validate on, by name; none: a part of the training data is held out."""
    data = config.data
    objects = {name: rows for name, rows in config.rows.items() if name != TRAIN}
    if objects:
        return {name: _of_object(data, "eval_dataset", *rows) for name, rows in objects.items()}
    given = [(name, getattr(data, name)) for name in ("validation_file", "validation_dir")]
    files = dict([("validation", (name, file)) for name, file in given if file])
    files |= {name: ("validation_files", file) for name, file in parse_named_files(data.validation_files or "")}
    return {name: Source(field, file, **columns_of(data)) for name, (field, file) in files.items()}


def columns_of(data: DataArguments) -> dict[str, Any]:
    """The columns of a source, as the flags name them."""
    named = {"text_column": data.text_column_name, "image_column": data.image_column_name}
    return named | {"label_column": data.label_column_name}


def _of_object(data: DataArguments, field: str, column: str, rows: Any) -> Source:
    columns = columns_of(replace(data, text_column_name=column))
    return Source(field, OBJECT, **columns, streaming=isinstance(rows, IterableDataset), rows=rows)


def _read_mixture(config: Config, path: Path) -> list[Source]:
    named = f"data_mixture={path}"
    try:
        entries = yaml.safe_load(path.read_text())
    except OSError as error:
        raise ConfigError([f"{named} cannot be read ({error.strerror}){from_here(path)}; check the path"]) from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError([f"{named} is not YAML: {' '.join(str(error).split())}"]) from error
    if not isinstance(entries, list) or not entries:
        kind = "an empty list" if entries == [] else type(entries).__name__
        raise ConfigError([f"{named} holds {kind}, not a list of sources; write '- source: ...' for each"])
    problems: list[str] = []
    sources = []
    for number, entry in enumerate(entries, start=1):
        found = _entry_problems(entry)
        problems += [f"{named}, source {number}: {problem}" for problem in found]
        if not found:
            defaults = {**columns_of(config.data), "streaming": config.data.streaming}
            sources.append(Source(**{"field": f"{named}, source {number}", **defaults, **entry}))
    if problems:
        raise ConfigError(problems)
    return sources


def _entry_problems(entry: Any) -> list[str]:
    if not isinstance(entry, dict):
        return [f"{entry!r} is not 'key: value' lines; write 'source: ...'"]
    types = {field.name: str(field.type) for field in dataclasses.fields(Source) if field.name not in ("field", "rows")}
    problems = [f"unknown key {key!r}; use one of {', '.join(types)}" for key in entry if key not in types]
    if not entry.get("source"):
        problems.append("no source; name a data set, a file, a directory or a glob")
    for key, value in entry.items():
        wanted = types.get(key, "")
        if "str" in wanted and not isinstance(value, str):
            problems.append(f"{key}: {value!r} is not text; put it in quotes")
        if wanted == "bool" and not isinstance(value, bool):
            problems.append(f"{key}: {value!r} is not true or false")
        if wanted == "float" and not _is_weight(value):
            problems.append(f"{key}: {value!r} is not a number greater than 0")
    return problems


def _is_weight(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value < float("inf")
