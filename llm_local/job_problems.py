"""What is wrong with the flags of a job, one stage in a launch of its own: seen without the other jobs."""

from __future__ import annotations

import os
import socket
from pathlib import Path

from llm_local.config import Config
from llm_local.jobs.key import key_problems
from llm_local.jobs.ways import Address, listen
from llm_local.model.heads.head import head_of

_OF_JOBS = {"send_to": None, "receive_on": None, "run_key_file": None, "on_full_log": "wait"}


def job_problems(config: Config) -> list[str]:
    """What the flags show by themselves."""
    local, stage = config.local, config.local.stage
    if stage is None:
        return [
            f"{name}={value} needs stage, the one that this job trains"
            for name, default in _OF_JOBS.items()
            if (value := config.flat()[name]) != default
        ]
    named, last = f"stage={stage}", local.num_stages - 1
    if stage > last or last < 1:
        return [
            f"{named} is none of num_stages={local.num_stages}, which are 0 to {last}; jobs share two stages or more"
        ]
    problems = []
    for name, is_needed, whom in (
        ("send_to", stage < last, f"stage {stage + 1}"),
        ("receive_on", stage > 0, f"stage {stage - 1}"),
    ):
        given = config.flat()[name]
        if is_needed and given is None:
            problems.append(f"{named} needs {name}, HOST:PORT of the link with {whom}")
        elif given is not None and not is_needed:
            problems.append(f"{named} of {local.num_stages} has no use for {name}={given}; leave it out")
        elif given is not None:
            problems += _address_problems(name, given)
    if local.run_key_file is None:
        problems.append(f"{named} needs run_key_file; make one with llm-local key, once for all jobs")
    return problems + _unfit(config)


def _address_problems(name: str, given: str) -> list[str]:
    problems = []
    for text in given.split(",") if name == "send_to" else [given]:
        try:
            Address.of(text)
        except ValueError as error:
            problems.append(f"{name}={given}: {error}; write it as siteB:7001")
    return problems


def _unfit(config: Config) -> list[str]:
    """What a stage cannot do that lives alone."""
    local, train, stage = config.local, config.train, f"stage={config.local.stage}"
    problems = []
    back = config.method.back_dtype(local, config.precision, config.wire_dtype)
    if back is not None or not config.method.has_local_losses:
        why = (
            "distillation_weight"
            if local.distillation_weight
            else "final_backprop_steps"
            if local.final_backprop_steps
            else ""
        )
        what = f"{why}={getattr(local, why)}" if why else f"method={local.method}"
        problems.append(
            f"{what} asks the next stage for something in each step, so no stage lives alone; leave out {stage}"
        )
    if not config.save_interval:
        problems.append(
            f"{stage} needs save_steps: a job goes on from its last checkpoint, the one before it keeps what followed"
        )
    if config.epoch_flag is not None:
        problems.append(
            f"{config.epoch_flag}={getattr(train, config.epoch_flag)} counts rows, which stage 0 alone reads; use steps"
        )
    if local.on_full_log == "skip" and head_of(config).shares_matrix:
        problems.append(
            f"on_full_log=skip waits for no stage behind, head={local.head} for the last one's matrix; use another head"
        )
    if train.trace:
        problems.append("trace=True joins the clocks of all stages, which jobs do not share; leave it out")
    if train.load_best_model_at_end:
        problems.append("load_best_model_at_end=True compares stages at the end, when others may be gone; leave it out")
    return problems


def surroundings_problems(config: Config) -> list[str]:
    """What the key file and the network show, of flags that job_problems lets pass."""
    local, problems = config.local, []
    if local.run_key_file is not None:
        problems += key_problems(Path(local.run_key_file))
    for text in (local.send_to or "").split(",") if local.send_to else ():
        address = Address.of(text)
        try:
            socket.getaddrinfo(address.host, address.port)
        except (OSError, UnicodeError) as error:
            problems.append(f"send_to={text}: {address.host} is no known host ({_reason(error)}); correct it")
    if local.receive_on is not None:
        address = Address.of(local.receive_on)
        try:
            listen(address).close()
        except (OSError, UnicodeError) as error:
            problems.append(not_listening(address, error))
    return problems


def not_listening(address: Address, error: OSError | UnicodeError) -> str:
    """Why a rank cannot be reached there, and what to do."""
    return f"receive_on={address} cannot be listened on ({_reason(error)}); choose another port or address"


def _reason(error: OSError | UnicodeError) -> str:
    """Without the address, which Python's own message names again."""
    if isinstance(error, UnicodeError):
        return "no name of a host"
    if isinstance(error, socket.gaierror) or error.errno is None:
        return str(error.strerror or error)
    return os.strerror(error.errno)
