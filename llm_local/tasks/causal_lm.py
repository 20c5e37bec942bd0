"""Each token from those before it: GPT-2, Llama and their like."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from llm_local.flags import DataArguments, LocalArguments, ModelArguments, TrainArguments
from llm_local.tasks.task import IGNORED, Task, register_task

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig


class CausalLM(Task):
    """A language model that writes. Labels are the ids where there are no others, one place further on."""

    title = "causal language model"
    auto_class = "AutoModelForCausalLM"
    auto_mapping = "MODEL_FOR_CAUSAL_LM_MAPPING"
    options = {"use_cache": False}  # noqa: RUF012 - read only
    score = "perplexity"
    pipeline_tag = "text-generation"
    generates = True

    def scored(
        self, states: torch.Tensor, input_ids: torch.Tensor | None, labels: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        labels = input_ids if labels is None else labels
        assert labels is not None, "there is text"
        targets = labels[:, 1:]  # of a part of a row there is the one behind it, too
        return states[:, : targets.shape[1]].reshape(-1, states.shape[-1]), targets.reshape(-1)

    def count_scored(self, labels: torch.Tensor) -> torch.Tensor:
        return (labels[:, 1:] != IGNORED).sum(dim=1)

    def problems(
        self, model: ModelArguments, data: DataArguments, local: LocalArguments, train: TrainArguments
    ) -> list[str]:
        if data.mlm_probability == DataArguments().mlm_probability:
            return []
        return [f"mlm_probability={data.mlm_probability:g} is for task=masked-lm; leave it out"]

    def order_problem(self, config: PretrainedConfig, reads_ahead: bool) -> str:
        if not reads_ahead:
            return ""
        is_encoder = getattr(config, "is_decoder", None) is False
        repair = "set is_decoder=true in config_overrides, or task=masked-lm" if is_encoder else "use a causal one"
        return f"model type {config.model_type!r} reads later tokens, so that predicting them is copying; {repair}"

    def usage(self, trust: str, drafts: Sequence[int]) -> list[str]:
        lines = [
            "from transformers import AutoModelForCausalLM, AutoTokenizer",
            "",
            f'tokenizer = AutoTokenizer.from_pretrained("export"{trust})',
            f'model = AutoModelForCausalLM.from_pretrained("export"{trust})',
            'inputs = tokenizer("Once upon a time", return_tensors="pt")',
        ]
        options = "max_new_tokens=64"
        for draft in drafts:
            lines.append(f'draft = AutoModelForCausalLM.from_pretrained("export/exits/stage-{draft:02d}"{trust})')
            options = f"assistant_model=draft, {options}"
        return [*lines, f"output = model.generate(**inputs, {options})", "print(tokenizer.decode(output[0]))"]


register_task("causal-lm", CausalLM())
