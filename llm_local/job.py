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
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from llm_local.checkpoint.line import committed
from llm_local.checkpoint.manifest import BrokenCheckpoint
from llm_local.config import ConfigError
from llm_local.files import Json, write_json, write_whole
from llm_local.job_problems import not_listening
from llm_local.job_start import GB, hello_of, packet_bytes, positions_at
from llm_local.job_status import Rate
from llm_local.jobs.channel import LINGER_SECONDS, Channel
from llm_local.jobs.ends import LogReceiver, LogSender
from llm_local.jobs.fullness import Fullness
from llm_local.jobs.hello import Terms
from llm_local.jobs.key import tls
from llm_local.jobs.packet_log import PacketLog, durable_in
from llm_local.jobs.positions import DONE, LOG, LOG_BACK, SKIPPED, STATUS, Positions
from llm_local.jobs.side import Limits
from llm_local.jobs.ways import Address, Dial, Door, Way
from llm_local.links.dealt import SenderToAll, receiver_of, sender_of
from llm_local.links.links import REFRESH_IN_FLIGHT, Links
from llm_local.links.packet import EVAL, TRAIN
from llm_local.model.anatomy import text_config
from llm_local.model.heads.head import head_of
from llm_local.replicas import Dealing, sequences_per_step
from llm_local.setup import Setup
from llm_local.world import World

FINISHED = "finished"  # of a log: the stage behind needs nothing more
RESCUE = "rescue"  # of a beat: the packet from which on a stage may want all again
STATUS_SECONDS = 1.0
LONG_SECONDS = 365 * 86400.0
_SMALL = 1 << 20  # of a packet, beside its tensors


class Job:
    """A rank's channels with the replicas before and behind it.

    links: what its stage trains with. step: the last that it has trained.
    """

    def __init__(self, setup: Setup, world: World, local_rank: int):
        """Every rank must call; it waits for nobody. Raises ConfigError for a port that is in use."""
        self.state, self.step = "starting", 0
        self._setup, self._world = setup, world
        place = world.place
        self.positions = positions_at(setup.checkpoint, place.stage)
        config = setup.config
        self._rate = Rate(sequences_per_step(config, place.replicas) * config.data.seq_length)
        self._shares = head_of(config).shares_matrix
        self._logs: dict[int, PacketLog] = {}
        self._logs_back: dict[int, PacketLog] = {}
        self._before: dict[int, Channel] = {}
        self._behind: dict[int, Channel] = {}
        self._receivers: list[LogReceiver] = []
        self._senders: list[LogSender] = []
        if not place.is_first_stage:
            dealing = place.dealing(place.stage - 1)
            targets = dealing.targets if self._shares else ()
            self._logs_back = {peer: self._open(LOG_BACK, peer, targets, self.positions.refreshed) for peer in targets}
            self._before = self._channels_before(dealing, local_rank)
        if not place.is_last_stage:
            dealing = place.dealing(place.stage + 1)
            self._logs = {peer: self._open(LOG, peer, dealing.peers, self.positions.sent) for peer in dealing.peers}
            self._behind = {peer: self._channel_behind(dealing, peer) for peer in dealing.peers}
        self.links = self._make_links()
        self.num_skipped = self.positions.skipped
        self._fullness = Fullness(self._logs, config.output_dir / LOG / f"{SKIPPED}-{place.replica:02d}")
        for channel in self._channels:
            channel.start()
        if place.rank == 0:
            threading.Thread(target=self._keep_status, name="status", daemon=True).start()

    @property
    def run(self) -> str:
        """The run's identity."""
        return self._setup.run

    @property
    def _channels(self) -> list[Channel]:
        return [*self._before.values(), *self._behind.values()]

    def _open(self, name: str, peer: int, peers: Sequence[int], number: int) -> PacketLog:
        """The log of one of this replica's links to a neighbour, with its share of the room."""
        local, mine = self._setup.config.local, f"replica-{self._world.place.replica:02d}"
        folder = self._setup.config.output_dir / name / (mine if len(peers) == 1 else f"{mine}-to-{peer:02d}")
        memory, disk = (int(size * GB / len(peers)) for size in (local.log_memory_gb, local.log_disk_gb))
        # who waits for room for a matrix saves nothing, and the stage before keeps its older checkpoints
        log = PacketLog(folder, memory, disk if name == LOG else None)
        log.start_at(number)
        return log

    def _channels_before(self, dealing: Dealing, local_rank: int) -> dict[int, Channel]:
        local = self._setup.config.local
        address = Address.of(local.receive_on or "").after(local_rank)
        try:
            door = Door(address, tls(Path(local.run_key_file or ""), server=True), dealing.peers)
        except OSError as error:  # rank 0's port was tried before the ranks met, others were not
            raise ConfigError([not_listening(address, error)]) from error
        most, received = packet_bytes(self._setup, "fp32"), self.positions.received
        return {
            peer: self._channel(
                visits,
                self._terms(self._world.place.stage - 1, peer, local.max_packets_in_flight),
                self._logs_back.get(peer),
                received,
                most,
            )
            for peer, visits in door.visits.items()
        }

    def _channel_behind(self, dealing: Dealing, peer: int) -> Channel:
        local, place, log = self._setup.config.local, self._world.place, self._logs[peer]
        address = address_of(local.send_to or "", peer, dealing.theirs)
        way = Dial(address, tls(Path(local.run_key_file or ""), server=False))
        refreshes = self._shares and peer == dealing.source
        terms = self._terms(place.stage + 1, peer, REFRESH_IN_FLIGHT if refreshes else 0)
        most = _matrix_bytes(self._setup) if refreshes else 0
        known, steps = log.folder / FINISHED, str(self._setup.config.train.max_steps)
        first = self.positions.refreshed if refreshes else 0
        oldest = next(iter(committed(self._setup.config.output_dir)), None)
        channel = self._channel(way, terms, log, first, most, min(first, self._matrices_at(oldest)))
        channel.finished = partial(write_whole, known, steps)
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

    def _terms(self, stage: int, peer: int, window: int) -> Terms:
        mine = hello_of(self._setup, self._world.place)
        return Terms(replace(mine, window=window), stage, (peer,))

    def _channel(
        self, way: Way, terms: Terms, log: PacketLog | None, first: int, most: int, durable: int | None = None
    ) -> Channel:
        limits = Limits(4 * most + _SMALL, self._setup.config.local.absent_peer_timeout)
        channel = Channel(way, terms, log, first, limits, durable)
        channel.beat = self._beat
        return channel

    def _make_links(self) -> Links:
        config, place, at = self._setup.config, self._world.place, self.positions
        receiver = sender = refresh_receiver = refresh_sender = None
        if not place.is_first_stage:
            dealing = place.dealing(place.stage - 1)
            receivers = {peer: LogReceiver(channel) for peer, channel in self._before.items()}
            receiver, self._receivers = receiver_of(receivers, dealing), [*receivers.values()]
            if self._shares:
                back = [self._before[peer] for peer in self._logs_back]
                refresh_sender = SenderToAll([LogSender(each, config.precision, at.refreshed) for each in back])
        if not place.is_last_stage:
            dealing = place.dealing(place.stage + 1)
            senders = {peer: LogSender(each, config.wire_dtype, at.sent) for peer, each in self._behind.items()}
            sender, self._senders = sender_of(senders, dealing), [*senders.values()]
            refresh_receiver = LogReceiver(self._behind[dealing.source]) if self._shares else None
        return Links(receiver, sender, refresh_receiver=refresh_receiver, refresh_sender=refresh_sender)

    def begin(self, kind: int, step: int) -> bool:
        """Whether a step, or an evaluation, has come: if not, the stages behind are told so. Every replica must call.

        With on_full_log=skip its packets are not sent on where they do not fit into the log of every replica; those of
        the last evaluation wait. Raises LostPeer, and Unwritten.
        """
        train, place = self._setup.config.train, self._world.place
        count = place.share(train.gradient_accumulation_steps if kind == TRAIN else train.eval_batches)
        if any([receiver.is_skipped() for receiver in self._receivers]):
            for ends in (self._receivers, self._senders):
                for end in ends:
                    end.skip(count // len(ends))
            self.num_skipped += kind == TRAIN
            return False
        if self._senders and self._setup.config.local.on_full_log == "skip":
            of_one = packet_bytes(self._setup, self._setup.config.wire_dtype)
            each = (count // len(self._senders) + 1) * of_one  # what is around a packet takes room, too
            must_come = kind == EVAL and step == train.max_steps
            is_full = not must_come and self._fullness.is_full(self._senders[0].number, each)
            is_skipping = self._world.mean_over_replicas(torch.tensor([float(is_full)])).item() > 0
            if is_skipping:
                self._fullness.remember(self._senders[0].number)
            for sender in self._senders:
                sender.is_skipping = is_skipping
        return True

    def here(self, refreshed: int, evaluated: bool) -> Positions:
        """Where the links stand now: after a step or an evaluation those with one neighbour are alike."""
        received, sent = (next((end.number for end in ends), 0) for ends in (self._receivers, self._senders))
        return Positions(received, sent, refreshed, evaluated, self.num_skipped)

    def rescue(self) -> Path | None:
        """The newest checkpoint from before what the next stage may want again, which it tells; else the oldest."""
        line, stage = committed(self._setup.config.output_dir), self._world.place.stage
        if not line or not self._behind:
            return line[-1] if line else None
        told = [channel.neighbour.get(RESCUE) for channel in self._behind.values()]
        known = [each if isinstance(each, int) else 0 for each in told]  # 0: no file is read for it
        # of the other replicas' logs, too, any of which may be lost
        wanted = min(*known, *map(durable_in, (self._setup.config.output_dir / LOG).glob("replica-*")))
        older = (path for path in reversed(line) if positions_at(path, stage).sent <= wanted) if wanted else ()
        return next(iter(older), line[0])

    def _matrices_at(self, checkpoint: Path | None) -> int:
        """Matrices of a shared head that were due before it. Of the oldest one that this stage may have to go back to,
        as a stage behind has lost its log: the next stage keeps those that follow, as it cannot make them again."""
        return positions_at(checkpoint, self._world.place.stage).refreshed

    def persist(self, positions: Positions) -> None:
        """Forces to disk what was sent until there, as a checkpoint of it is to be committed. Raises Unwritten."""
        for log in self._logs.values():
            log.persist(positions.sent)
        for log in self._logs_back.values():
            log.persist(positions.refreshed)

    def made_durable(self, positions: Positions) -> None:
        """The checkpoint is committed: the neighbours need to keep nothing from before it."""
        for channel in self._before.values():
            channel.made_durable(positions.received)
        for peer, channel in self._behind.items():
            if self._shares and peer == self._world.place.dealing(self._world.place.stage + 1).source:
                with suppress(BrokenCheckpoint):  # it is being removed, for a newer one
                    channel.made_durable(self._matrices_at(self.rescue()))

    def finish(self) -> None:
        """Until the stages behind need nothing of any replica here, and the one before knows that these need nothing of
        it. A neighbour may be away for long: who waits here is ended by the watchdog alone, with a replica that is
        lost. Every replica must call. Raises LostPeer, Unwritten."""
        self.state = "finished"
        self._write_status()
        for channel in self._behind.values():
            channel.await_finish()
            channel.made_durable(channel.taken)  # nobody is left who could make this stage go back
        for channel in self._before.values():
            channel.finish()
        self._world.everybody("finished", LONG_SECONDS, "the other replicas to finish")
        write_whole(self._setup.config.output_dir / DONE, str(self._setup.config.train.max_steps))
        for channel in self._channels:
            channel.part()
        end = time.monotonic() + LINGER_SECONDS
        for channel in self._channels:
            channel.await_parted(end - time.monotonic())

    def close(self) -> None:
        for channel in self._channels:
            channel.close()

    def _status(self) -> Json:
        logs = [*self._logs.values(), *self._logs_back.values()]
        return {
            "stage": self._world.place.stage,
            "state": self.state,
            "life": self._setup.life,
            "step": self.step,
            "max_steps": self._setup.config.train.max_steps,
            "tokens_per_second": self._rate.at(self.step),
            "skipped_steps": self.num_skipped,
            "log_bytes": sum(log.num_bytes for log in logs),
            "linked": [channel.is_connected for channel in self._channels],
            "error": next((channel.trouble for channel in self._channels if channel.trouble), ""),
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "time": time.time(),
        }

    def _beat(self) -> Json:
        told: Json = {"stages": self._known()}
        with suppress(BrokenCheckpoint):  # it is being removed
            if (rescue := self.rescue()) is not None:
                told[RESCUE] = positions_at(rescue, self._world.place.stage).received
        return told

    def _known(self) -> Json:
        """What is known of all stages, by their number: the neighbours tell of those beyond."""
        found: Json = {}
        place, stage = self._world.place, self._world.place.stage
        for channels, beyond in ((self._before, range(stage)), (self._behind, range(stage + 1, place.num_stages))):
            for channel in channels.values():
                told = channel.neighbour.get("stages", {})
                found |= {k: v for k, v in told.items() if k.isdecimal() and int(k) in beyond}
        return found | {str(stage): self._status()}

    def _keep_status(self) -> None:
        while True:
            self._write_status()
            time.sleep(STATUS_SECONDS)

    def _write_status(self) -> None:
        with suppress(Exception):  # a full disk ends nothing here
            if self._world.place.rank == 0:
                write_json(self._setup.config.output_dir / STATUS, self._known())


def address_of(send_to: str, replica: int, num_replicas: int) -> Address:
    """Of the next stage's replica: several hosts share them, each with its ports from the one named on."""
    hosts = [Address.of(text) for text in send_to.split(",")]
    each = -(-num_replicas // len(hosts))
    return hosts[replica // each].after(replica % each)


def _matrix_bytes(setup: Setup) -> int:
    """Of a shared head's matrix in float32."""
    text: Any = text_config(setup.model_config())
    return 4 * int(text.vocab_size) * setup.anatomy.hidden_size
