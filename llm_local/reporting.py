"""Where else the metrics go (--report_to): DeepSpeed's own monitors, and trackers that transformers knows."""

from __future__ import annotations

from transformers import TrainerCallback
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK as INTEGRATIONS
from transformers.integrations.integration_utils import get_available_reporting_integrations as installed_integrations

from llm_local.config import RunConfig
from llm_local.ds_config import REPORTERS

ALL = "all"


def report_problems(config: RunConfig) -> list[str]:
    """What is wrong with report_to."""
    named, known = f"report_to={config.train.report_to}", ", ".join(sorted({*REPORTERS, *INTEGRATIONS}))
    problems = []
    for name in config.reporters:
        if name not in (ALL, *REPORTERS, *INTEGRATIONS):
            problems.append(f"{named}: {name!r} is unknown; use none, all, or some of {known}")
        elif name not in (ALL, *REPORTERS, *installed_integrations()):
            problems.append(f"{named}: the package of {name} is not installed, or not set up; install it")
    return problems


def trackers(config: RunConfig) -> list[type[TrainerCallback]]:
    """The callbacks of transformers that report_to asks for; 'all': of every tracker that is installed."""
    names = config.reporters
    if ALL in names:
        names = installed_integrations()
    return [INTEGRATIONS[name] for name in names if name not in REPORTERS]
