"""Where else the metrics go (--report_to): DeepSpeed's own monitors, and trackers that transformers knows."""

from __future__ import annotations

from transformers import TrainerCallback
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK as INTEGRATIONS
from transformers.integrations.integration_utils import get_available_reporting_integrations

from llm_local.config import Config
from llm_local.ds_config import REPORTERS

ALL = "all"


def report_problems(config: Config) -> list[str]:
    """What is wrong with report_to. Imports the packages of the trackers."""
    named, known = f"report_to={config.train.report_to}", ", ".join(sorted({*REPORTERS, *INTEGRATIONS}))
    unknown = [name for name in config.reporters if name not in (ALL, *REPORTERS, *INTEGRATIONS)]
    problems = [f"{named}: {name!r} is unknown; use none, all, or some of {known}" for name in unknown]
    for tracker in [] if unknown else trackers(config):
        try:
            tracker()
        except Exception as error:  # of whatever package it is
            reason = " ".join(str(error).split())
            problems.append(f"{named}: {tracker.__name__} cannot be used ({reason}); install what it needs")
    return problems


def trackers(config: Config) -> list[type[TrainerCallback]]:
    """The callbacks of transformers that report_to asks for; 'all': of every tracker that is installed."""
    names = get_available_reporting_integrations() if ALL in config.reporters else config.reporters
    return [INTEGRATIONS[name] for name in names if name not in REPORTERS]
