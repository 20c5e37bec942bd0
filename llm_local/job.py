"""A job: one stage of a run in a launch of its own, which knows its two neighbours and nobody else.

OUTPUT/stage-01/                its folder: checkpoints, metrics, export, as a run's
OUTPUT/stage-01/job.json        the run that it belongs to, and how many times it was started
OUTPUT/stage-01/log/            what it keeps for the next stage; log-back/: for the one before, of a shared head
OUTPUT/stage-01/status.json     what it does, and what its neighbours told of theirs
"""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from llm_local.checkpoint.line import committed
from llm_local.files import write_json, write_whole
from llm_local.job_start import GB, hello_of, packet_bytes, positions_at
from llm_local.job_status import Rate
from llm_local.jobs.channel import Channel
from llm_local.jobs.ends import LogReceiver, LogSender
from llm_local.jobs.hello import Terms
from llm_local.jobs.key import tls
from llm_local.jobs.packet_log import PacketLog
from llm_local.jobs.positions import DONE, LOG, LOG_BACK, STATUS, Positions
from llm_local.jobs.ways import Address, Dial, Door, Way
from llm_local.links.ends import REFRESH_IN_FLIGHT, Links
from llm_local.model.anatomy import text_config
from llm_local.model.heads.head import head_of
from llm_local.setup import Setup
from llm_local.world import Place, World

FINISHED = "finished"  # of a log: the stage behind needs nothing more
STATUS_SECONDS = 1.0
_SMALL = 1 << 20  # of a packet, beside its tensors


class Job:
    """A rank's two channels. links: what its stage trains with; step: the last that it has trained."""

    def __init__(self, setup: Setup, world: World, local_rank: int):
        """Every rank must call; it waits for nobody."""
        self.state, self.step = "starting", 0
        self._setup, self._world = setup, world
        place = world.place
        self.positions = positions_at(setup.checkpoint, place.stage)
        config = setup.config
        tokens = config.train.per_device_train_batch_size * config.train.gradient_accumulation_steps
        self._rate = Rate(tokens * place.num_replicas * config.data.seq_length)
        self._shares = head_of(config).shares_matrix
        self._log = self._log_back = self._before = self._behind = None
        if not place.is_first_stage:
            self._log_back = self._open(LOG_BACK, self.positions.refreshed) if self._shares else None
            self._before = self._channel_before(local_rank)
        if not place.is_last_stage:
            self._log = self._open(LOG, self.positions.sent)
            self._behind = self._channel_behind(self._log)
        self.links = self._make_links()
        for channel in self._channels:
            channel.start()
        if place.rank == 0:
            threading.Thread(target=self._write_status, name="status", daemon=True).start()

    @property
    def run(self) -> str:
        """The run's identity."""
        return self._setup.run

    @property
    def _channels(self) -> list[Channel]:
        return [channel for channel in (self._before, self._behind) if channel is not None]

    def _open(self, name: str, number: int) -> PacketLog:
        local = self._setup.config.local
        folder = self._setup.config.output_dir / name / f"replica-{self._world.place.replica:02d}"
        log = PacketLog(folder, int(local.log_memory_gb * GB), int(local.log_disk_gb * GB))
        log.start_at(number)
        return log

    def _channel_before(self, local_rank: int) -> Channel:
        local = self._setup.config.local
        address = Address.of(local.receive_on or "").after(local_rank)
        way = Door(address, tls(Path(local.run_key_file or ""), server=True))
        terms = self._terms(self._world.place.stage - 1, local.max_packets_in_flight)
        most = packet_bytes(self._setup, "fp32")
        return self._channel(way, terms, self._log_back, self.positions.received, most, lambda: None)

    def _channel_behind(self, log: PacketLog) -> Channel:
        local, place = self._setup.config.local, self._world.place
        way = Dial(address_of(local.send_to or "", place), tls(Path(local.run_key_file or ""), server=False))
        terms = self._terms(place.stage + 1, REFRESH_IN_FLIGHT if self._shares else 0)
        most = _matrix_bytes(self._setup) if self._shares else 0
        known, steps = log.folder / FINISHED, str(self._setup.config.train.max_steps)
        finished = partial(write_whole, known, steps)
        channel = self._channel(way, terms, log, self.positions.refreshed, most, finished)
        if known.exists() and known.read_text() == steps:  # not of an end that has been put off since
            channel.knew()
        channel.goes_back = lambda number: self._goes_back(log, number)
        return channel

    def _goes_back(self, log: PacketLog, number: int) -> bool:
        """Whether the job's next life can make that packet again; it goes on from a checkpoint from before it, then."""
        folder, stage = self._setup.config.output_dir, self._world.place.stage
        if not any(positions_at(path, stage).sent <= number for path in committed(folder)):
            return False
        log.go_back(number)
        return True

    def _terms(self, stage: int, window: int) -> Terms:
        mine = hello_of(self._setup, self._world.place)
        return Terms(replace(mine, window=window), stage)

    def _channel(
        self, way: Way, terms: Terms, log: PacketLog | None, first: int, most: int, finished: Callable[[], None]
    ) -> Channel:
        stages = sorted((terms.stage, terms.mine.stage))
        name = f"link {stages[0]}→{stages[1]}, replica {terms.mine.replica}"
        absent = self._setup.config.local.absent_peer_timeout
        return Channel(name, way, terms, log, first, 4 * most + _SMALL, absent, self._beat, finished)

    def _make_links(self) -> Links:
        config, at, before, behind = self._setup.config, self.positions, self._before, self._behind
        return Links(
            receiver=LogReceiver(before) if before else None,
            sender=LogSender(behind, config.wire_dtype, at.sent) if behind else None,
            refresh_receiver=LogReceiver(behind) if behind and self._shares else None,
            refresh_sender=LogSender(before, config.precision, at.refreshed) if before and self._shares else None,
        )

    def here(self, refreshed: int, evaluated: bool) -> Positions:
        """Where the links stand now."""
        sender, receiver = self.links.sender, self.links.receiver
        received = receiver.number if isinstance(receiver, LogReceiver) else 0
        return Positions(received, sender.number if isinstance(sender, LogSender) else 0, refreshed, evaluated)

    def persist(self, positions: Positions) -> None:
        """Forces to disk what was sent until there, as a checkpoint of it is to be committed. Raises Unwritten."""
        if self._log is not None:
            self._log.persist(positions.sent)
        if self._log_back is not None:
            self._log_back.persist(positions.refreshed)

    def made_durable(self, positions: Positions) -> None:
        """The checkpoint is committed: the neighbours need to keep nothing from before it."""
        if self._before is not None:
            self._before.made_durable(positions.received)
        if self._behind is not None:
            self._behind.made_durable(positions.refreshed)

    def finish(self) -> None:
        """Until the stages behind need nothing of this one, and the one before knows. Raises LostPeer, Unwritten."""
        self.state = "finished"
        if self._behind is not None:
            self._behind.await_finish()
        if self._before is not None:
            self._before.finish()
        write_whole(self._setup.config.output_dir / DONE, str(self._setup.config.train.max_steps))

    def close(self) -> None:
        for channel in self._channels:
            channel.close()

    def _status(self) -> dict[str, Any]:
        logs = [log for log in (self._log, self._log_back) if log is not None]
        return {
            "stage": self._world.place.stage,
            "state": self.state,
            "life": self._setup.life,
            "step": self.step,
            "max_steps": self._setup.config.train.max_steps,
            "tokens_per_second": self._rate.at(self.step),
            "log_bytes": sum(log.num_bytes for log in logs),
            "linked": [channel.is_connected for channel in self._channels],
            "error": next((channel.trouble for channel in self._channels if channel.trouble), ""),
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "time": time.time(),
        }

    def _beat(self) -> dict[str, Any]:
        return {"stages": self._known()}

    def _known(self) -> dict[str, Any]:
        """What is known of all stages, by their number: the neighbours tell of those beyond."""
        found: dict[str, Any] = {}
        stage = self._world.place.stage
        for channel in self._channels:
            told = channel.neighbour.get("stages", {})
            is_beyond = (lambda k: k < stage) if channel is self._before else (lambda k: k > stage)
            found |= {k: v for k, v in told.items() if k.isdecimal() and is_beyond(int(k))}
        return found | {str(stage): self._status()}

    def _write_status(self) -> None:
        while True:
            with suppress(Exception):  # a full disk ends nothing here
                write_json(self._setup.config.output_dir / STATUS, self._known())
            time.sleep(STATUS_SECONDS)


def address_of(send_to: str, place: Place) -> Address:
    """Of the next stage's replica: several hosts share them, each with its ports from the one named on."""
    hosts = [Address.of(text) for text in send_to.split(",")]
    each = -(-place.num_replicas // len(hosts))
    return hosts[place.replica // each].after(place.replica % each)


def _matrix_bytes(setup: Setup) -> int:
    """Of a shared head's matrix in float32."""
    text: Any = text_config(setup.model_config())
    return 4 * int(text.vocab_size) * setup.anatomy.hidden_size
