"""The page that says what came out for each model type."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from importlib.metadata import version

from llm_local.checks.tiny import NUM_LAYERS
from llm_local.coverage.model_type import EXACT, NUM_STAGES, REFUSED, UNTRIED, WRONG, Finding
from llm_local.flags import ModelArguments
from llm_local.registry import TASKS

STATUSES = (EXACT, REFUSED, WRONG, UNTRIED)
PACKAGES = ("torch", "transformers")
_LONGEST = 240


def all_types(task: str = "causal-lm") -> list[str]:
    """Every model type that transformers has a class for."""
    return sorted(TASKS[task].class_names)


def chosen_types(text: str, task: str = "causal-lm") -> list[str]:
    """The types of a comma-separated list. Raises ValueError for what is none."""
    types = [part.strip() for part in text.split(",") if part.strip()]
    unknown = [name for name in types if name not in all_types(task)]
    if unknown:
        raise ValueError(
            f"--types {unknown[0]}: transformers {version('transformers')} has no {TASKS[task].title} of that type"
        )
    if not types:
        raise ValueError(f"--types {text!r} names no model type")
    return types


def counts(findings: Sequence[Finding]) -> str:
    """'157 exact, 26 refused, 0 wrong, 6 not tried, of 189 model types'."""
    found = Counter(finding.status for finding in findings)
    return ", ".join(f"{found[status]} {status}" for status in STATUSES) + f", of {len(findings)} model types"


def table(findings: Sequence[Finding]) -> str:
    """A row a type, and why where it is not exact."""
    rows = ["| model type | | embeddings | exits | why, or what else |", "|---|---|---|---|---|"]
    for finding in sorted(findings, key=lambda finding: finding.model_type):
        why = finding.reason.partition(" cannot be cut into stages: ")[2] or finding.reason or finding.note
        cells = (finding.model_type, finding.status, ", ".join(finding.ties), finding.exits, why)
        rows.append("| " + " | ".join(_cell(cell) for cell in cells) + " |")
    return "\n".join(rows) + "\n"


def _cell(text: str) -> str:
    text = text if len(text) <= _LONGEST else f"{text[:_LONGEST]} ..."
    return text.replace("|", "\\|").replace("<", "&lt;")


def page_name(task: str) -> str:
    """'coverage.md', and 'coverage_masked_lm.md' and the like of another task than the default."""
    return "coverage.md" if task == ModelArguments().task else f"coverage_{task.replace('-', '_')}.md"


def page(findings: Sequence[Finding], seconds: float, task: str = "causal-lm") -> str:
    """The whole page: what was tried, how often it came out how, and the table."""
    versions = ", ".join(f"{name} {version(name)}" for name in PACKAGES)
    title, given = TASKS[task].title, "" if task == ModelArguments().task else f" --task {task}"
    return f"""# Model types: {title}s

{counts(findings)}.

Made by `python scripts/coverage.py{given}` in {seconds / 60:.2g} minutes, with {versions} on a CPU. Each
{title} type that transformers registers is tried in one process, as a tiny model of {NUM_LAYERS} layers in
{NUM_STAGES} stages. All weights, norms and biases too, have noise, so that nothing is an identity by accident.

- **exact**: bit for bit equal to the undivided model of plain `transformers`: logits and loss of the chained stages,
  and every gradient through them, in training without dropout; new weights of the stages to those of one slice of all
  layers; logits of the export that `{TASKS[task].auto_class}` loads, with no missing and no unexpected key. All of it
  for untied and, where the type can be tied, tied embeddings.
- **refused**: a run ends before it starts, with the reason. Types with weights that a new model leaves unset can
  still be trained from a pretrained one.
- **wrong**: accepted, and then not exact.
- **not tried**: transformers makes no tiny model of it, for the reason given.

*Exits* are the models of the first and second stage: exact, refused at the start with the reason (the whole model is
exported all the same), or the largest difference of their logits.

{table(findings)}"""
