"""Pretraining of Hugging Face models by local parallelism on DeepSpeed.

    import llm_local as ll

    config = ll.Config.load("configs/quickstart.yaml", num_stages=2, max_steps=2000)
    with ll.prepare(config) as run:  # on every rank
        run.train()
        run.export("model")

The names below are what can be relied on; everything else may change.
"""

from __future__ import annotations

import sys
from importlib import import_module
from typing import TYPE_CHECKING, Any

from llm_local.imports import quick_imports

if TYPE_CHECKING:
    from llm_local.config import Config as Config
    from llm_local.config import ConfigError as ConfigError
    from llm_local.methods.method import Method as Method
    from llm_local.methods.method import register_method as register_method
    from llm_local.methods.schedule import Schedule as Schedule
    from llm_local.model.heads.head import Head as Head
    from llm_local.model.heads.head import register_head as register_head
    from llm_local.peer import LostPeer as LostPeer
    from llm_local.results import NonFiniteLoss as NonFiniteLoss
    from llm_local.results import StepResult as StepResult
    from llm_local.run import Run as Run
    from llm_local.start import prepare as prepare
    from llm_local.tasks.task import Task as Task
    from llm_local.tasks.task import register_task as register_task
    from llm_local.trainer import LocalTrainer as LocalTrainer
    from llm_local.training_arguments import LocalTrainingArguments as LocalTrainingArguments

_HOMES = {
    "Config": "config",
    "ConfigError": "config",
    "Head": "model.heads.head",
    "LocalTrainer": "trainer",
    "LocalTrainingArguments": "training_arguments",
    "LostPeer": "peer",
    "Method": "methods.method",
    "NonFiniteLoss": "results",
    "Run": "run",
    "Schedule": "methods.schedule",
    "StepResult": "results",
    "Task": "tasks.task",
    "prepare": "start",
    "register_head": "model.heads.head",
    "register_method": "methods.method",
    "register_task": "tasks.task",
}
__all__ = list(_HOMES)


def __getattr__(name: str) -> Any:
    """Imported when it is asked for: a command that needs only flags does not wait for torch."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    home = f"{__name__}.{_HOMES[name]}"
    if home not in sys.modules:  # else each use of a name would keep a program's own garbage from being found
        with quick_imports():
            import_module(home)
    return getattr(sys.modules[home], name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
