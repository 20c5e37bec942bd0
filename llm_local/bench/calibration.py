"""What the simulator needs of a system, timed in a run of it: seconds of each stage's passes."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median

from llm_local.bench.cases import Case, run_case
from llm_local.plan.times import StageSeconds

SCHEDULES = {"local": "local", "deepspeed": "1f1b"}  # of a system, as the simulator calls it


def stage_seconds(measured: dict[str, float], with_messages: bool) -> StageSeconds:
    """Loading and, with_messages, sending and receiving belong to the passes, reducing to the optimizer."""

    def of(*names: str) -> float:
        return sum(measured.get(name, 0.0) for name in names)

    ahead, back = (("RecvActivation", "SendActivation"), ("RecvGrad", "SendGrad")) if with_messages else ((), ())
    return StageSeconds(
        (of("LoadMicroBatch", "ForwardPass", *ahead),),
        (of("BackwardPass", *back),),
        of("ReduceTiedGrads", "ReduceGrads", "OptimizerStep"),
    )


def calibrate(
    case: Case, repeats: int, shares_cores: bool = False, launchers: Sequence[Sequence[str]] = ()
) -> list[StageSeconds]:
    """Of each stage, the median over runs of a case that measures passes.

    Seconds that include waits leave messages out; where stages share cores, those on a core do not include waits.
    """
    runs = [run_case(case, launchers) for _ in range(repeats)]
    found = []
    for stage in range(case.ranks):
        own = [run[stage]["core_seconds" if shares_cores else "seconds"] for run in runs]
        medians = {name: median(seconds[name] for seconds in own) for name in own[0]}
        found.append(stage_seconds(medians, with_messages=shares_cores))
    return found
