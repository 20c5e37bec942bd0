"""What rank 0 has found out at a start, configuration included: checked once, published once, used by all ranks.

After the start nothing of it is read from disk again. Data, checkpoints and a pretrained model's weights are: of these,
a rank that reads them compares what it finds with what rank 0 has found.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import cache, cached_property
from typing import Any

from pydantic import TypeAdapter
from transformers import CONFIG_MAPPING, PretrainedConfig
from transformers.dynamic_module_utils import get_class_from_dynamic_module

from llm_local.config import Config, from_flat
from llm_local.evaluation import EvalSet
from llm_local.files import Json
from llm_local.memory.stage import Memory
from llm_local.model.anatomy import Anatomy, attention_kernel
from llm_local.model.document_mask import DocumentMask
from llm_local.partition import Partition

Counts = dict[str, tuple[int, int]]
_KERNEL = "attn_implementation"


@dataclass(frozen=True)
class Setup:
    """A run as it was checked.

    config: the flags, with what was measured, or is a checkpoint's, written down. given: the flags as rank 0 has read
    them. model: the model's config (see model_values). generation: what the export's generation_config.json holds.
    code: modules of the model's own, by file name. checkpoint: the folder that the run goes on from. refused_exits: why
    an exit is no model of its own, by its name. tokenizer: key of a fast one. counts: documents and tokens of each data
    set that is on disk. run, life: of a job, the run's identity and how many times the job has started. memory: what a
    rank of each stage is expected to need.
    """

    config: Config
    given: Json
    model: Json
    generation: Json
    anatomy: Anatomy
    partition: Partition
    checkpoint: str | None = None
    warnings: tuple[str, ...] = ()
    documents: DocumentMask | None = None
    refused_exits: dict[str, str] = field(default_factory=dict)
    code: dict[str, str] = field(default_factory=dict)
    tokenizer: str = ""
    counts: Counts = field(default_factory=dict)
    eval_sets: tuple[EvalSet, ...] = ()
    run: str = ""
    life: int = 0
    memory: tuple[Memory, ...] = ()

    def model_config(self) -> PretrainedConfig:
        """The model's config, a new object."""
        values = dict(self.model)
        kernel = values.pop(_KERNEL)
        return self._config_class.from_dict(values, attn_implementation=kernel)

    @cached_property
    def _config_class(self) -> Any:
        reference = (self.model.get("auto_map") or {}).get("AutoConfig")
        if reference is not None and self.config.model.trust_remote_code:
            return get_class_from_dynamic_module(reference, self.model["_name_or_path"])
        return CONFIG_MAPPING[self.model["model_type"]]

    def to_json(self) -> str:
        config = self.config
        found = {"deepspeed_json": config.deepspeed_json, "epoch": config.epoch}
        return json.dumps(asdict(replace(self, config=Config())) | {"config": config.flat(), "found": found})

    @staticmethod
    def from_json(text: str) -> Setup:
        values = json.loads(text)
        found = values.pop("found")
        epoch = found["epoch"] and (found["epoch"][0], found["epoch"][1])
        config = replace(from_flat(values["config"]), **found | {"epoch": epoch})
        return _adapter().validate_python(values | {"config": config})

    def other_flags(self, given: Mapping[str, Any]) -> str:
        """Which flags another rank has read otherwise than rank 0, in words; '' if none."""
        names = [name for name, value in self.given.items() if given.get(name) != value]
        return ", ".join(f"{name}={given.get(name)} (rank 0: {self.given[name]})" for name in names)

    def other_data(self, tokenizer: str, counts: Mapping[str, tuple[int, int]]) -> str:
        """What a rank that reads the data has found otherwise than rank 0, in words; '' if all is the same."""
        if self.tokenizer and tokenizer != self.tokenizer:
            return "its tokenizer is another one than rank 0's; copy that, or name a folder that all hosts see"
        for name, (documents, tokens) in self.counts.items():
            found = counts.get(name, (0, 0))
            if found != (documents, tokens):
                ours, theirs = f"{found[0]:,} documents of {found[1]:,} tokens", f"{documents:,} of {tokens:,}"
                return f"its {name} has {ours}, rank 0's {theirs}; copy the files, or name a folder that all hosts see"
        return ""


@cache
def _adapter() -> TypeAdapter[Setup]:
    return TypeAdapter(Setup)


def model_values(config: Config, model_config: PretrainedConfig) -> Json:
    """A model's config as JSON knows it, with the attention kernel of the run, which transformers leaves out."""
    values = json.loads(json.dumps(model_config.to_dict()))
    return values | {_KERNEL: attention_kernel(config.model, model_config)}
