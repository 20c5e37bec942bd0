"""The start of a job, on its rank 0: what it knows of its run, what it learns from the stage before, where it goes on.

Each stage makes its setup by itself, from the same flags. Neighbours compare it by its fingerprint when they meet, and
what stage 0 alone reads goes from one to the next.
"""

from __future__ import annotations

import json
import math
import os
import socket
import ssl
import sys
import time
import uuid
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from llm_local.checkpoint.line import committed, find_checkpoint
from llm_local.checkpoint.manifest import layout_of, read_note
from llm_local.config import Config, ConfigError
from llm_local.evaluation import EvalSet
from llm_local.export.model_card import installed_versions
from llm_local.files import Json, write_json
from llm_local.flags import AMOUNT, FLAGS, LAYOUT, TRAINING, deciding
from llm_local.jobs.frames import Frame, Garbled
from llm_local.jobs.hello import NEW, SAVED, Hello, Refusal, Terms
from llm_local.jobs.key import tls
from llm_local.jobs.packet_log import PacketLog, bytes_of
from llm_local.jobs.positions import DONE, IDENTITY, LOG, LOG_BACK, NOTE, Positions
from llm_local.jobs.ways import ANSWER_SECONDS, Address, Door
from llm_local.links.message import HEADER_BYTES, body_size
from llm_local.links.wire import expected
from llm_local.peer import LostPeer
from llm_local.place import Place
from llm_local.setup import Setup

GB = 10**9
# of the machine that a stage runs on: they change rounding at most
_OWN = ("deepspeed", "gradient_checkpointing", "torch_compile", "attn_implementation")
_CUT = ("partition", "stage_layers")  # ways to what "blocks" and "stages" say
_EVALUATION = ("eval_batches", "eval_steps", "eval_strategy", "eval_on_start")
_VERSIONS = ("torch", "transformers", "deepspeed")


def positions_at(checkpoint: Path | str | None, stage: int) -> Positions:
    """Where the stage's links stood when the checkpoint was made; at their beginning without one."""
    return Positions(**read_note(Path(checkpoint), NOTE, stage)) if checkpoint else Positions()


@dataclass(frozen=True)
class Facts:
    """What only stage 0 knows at the start. run: the run's identity."""

    run: str
    eval_sets: tuple[EvalSet, ...]

    @staticmethod
    def of(values: Json) -> Facts:
        sets = (EvalSet(**each | {"measures": tuple(each["measures"])}) for each in values["eval_sets"])
        return Facts(values["run"], tuple(sets))


def fingerprint(setup: Setup, replicas: Sequence[int]) -> Json:
    """What two jobs of a run have alike."""
    config = setup.config
    flags = config.flat()
    names = [
        n
        for n in (*deciding(TRAINING, AMOUNT, LAYOUT), *_EVALUATION)
        if n not in (*_OWN, *_CUT) and not FLAGS[n].is_read
    ]
    layout = layout_of(config, setup.partition, replicas, setup.model_config())
    versions = installed_versions()
    return {
        "model": layout.model,
        "blocks": layout.blocks,
        "stages": [[span.start, span.stop] for span in setup.partition.stages],
        "replicas": layout.replicas,
        "tokenizer": setup.tokenizer,
        **{name: flags[name] for name in names},
        "precision": config.precision,
        "versions": {name: versions.get(name) for name in _VERSIONS},
    }


def hello_of(setup: Setup, place: Place) -> Hello:
    """What a rank says of itself when it meets one of a neighbour, as far as it knows its run."""
    return Hello(
        stage=place.stage,
        replica=place.replica,
        place=f"{socket.gethostname()} pid {os.getpid()}",
        life=setup.life,
        fingerprint=json.loads(json.dumps(fingerprint(setup, place.replicas))),
        run=setup.run or None,
        facts=asdict(Facts(setup.run, setup.eval_sets)) if setup.run else None,
        standing=SAVED if setup.checkpoint else NEW,
    )


def sound_start(config: Config) -> Config:
    """The config with an older checkpoint, where the log lacks what was sent before the newest one: from there the
    stage makes it again. Raises ConfigError where there is none."""
    newest = None
    with suppress(ConfigError):  # which preflight has
        newest = find_checkpoint(config)
    if newest is None or config.local.stage is None:
        return config
    logs = [
        (PacketLog(folder, 0, None), name == LOG_BACK)
        for name in (LOG, LOG_BACK)
        for folder in sorted((config.output_dir / name).glob("replica-*"))
    ]
    line = [path for path in committed(config.output_dir) if path.name <= newest.name] or [newest]
    sound = next((path for path in reversed(line) if _is_covered(logs, positions_at(path, config.local.stage))), None)
    if sound is None:
        raise ConfigError(
            [
                f"the log in {config.output_dir} has lost packets that the stage behind has not saved yet, and no "
                "checkpoint is old enough to make them again; let all stages go on from one step "
                "(--resume_from_checkpoint), or begin anew"
            ]
        )
    if sound == newest:
        return config
    said = f"the log lacks packets from before {newest.name}; goes on from {sound.name}, to make them again"
    print(f"llm_local: warning: {said}", file=sys.stderr, flush=True)
    return replace(config, train=replace(config.train, resume_from_checkpoint=str(sound)))


def _is_covered(logs: list[tuple[PacketLog, bool]], positions: Positions) -> bool:
    """Whether the logs, some of them of shared heads, have all that was sent and is not durable at its receiver."""
    sent = [(log, positions.refreshed if is_back else positions.sent) for log, is_back in logs]
    return all(number <= log.durable or log.covers(log.durable, number) for log, number in sent)


def is_done(config: Config) -> bool:
    """Whether an earlier life of the job that is gone on with has come to the end."""
    if not config.is_job or (config.train.resume_from_checkpoint or "false").lower() == "false":
        return False
    try:
        return (config.output_dir / DONE).read_text() == str(config.train.max_steps)
    except OSError:
        return False


def identity_of(config: Config) -> Json:
    """What an earlier life of the job has written down; empty in the first one."""
    try:
        return json.loads((config.output_dir / IDENTITY).read_text())
    except (OSError, ValueError):
        return {}


def write_identity(setup: Setup) -> None:
    """A new life of the job begins."""
    facts = Facts(setup.run, setup.eval_sets)
    write_json(setup.config.output_dir / IDENTITY, {"life": setup.life, **asdict(facts)})


def identified(setup: Setup, world_size: int) -> Setup:
    """The setup with its run and its life, and what stage 0 alone has read.

    Of an earlier life, which has written it down; else stage 0 names the run, and another one waits for what the stage
    before tells. Raises ConfigError where that one is of something else, or the log is too small, and LostPeer where it
    is away for too long.
    """
    place = Place.of(0, setup.config, world_size)
    known = identity_of(setup.config)
    goes_on = setup.checkpoint or (setup.config.train.resume_from_checkpoint or "false").lower() != "false"
    if known and goes_on:
        facts, life = Facts.of(known), int(known["life"]) + 1
    elif setup.config.reads_data:
        facts, life = Facts(uuid.uuid4().hex, setup.eval_sets), 1
    else:
        facts, life = _ask_for_facts(setup, place), 1
    setup = replace(setup, run=facts.run, eval_sets=facts.eval_sets, life=life)
    if problems := log_problems(setup, place):
        raise ConfigError(problems)
    return setup


def _ask_for_facts(setup: Setup, place: Place) -> Facts:
    local = setup.config.local
    address = Address.of(local.receive_on or "")
    mine, before = hello_of(setup, place), place.stage - 1
    terms = Terms(mine, before, place.dealing(before).peers)
    print(f"llm_local: stage {mine.stage} waits for stage {terms.stage} at {address}", file=sys.stderr, flush=True)
    limit = local.absent_peer_timeout
    start = time.monotonic()
    door = Door(address, tls(Path(local.run_key_file or ""), server=True))
    try:
        while limit is None or time.monotonic() - start < limit:
            met = door.visits[0].connection(lambda: mine, 1.0)
            if met is None:
                continue
            with met[0] as connection, suppress(OSError, Garbled):
                if (facts := _asked(connection, met[1], terms)) is not None:
                    return Facts.of(facts)
    finally:
        door.close()
    raise LostPeer(
        f"stage {terms.stage} has not come to {address} within {limit:g} s (--absent_peer_timeout {limit:g})"
    )


def _asked(connection: ssl.SSLSocket, first: Frame, terms: Terms) -> Json | None:
    """The facts that the other end has. Raises ConfigError for one that does not belong here, OSError and Garbled."""
    connection.settimeout(ANSWER_SECONDS)
    other, mine = Hello.of(first), terms.mine
    if objection := terms.objection(other):
        connection.sendall(Refusal(objection, mine.standing).to_bytes())
        raise ConfigError([f"link {terms.stage}→{mine.stage}: {objection}"])
    connection.sendall(mine.to_bytes())
    return other.facts


def packet_bytes(setup: Setup, wire_dtype: str) -> int:
    """Of hidden states and what travels beside them of a micro-batch."""
    rows, tokens = setup.config.train.per_device_train_batch_size, setup.config.data.seq_length
    task = setup.config.task
    beside = [(rows, 1)] if task.answers_once else [(rows, tokens)] * (2 if task.sends_labels else 1)
    hidden = expected(wire_dtype, (rows, tokens, setup.anatomy.hidden_size))
    return body_size([*((shape, torch.int32) for shape in beside), *hidden]) + HEADER_BYTES


def log_need(setup: Setup, place: Place) -> tuple[int, str]:
    """Bytes that a replica's log needs, of all its links with the next stage, and in words for a person."""
    config, train = setup.config, setup.config.train
    steps = math.ceil(config.save_interval)
    num_packets = place.share(train.gradient_accumulation_steps) * steps
    if config.eval_interval and train.eval_batches:
        batches = place.share(train.eval_batches) * max(1, len(setup.eval_sets))
        num_packets += batches * math.ceil(steps / config.eval_interval)
    size = packet_bytes(setup, config.wire_dtype)
    in_flight = config.local.max_packets_in_flight * len(place.dealing(place.stage + 1).peers)
    need = bytes_of(num_packets + in_flight, size)  # the receiver's next checkpoint is so far behind its last one
    return need, f"{need / GB:.3g} GB for the {steps} steps between two checkpoints, at {size / 1e6:.3g} MB a packet"


def log_problems(setup: Setup, place: Place) -> list[str]:
    """Whether the log is too small for the stage behind to come from one checkpoint to the next."""
    local = setup.config.local
    if local.send_to is None:
        return []
    need, words = log_need(setup, place)
    if need <= (local.log_memory_gb + local.log_disk_gb) * GB:
        return []
    given = f"log_memory_gb={local.log_memory_gb:g} and log_disk_gb={local.log_disk_gb:g}"
    return [
        f"{given} are less than the log of stage {local.stage} needs, {words}; raise log_disk_gb or lower save_steps"
    ]
