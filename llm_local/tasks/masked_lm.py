"""Some tokens of a row from all the others: BERT and its like.

Which tokens are masked, and by what, is drawn by transformers' own collator, for each row by a seed of its own: a run
asks the same on any layout.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from llm_local.flags import DataArguments, LocalArguments, ModelArguments, TrainArguments
from llm_local.registry import HEADS
from llm_local.tasks.task import IGNORED, Ask, Parts, Task, Wrong, causal_only, register_task

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig, PreTrainedTokenizerBase


class MaskedLM(Task):
    """An encoder. Labels are the masked tokens, where they stand; the others are IGNORED."""

    title = "masked language model"
    auto_class = "AutoModelForMaskedLM"
    auto_mapping = "MODEL_FOR_MASKED_LM_MAPPING"
    score = "pseudo-perplexity"
    pipeline_tag = "fill-mask"
    sends_labels = True
    needed_token = "mask_token"
    new_tokens = {"mask_token": "<mask>", "pad_token": "<pad>"}  # noqa: RUF012 - read only
    answer = "token_str"
    delimiters = {"bos_token": "cls_token", "eos_token": "sep_token"}  # noqa: RUF012

    def scored(
        self, states: torch.Tensor, input_ids: torch.Tensor | None, labels: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        targets = input_ids if labels is None else labels
        assert targets is not None, "there is text"
        asked = targets != IGNORED  # so that the head runs for these alone
        return states[asked], targets[asked]

    def count_scored(self, labels: torch.Tensor) -> torch.Tensor:
        return (labels != IGNORED).sum(dim=1)

    def scored_share(self, data: DataArguments) -> float:
        return data.mlm_probability

    def asker(self, tokenizer: PreTrainedTokenizerBase, data: DataArguments) -> Ask | None:
        import torch
        from transformers import DataCollatorForLanguageModeling

        collator: Any = DataCollatorForLanguageModeling(tokenizer, mlm_probability=data.mlm_probability)
        never = torch.tensor(tokenizer.all_special_ids)

        def ask(parts: Parts, seeds: Sequence[int]) -> Parts:
            ids, mask = parts["input_ids"], parts.get("attention_mask")
            spared = torch.isin(ids, never)
            spared = spared if mask is None else spared | (mask == 0)
            found = []
            for row, kept, seed in zip(ids, spared, seeds, strict=True):
                collator.generator = torch.Generator().manual_seed(seed)
                found.append(collator.torch_mask_tokens(row[None].clone(), kept[None]))
            masked, labels = (torch.cat(each) for each in zip(*found, strict=True))
            return {**parts, "input_ids": masked, "labels": labels}

        return ask

    def question(self, text: str, processing: Any) -> Any:
        """[MASK] is a mask in any vocabulary."""
        mask = processing.mask_token
        asked = text if mask in text else text.replace("[MASK]", mask)
        if mask not in asked:
            raise ValueError(f"{text!r} has no {mask}; write it, or [MASK], where a token is missing")
        return asked

    def order_problem(self, config: PretrainedConfig, reads_ahead: bool) -> str:
        if reads_ahead:
            return ""
        is_decoder = getattr(config, "is_decoder", False)
        repair = "set is_decoder=false in config_overrides" if is_decoder else "use task=causal-lm"
        return f"task={self.name}: model type {config.model_type!r} does not read later tokens; {repair}"

    def problems(
        self, model: ModelArguments, data: DataArguments, local: LocalArguments, train: TrainArguments
    ) -> list[str]:
        head = HEADS.get(local.head)
        wrong: Wrong = {
            f"seq_length={data.seq_length}": (
                data.seq_length < 3,
                "a document's begin and end leave nothing to mask; use 3 or more",
            ),
            f"document_mask={data.document_mask}": (data.document_mask, "its masks are causal; leave it out"),
            f"head={local.head}": (
                head is not None and head.shares_matrix,
                "a layer stands between its temperature and the output matrix; use head=linear or decoder",
            ),
            f"head_token_fraction={local.head_token_fraction:g}": (
                local.head_token_fraction < 1,
                "a head reads the masked tokens alone already; leave it out",
            ),
            **causal_only(model, local),
            f"sample_prompt={train.sample_prompt!r}": (
                train.sample_prompt is not None,
                "such a model writes no text; leave it out",
            ),
        }
        return self.refusals(wrong)

    def usage(self, trust: str, drafts: Sequence[int]) -> list[str]:
        return [
            "from transformers import pipeline",
            "",
            f'fill = pipeline("fill-mask", model="export"{trust})',
            'print(fill(f"import {fill.tokenizer.mask_token}"))',
        ]


register_task("masked-lm", MaskedLM())
